import platform
from functools import cache
from itertools import islice
from shutil import which

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import nn, ops

from local_attention import LocalTransformer
from local_attention.decoding import DecodingSession, UncachedSession, cache_length, generate_tokens
from local_attention.kernels import library
from tests.local_attention.cells import both_modes, examples, randomise, run, tensor

SIZES = dict(num_tokens=11, max_seq_len=32, dim=6, depth=1, local_attn_window_size=3, dim_head=4, heads=2, ff_mult=2)


def transformer(seed=0, **options):
    """A small causal LocalTransformer with parameters that matter."""
    model = LocalTransformer(**SIZES | options)
    randomise(model, seed)
    return model


def sequences(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 11, shape)


def fed(session, x):
    """The logits after each token of ``x: (b, n)``, as ``(b, n, num_tokens)``."""
    return np.stack([session.feed(column) for column in x.T], 1)


def assert_cached_equals_full(model, x, batch, use_kernels=None):
    session = DecodingSession(model, batch, use_kernels=use_kernels)
    np.testing.assert_allclose(fed(session, x), run(model, x), atol=1e-4)
    if use_kernels is not None:
        assert (session.graphs[1].step.kernels is not None) == use_kernels


def test_the_kernels_are_there_wherever_they_can_be_built():
    """So that the tests that need them are skipped for want of a compiler alone."""
    can_build = platform.system() == "Linux" and which("g++") is not None
    assert library() is not None or not can_build, "pip had g++ but did not build kernels.cpp: install again with -v"


# The operators in C++ are optional: nothing but the speed of decoding on a CPU depends on them.
needs_kernels = pytest.mark.skipif(library() is None, reason="pip found no C++ compiler to build kernels.cpp")
with_and_without_kernels = pytest.mark.parametrize(
    "use_kernels", [pytest.param(True, marks=needs_kernels, id="kernels"), pytest.param(False, id="operators")]
)


NGRAMS = dict(max_ngram=4, ngram_buckets=97, ngram_dim=3)
CONFIGURATIONS = {
    "exact": dict(depth=2),
    "whole windows": dict(exact_windowsize=False),
    "own window only": dict(look_backward=0, exact_windowsize=False),
    "itself only": dict(look_backward=0),
    "two windows back": dict(look_backward=2),
    "two whole windows back": dict(look_backward=2, exact_windowsize=False),
    "no positions at all": dict(use_abs_pos_emb=False, use_rotary_pos_emb=False),
    "rotary alone": dict(use_abs_pos_emb=False),
    "learned alone": dict(use_rotary_pos_emb=False),
    "a scale of its own": dict(scale=0.9),
    "windows of one": dict(local_attn_window_size=1),
    "one window": dict(local_attn_window_size=32),
    "xPos": dict(use_xpos=True),
    "xPos alone in whole windows": dict(use_xpos=True, use_abs_pos_emb=False, exact_windowsize=False, look_backward=2),
    "dynamic bias": dict(use_dynamic_pos_bias=True),
    "dynamic bias alone, two windows back": dict(use_dynamic_pos_bias=True, use_abs_pos_emb=False, look_backward=2),
    "normalised queries and keys": dict(qk_rmsnorm=True, qk_scale=3),
    "shared queries and keys": dict(shared_qk=True),
    "shared, whole windows": dict(shared_qk=True, exact_windowsize=False, look_backward=0),
    "gated values": dict(gate_values_per_head=True),
    "hyper-connections": dict(num_residual_streams=3, depth=2),
    "n-grams": dict(use_abs_pos_emb=False, **NGRAMS),
    "bigrams and learned positions": dict(max_ngram=2, ngram_buckets=50, ngram_dim=5),
    "much at once": dict(
        use_xpos=True, qk_rmsnorm=True, shared_qk=True, gate_values_per_head=True, num_residual_streams=2, depth=2
    ),
    "odd heads": dict(heads=3, dim_head=3, use_rotary_pos_emb=False),
}


@with_and_without_kernels
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_cached_logits_equal_the_full_pass_token_after_token(options, use_kernels):
    assert_cached_equals_full(transformer(**options), sequences(2, 14), 2, use_kernels=use_kernels)


