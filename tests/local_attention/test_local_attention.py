from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_attention import LocalAttention
from tests.local_attention import reference
from tests.local_attention.cells import both_modes, examples, run, value_and_gradients

RULES = [
    dict(causal=causal, exact_windowsize=exact, look_backward=back, look_forward=forward)
    for causal, exact, back, forward in product([True, False], [True, False], [0, 1, 2], [0, 1, 2])
    if not (causal and forward)
]


def rule_name(rule):
    causal, exact = ("causal" if rule["causal"] else "open"), ("exact" if rule["exact_windowsize"] else "whole")
    return f"{causal}-{exact}-back{rule['look_backward']}-forward{rule['look_forward']}"


every_rule = pytest.mark.parametrize("rule", RULES, ids=rule_name)


def qkv(rng, *shape):
    return rng.standard_normal((3, *shape))


@every_rule
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
def test_every_rule_at_every_length_is_full_attention_with_a_mask(rule, rotary, rng):
    for window_size, n in product([1, 3, 4], [1, 2, 4, 5, 11, 12]):
        q, k, v = qkv(rng, 2, n, 4)
        attention = LocalAttention(window_size, **rule, autopad=True, dim=4, use_rotary_pos_emb=rotary)
        wanted = reference.attention(q, k, v, rotary=rotary, window_size=window_size, **rule)
        np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5, err_msg=f"{window_size=}, {n=}")


@every_rule
def test_every_rule_has_the_gradients_of_full_attention_with_a_mask(rule, rng):
    check_gradients(rule, 3, rng.standard_normal((4, 1, 7, 4)))


@both_modes
@pytest.mark.parametrize("rule", [RULES[1], RULES[4], RULES[10], RULES[-1]], ids=rule_name)
def test_output_and_gradients_are_right_in_both_modes(mode, rule, rng):
    check_gradients(rule, 3, rng.standard_normal((4, 2, 5, 4)))


def check_gradients(rule, window_size, inputs):
    *inputs, cotangent = inputs
    definition = partial(reference.attention, rotary=True, window_size=window_size, **rule)
    value, gradients = value_and_gradients(LocalAttention(window_size, **rule, autopad=True, dim=4), inputs, cotangent)
    np.testing.assert_allclose(value, definition(*inputs), atol=1e-5)
    for gradient, wanted in zip(gradients, reference.numerical_gradients(definition, inputs, cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "rule",
    [
        dict(causal=True, exact_windowsize=True),  # in blocks of 128
        dict(causal=False, exact_windowsize=True, look_backward=1, look_forward=1),
        dict(causal=True, exact_windowsize=False),  # in blocks of 256
    ],
    ids=["exact", "exact-forward", "whole"],
)
@pytest.mark.parametrize("n", [100, 300, 512])  # less than a block, two windows not full, two windows
def test_a_window_of_several_blocks_is_full_attention_with_a_mask(rule, n, rng):
    q, k, v = qkv(rng, 1, n, 4)
    attention = LocalAttention(256, **rule, autopad=True, dim=4)
    assert attention.block == (128 if rule["exact_windowsize"] else 256)
    wanted = reference.attention(q, k, v, rotary=True, window_size=256, **rule)
    np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5)


def test_by_default_an_open_window_looks_one_back_and_one_forward(rng):
    q, k, v = qkv(rng, 1, 12, 4)
    wanted = reference.attention(q, k, v, window_size=2, look_backward=1, look_forward=1)
    np.testing.assert_allclose(run(LocalAttention(2), q, k, v), wanted, atol=1e-5)


def test_by_default_a_causal_window_looks_one_back_and_none_forward(rng):
    q, k, v = qkv(rng, 1, 12, 4)
    wanted = reference.attention(q, k, v, window_size=2, look_backward=1, look_forward=0, causal=True)
    np.testing.assert_allclose(run(LocalAttention(2, causal=True), q, k, v), wanted, atol=1e-5)


