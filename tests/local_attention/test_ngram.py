from collections import defaultdict

import mindspore as ms
import numpy as np
import pytest

from local_attention import LocalTransformer
from local_attention.ngram import NgramEmbedding
from tests.local_attention.cells import randomise, run, slowly_in_a_graph, tensor

SIZES = dict(num_tokens=256, max_seq_len=64, dim=8, depth=1, local_attn_window_size=4, dim_head=4, heads=2)


def embedding(max_ngram=4, buckets=997, ngram_dim=3, dim=5):
    cell = NgramEmbedding(max_ngram, buckets, ngram_dim, dim)
    randomise(cell, 0)
    return cell


def of_sequences(cell, x, mask=None):
    return cell(ms.Tensor(x, ms.int32), None if mask is None else ms.Tensor(mask)).asnumpy()


def only(cell, n):
    """Leave the embeddings of n-grams alone and make the others zero."""
    table = cell.embedding_table.asnumpy().reshape((cell.context, cell.buckets, -1)) * 1.0
    table[np.arange(cell.context) != n - 2] = 0
    cell.embedding_table.set_data(tensor(table.reshape((cell.context * cell.buckets, -1))))
    return cell


@pytest.mark.parametrize("n", [2, 3, 4])
def test_an_embedding_depends_on_the_last_n_tokens_and_on_nothing_else(n, rng):
    cell, x = only(embedding(), n), rng.integers(0, 256, (1, 20))
    out = of_sequences(cell, x)
    for place in range(20):
        changed = x.copy()
        changed[0, place] = (changed[0, place] + 1) % 256
        differs = (of_sequences(cell, changed) != out).any(-1)
        np.testing.assert_array_equal(differs, (np.arange(20) >= place) & (np.arange(20) < place + n))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_same_n_gram_has_the_same_embedding_wherever_it_stands(n, rng):
    x = rng.integers(0, 3, (2, 200))
    out, seen = of_sequences(only(embedding(), n), x).reshape(2, 200, -1), defaultdict(set)
    for row in range(2):
        for end in range(n, 201):
            seen[tuple(x[row, end - n : end])].add(out[row, end - 1].tobytes())
    assert all(len(embeddings) == 1 for embeddings in seen.values())
    distinct = {embeddings.copy().pop() for embeddings in seen.values()}
    assert len(distinct) > 0.9 * len(seen) >= 0.9 * 3**n


def test_n_grams_are_spread_over_all_buckets_and_meet_as_rarely_as_at_random():
    cell = embedding(max_ngram=3, buckets=65521, ngram_dim=1, dim=1)
    cell.to_out.weight.set_data(tensor([[0.0, 1.0]]))
    cell.embedding_table.set_data(tensor(np.arange(2 * 65521)[:, None] - 65521.0))
    first, second, third = np.meshgrid(np.arange(97, 123), np.arange(97, 123), np.arange(32, 123))
    words = np.stack([first, second, third], -1).reshape(-1, 3)
    found = of_sequences(cell, words).reshape(-1, 3)[:, 2]
    at_random = 65521 * (1 - np.exp(-len(words) / 65521))
    assert len(np.unique(found)) > 0.97 * at_random
    assert np.histogram(found, 10, (0, 65521))[0].min() > 0.8 * len(words) / 10


def test_hidden_tokens_count_as_none(rng):
    cell, x = embedding(), rng.integers(0, 256, (2, 9))
    mask = np.arange(9) >= 3
    padded, alone = of_sequences(cell, x, np.tile(mask, (2, 1))), of_sequences(cell, x[:, 3:])
    np.testing.assert_allclose(padded.reshape(2, 9, -1)[:, 3:], alone.reshape(2, 6, -1), rtol=1e-4)


@slowly_in_a_graph
def test_a_model_with_n_grams_sees_no_later_token(mode, rng):
    model = LocalTransformer(**SIZES, max_ngram=3, ngram_buckets=997, ngram_dim=4)
    randomise(model, 0)
    x = rng.integers(0, 256, (1, 12))
    out, changed = run(model, x), x.copy()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    differs = abs(run(model, changed) - out)[0].max(-1)
    assert differs[:7].max() == 0 and differs[7:10].min() > 1e-4


def test_masked_padding_changes_nothing_of_a_model_with_n_grams(rng):
    model = LocalTransformer(**SIZES, max_ngram=3, ngram_buckets=997, ngram_dim=4, use_abs_pos_emb=False)
    randomise(model, 0)
    x = rng.integers(0, 256, (1, 12))
    mask = np.arange(12)[None] >= 4  # a whole window of padding
    np.testing.assert_allclose(
        model(tensor(x), mask=ms.Tensor(mask)).asnumpy()[:, 4:], run(model, x[:, 4:]), rtol=1e-4, atol=1e-4
    )


def test_each_size_reaches_the_parameters():
    model = LocalTransformer(**SIZES, max_ngram=4, ngram_buckets=101, ngram_dim=3)
    shapes = {p.name: p.shape for p in model.get_parameters() if p.name.startswith("ngram_emb")}
    assert shapes == {"ngram_emb.embedding_table": (303, 3), "ngram_emb.to_out.weight": (8, 9)}
    assert LocalTransformer(**SIZES).ngram_emb is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_ngram=0), "max_ngram >= 1, got 0"),
        (dict(ngram_buckets=1), "ngram_buckets >= 2, got 1"),
        (dict(ngram_buckets=2**18 + 1), "ngram_buckets <= 262144, got 262145"),
        (dict(ngram_dim=0), "ngram_dim >= 1, got 0"),
        (dict(num_tokens=None), "num_tokens with max_ngram = 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalTransformer(**SIZES | dict(max_ngram=2) | options)


def test_embeddings_that_were_never_trained_change_nothing(rng):
    x = rng.integers(0, 256, (1, 12))
    assert (of_sequences(NgramEmbedding(4, 997, 3, 5), x) == 0).all()