@both_modes
@with_and_without_kernels
def test_cached_logits_equal_the_full_pass_in_both_modes(mode, use_kernels):
    assert_cached_equals_full(transformer(), sequences(2, 13), 2, use_kernels=use_kernels)


@needs_kernels
@pytest.mark.parametrize(("batch", "dim", "heads", "dim_head"), [(8, 37, 2, 17), (19, 70, 5, 8), (1, 96, 1, 64)])
def test_the_kernels_compute_what_the_operators_do_for_sizes_that_fill_no_vectors(batch, dim, heads, dim_head):
    sizes = dict(dim=dim, heads=heads, dim_head=dim_head, local_attn_window_size=21, ff_mult=3)
    model, x = transformer(use_rotary_pos_emb=False, **sizes), sequences(batch, 30)
    with_kernels, without = (fed(DecodingSession(model, batch, use_kernels=use), x) for use in (True, False))
    np.testing.assert_allclose(with_kernels, without, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_the_kernels_give_the_same_bits_again_and_again():
    model, x = transformer(dim=96, heads=4, dim_head=64), sequences(3, 20)
    first = fed(DecodingSession(model, 3), x)
    for _ in range(5):
        np.testing.assert_array_equal(fed(DecodingSession(model, 3), x), first)


@needs_kernels
def test_the_kernels_are_refused_where_they_cannot_be_used():
    model = transformer()
    assert DecodingSession(model).use_kernels
    model.layers[0].attention.to_q.weight.set_dtype(ms.float16)
    assert not DecodingSession(model).use_kernels
    with pytest.raises(ValueError, match="expected use_kernels=False"):
        DecodingSession(model, use_kernels=True)


@given(
    options=st.fixed_dictionaries(
        dict(
            depth=st.integers(1, 2),
            heads=st.integers(1, 3),
            dim_head=st.sampled_from([2, 6]),
            local_attn_window_size=st.integers(1, 5),
            look_backward=st.integers(0, 2),
            exact_windowsize=st.booleans(),
            use_abs_pos_emb=st.booleans(),
            use_rotary_pos_emb=st.booleans(),
            use_xpos=st.booleans(),
            use_dynamic_pos_bias=st.booleans(),
            qk_rmsnorm=st.booleans(),
            shared_qk=st.booleans(),
            gate_values_per_head=st.booleans(),
            num_residual_streams=st.integers(1, 3),
            max_ngram=st.integers(1, 4),
            ngram_buckets=st.integers(2, 50),
            ngram_dim=st.integers(1, 3),
        )
    ),
    batch=st.integers(1, 9),
    prefill_chunk=st.integers(1, 7),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    use_kernels=st.sampled_from([None, False]),
)
@examples(9)
def test_cached_logits_equal_the_full_pass_for_any_configuration(options, batch, chunk, pieces, use_kernels):
    model = transformer(**options)
    length = max(4 * options["local_attn_window_size"] + 2, sum(pieces))
    x = sequences(batch, min(length, 32))
    session = DecodingSession(model, batch, prefill_chunk=chunk, prefill_threshold=2, use_kernels=use_kernels)
    logits, rest = [], x
    for piece in [*pieces, length]:  # in pieces, one by one where a piece is a single token
        if rest.shape[1]:
            logits.append(session.feed(rest[:, :piece]))
            rest = rest[:, piece:]
    np.testing.assert_allclose(np.concatenate(logits, 1), run(model, x), atol=1e-4)


@both_modes
def test_chunks_equal_the_full_pass_in_both_modes(mode):
    model, x = transformer(), sequences(2, 13)
    session = DecodingSession(model, 2, prefill_chunk=4, prefill_threshold=3)
    logits = np.concatenate([session.feed(part) for part in (x[:, :6], x[:, 6:7], x[:, 7:])], 1)
    np.testing.assert_allclose(logits, run(model, x), atol=1e-4)
    assert set(session.graphs) == {1, 4}


def test_a_chunk_is_never_longer_than_the_decay_of_xpos_allows():
    model = transformer(use_xpos=True, use_abs_pos_emb=False, local_attn_window_size=2)  # with a base of 1
    session, x = DecodingSession(model), sequences(1, 300)
    np.testing.assert_allclose(session.feed(x), run(model, x), atol=1e-4)
    assert len(session.graphs) == 1 and session.prefill_chunk == 55


def test_few_tokens_are_fed_one_by_one_and_many_in_chunks():
    session = DecodingSession(transformer(), prefill_chunk=4, prefill_threshold=6)
    session.feed(sequences(1, 5))
    assert set(session.graphs) == {1}
    session.feed(sequences(1, 6))
    assert set(session.graphs) == {1, 4}
    assert session.position == 11


@given(st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=3))
@examples(6)
def test_with_and_without_the_cache_a_context_starts_again_at_the_same_places(limit, pieces):
    model = transformer(max_seq_len=limit, **NGRAMS)
    cached, full = DecodingSession(model, prefill_chunk=3, prefill_threshold=2), UncachedSession(model, 1)
    for piece in pieces:
        x = sequences(1, piece, seed=piece)
        np.testing.assert_allclose(cached.feed(x), full.feed(x), atol=1e-4)
        assert cached.position == full.position <= limit