def test_without_dim_there_are_no_rotary_embeddings(rng):
    q, k, v = qkv(rng, 1, 8, 4)
    plain = run(LocalAttention(4), q, k, v)
    assert abs(plain - run(LocalAttention(4, dim=4), q, k, v)).max() > 0.01
    np.testing.assert_array_equal(plain, run(LocalAttention(4, dim=4, use_rotary_pos_emb=False), q, k, v))


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
@pytest.mark.parametrize("scale", [0.1, 1, 3.0])
def test_the_scale_replaces_the_root_of_the_head_size(scale, rotary, rng):
    q, k, v = qkv(rng, 2, 8, 4)
    attention = LocalAttention(4, scale=scale, dim=4 if rotary else None)
    wanted = reference.attention(q, k, v, window_size=4, look_forward=1, rotary=rotary, scale=scale)
    np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes_may_be_any_and_do_not_mix(leading, rng):
    q, k, v = qkv(rng, *leading, 8, 4)
    out = run(LocalAttention(4, dim=4, causal=True), q, k, v)
    assert out.shape == (*leading, 8, 4) and out.dtype == np.float32
    np.testing.assert_allclose(out, reference.attention(q, k, v, rotary=True, window_size=4, causal=True), atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 7, 9])
def test_autopad_without_causal_equals_the_unpadded_computation(n, rng):
    # windows that hold the whole sequence: no mask at all (the original lets the last queries attend to the padding)
    q, k, v = qkv(rng, 2, n, 4)
    unpadded = reference.softmax(q @ k.transpose(0, 2, 1) / 2) @ v
    np.testing.assert_allclose(run(LocalAttention(10, autopad=True), q, k, v), unpadded, atol=1e-5)
    np.testing.assert_allclose(run(LocalAttention(5, autopad=True), q, k, v), unpadded, atol=1e-5)
    np.testing.assert_allclose(run(LocalAttention(n), q, k, v), unpadded, atol=1e-5)


def test_autopad_of_whole_windows_changes_nothing(rng):
    inputs = qkv(rng, 2, 8, 4)
    np.testing.assert_array_equal(
        run(LocalAttention(4, dim=4, autopad=True), *inputs), run(LocalAttention(4, dim=4), *inputs)
    )


@pytest.mark.parametrize("look_forward", [0, 1, 2])
def test_scores_of_equal_vectors_depend_on_the_distance_alone_and_are_largest_at_none(look_forward):
    n = 12
    q = np.tile([1.0, -0.5, 0.3, 2.0], (1, n, 1))
    identity = np.eye(n)[None]  # as values they show the weights, four at a time
    attention = LocalAttention(4, look_backward=2, look_forward=look_forward, dim=4)
    weights = np.concatenate([run(attention, q, q, identity[..., c : c + 4]) for c in range(0, n, 4)], -1)[0]
    assert (weights.argmax(-1) == np.arange(n)).all()
    seen = reference.visibility(n, window_size=4, look_backward=2, look_forward=look_forward)
    of_distance = {}
    for i, j in np.argwhere(seen):
        of_distance.setdefault(abs(i - j), []).append(np.log(weights[i, j] / weights[i, i]))
    assert max(np.ptp(scores) for scores in of_distance.values()) < 1e-5
    assert len({round(scores[0], 4) for scores in of_distance.values()}) == len(of_distance)


