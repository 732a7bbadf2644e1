from functools import cache
from itertools import islice

import mindspore as ms
import numpy as np
import pytest

from local_attention.decoding import DecodingSession, UncachedSession, generate_tokens
from tests.local_attention.cells import in_a_graph, run, tensor
from tests.local_attention.models import (
    NGRAMS,
    NUM_TOKENS,
    DecodableMean,
    needs_kernels,
    sequences,
    transformer,
)

# generate_tokens


@cache
def shared_model():
    return transformer(seed=1, use_abs_pos_emb=False)


@cache
def shared_session(batch):
    """One session per batch size, all of one model."""
    return DecodingSession(shared_model(), batch)


def generated(batch=1, prompt=(1, 2), length=10, **options):
    """``(batch, length)`` tokens."""
    sampled = list(generate_tokens(shared_session(batch), prompt, length, **options))
    assert all(tokens.shape == (batch,) and tokens.dtype == np.int32 for tokens in sampled)
    return np.stack(sampled, 1)


def test_the_same_seed_gives_the_same_sequence_and_another_seed_another():
    assert (generated(seed=5) == generated(seed=5)).all()
    assert (generated(seed=5) != generated(seed=6)).any()
    assert (generated() == generated(seed=0)).all()


def test_a_tuple_of_numbers_is_a_seed():
    of_seeds = [generated(seed=seed).tolist() for seed in [(3, 1), (3, 2), (4, 1), 3]]
    assert generated(seed=(3, 1)).tolist() == of_seeds[0]
    assert all(of_seeds[i] != of_seeds[j] for i in range(4) for j in range(i))


def test_each_row_is_the_same_whatever_the_batch():
    single, pair, three = (generated(batch, seed=7) for batch in (1, 2, 3))
    np.testing.assert_array_equal(pair[:1], single)
    np.testing.assert_array_equal(three[:2], pair)
    assert (three[0] != three[1]).any() and (three[1] != three[2]).any()


def test_a_sequence_begins_anew_whatever_was_fed_before():
    first = generated(seed=1)
    shared_session(1).feed([9])
    assert (generated(seed=1) == first).all()


def test_the_options_of_sampling_are_obeyed():
    greedy = generated(temperature=0)
    assert (generated(top_k=1, seed=1) == greedy).all()
    assert (generated(top_p=1e-6, seed=1) == greedy).all()
    assert (generated(temperature=1e-6, seed=1) == greedy).all()
    assert (generated(seed=1) != greedy).any()


def test_tokens_are_sampled_as_the_logits_say():
    logits = run(shared_model(), [[1, 2]])[0, -1].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    sampled = generated(400, length=1)[:, 0]
    np.testing.assert_allclose(np.bincount(sampled, minlength=NUM_TOKENS) / 400, p, atol=0.07)


def test_the_prompt_matters_and_may_be_a_single_token():
    assert generated(prompt=[3], seed=1).shape == (1, 10)
    assert (generated(prompt=[3, 4], temperature=0) != generated(prompt=[5, 9], temperature=0)).any()


MIXED = dict(depth=3, local_attn_window_size=[2, 3, 5], global_attn_layers=[3])


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ({}, 1),
        (dict(exact_windowsize=False, use_abs_pos_emb=False), 1),
        (MIXED, 3),
        (dict(use_abs_pos_emb=False, **MIXED), 1),
    ],
    ids=["exact", "whole", "mixed", "mixed, without positions"],
)
def test_greedy_tokens_are_those_of_the_full_pass(options, seed):
    model, prompt = transformer(seed=seed, **options), [3, 1, 4]
    greedy = [int(token) for (token,) in generate_tokens(DecodingSession(model), prompt, 15, temperature=0)]
    most_likely = run(model, [[*prompt, *greedy]])[0, 2:-1].argmax(-1)
    assert greedy == most_likely.tolist()
    assert len(set(greedy)) > 2  # no model that always says the same


@pytest.mark.slow
@in_a_graph
def test_a_thousand_greedy_tokens_are_those_of_the_full_pass(mode):
    model = transformer(num_tokens=256, max_seq_len=1004, dim=16, depth=2, dim_head=8, local_attn_window_size=8)
    greedy = model.generate(tensor([[1, 2, 3]]), 1000, temperature=0).asnumpy()[0].tolist()
    most_likely = run(model, [[1, 2, 3, *greedy]])[0, 2:-1].argmax(-1)
    assert greedy == most_likely.tolist()
    assert len(set(greedy)) > 2