@given(limit=st.integers(1, 7), prompt=st.integers(1, 30), fed_before=st.integers(0, 9))
@examples(20)
def test_of_a_prompt_beyond_max_seq_len_only_what_counts_is_computed(limit, prompt, fed_before):
    contexts = [StandIn(long_model(limit), 1) for _ in range(2)]
    for context in contexts:
        if fed_before:
            context.feed(sequences(1, fed_before, seed=1))
        context.fed = 0
    text, uniforms = sequences(1, prompt), np.zeros((1, 1))
    contexts[0].sample(text, uniforms, None)
    if prompt > 1:
        contexts[1].feed(text[:, :-1])
    contexts[1].sample(text[:, -1:], uniforms, None)
    one, other = contexts
    assert one.context == other.context and one.length == other.length and one.position == other.position
    assert one.fed <= min(other.fed, 2 * limit)


@cache
def long_model(limit):
    return transformer(max_seq_len=limit)


class StandIn(UncachedSession):
    """Computes nothing, but notes how many tokens it would have, and which the newest one sees."""

    fed = 0

    def advance(self, tokens):
        self.text = np.concatenate([self.text, tokens], 1)
        self.fed += tokens.shape[1]
        return np.zeros((*tokens.shape, 11), np.float32)

    def sample_some(self, tokens, uniforms, rule):
        self.advance(tokens[:, None])
        self.context = self.text.tolist()
        return tokens[:, None]


def test_decoding_in_the_midst_of_training_drops_nothing_and_leaves_the_model_in_training():
    model = transformer(attn_dropout=0.5, ff_dropout=0.5)
    wanted = run(model.set_train(False), sequences(1, 6))
    model.set_train()
    np.testing.assert_allclose(fed(DecodingSession(model), sequences(1, 6)), wanted, atol=1e-4)
    assert model.training and model.layers[0].training


@pytest.mark.parametrize("options", [{}, dict(exact_windowsize=False, use_abs_pos_emb=False)], ids=["exact", "whole"])
def test_greedy_text_is_the_same_with_and_without_the_cache(options):
    model, prompt, length = transformer(seed=1, **options), [3, 1, 4], 15
    cached = [int(token) for (token,) in generate_tokens(DecodingSession(model), prompt, length, temperature=0)]
    text = list(prompt)
    for _ in range(length):
        text.append(int(run(model, [text])[0, -1].argmax()))
    assert cached == text[3:]
    assert len(set(cached)) > 2  # no model that always says the same


def test_the_size_of_the_cache_depends_on_the_window_alone():
    for options, size in [
        (dict(), 4),
        (dict(exact_windowsize=False), 6),
        (dict(look_backward=2), 7),
        (dict(look_backward=2, exact_windowsize=False), 9),
        (dict(look_backward=0), 1),
    ]:
        model = transformer(max_seq_len=1000, **options)
        assert cache_length(model.layers[0].attention.attention) == size
        session = DecodingSession(model, 3, prefill_chunk=5)
        session.feed(sequences(3, 20))
        assert [p.shape for ring in session.rings for p in ring] == [
            (3 * 2 * (size + 1), 4)
        ] * 2  # with the slot that nobody sees


