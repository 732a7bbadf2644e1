import mindspore as ms
import numpy as np
import pytest

from local_attention import LocalMHA
from tests.local_attention import reference
from tests.local_attention.cells import (
    assert_gradients,
    directions_or_entries,
    parameters,
    randomise,
    run,
    tensor,
    value_and_gradients,
)


def mha(**options):
    """A LocalMHA with parameters that matter, and those."""
    cell = LocalMHA(**dict(dim=6, window_size=3, dim_head=4, heads=2) | options)
    return cell, randomise(cell)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, dict(exact_windowsize=True, look_forward=1)),
        (dict(exact_windowsize=None), dict(exact_windowsize=True, look_forward=1)),
        (dict(exact_windowsize=False), dict(exact_windowsize=False, look_forward=1)),
        (dict(causal=True), dict(exact_windowsize=True, causal=True)),
        (dict(prenorm=True), dict(exact_windowsize=True, look_forward=1, prenorm=True)),
        (dict(look_backward=2, look_forward=0), dict(exact_windowsize=True, look_backward=2)),
        (dict(use_rotary_pos_emb=False), dict(exact_windowsize=True, look_forward=1, rotary=False)),
        (dict(scale=0.2), dict(exact_windowsize=True, look_forward=1, scale=0.2)),
        (dict(window_size=2), dict(exact_windowsize=True, look_forward=1, window_size=2)),
        (dict(qk_rmsnorm=True), dict(exact_windowsize=True, look_forward=1, qk_rmsnorm=True)),
        (dict(qk_rmsnorm=True, qk_scale=3), dict(exact_windowsize=True, look_forward=1, qk_rmsnorm=True, qk_scale=3)),
        (dict(gate_values_per_head=True), dict(exact_windowsize=True, look_forward=1, gate_values_per_head=True)),
        (
            dict(gate_values_per_head=True, prenorm=True),
            dict(exact_windowsize=True, look_forward=1, gate_values_per_head=True, prenorm=True),
        ),
        (dict(shared_qk=True), dict(exact_windowsize=True, look_forward=1, shared_qk=True)),
        (dict(use_xpos=True), dict(exact_windowsize=True, look_forward=1, xpos_scale_base=1)),
        (dict(use_xpos=True, xpos_scale_base=4), dict(exact_windowsize=True, look_forward=1, xpos_scale_base=4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [3, 40])  # few and many rows for the norm; with and without padding
def test_multi_head_attention_does_what_its_options_say(options, wanted, n, rng):
    cell, p = mha(**options)
    x = rng.standard_normal((2, n, 6))
    wanted = dict(heads=2, prenorm=False, rotary=True, window_size=3) | wanted
    np.testing.assert_allclose(run(cell, x), reference.mha(x, p, **wanted), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "more"),
    [(mode, dict(qk_rmsnorm=True, gate_values_per_head=True, shared_qk=True)) for mode in ("eager", "graph")]
    + [("eager", {})],
    indirect=["mode"],
)
@directions_or_entries
def test_multi_head_attention_and_its_gradient_in_both_modes(mode, more, every_entry, rng):
    cell, p = mha(causal=True, prenorm=True, heads=3, **more)
    x, cotangent = rng.standard_normal((2, 2, 5, 6))
    options = dict(heads=3, prenorm=True, rotary=True, window_size=3, causal=True, exact_windowsize=True, **more)

    def definition(x):
        return reference.mha(x, p, **options)

    value, gradients = value_and_gradients(cell, [x], cotangent)
    np.testing.assert_allclose(value, definition(x), atol=1e-5)
    assert_gradients(definition, [x], cotangent, gradients, every_entry)


def test_a_single_head_and_many_heads_of_any_size(rng):
    x = rng.standard_normal((2, 4, 6))
    for heads, dim_head in [(1, 2), (1, 8), (5, 2), (7, 6)]:
        cell, p = mha(heads=heads, dim_head=dim_head)
        wanted = reference.mha(
            x, p, heads=heads, prenorm=False, rotary=True, window_size=3, exact_windowsize=True, look_forward=1
        )
        np.testing.assert_allclose(run(cell, x), wanted, atol=1e-5)


def test_multi_head_attention_has_a_norm_only_with_prenorm_and_no_biases():
    names = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"}
    assert set(mha()[1]) == names
    assert set(mha(prenorm=True)[1]) == names | {"norm.gamma", "norm.beta"}


@pytest.mark.parametrize("name", ["dim", "dim_head", "heads", "window_size"])
def test_multi_head_attention_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} >= 1.* got 0"):
        mha(**{name: 0})


def test_multi_head_attention_hands_on_mask_and_bias(rng):
    cell, p = mha(causal=True)
    x, bias, mask = rng.standard_normal((2, 7, 6)), rng.standard_normal((2, 3, 6)), rng.random((2, 7)) < 0.6
    out = cell(tensor(x), mask=ms.Tensor(mask), attn_bias=tensor(bias)).asnumpy()
    options = dict(heads=2, prenorm=False, rotary=True, window_size=3, causal=True, exact_windowsize=True)
    np.testing.assert_allclose(out, reference.mha(x, p, **options, mask=mask, attn_bias=bias), atol=1e-5)


def test_multi_head_attention_drops_attention_weights_in_training_only(rng):
    cell, _ = mha(dropout=0.5)
    x = rng.standard_normal((2, 7, 6))
    cell.set_train(False)
    np.testing.assert_array_equal(run(cell, x), run(cell, x))
    cell.set_train()
    assert abs(run(cell, x) - run(cell, x)).max() > 1e-3


def test_each_option_of_multi_head_attention_adds_its_parameters():
    plain = set(mha()[1])
    assert set(mha(qk_rmsnorm=True)[1]) - plain == {"q_scale", "k_scale"}
    assert set(mha(gate_values_per_head=True)[1]) - plain == {"to_v_gate.weight", "to_v_gate.bias"}
    cell = LocalMHA(dim=6, window_size=3, qk_rmsnorm=True)
    assert (parameters(cell)["q_scale"] == 1).all() and (parameters(cell)["k_scale"] == 1).all()


def test_a_scale_beside_that_of_the_norm_is_refused():
    with pytest.raises(ValueError, match="qk_scale instead of scale"):
        mha(qk_rmsnorm=True, scale=0.5)


def test_multi_head_attention_refuses_what_local_attention_refuses():
    with pytest.raises(ValueError, match="look_forward = 0, got 2"):
        mha(causal=True, look_forward=2)
    with pytest.raises(ValueError, match="even head size, got dim_head = 5"):
        mha(dim_head=5)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="windowsize"):
        mha(windowsize=4)