def test_the_first_token_comes_at_once_and_later_ones_several_per_call():
    model = transformer()
    session, appended = DecodingSession(model, steps_per_call=4), []
    tokens = generate_tokens(session, [1, 2], None, seed=3)
    first = []
    for token in islice(tokens, 13):
        first.append(int(token[0]))
        appended.append(session.position)
    # the prompt; then the newest token with all but the last of those sampled: 1, 2, 4, 8 (in two calls) tokens
    assert appended == [2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16]
    assert first == [int(t) for (t,) in generate_tokens(session, [1, 2], 13, seed=3)]


@pytest.mark.parametrize(
    "options",
    [
        dict(max_seq_len=7, **NGRAMS),
        dict(use_abs_pos_emb=False),
        pytest.param(NGRAMS, marks=pytest.mark.slow),
    ],
    ids=["restarts", "rotary", "n-grams"],
)
def test_several_steps_per_call_sample_what_one_step_per_call_does(options):
    model, sampled = transformer(seed=1, **options), []
    for session in (
        DecodingSession(model, 2, steps_per_call=1),
        DecodingSession(model, 2, steps_per_call=5),
        UncachedSession(model, 2),
    ):
        sampled.append(np.stack(list(generate_tokens(session, sequences(2, 3), 13, seed=3, top_p=0.9)), 1))
        assert session.newest[:, -1].tolist() == sampled[-1][:, -2].tolist()  # all but the last one are appended
    np.testing.assert_array_equal(sampled[1], sampled[0])
    np.testing.assert_array_equal(sampled[2], sampled[0])


@in_a_graph
def test_another_sampling_rule_holds_for_a_compiled_graph(mode):
    session, sampled = DecodingSession(shared_model()), []
    rules = (dict(temperature=0), dict(temperature=5), dict(top_k=2), dict(top_p=0.3), dict(temperature=0))
    for rule in rules:
        sampled.append([int(t) for (t,) in generate_tokens(session, [1, 2], 12, seed=1, **rule)])
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert sampled == [generated(length=12, seed=1, **rule)[0].tolist() for rule in rules]
    assert len(set(map(tuple, sampled))) == 4


def test_no_token_is_sampled_for_a_length_of_zero():
    assert list(generate_tokens(shared_session(1), [1], 0)) == []


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="expected a length >= 0, or None, got -1"):
        next(generate_tokens(shared_session(1), [1], -1))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate_tokens(shared_session(1), [], 3))


# Only the first tokens of the vocabulary


@cache
def model_that_favours_the_300th():
    model = transformer(num_tokens=320)
    weight, bias = np.zeros((320, 6)), np.zeros((1, 6))
    weight[:, 0], bias[0, 0] = np.arange(320) == 300, 20.0
    model.norm.gamma.set_data(tensor(np.zeros((1, 6))))
    model.norm.beta.set_data(tensor(bias))
    model.to_logits.weight.set_data(tensor(weight))
    return model


@pytest.mark.parametrize(
    ("mode", "session"),
    [
        ("eager", lambda model: UncachedSession(model, 2)),
        ("eager", lambda model: DecodingSession(model, 2, use_kernels=False)),
        pytest.param("eager", lambda model: DecodingSession(model, 2, use_kernels=True), marks=needs_kernels),
        ("graph", lambda model: DecodingSession(model, 2)),
    ],
    ids=["uncached", "operators", "kernels", "graph"],
    indirect=["mode"],
)
def test_only_the_first_num_tokens_are_drawn(mode, session):
    session = session(model_that_favours_the_300th())

    def drawn(**options):
        return np.stack(list(generate_tokens(session, [1, 2], 8, **options)))

    assert (drawn() == 300).all() and (drawn(num_tokens=400) == 300).all()
    assert (drawn(temperature=0, num_tokens=256) < 256).all()
    sampled = drawn(num_tokens=256)
    assert (sampled < 256).all() and len(set(sampled.flatten())) > 8  # of 256 that are equally likely


# Rows of different lengths