def test_a_million_tokens_on_logits_are_as_good_as_at_the_beginning():
    options = dict(use_abs_pos_emb=False, local_attn_window_size=5, look_backward=1, dim_head=8)
    x = sequences(2, 17)
    for more in ({}, dict(use_xpos=True), dict(exact_windowsize=False), dict(use_dynamic_pos_bias=True)):
        model = transformer(**options, **more)
        session = DecodingSession(model, 2, prefill_chunk=6, prefill_threshold=2, steps_per_call=3)
        session.position = 10**6  # nothing held lies in sight, so the text may as well begin here
        logits = np.concatenate([session.feed(x[:, :1]), session.feed(x[:, 1:13]), session.feed(x[:, 13:])], 1)
        near = DecodingSession(model, 2).feed(x)
        # what lies before it: slots that hold nothing but zeros, seen with a score of 0
        alone = 2 * options["local_attn_window_size"]
        np.testing.assert_allclose(logits[:, alone:], near[:, alone:], atol=1e-4)


@pytest.mark.parametrize("mode", ["graph"], indirect=True)
def test_a_greedy_text_of_a_thousand_bytes_is_what_the_full_pass_says(mode):
    model = transformer(num_tokens=256, max_seq_len=1004, dim=16, depth=2, dim_head=8, local_attn_window_size=8)
    text = model.generate(tensor([[1, 2, 3]]), 1000, temperature=0).asnumpy()[0].tolist()
    most_likely = run(model, [[1, 2, 3, *text]])[0, 2:-1].argmax(-1)
    assert text == most_likely.tolist()
    assert len(set(text)) > 2


def test_without_learned_positions_text_goes_on_far_beyond_max_seq_len():
    model = transformer(max_seq_len=4, use_abs_pos_emb=False)
    assert_cached_equals_full(model, sequences(1, 80), 1)


@pytest.mark.parametrize("limit", [1, 2, 7, 8])
def test_beyond_max_seq_len_the_context_starts_again_from_its_newest_half(limit):
    model = transformer(max_seq_len=limit, local_attn_window_size=2, look_backward=2)
    session = DecodingSession(model, 2)
    context = np.zeros((2, 0), int)
    for token in sequences(2, 3 * limit).T:
        if context.shape[1] == limit:
            context = context[:, limit - limit // 2 :]
        context = np.concatenate([context, token[:, None]], 1)
        np.testing.assert_allclose(session.feed(token), run(model, context)[:, -1], atol=1e-4)


def test_the_rows_of_a_batch_do_not_see_each_other():
    model, x = transformer(), sequences(3, 9)
    together = fed(DecodingSession(model, 3), x)
    for row in range(3):
        np.testing.assert_allclose(together[row], fed(DecodingSession(model), x[row : row + 1])[0], atol=1e-5)
    x[1] = (x[1] + 1) % 11
    changed = fed(DecodingSession(model, 3), x)
    np.testing.assert_array_equal(changed[[0, 2]], together[[0, 2]])
    assert abs(changed[1] - together[1]).max() > 0.01


def test_two_decoders_of_one_model_do_not_disturb_each_other():
    model, x = transformer(), sequences(2, 10)
    sessions = DecodingSession(model), DecodingSession(model)
    for i in range(10):
        for session, row in zip(sessions, x, strict=True):
            logits = session.feed(row[i : i + 1])
            np.testing.assert_allclose(logits[0], run(model, row[None, : i + 1])[0, -1], atol=1e-4)


def test_after_a_reset_nothing_of_the_former_context_is_left():
    model = transformer(**NGRAMS)
    session = DecodingSession(model)
    fed(session, sequences(1, 7))
    session.reset()
    x = sequences(1, 9, seed=1)
    np.testing.assert_array_equal(fed(session, x), fed(DecodingSession(model), x))


def test_the_model_is_not_changed_by_decoding():
    model, x = transformer(), sequences(1, 8)
    before, names = run(model, x), [p.name for p in model.trainable_params()]
    fed(DecodingSession(model), x)
    np.testing.assert_array_equal(run(model, x), before)
    assert [p.name for p in model.trainable_params()] == names


@both_modes
def test_a_decoder_follows_the_weights_of_its_model(mode):
    model, x = transformer(), sequences(1, 5)
    session = DecodingSession(model)
    fed(session, x)
    randomise(model, seed=1)
    session.reset()
    np.testing.assert_allclose(fed(session, x), run(model, x), atol=1e-4)


# Global layers


class Mean(nn.Cell):
    """The mean of the text so far, a projection of it."""

    def __init__(self, dim):
        super().__init__()
        self.to_out = nn.Dense(dim, dim)

    def construct(self, x):
        n = x.shape[1]
        return self.to_out(ops.matmul(tensor(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]), x))

    def decoding_cell(self, batch):
        return MeanStep(self, batch)