@given(
    window_size=st.integers(1, 4),
    look_backward=st.integers(0, 2),
    look_forward=st.integers(0, 2),
    exact=st.booleans(),
    shift=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@examples(15)
def test_what_lies_out_of_sight_before_a_sequence_shifts_it_and_changes_nothing(
    window_size, look_backward, look_forward, exact, shift, seed
):
    attention = LocalAttention(
        window_size, False, look_backward, look_forward, exact_windowsize=exact, dim=4, autopad=True
    )
    if not exact:
        shift *= window_size
    out_of_sight = (look_backward + 1) * window_size
    inputs = np.random.default_rng(seed).standard_normal((3, shift + out_of_sight + 6, 4))
    late = run(attention, *inputs)[shift + out_of_sight :]
    early = run(attention, *inputs[:, shift:])[out_of_sight:]
    np.testing.assert_allclose(late, early, atol=1e-5)


@given(
    causal=st.booleans(),
    exact=st.booleans(),
    window_size=st.integers(1, 4),
    look_backward=st.integers(0, 2),
    look_forward=st.integers(0, 2),
    n=st.integers(1, 13),
    data=st.data(),
)
@examples(25)
def test_a_changed_key_and_value_changes_exactly_the_queries_that_see_it(
    causal, exact, window_size, look_backward, look_forward, n, data
):
    rule = dict(
        causal=causal,
        exact_windowsize=exact,
        look_backward=look_backward,
        look_forward=0 if causal else look_forward,
    )
    attention = LocalAttention(window_size, **rule, dim=2, autopad=True)
    q, k, v = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((3, n, 2))
    before = run(attention, q, k, v)
    j = data.draw(st.integers(0, n - 1))
    k[j] += 0.5
    v[j] += 3
    changed = (run(attention, q, k, v) != before).any(-1)
    assert (changed == reference.visibility(n, window_size=window_size, **rule)[:, j]).all()


@both_modes
@pytest.mark.parametrize(
    ("options", "shapes", "parts"),
    [
        (dict(window_size=4), [(1, 6, 2)] * 3, ["multiple of the window 4", "got 6"]),
        (dict(window_size=4, autopad=True), [(1, 4, 2), (1, 5, 2), (1, 4, 2)], ["(1, 4, 2)", "(1, 5, 2)"]),
        (dict(window_size=4), [(1, 4, 2), (1, 4, 2), (2, 4, 2)], ["(1, 4, 2)", "(2, 4, 2)"]),
        (dict(window_size=4, dim=4), [(1, 4, 2)] * 3, ["dim = 4", "(1, 4, 2)"]),
        (dict(window_size=4), [(4,)] * 3, ["(..., n, d)", "(4,)"]),
        (dict(window_size=4), [(1, 0, 2)] * 3, ["none of them empty", "(1, 0, 2)"]),
    ],
    ids=["no multiple", "k differs", "v differs", "wrong dim", "one axis", "empty"],
)
def test_inputs_that_do_not_fit_are_refused(mode, options, shapes, parts):
    with pytest.raises(ValueError) as error:
        run(LocalAttention(**options), *map(np.zeros, shapes))
    assert all(part in str(error.value) for part in parts)


@both_modes
def test_values_may_have_another_head_size_than_keys(mode, rng):
    q, k, v = rng.standard_normal((3, 2, 8, 6))
    narrow = run(LocalAttention(4, causal=True), q, k, v[..., :3])
    np.testing.assert_allclose(narrow, run(LocalAttention(4, causal=True), q, k, v)[..., :3], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(window_size=4, causal=True, look_forward=1), ["look_forward = 0", "got 1"]),
        (dict(window_size=4, dim=3), ["even head size", "dim = 3"]),
        (dict(window_size=0), ["window_size >= 1", "got 0"]),
        (dict(window_size=4, look_backward=-1), ["look_backward >= 0", "-1"]),
        (dict(window_size=4, look_forward=-2), ["look_forward >= 0", "-2"]),
    ],
    ids=["causal forward", "odd dim", "no window", "negative back", "negative forward"],
)
def test_options_that_do_not_fit_are_refused(options, parts):
    with pytest.raises(ValueError) as error:
        LocalAttention(**options)
    assert all(part in str(error.value) for part in parts)


def test_an_odd_dim_is_fine_without_rotary_embeddings(rng):
    q, k, v = qkv(rng, 1, 4, 3)
    attention = LocalAttention(4, dim=3, use_rotary_pos_emb=False)
    np.testing.assert_allclose(
        run(attention, q, k, v), reference.attention(q, k, v, window_size=4, look_forward=1), atol=1e-5
    )
