import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from local_attention.decoding.sampling import Sampler, sampling_rule
from tests.local_attention.cells import both_modes, for_all, tensor
from tests.local_attention.reference import softmax

VOCABULARY = 5
ROWS = 400
EVENLY = (np.arange(ROWS) + 0.5) / ROWS
SAMPLER = Sampler(VOCABULARY)

logits_of_any_kind = st.lists(st.integers(-300, 300), min_size=5, max_size=5).map(lambda x: np.array(x) / 10)
different_logits = st.lists(st.integers(-90, 90), min_size=5, max_size=5, unique=True).map(lambda x: np.array(x) / 10)
top_ks = st.none() | st.integers(1, 7)
top_ps = st.none() | st.floats(0.01, 1)


def sampled(logits, uniforms, sampler=SAMPLER, **options):
    """The tokens sampled from ``logits`` by each of ``uniforms``."""
    rule = sampling_rule(len(logits), **options)
    rows = np.tile(np.array(logits, np.float32), (len(uniforms), 1))
    uniforms = np.array(uniforms, np.float32)[:, None]
    return sampler(tensor(rows), tensor(uniforms), *map(tensor, rule)).asnumpy()


def frequencies(logits, **options):
    """How often each token is sampled by evenly spaced numbers, its probability within 1 / ROWS."""
    return np.bincount(sampled(logits, EVENLY, **options), minlength=len(logits)) / ROWS


def assert_frequencies(logits, wanted, **options):
    np.testing.assert_allclose(frequencies(logits, **options), wanted, atol=1.01 / ROWS)


@both_modes
def test_tokens_are_sampled_as_often_as_their_probabilities_say(mode):
    p = np.array([0.1, 0.2, 1e-9, 0.45, 0.25])
    tokens = sampled(np.log(p), EVENLY, Sampler(VOCABULARY))
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / ROWS, p, atol=1.01 / ROWS)


@for_all(15, 50, logits_of_any_kind, st.floats(0.1, 5))
def test_temperature_divides_the_logits(logits, temperature):
    assert_frequencies(logits, softmax(logits / temperature), temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-300])
def test_temperature_zero_or_nearly_takes_the_most_likely(temperature):
    assert frequencies([1.0, 3.0, 2.0, -1e4, 2.999], temperature=temperature).tolist() == [0, 1, 0, 0, 0]


@for_all(15, 50, different_logits, st.integers(1, 7))
def test_top_k_keeps_the_k_largest_in_their_proportions(logits, k):
    kept = logits >= np.sort(logits)[-min(k, 5)]
    assert_frequencies(logits, softmax(np.where(kept, logits, -np.inf)), top_k=k)


def test_top_k_keeps_no_more_than_k_of_equal_logits():
    assert np.count_nonzero(frequencies([0.0] * 5, top_k=2)) == 2


@for_all(15, 50, different_logits, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_of_most_likely_tokens_that_reaches_p(logits, top_p):
    full = softmax(logits)
    ranked = np.argsort(-logits)
    sums = np.cumsum(full[ranked])
    assume(abs(sums - top_p).min() > 1e-5)  # or rounding decides
    kept = np.zeros(5)
    kept[ranked[: 1 + np.count_nonzero(sums < top_p)]] = 1
    assert_frequencies(logits, full * kept / (full * kept).sum(), top_p=top_p)


@pytest.mark.parametrize("top_p", [1e-9, 1e-300, 0])
def test_a_tiny_top_p_keeps_the_most_likely_token(top_p):
    assert frequencies([0.0, 1.0, 0.5, 0.9, 0.2], top_p=top_p).tolist() == [0, 1, 0, 0, 0]


def test_top_p_counts_the_tokens_that_top_k_left_over():
    logits = np.log([0.4, 0.3, 0.2, 0.06, 0.04])  # of the first three: 4/9, 3/9, 2/9
    # 0.7 of all, but 0.78 of those left over
    assert_frequencies(logits, [4 / 7, 3 / 7, 0, 0, 0], top_k=3, top_p=0.75)


def test_top_p_counts_after_the_temperature():
    logits = np.log([0.4, 0.3, 0.3, 1e-9, 1e-9])
    assert np.count_nonzero(frequencies(logits, top_p=0.6)) == 2
    assert np.count_nonzero(frequencies(logits, temperature=0.05, top_p=0.6)) == 1


@for_all(15, 50, different_logits, st.integers(1, 6), top_ks, st.sampled_from([0.3, 1, 1e38]))
def test_only_the_first_num_tokens_are_sampled_as_if_there_were_no_others(logits, num_tokens, top_k, temperature):
    first = logits[:num_tokens]
    kept = first >= np.sort(first)[-min(top_k or 5, len(first))]
    wanted = np.zeros(VOCABULARY)
    wanted[: len(first)] = softmax(np.where(kept, first / temperature, -np.inf))
    assert_frequencies(logits, wanted, top_k=top_k, temperature=temperature, num_tokens=num_tokens)


def test_the_most_likely_of_the_first_tokens_is_taken_at_temperature_zero():
    assert frequencies([0.0, 1.0, 0.5, 90.0, 0.2], temperature=0, num_tokens=3).tolist() == [0, 1, 0, 0, 0]


def test_a_logit_of_minus_infinity_is_never_sampled():
    assert_frequencies([0.0, -np.inf, 0.0, -np.inf, -np.inf], [0.5, 0, 0.5, 0, 0])


@for_all(30, 100, logits_of_any_kind, top_ks, top_ps)
def test_a_token_that_is_not_kept_is_never_sampled_whatever_the_number(logits, top_k, top_p):
    p = np.sort(softmax(logits))[::-1][:top_k]
    p = p / p.sum()
    kept = np.count_nonzero(np.cumsum(p) - p < (1 if top_p is None else top_p) + 1e-5)
    least = np.sort(logits)[::-1][kept - 1]
    tokens = sampled(logits, [0, np.nextafter(np.float32(1), np.float32(0)), 1.0], top_k=top_k, top_p=top_p)
    assert (logits[tokens] >= least).all()
    assert logits[tokens[0]] == logits.max()


def test_a_vocabulary_may_hold_a_single_token():
    assert sampled([0.3], [0.0, 0.9], Sampler(1)).tolist() == [0, 0]


@pytest.mark.parametrize("options", [dict(top_k=0), dict(top_k=-1), dict(temperature=-0.5), dict(num_tokens=0)])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match="expected temperature >= 0, top_k >= 1 and num_tokens >= 1"):
        sampling_rule(5, **options)
