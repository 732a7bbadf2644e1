from functools import cache
from itertools import islice

import mindspore as ms
import numpy as np
import pytest

from local_attention.decoding import DecodingSession, UncachedSession, generate_tokens
from tests.local_attention.cells import in_a_graph, run, tensor
from tests.local_attention.models import NGRAMS, NUM_TOKENS, sequences, transformer

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


@pytest.mark.parametrize("options", [{}, dict(exact_windowsize=False, use_abs_pos_emb=False)], ids=["exact", "whole"])
def test_greedy_tokens_are_those_of_the_full_pass(options):
    model, prompt = transformer(seed=1, **options), [3, 1, 4]
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
        assert session.length == 15  # all but the last one sampled
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


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate_tokens(shared_session(1), [], 3))


# LocalTransformer.generate


@cache
def model_with_positions():
    return transformer(seed=1)


def prime(*shape):
    return tensor(sequences(*shape))


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