class MeanStep(nn.Cell):
    """:class:`Mean`, token by token."""

    def __init__(self, mean, batch):
        super().__init__(auto_prefix=False)
        self.mean = mean
        shape = (batch, 1, mean.to_out.in_channels)
        self.sum = ms.Parameter(tensor(np.zeros(shape)), name="sum", requires_grad=False)

    def construct(self, x, position):
        total = x + self.sum * (position > 0).astype(x.dtype)
        ops.assign(self.sum, total)
        return self.mean.to_out(total / (position + 1).astype(x.dtype))


@pytest.mark.parametrize(
    ("mode", "options"),
    [("eager", {}), ("graph", dict(num_residual_streams=2, layers_insert_global_attn=(2,)))],
    indirect=["mode"],
)
def test_a_global_layer_with_a_decoding_cell_takes_part_in_the_cache(mode, options):
    model = transformer(depth=2, global_attn_layer=Mean(6), **options)
    session, x = DecodingSession(model, 2, prefill_chunk=4, prefill_threshold=2), sequences(2, 11)
    session.feed(sequences(2, 5, seed=3))
    session.reset()
    logits = np.concatenate([session.feed(x[:, :6]), session.feed(x[:, 6:])], 1)
    np.testing.assert_allclose(logits, run(model, x), atol=1e-4)


def test_a_global_layer_without_one_is_refused_by_the_decoder():
    with pytest.raises(ValueError, match="a method decoding_cell"):
        DecodingSession(transformer(global_attn_layer=nn.Dense(6, 6)))


# generate_tokens


@cache
def shared_session(batch):
    """One session a batch size, all of one model."""
    return DecodingSession(shared_model(), batch)


@cache
def shared_model():
    return transformer(seed=1, use_abs_pos_emb=False)


def generated(batch=1, prompt=(1, 2), length=10, **options):
    """``(batch, length)`` tokens."""
    drawn = list(generate_tokens(shared_session(batch), prompt, length, **options))
    assert all(tokens.shape == (batch,) and tokens.dtype == np.int32 for tokens in drawn)
    return np.stack(drawn, 1)


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert (generated(seed=5) == generated(seed=5)).all()
    assert (generated(seed=5) != generated(seed=6)).any()
    assert (generated() == generated(seed=0)).all()


def test_a_tuple_of_numbers_is_a_seed():
    texts = [generated(seed=seed).tolist() for seed in [(3, 1), (3, 2), (4, 1), 3]]
    assert generated(seed=(3, 1)).tolist() == texts[0]
    assert all(texts[i] != texts[j] for i in range(4) for j in range(i))


def test_each_row_is_the_same_whatever_the_batch():
    single, pair, three = (generated(batch, seed=7) for batch in (1, 2, 3))
    np.testing.assert_array_equal(pair[:1], single)
    np.testing.assert_array_equal(three[:2], pair)
    assert (three[0] != three[1]).any() and (three[1] != three[2]).any()


def test_a_text_begins_anew_whatever_was_fed_before():
    first = generated(seed=1)
    shared_session(1).feed([9])
    assert (generated(seed=1) == first).all()


