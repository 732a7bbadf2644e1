from dataclasses import fields
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from hypothesis import strategies as st

from local_attention import GlobalAttention, LocalTransformer
from local_attention.decoding import DecodingSession, UncachedSession, generate_tokens
from local_attention.decoding.sampling import sampling_rule
from local_attention.options import LocalTransformerOptions
from tests.local_attention.cells import both_modes, for_all, in_a_graph, randomise, run
from tests.local_attention.models import (
    NGRAMS,
    NUM_TOKENS,
    SIZES,
    DecodableMean,
    Mean,
    feed_in_pieces,
    needs_kernels,
    sequences,
    transformer,
    with_and_without_kernels,
)

# The law of the cache: prefill and decoding give the logits of the full pass.

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
    "xPos with a base of its own": dict(use_xpos=True, xpos_scale_base=4.0),
    "xPos alone in whole windows": dict(use_xpos=True, use_abs_pos_emb=False, exact_windowsize=False, look_backward=2),
    "dynamic bias": dict(use_dynamic_pos_bias=True),
    "dynamic bias alone, two windows back": dict(use_dynamic_pos_bias=True, use_abs_pos_emb=False, look_backward=2),
    "normalised queries and keys": dict(qk_rmsnorm=True, qk_scale=3),
    "shared queries and keys": dict(shared_qk=True),
    "shared, whole windows": dict(shared_qk=True, exact_windowsize=False, look_backward=0),
    "gated values": dict(gate_values_per_head=True),
    "hyper-connections": dict(num_residual_streams=3, depth=2),
    "embedding skip": dict(embedding_skip=True, num_residual_streams=2, depth=2),
    "n-grams": dict(use_abs_pos_emb=False, **NGRAMS),
    "bigrams and learned positions": dict(max_ngram=2, ngram_buckets=50, ngram_dim=5),
    "much at once": dict(
        use_xpos=True, qk_rmsnorm=True, shared_qk=True, gate_values_per_head=True, num_residual_streams=2, depth=2
    ),
    "windows of layers": dict(depth=4, local_attn_window_size=[2, 3, 3, 5], look_backward=[1, 0, 2, 1]),
    "windows of layers, xPos alone": dict(depth=2, local_attn_window_size=[2, 5], use_xpos=True, use_abs_pos_emb=False),
    "windows of layers, dynamic bias": dict(
        depth=2, local_attn_window_size=[3, 2], look_backward=[1, 2], use_dynamic_pos_bias=True
    ),
    "a global layer on top": dict(depth=2, global_attn_layers=[2], qk_rmsnorm=True, gate_values_per_head=True),
    "global layers alone": dict(depth=2, global_attn_layers=[1, 2], use_abs_pos_emb=False, shared_qk=True),
    "odd heads": dict(heads=3, dim_head=3, use_rotary_pos_emb=False),
}


def assert_cached_equals_full(model, x, lengths, **options):
    """Feed ``x: (b, n)`` in pieces to a session; returns it."""
    session = DecodingSession(model, len(x), **options)
    np.testing.assert_allclose(feed_in_pieces(session, x, lengths), run(model, x), atol=1e-4)
    return session


# Options of a model that decoding refuses, or that it knows nothing of; and those with tests of their own below.
NO_CONFIGURATION = {"causal", "look_forward", "ignore_index"}
NO_CONFIGURATION |= {"attn_dropout", "ff_dropout", "global_attn_layer", "layers_insert_global_attn"}


def test_every_option_of_a_model_is_in_some_configuration():
    configured = SIZES.keys() | set().union(*CONFIGURATIONS.values())
    assert {field.name for field in fields(LocalTransformerOptions)} - NO_CONFIGURATION == configured


@with_and_without_kernels
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_cached_logits_equal_the_full_pass(options, use_kernels):
    """One token; six by prefill, in chunks of 4 and 2; seven decoded, up to three per call."""
    pieces = dict(prefill_chunk=4, prefill_threshold=6, steps_per_call=3)
    model, x = transformer(**options), sequences(2, 14)
    session = assert_cached_equals_full(model, x, (1, 6, 5, 2), use_kernels=use_kernels, **pieces)
    assert session.use_kernels == use_kernels and set(session.graphs) == {1, 4}