LENGTHS = [3, 8, 1]
OF_LENGTHS = {
    "rotary": dict(use_abs_pos_emb=False),
    "xPos": dict(use_xpos=True, use_abs_pos_emb=False, look_backward=2),
    "learned positions": dict(use_rotary_pos_emb=False),
    "n-grams and restarts": dict(max_seq_len=7, **NGRAMS),
}
OF_LENGTHS_SLOW = {
    "hyper-connections": dict(num_residual_streams=3, depth=2),
    "whole windows": dict(exact_windowsize=False),
    "restarts": dict(max_seq_len=6),
    "n-grams": dict(use_abs_pos_emb=False, **NGRAMS),
    "dynamic bias": dict(use_dynamic_pos_bias=True),
    "global layer": dict(global_attn_layer=DecodableMean(6)),
}


def padded(rows, padding=-7):
    """``(b, n)``, with anything to the right of the rows."""
    array = np.full((len(rows), 1 + max(map(len, rows))), padding)
    for filled, row in zip(array, rows, strict=True):
        filled[: len(row)] = row
    return array


def rows_of(lengths):
    return [sequences(1, length, seed=length)[0].tolist() for length in lengths]


def test_greedy_rows_of_different_lengths_are_those_of_each_row_alone():
    model, rows = transformer(seed=1, exact_windowsize=False), rows_of(LENGTHS)
    together = model.generate(padded(rows), 15, temperature=0, lengths=LENGTHS).asnumpy().tolist()
    assert together == [model.generate([row], 15, temperature=0).asnumpy()[0].tolist() for row in rows]
    assert len(set(map(tuple, together))) == 3  # no model that always says the same


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name) for name, options in OF_LENGTHS.items()]
    + [pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in OF_LENGTHS_SLOW.items()],
)
def test_rows_of_different_lengths_are_continued_as_if_each_were_alone(options):
    """12 tokens, several windows of 3, after prompts of 1 to 8; with the cache and without it."""
    model, rows = transformer(seed=1, **options), rows_of(LENGTHS)
    sampling = dict(seed=5, filter_thres=0)
    with_cache, without = (
        model.generate(padded(rows), 12, lengths=LENGTHS, use_kv_cache=use, **sampling).asnumpy().tolist()
        for use in (True, False)
    )
    assert with_cache == [model.generate([row] * 3, 12, **sampling).asnumpy()[i].tolist() for i, row in enumerate(rows)]
    assert without == with_cache
    assert len(set(map(tuple, with_cache))) == 3


@in_a_graph
@pytest.mark.parametrize("use_kernels", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_of_different_lengths_in_a_graph_with_prefill(mode, use_kernels):
    model, lengths = transformer(seed=1, **NGRAMS), [9, 30, 14]
    rows = rows_of(lengths)
    session = DecodingSession(model, 3, prefill_chunk=4, prefill_threshold=6, steps_per_call=5, use_kernels=use_kernels)
    tokens = np.stack(list(generate_tokens(session, padded(rows), 12, lengths=lengths, temperature=0)), 1)
    assert set(session.graphs) == {1, 4}
    ms.set_context(mode=ms.PYNATIVE_MODE)
    alone = [np.stack(list(generate_tokens(UncachedSession(model, 1), row, 12, temperature=0)), 1)[0] for row in rows]
    np.testing.assert_array_equal(tokens, alone)


def test_lengths_may_be_a_tensor_and_all_alike():
    model, rows = shared_model(), sequences(2, 3)
    alike = model.generate(padded(rows.tolist()), 5, temperature=0, lengths=tensor([3, 3]))
    assert (alike == model.generate(rows, 5, temperature=0)).all()
    assert model.generate(rows, 0, lengths=[1, 3]).shape == (2, 0)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 4], [3], [3, 3, 3], [[3, 3]], [1.0, 2.0], 3, []])
def test_lengths_outside_the_prime_are_refused(lengths):
    with pytest.raises(ValueError, match="expected 2 lengths from 1 to 3, got"):
        shared_model().generate(sequences(2, 3), 5, lengths=lengths)


# LocalTransformer.generate


@cache
def model_with_positions():
    return transformer(seed=1)


def prime(*shape):
    return tensor(sequences(*shape))


