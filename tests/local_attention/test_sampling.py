import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from local_attention.sampling import draw, next_token_probabilities
from tests.local_attention.cells import examples
from tests.local_attention.reference import softmax

logits_of_any_kind = st.lists(st.floats(-30, 30), min_size=1, max_size=9)
top_ks = st.none() | st.integers(1, 12)
top_ps = st.none() | st.floats(0.01, 1)
JUST_BELOW_ONE = np.nextafter(1.0, 0.0)


@given(logits_of_any_kind, st.just(0) | st.floats(1e-3, 5), top_ks, top_ps)
@examples(300)
def test_the_probabilities_are_a_distribution(logits, temperature, top_k, top_p):
    p = next_token_probabilities(logits, temperature, top_k, top_p)
    assert p.shape == (len(logits),) and p.dtype == np.float64
    assert (p >= 0).all() and abs(p.sum() - 1) < 1e-12


@given(logits_of_any_kind, st.floats(0.1, 5))
@examples(100)
def test_without_further_options_they_are_the_softmax_of_the_divided_logits(logits, temperature):
    p = next_token_probabilities(logits, temperature)
    np.testing.assert_allclose(p, softmax(np.array(logits) / temperature), atol=1e-12)


@given(logits_of_any_kind)
@examples(100)
def test_temperature_zero_puts_all_weight_on_the_largest_logit(logits):
    p = next_token_probabilities(logits, temperature=0)
    assert p[np.argmax(logits)] == 1 and p.sum() == 1


def test_a_temperature_near_zero_overflows_nothing():
    assert next_token_probabilities([1.0, 3.0, 2.0], 1e-300).tolist() == [0, 1, 0]


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9, unique=True), st.integers(1, 12))
@examples(100)
def test_top_k_keeps_the_k_largest_in_their_proportions(logits, k):
    p, full = next_token_probabilities(logits, top_k=k), softmax(np.array(logits))
    largest = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    wanted = np.zeros(len(logits))
    wanted[largest] = full[largest] / full[largest].sum()
    np.testing.assert_allclose(p, wanted, atol=1e-12)


def test_top_k_keeps_no_more_than_k_of_equal_logits():
    assert np.count_nonzero(next_token_probabilities([0.0, 0.0, 0.0], top_k=2)) == 2


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9, unique=True), st.floats(0.01, 1))
@examples(200)
def test_top_p_keeps_the_smallest_set_of_most_likely_tokens_that_reaches_p(logits, top_p):
    full = softmax(np.array(logits))
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    sums = np.cumsum(full[ranked])
    assume(abs(sums - top_p).min() > 1e-9)  # or rounding decides
    kept = ranked[: 1 + np.count_nonzero(sums < top_p)]
    p = next_token_probabilities(logits, top_p=top_p)
    wanted = np.zeros(len(logits))
    wanted[kept] = full[kept] / full[kept].sum()
    np.testing.assert_allclose(p, wanted, atol=1e-12)


def test_top_p_that_is_reached_exactly_keeps_no_further_token():
    logits = np.log([0.5, 0.25, 0.25])
    np.testing.assert_allclose(next_token_probabilities(logits, top_p=0.5), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(next_token_probabilities(logits, top_p=0.51), [2 / 3, 1 / 3, 0], atol=1e-12)


@pytest.mark.parametrize("top_p", [1e-9, 1e-300, 0])
def test_a_tiny_top_p_keeps_the_most_likely_token(top_p):
    assert next_token_probabilities([0.0, 1.0, 0.5], top_p=top_p).tolist() == [0, 1, 0]


def test_top_p_counts_the_tokens_that_top_k_left_over():
    logits = np.log([0.4, 0.3, 0.2, 0.1])  # of the first three: 4/9, 3/9, 2/9
    p = next_token_probabilities(logits, top_k=3, top_p=0.75)  # 0.7 of all, but 0.78 of those left over
    np.testing.assert_allclose(p, [4 / 7, 3 / 7, 0, 0], atol=1e-12)


def test_top_p_counts_after_the_temperature():
    logits = np.log([0.4, 0.3, 0.3])
    assert np.count_nonzero(next_token_probabilities(logits, temperature=1.0, top_p=0.7)) == 2
    assert np.count_nonzero(next_token_probabilities(logits, temperature=0.05, top_p=0.7)) == 1


def test_a_logit_of_minus_infinity_is_never_drawn():
    assert next_token_probabilities([0.0, -np.inf, 0.0]).tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (JUST_BELOW_ONE, 3)],
)
def test_the_token_drawn_is_that_at_which_the_running_sum_passes_the_number(uniform, token):
    assert draw(np.array([0, 0.25, 0, 0.75, 0]), uniform) == token


@given(logits_of_any_kind, top_ks, top_ps, st.floats(0, 1, exclude_max=True))
@examples(300)
def test_a_token_of_no_probability_is_never_drawn(logits, top_k, top_p, uniform):
    p = next_token_probabilities(logits, 1.0, top_k, top_p)
    token = draw(p, uniform)
    assert p[token] > 0
    assert p[:token].sum() <= uniform + 1e-12 and uniform < p[: token + 1].sum() + 1e-12


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    p = np.array([0.1, 0.2, 0.0, 0.7])
    drawn = [draw(p, (i + 0.5) / 1000) for i in range(1000)]
    assert np.bincount(drawn, minlength=4).tolist() == [100, 200, 0, 700]


@pytest.mark.parametrize("options", [dict(top_k=0), dict(top_k=-1), dict(temperature=-0.5)])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match="expected temperature >= 0 and top_k >= 1"):
        next_token_probabilities([0.0, 1.0], **options)
