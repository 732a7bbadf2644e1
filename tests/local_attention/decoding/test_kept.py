import gc
from copy import deepcopy
from weakref import ref

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from local_attention.decoding import DecodingSession, UncachedSession, kept, session_for
from local_attention.decoding.kept import kept_session
from tests.local_attention.cells import in_a_graph, randomise, run, slowly_in_a_graph, tensor
from tests.local_attention.models import (
    NGRAMS,
    NUM_TOKENS,
    DecodableMean,
    sequences,
    transformer,
    with_and_without_kernels,
)

# Which sessions are kept


def test_a_model_keeps_a_session_for_each_of_its_last_batch_sizes():
    model = transformer()
    first, second = kept_session(model, 1), kept_session(model, 2)
    assert first is not second
    for _ in range(2):
        assert kept_session(model, 1) is session_for(model, 1) is first
        assert kept_session(model, 2) is second
    assert kept_session(transformer(), 2) is not second


@in_a_graph
def test_another_batch_size_in_between_compiles_nothing_again(mode):
    model = transformer()
    for batch in (1, 2):
        model.generate(sequences(batch, 2), 1)
    graphs = [kept_session(model, batch).graphs[1] for batch in (1, 2)]
    for batch in (1, 2):
        model.generate(sequences(batch, 2), 1)
    assert [kept_session(model, batch).graphs[1] for batch in (1, 2)] == graphs
    assert all(len(graph.compile_cache) == 1 for graph in graphs)


def test_the_session_that_was_not_used_for_the_longest_time_is_dropped_first():
    model = transformer()
    sessions = {batch: kept_session(model, batch) for batch in range(1, kept.MAX_SESSIONS + 1)}
    kept_session(model, 1)
    kept_session(model, 9)
    assert kept_session(model, 1) is sessions[1]
    assert kept_session(model, 3) is sessions[3]
    assert kept_session(model, 2) is not sessions[2]


def test_the_caches_of_the_sessions_are_bounded_by_their_size(monkeypatch):
    model = transformer()
    of_one = kept_session(model, 1).nbytes
    assert of_one == 2 * 2 * (4 + 1) * 4 * 4  # keys and values, 2 heads, 4 slots and a spare one, 4 channels of float32
    monkeypatch.setattr(kept, "MAX_BYTES", 3 * of_one)
    first, second = kept_session(model, 1), kept_session(model, 2)
    assert kept_session(model, 1) is first and kept_session(model, 2) is second
    large = kept_session(model, 9)  # larger than all of them may be together
    assert kept_session(model, 9) is large
    assert kept_session(model, 1) is not first


@in_a_graph
def test_a_session_that_is_dropped_is_freed_with_its_graph_and_so_is_the_model(mode, monkeypatch):
    monkeypatch.setattr(kept, "MAX_SESSIONS", 1)
    model = transformer()
    model.generate(sequences(1, 2), 1)
    session = kept_session(model, 1)
    dropped = [ref(session), ref(session.graphs[1]), ref(session.caches[0])]
    del session
    kept_session(model, 2)
    gc.collect()
    assert [thing() for thing in dropped] == [None] * 3
    model = ref(model)
    gc.collect()
    assert model() is None


@slowly_in_a_graph
def test_a_copy_of_a_model_that_has_generated_is_independent_of_it(mode):
    model = transformer(seed=1)
    text = model.generate(sequences(1, 3), 12, temperature=0).asnumpy().tolist()
    copy = deepcopy(model)
    assert copy.generate(sequences(1, 3), 12, temperature=0).asnumpy().tolist() == text
    randomise(copy, seed=2)
    of_copy = copy.generate(sequences(1, 3), 12, temperature=0).asnumpy().tolist()
    assert of_copy == transformer(seed=2).generate(sequences(1, 3), 12, temperature=0).asnumpy().tolist() != text
    randomise(model, seed=3)
    assert copy.generate(sequences(1, 3), 12, temperature=0).asnumpy().tolist() == of_copy
    assert kept_session(copy, 1) is not kept_session(model, 1)


def test_a_model_with_such_a_layer_gets_a_session_without_a_cache_and_a_warning():
    with pytest.warns(UserWarning, match="no method decoding_cell: each token computes the whole context again"):
        assert isinstance(session_for(transformer(global_attn_layer=nn.Dense(6, 6)), 1), UncachedSession)