def test_the_options_of_sampling_are_obeyed():
    greedy = generated(temperature=0)
    assert (generated(top_k=1, seed=1) == greedy).all()
    assert (generated(top_p=1e-6, seed=1) == greedy).all()
    assert (generated(temperature=1e-6, seed=1) == greedy).all()
    assert (generated(seed=1) != greedy).any()


def test_tokens_are_drawn_as_the_logits_say():
    logits = run(shared_model(), [[1, 2]])[0, -1].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    drawn = generated(400, length=1)[:, 0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=11) / 400, p, atol=0.07)


def test_the_prompt_matters_and_may_be_a_single_token():
    assert generated(prompt=[3], seed=1).shape == (1, 10)
    assert (generated(prompt=[3, 4], temperature=0) != generated(prompt=[5, 9], temperature=0)).any()


def test_the_first_token_comes_at_once_and_later_ones_in_bursts():
    model = transformer()
    session, fed_when_drawn = DecodingSession(model, steps_per_call=4), []
    tokens = generate_tokens(session, [1, 2], None, seed=3)
    first = []
    for token in islice(tokens, 13):
        first.append(int(token[0]))
        fed_when_drawn.append(session.position)
    # the prompt; then the newest token with all but the last of its burst: 1, 2, 4, 8 (in two calls) tokens
    assert fed_when_drawn == [2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16]
    assert first == [int(t) for (t,) in generate_tokens(session, [1, 2], 13, seed=3)]


@pytest.mark.parametrize("options", [NGRAMS, dict(max_seq_len=7, **NGRAMS), dict(use_abs_pos_emb=False)])
def test_bursts_draw_what_one_token_at_a_time_would(options):
    model, all_drawn = transformer(seed=1, **options), []
    for context in (DecodingSession(model, 2, steps_per_call=1), DecodingSession(model, 2, steps_per_call=5), UncachedSession(model, 2)):
        drawn = np.stack(list(generate_tokens(context, sequences(2, 3), 30, seed=3, top_p=0.9)), 1)
        all_drawn.append(drawn)
        assert context.length == 32  # all but the last one drawn
    np.testing.assert_array_equal(all_drawn[1], all_drawn[0])
    np.testing.assert_array_equal(all_drawn[2], all_drawn[0])


def test_a_new_rule_of_sampling_holds_for_a_compiled_decoder():
    session = DecodingSession(shared_model())
    for options in (dict(temperature=0), dict(temperature=5), dict(top_k=2), dict(top_p=0.3), dict(temperature=0)):
        drawn, again = (
            [int(t) for (t,) in generate_tokens(d, [1, 2], 20, seed=1, **options)]
            for d in (session, UncachedSession(shared_model(), 1))
        )
        assert drawn == again


def test_no_token_is_drawn_for_a_length_of_zero():
    assert list(generate_tokens(DecodingSession(transformer()), [1], 0)) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate_tokens(DecodingSession(transformer()), [], 3))


# LocalTransformer(cache=, return_cache=)


@pytest.mark.parametrize(
    "options", [NGRAMS, dict(use_xpos=True, use_abs_pos_emb=False), dict(global_attn_layer=Mean(6))]
)
def test_a_cache_stands_for_the_tokens_it_was_made_of(options):
    model, x = transformer(**options), sequences(2, 12)
    wanted = run(model, x)
    logits, cache = model(tensor(x[:, :5]), return_cache=True)
    np.testing.assert_allclose(logits.asnumpy(), wanted[:, :5], atol=1e-4)
    for n in range(6, 11):
        logits, cache = model(tensor(x[:, :n]), cache=cache, return_cache=True)
        assert logits.shape == (2, 1, 11)
        np.testing.assert_allclose(logits.asnumpy(), wanted[:, n - 1 : n], atol=1e-4)
    np.testing.assert_allclose(model(tensor(x), cache=cache).asnumpy(), wanted[:, 10:], atol=1e-4)


@both_modes
@with_and_without_kernels
def test_a_cache_may_be_used_for_several_continuations(mode, use_kernels):
    model, x = transformer(), sequences(2, 8)
    model.session = DecodingSession(model, 2, use_kernels=use_kernels)
    _, cache = model(tensor(x[:, :6]), return_cache=True)
    for seed in (1, 2, 3):
        other = np.concatenate([x[:, :6], sequences(2, 2, seed=seed)], 1)
        np.testing.assert_allclose(model(tensor(other), cache=cache).asnumpy(), run(model, other)[:, 6:], atol=1e-4)