@pytest.mark.parametrize(
    "convert",
    [np.ndarray.tolist, lambda x: x.astype(np.uint8), lambda x: x.astype(np.int64), lambda x: ms.Tensor(x, ms.int16)],
    ids=["lists", "uint8", "int64", "int16 tensor"],
)
def test_a_prime_may_be_lists_or_an_array_or_a_tensor_of_any_integers(convert):
    model, x = model_with_positions(), sequences(2, 3)
    assert (model.generate(convert(x), 5, temperature=0) == model.generate(tensor(x), 5, temperature=0)).all()


@pytest.mark.parametrize(
    ("prime", "got"),
    [
        ([1, 2, 3], r"int64 of shape \(3,\)"),
        ([[1.0, 2.0]], r"float64 of shape \(1, 2\)"),
        (ms.Tensor([[1.0, 2.0]], ms.bfloat16), r"bfloat16 of shape \(1, 2\)"),
        ([[True, False]], r"bool of shape \(1, 2\)"),
        ([[[1]]], r"int64 of shape \(1, 1, 1\)"),
        ([[1, 2], [3]], "rows of different lengths"),
        ([[]], r"float64 of shape \(1, 0\)"),
        (tensor(np.zeros((0, 3), int)), r"int32 of shape \(0, 3\)"),
        ("text", r"<U4 of shape \(\)"),
    ],
    ids=str,
)
def test_a_prime_of_another_shape_or_type_is_refused(prime, got):
    with pytest.raises(ValueError, match=rf"expected prime: \(b, n\) integers, n >= 1 \(pad .* lengths\), got {got}"):
        model_with_positions().generate(prime, 3)


@pytest.mark.parametrize(("prime", "outside"), [([[1, 11]], 11), ([[-1, 1]], -1), ([[2**33, 1]], 2**33)])
def test_tokens_that_the_vocabulary_does_not_have_are_refused(prime, outside):
    with pytest.raises(ValueError, match=f"expected tokens from 0 to 10, got {outside}$"):
        model_with_positions().generate(prime, 3)


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_generate_continues_each_row_of_the_prime(use_kv_cache):
    model = model_with_positions()
    tokens = model.generate(prime(2, 4), 6, temperature=0, use_kv_cache=use_kv_cache)
    assert tokens.shape == (2, 6) and tokens.dtype == ms.int32
    whole = np.concatenate([sequences(2, 4), tokens.asnumpy()], 1)
    np.testing.assert_array_equal(tokens.asnumpy(), run(model, whole)[:, 3:-1].argmax(-1))


def test_generate_samples_the_same_for_the_same_seed():
    model = model_with_positions()
    first, again, other = (model.generate(prime(2, 3), 12, filter_thres=0, seed=s).asnumpy() for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_generate_without_a_seed_follows_that_of_mindspore():
    sampled = []
    for seed in (3, 3, 4):
        ms.set_seed(seed)
        sampled.append(model_with_positions().generate(prime(1, 3), 12, filter_thres=0).asnumpy().tolist())
    assert sampled[0] == sampled[1] != sampled[2]


def first_tokens(**options):
    """The set of tokens that come first in 200 sequences."""
    prime = tensor(np.tile(sequences(1, 3), (200, 1)))
    return set(model_with_positions().generate(prime, 1, seed=1, **options).asnumpy()[:, 0].tolist())


def tokens_by_likelihood():
    return (-run(model_with_positions(), sequences(1, 3))[0, -1]).argsort().tolist()


def test_filter_thres_keeps_the_most_likely_fraction_of_the_tokens():
    order = tokens_by_likelihood()
    for filter_thres, kept in [(0.9, 1), (0.7, 3), (0.5, 5), (0, 11)]:
        assert first_tokens(filter_thres=filter_thres, temperature=5) == set(order[:kept])


def test_generate_has_top_k_and_top_p_instead():
    order = tokens_by_likelihood()
    assert first_tokens(top_k=4, temperature=5) == set(order[:4])
    assert first_tokens(top_p=1e-6) == set(order[:1])
    assert len(first_tokens(top_p=1.0, temperature=5)) == NUM_TOKENS


def test_a_sequence_of_no_tokens_is_empty():
    assert model_with_positions().generate(prime(2, 3), 0).shape == (2, 0)