# LocalTransformer(cache=, return_cache=)


@pytest.mark.parametrize(
    "options", [NGRAMS, dict(use_xpos=True, use_abs_pos_emb=False), dict(global_attn_layer=DecodableMean(6))]
)
def test_a_cache_stands_for_the_tokens_it_was_made_of(options):
    model, x = transformer(**options), sequences(2, 9)
    full = run(model, x)
    logits, cache = model(tensor(x[:, :5]), return_cache=True)
    np.testing.assert_allclose(logits.asnumpy(), full[:, :5], atol=1e-4)
    for n in (6, 7):
        logits, cache = model(tensor(x[:, :n]), cache=cache, return_cache=True)
        assert logits.shape == (2, 1, NUM_TOKENS)
        np.testing.assert_allclose(logits.asnumpy(), full[:, n - 1 : n], atol=1e-4)
    np.testing.assert_allclose(model(tensor(x), cache=cache).asnumpy(), full[:, 7:], atol=1e-4)


@in_a_graph
@with_and_without_kernels
def test_a_cache_may_be_used_for_several_continuations(mode, use_kernels, monkeypatch):
    model, x = transformer(), sequences(2, 8)
    session = DecodingSession(model, 2, use_kernels=use_kernels)
    monkeypatch.setattr(kept, "DecodingSession", lambda model, batch: session)
    _, cache = model(tensor(x[:, :6]), return_cache=True)
    for seed in (1, 2):
        other = np.concatenate([x[:, :6], sequences(2, 2, seed=seed)], 1)
        np.testing.assert_allclose(model(tensor(other), cache=cache).asnumpy(), run(model, other)[:, 6:], atol=1e-4)
    assert session.position == 8


@pytest.mark.slow
@in_a_graph
def test_a_cache_of_global_attention_may_be_used_after_the_session_has_grown(mode, monkeypatch):
    monkeypatch.setattr("local_attention.decoding.session.FIRST_CAPACITY", 8)
    model, x = transformer(depth=2, global_attn_layers=[2], use_abs_pos_emb=False), sequences(2, 20)
    full = run(model, x)
    _, small = model(tensor(x[:, :7]), return_cache=True)
    logits, large = model(tensor(x[:, :18]), cache=small, return_cache=True)
    np.testing.assert_allclose(logits.asnumpy(), full[:, 7:18], atol=1e-4)
    np.testing.assert_allclose(model(tensor(x[:, :9]), cache=small).asnumpy(), full[:, 7:9], atol=1e-4)
    vars(model)["_decoding_sessions"].clear()  # a new session begins with a small cache
    np.testing.assert_allclose(model(tensor(x), cache=large).asnumpy(), full[:, 18:], atol=1e-4)
    assert kept_session(model, 2).capacity == 32


def test_a_cache_outlives_the_length_of_learned_positions():
    model, x, session = transformer(max_seq_len=6), sequences(1, 15), DecodingSession(transformer(max_seq_len=6))
    _, cache = model(tensor(x[:, :5]), return_cache=True)
    wanted = session.feed(x)
    for n in range(6, 16):
        logits, cache = model(tensor(x[:, :n]), cache=cache, return_cache=True)
        np.testing.assert_allclose(logits.asnumpy()[:, 0], wanted[:, n - 1], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 5), {}, "with n > 5"),
        ((1, 7), {}, r"expected tokens \(2, n\)"),
        ((7,), {}, r"expected tokens: \(b, n\) integers, got int32 of shape \(7,\)"),
        ((2, 7), dict(return_loss=True), "no mask and no return_loss"),
        ((2, 7), dict(mask=ms.Tensor(np.ones((2, 7), bool))), "no mask and no return_loss"),
    ],
)
def test_what_does_not_fit_a_cache_is_refused(shape, options, message):
    model = transformer()
    _, cache = model(tensor(sequences(2, 5)), return_cache=True)
    with pytest.raises(ValueError, match=message):
        model(tensor(sequences(*shape)), cache=cache, **options)


def test_a_token_that_the_vocabulary_does_not_have_is_refused():
    model = transformer()
    with pytest.raises(ValueError, match="expected tokens from 0 to 10, got 11"):
        model(tensor([[1, 11]]), return_cache=True)