def test_a_cache_outlives_the_length_of_learned_positions():
    model, x, session = transformer(max_seq_len=8), sequences(1, 20), DecodingSession(transformer(max_seq_len=8))
    _, cache = model(tensor(x[:, :7]), return_cache=True)
    wanted = fed(session, x)
    for n in range(8, 21):
        logits, cache = model(tensor(x[:, :n]), cache=cache, return_cache=True)
        np.testing.assert_allclose(logits.asnumpy()[:, 0], wanted[:, n - 1], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 5), {}, "with n > 5"),
        ((1, 7), {}, r"expected tokens \(2, n\)"),
        ((2, 7), dict(return_loss=True), "no mask and no return_loss"),
        ((2, 7), dict(mask=ms.Tensor(np.ones((2, 7), bool))), "no mask and no return_loss"),
    ],
)
def test_what_does_not_fit_a_cache_is_refused(shape, options, message):
    model = transformer()
    _, cache = model(tensor(sequences(2, 5)), return_cache=True)
    with pytest.raises(ValueError, match=message):
        model(tensor(sequences(*shape)), cache=cache, **options)


# LocalTransformer.generate


def prime(*shape, seed=0):
    return tensor(sequences(*shape, seed=seed))


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_generate_continues_each_row_of_the_prime(use_kv_cache):
    model = transformer(seed=1)
    text = model.generate(prime(2, 4), 6, temperature=0, use_kv_cache=use_kv_cache)
    assert text.shape == (2, 6) and text.dtype == ms.int32
    for row in range(2):
        alone = sequences(2, 4)[row].tolist()
        for _ in range(6):
            alone.append(int(run(model, [alone])[0, -1].argmax()))
        assert text.asnumpy()[row].tolist() == alone[4:]


def test_generate_draws_the_same_for_the_same_seed():
    model = transformer(seed=1)
    first, again, other = (model.generate(prime(2, 3), 12, filter_thres=0, seed=s).asnumpy() for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_generate_without_a_seed_follows_that_of_mindspore():
    model, drawn = transformer(seed=1), []
    for seed in (3, 3, 4):
        ms.set_seed(seed)
        drawn.append(model.generate(prime(1, 3), 12, filter_thres=0).asnumpy().tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def tokens_drawn(model, **options):
    """The set of tokens that come first in 200 texts."""
    return set(model.generate(tensor(np.tile(sequences(1, 3), (200, 1))), 1, seed=1, **options).asnumpy()[:, 0].tolist())


def test_filter_thres_leaves_the_most_likely_share_of_the_tokens():
    model = transformer(seed=1)
    order = (-run(model, sequences(1, 3))[0, -1]).argsort().tolist()
    for filter_thres, left in [(0.9, 1), (0.7, 3), (0.5, 5), (0, 11)]:
        assert tokens_drawn(model, filter_thres=filter_thres, temperature=5) == set(order[:left])


def test_generate_has_top_k_and_top_p_instead():
    model = transformer(seed=1)
    order = (-run(model, sequences(1, 3))[0, -1]).argsort().tolist()
    assert tokens_drawn(model, top_k=4, temperature=5) == set(order[:4])
    assert tokens_drawn(model, top_p=1e-6) == set(order[:1])
    assert len(tokens_drawn(model, top_p=1.0, temperature=5)) == 11


def test_a_text_of_no_tokens_is_empty():
    assert transformer().generate(prime(2, 3), 0).shape == (2, 0)


@pytest.mark.parametrize("options", [dict(causal=False), dict(num_tokens=None)])
def test_a_model_that_cannot_be_decoded_is_refused(options):
    model = LocalTransformer(
        **dict(num_tokens=11, max_seq_len=8, dim=8, depth=1, heads=1, dim_head=4, local_attn_window_size=4) | options
    )
    with pytest.raises(ValueError, match="causal model with num_tokens"):
        DecodingSession(model)