@pytest.mark.slow
@with_and_without_kernels
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_cached_logits_equal_the_full_pass_token_after_token(options, use_kernels):
    assert_cached_equals_full(transformer(**options), sequences(2, 20), (1,) * 20, use_kernels=use_kernels)


@in_a_graph
@with_and_without_kernels
def test_cached_logits_equal_the_full_pass_in_a_graph(mode, use_kernels):
    pieces = dict(prefill_chunk=4, prefill_threshold=6, steps_per_call=3)
    model = transformer(**NGRAMS)
    assert_cached_equals_full(model, sequences(2, 14), (6, 1, 4, 3), use_kernels=use_kernels, **pieces)


@for_all(
    4,
    25,
    options=st.fixed_dictionaries(
        dict(
            heads=st.integers(1, 3),
            dim_head=st.sampled_from([2, 6]),
            local_attn_window_size=st.lists(st.integers(1, 5), min_size=1, max_size=2),
            look_backward=st.integers(0, 2),
            exact_windowsize=st.booleans(),
            use_abs_pos_emb=st.booleans(),
            use_rotary_pos_emb=st.booleans(),
            use_xpos=st.booleans(),
            use_dynamic_pos_bias=st.booleans(),
            is_global=st.lists(st.booleans(), min_size=2, max_size=2),
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
    chunk=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    use_kernels=st.sampled_from([None, False]),
)
def test_cached_logits_equal_the_full_pass_for_any_configuration(options, batch, chunk, lengths, use_kernels):
    options |= dict(depth=len(options["local_attn_window_size"]))
    is_global = options.pop("is_global")[: options["depth"]]
    if not (options["use_xpos"] or options["use_dynamic_pos_bias"]):
        options["global_attn_layers"] = [number for number, of_layer in enumerate(is_global, 1) if of_layer]
    length = min(max(4 * max(options["local_attn_window_size"]) + 2, sum(lengths)), 32)
    lengths = np.diff(np.minimum([0, *np.cumsum(lengths), length], length))
    pieces = dict(prefill_chunk=chunk, prefill_threshold=2)
    model, x = transformer(**options), sequences(batch, length)
    assert_cached_equals_full(model, x, lengths[lengths > 0], use_kernels=use_kernels, **pieces)


def test_without_learned_positions_a_sequence_goes_on_far_beyond_max_seq_len():
    model = transformer(max_seq_len=4, use_abs_pos_emb=False)
    assert_cached_equals_full(model, sequences(1, 50), (50,))


def test_a_million_tokens_on_logits_are_as_good_as_at_the_beginning():
    options = dict(use_abs_pos_emb=False, local_attn_window_size=2, dim_head=8)
    x = sequences(2, 11)
    for more in ({}, dict(use_xpos=True), dict(exact_windowsize=False), dict(use_dynamic_pos_bias=True)):
        model = transformer(**options, **more)
        session = DecodingSession(model, 2, prefill_chunk=6, prefill_threshold=4, steps_per_call=3)
        session.position = 10**6  # nothing cached lies in sight, so the sequence may as well begin here
        logits = feed_in_pieces(session, x, (1, 7, 3))
        near = DecodingSession(model, 2).feed(x)
        # what lies before it: slots that hold nothing but zeros, seen with a score of 0
        alone = 2 * options["local_attn_window_size"]
        np.testing.assert_allclose(logits[:, alone:], near[:, alone:], atol=1e-4)


def test_the_rows_of_a_batch_do_not_see_each_other():
    model, x = transformer(), sequences(3, 9)
    together = DecodingSession(model, 3).feed(x)
    for row in range(3):
        np.testing.assert_allclose(together[row], DecodingSession(model).feed(x[row : row + 1])[0], atol=1e-5)
    x[1] = (x[1] + 1) % NUM_TOKENS
    changed = DecodingSession(model, 3).feed(x)
    np.testing.assert_array_equal(changed[[0, 2]], together[[0, 2]])
    assert abs(changed[1] - together[1]).max() > 0.01


# Prefill and decoding


def test_few_tokens_are_decoded_one_by_one_and_many_by_prefill():
    session = DecodingSession(transformer(), prefill_chunk=4, prefill_threshold=6)
    session.feed(sequences(1, 5))
    assert set(session.graphs) == {1}
    session.feed(sequences(1, 6))
    assert set(session.graphs) == {1, 4}
    assert session.position == 11


def test_the_first_token_after_prefill_does_not_wait_for_the_graph_of_decoding():
    model, prompt = transformer(), sequences(1, 11)
    session = DecodingSession(model, prefill_chunk=4, prefill_threshold=6)
    tokens = generate_tokens(session, prompt, 5, seed=3)
    first = next(tokens)
    assert set(session.graphs) == {session.prefill_chunk}
    np.testing.assert_array_equal([first, *tokens], list(generate_tokens(UncachedSession(model, 1), prompt, 5, seed=3)))


def test_prefill_never_takes_more_tokens_than_the_decay_of_xpos_allows():
    model = transformer(use_xpos=True, use_abs_pos_emb=False, local_attn_window_size=2)  # with a base of 1
    session = assert_cached_equals_full(model, sequences(1, 60), (60,), prefill_threshold=2)
    assert set(session.graphs) == {session.prefill_chunk} == {55}


@needs_kernels
def test_the_kernels_are_refused_where_they_cannot_be_used():
    model = transformer()
    assert DecodingSession(model).use_kernels
    model.layers[0].attention.to_q.weight.set_dtype(ms.float16)
    assert not DecodingSession(model).use_kernels
    with pytest.raises(ValueError, match="expected use_kernels=False"):
        DecodingSession(model, use_kernels=True)


# A model and its sessions


@pytest.mark.parametrize("session", [DecodingSession, UncachedSession])
@pytest.mark.parametrize("training", [True, False])
def test_decoding_drops_nothing_and_leaves_each_cell_as_it_was(session, training):
    model = transformer(depth=2, attn_dropout=0.5, ff_dropout=0.5)
    full = run(model.set_train(False), sequences(1, 6))
    model.set_train(training)
    model.layers[0].set_train(not training)
    modes = [cell.training for _, cell in model.cells_and_names()]
    decoder = session(model, 1)
    np.testing.assert_allclose(decoder.feed(sequences(1, 6)), full, atol=1e-4)
    decoder.sample([[1]], np.zeros((1, 1)), sampling_rule(NUM_TOKENS))
    assert [cell.training for _, cell in model.cells_and_names()] == modes
    assert len(set(modes)) == 2


def test_two_sessions_of_one_model_do_not_disturb_each_other():
    model, x = transformer(), sequences(2, 7)
    sessions, full = (DecodingSession(model), DecodingSession(model)), run(model, x)
    for i in range(7):
        for session, row, logits in zip(sessions, x, full, strict=True):
            np.testing.assert_allclose(session.feed(row[i : i + 1])[0], logits[i], atol=1e-4)


def test_after_a_reset_nothing_of_the_former_sequence_is_left():
    model = transformer(**NGRAMS)
    session, x = DecodingSession(model), sequences(1, 9, seed=1)
    session.feed(sequences(1, 7))
    session.reset()
    np.testing.assert_array_equal(session.feed(x), DecodingSession(model).feed(x))


def test_the_model_is_not_changed_by_decoding():
    model, x = transformer(), sequences(1, 8)
    before, names = run(model, x), [p.name for p in model.get_parameters()]
    DecodingSession(model).feed(x)
    np.testing.assert_array_equal(run(model, x), before)
    assert [p.name for p in model.get_parameters()] == names


@both_modes
def test_a_session_follows_the_weights_of_its_model(mode):
    model, x = transformer(), sequences(1, 5)
    session = DecodingSession(model)
    session.feed(x)
    randomise(model, seed=1)
    session.reset()
    np.testing.assert_allclose(session.feed(x), run(model, x), atol=1e-4)


@pytest.mark.parametrize("options", [dict(causal=False), dict(num_tokens=None)])
def test_a_model_that_cannot_be_decoded_is_refused(options):
    with pytest.raises(ValueError, match="causal model with num_tokens"):
        DecodingSession(LocalTransformer(**SIZES | options))


@pytest.mark.parametrize("session", [DecodingSession, UncachedSession])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1.0]], r"expected tokens: \(b,\) or \(b, n\) integers, got float64 of shape \(1, 1\)"),
        ([[]], r"expected tokens: .*, got float64 of shape \(1, 0\)"),
        ([[[1]]], r"expected tokens: .*, got int64 of shape \(1, 1, 1\)"),
        ([11], "expected tokens from 0 to 10, got 11"),
        ([[1, -5]], "expected tokens from 0 to 10, got -5"),
    ],
)
def test_what_are_no_tokens_of_the_vocabulary_is_not_fed(session, tokens, message):
    with pytest.raises(ValueError, match=message):
        session(model_with_positions(7), 1).feed(tokens)


# Restarts of the context, where learned positions run out


@pytest.mark.parametrize("limit", [1, 2, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_beyond_max_seq_len_the_context_restarts_from_its_newest_half(limit):
    model = transformer(max_seq_len=limit, local_attn_window_size=2, look_backward=2)
    session = DecodingSession(model, 2)
    context = np.zeros((2, 0), int)
    for token in sequences(2, 3 * limit).T:
        if context.shape[1] == limit:
            context = context[:, limit - limit // 2 :]
        context = np.concatenate([context, token[:, None]], 1)
        np.testing.assert_allclose(session.feed(token), run(model, context)[:, -1], atol=1e-4)


@for_all(3, 20, st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_with_and_without_the_cache_the_context_restarts_at_the_same_places(limit, lengths):
    model = transformer(max_seq_len=limit, **NGRAMS)
    cached, full = DecodingSession(model, prefill_chunk=3, prefill_threshold=2), UncachedSession(model, 1)
    for length in lengths:
        x = sequences(1, length, seed=length)
        np.testing.assert_allclose(cached.feed(x), full.feed(x), atol=1e-4)
        assert cached.position == full.position <= limit


@for_all(20, 100, limit=st.integers(1, 7), prompt=st.integers(1, 30), fed_before=st.integers(0, 9))
def test_of_a_prompt_beyond_max_seq_len_only_what_counts_is_computed(limit, prompt, fed_before):
    sessions = [CountingSession(model_with_positions(limit), 1) for _ in range(2)]
    for session in sessions:
        if fed_before:
            session.feed(sequences(1, fed_before, seed=1))
        session.computed = 0
    x, uniforms = sequences(1, prompt), np.zeros((1, 1))
    at_once, fed = sessions
    at_once.append(x[:, :-1])
    if prompt > 1:
        fed.feed(x[:, :-1])
    for session in sessions:
        session.sample(x[:, -1:], uniforms, None)
    np.testing.assert_array_equal(at_once.newest, fed.newest)
    assert at_once.position == fed.position
    assert at_once.computed <= min(fed.computed, 2 * limit)


@cache
def model_with_positions(limit):
    return transformer(max_seq_len=limit)


class CountingSession(UncachedSession):
    """Computes nothing, but counts the tokens that it would have computed."""

    computed = 0

    def logits_after(self, tokens):
        self.computed += tokens.shape[1]
        return np.zeros((*tokens.shape, NUM_TOKENS), np.float32)

    def sample_some(self, tokens, uniforms, rule):
        self.logits_after(tokens[:, :1])
        return tokens[:, :1]


# Global layers


@pytest.mark.parametrize(
    ("mode", "options"),
    [("eager", {}), ("graph", dict(num_residual_streams=2, layers_insert_global_attn=(2,)))],
    indirect=["mode"],
)
def test_a_global_layer_with_a_decoding_cell_takes_part_in_the_cache(mode, options):
    model = transformer(depth=2, global_attn_layer=DecodableMean(6), **options)
    session, x = DecodingSession(model, 2, prefill_chunk=4, prefill_threshold=2), sequences(2, 8)
    session.feed(sequences(2, 5, seed=3))
    session.reset()
    np.testing.assert_allclose(feed_in_pieces(session, x, (5, 3)), run(model, x), atol=1e-4)


INSERTED = [
    (dict(heads=3, dim_head=2), dict(use_dynamic_pos_bias=True)),
    (
        dict(heads=2, dim_head=4, prenorm=True),
        dict(use_xpos=True, use_abs_pos_emb=False, layers_insert_global_attn=[2]),
    ),
    (dict(heads=1, use_rotary_pos_emb=False), dict(num_residual_streams=2, global_attn_layers=[1])),
]


@with_and_without_kernels
@pytest.mark.parametrize(("inserted", "options"), INSERTED, ids=str)
def test_inserted_global_attention_is_decoded_with_a_cache(inserted, options, use_kernels):
    pieces = dict(prefill_chunk=4, prefill_threshold=6, steps_per_call=3)
    layer = GlobalAttention(dim=6, causal=True, **inserted)
    model = transformer(depth=2, local_attn_window_size=[2, 3], global_attn_layer=layer, **options)
    session = assert_cached_equals_full(model, sequences(2, 14), (1, 6, 5, 2), use_kernels=use_kernels, **pieces)
    assert set(session.graphs) == {1, 4}


@pytest.mark.parametrize("options", [dict(global_attn_layers=[2]), dict(global_attn_layer="inserted")], ids=str)
def test_without_learned_positions_the_cache_of_global_attention_doubles_when_it_is_full(options, monkeypatch):
    monkeypatch.setattr("local_attention.decoding.session.FIRST_CAPACITY", 4)
    if "global_attn_layer" in options:
        options = dict(global_attn_layer=GlobalAttention(dim=6, heads=2, dim_head=2, causal=True))
    model, capacities = transformer(depth=2, use_abs_pos_emb=False, max_seq_len=3, **options), []
    session = DecodingSession(model, 2, prefill_chunk=4, prefill_threshold=6, steps_per_call=3)
    x, full = sequences(2, 40), []
    for piece in np.split(x, [4, 5, 13, 17], 1):
        full.append(session.feed(piece))
        capacities.append(session.capacity)
    assert capacities == [4, 8, 16, 32, 64]
    assert sorted((of_layers.length, of_layers.is_global) for of_layers in session.caches) == [
        *[(4, False)] * (len(session.caches) - 1),
        (64, True),
    ]
    np.testing.assert_allclose(np.concatenate(full, 1), run(model, x), atol=1e-4)
    session.reset()  # the cache stays as it is
    np.testing.assert_allclose(session.feed(x[:, ::-1]), run(model, x[:, ::-1]), atol=1e-4)
    assert session.capacity == 64


def test_with_learned_positions_the_cache_of_global_attention_is_as_long_as_they_are():
    session = DecodingSession(transformer(depth=2, global_attn_layers=[1]))
    assert sorted(of_layers.length for of_layers in session.caches) == [4, 32]
    session.feed(sequences(1, 40))
    assert sorted(of_layers.length for of_layers in session.caches) == [4, 32]


@pytest.mark.parametrize("session", [DecodingSession, UncachedSession])
def test_inserted_global_attention_that_sees_later_tokens_makes_a_model_that_cannot_be_decoded(session):
    with pytest.raises(ValueError, match="causal model with num_tokens"):
        session(transformer(global_attn_layer=GlobalAttention(dim=6)), 1)


def test_a_global_layer_without_one_is_refused():
    with pytest.raises(ValueError, match="a method decoding_cell"):
        DecodingSession(transformer(global_attn_layer=Mean(6)))
