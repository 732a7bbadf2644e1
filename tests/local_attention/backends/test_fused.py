"""Attention by the fused operator, for sizes around its tiles of 64; and what all fused operators have in common."""

import ctypes
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from local_attention import LocalAttention, kernels
from local_attention.backends.blocked import BlockedAttention
from local_attention.backends.fused import TILE, FusedAttention
from tests.local_attention import reference
from tests.local_attention.backends import operators
from tests.local_attention.cells import (
    Loss,
    assert_gradients,
    both_modes,
    both_paths,
    in_a_graph,
    needs_fused,
    portable,
    run,
    tensor,
    value_and_gradients,
    value_and_parameter_gradients,
)
from tests.local_attention.golden import attention_definition
from tests.local_attention.models import sequences, transformer

pytestmark = needs_fused

CHOICES = dict(
    window_size=[1, 3, 16, 40, 100],
    length=[1, TILE - 1, TILE, TILE + 1, 150, 200],
    causal=[True, False],
    exact_windowsize=[True, False],
    look_backward=[0, 1, 2],
    look_forward=[0, 1, 2],
    shared_qk=[False, False, True],
    scale=[None, 0.7],
    position=["none", "rotary", "xpos", "xpos with a window in the call"],
    sizes=[(6, 6), (6, 3), (4, 9)],  # of a head of queries and keys, and of values
    batch_and_heads=[(1, 1), (2, 1), (1, 3), (2, 3)],
    mask=["none", "a row for all", "a row per sequence", "a row per head"],
    bias=["none", "one head", "all heads", "all heads, with minus infinity"],
)


class Attention(nn.Cell):
    """LocalAttention of ``q, k, v: (b, h, n, d)``, fused with heads side by side, as LocalMHA does it."""

    def __init__(self, options, mask, window_size=None):
        super().__init__()
        self.attention, self.mask, self.window_size = LocalAttention(**options), mask, window_size
        self.fused = isinstance(self.attention.attend, FusedAttention)

    def construct(self, q, k, v, attn_bias=None):
        if not self.fused:
            return self.attention(q, k, v, self.mask, None, attn_bias, self.window_size)
        b, heads, n, _ = q.shape
        q, k, v = self.side_by_side(q), self.side_by_side(k), self.side_by_side(v)
        window = self.attention.window_size if self.window_size is None else self.window_size
        out = self.attention.attend_projections(q, k, v, heads, window, self.mask, attn_bias)
        return out.reshape((b, n, heads, -1)).transpose((0, 2, 1, 3))

    def side_by_side(self, x):
        b, heads, n, d = x.shape
        return x.transpose((0, 2, 1, 3)).reshape((b, n, heads * d))


class Case:
    """A call with options and arguments drawn at random: ``inputs`` of the cell, ``cotangent`` of its output."""

    def __init__(self, seed, **given):
        rng = np.random.default_rng(seed)
        self.drawn = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()} | given
        draw = self.drawn
        b, heads = draw["batch_and_heads"]
        d, e = draw["sizes"]
        forward = 0 if draw["causal"] else draw["look_forward"]
        span = draw["window_size"] * (draw["look_backward"] + 1 + forward)
        rule = ("window_size", "causal", "exact_windowsize", "look_backward", "shared_qk", "scale")
        self.options = {name: draw[name] for name in rule} | dict(look_forward=forward, autopad=True)
        self.window_size = None
        if draw["position"] != "none":
            self.options["dim"] = d
        if draw["position"].startswith("xpos"):
            self.options |= dict(use_xpos=True, xpos_scale_base=max(span, 4))
        if draw["position"].endswith("call"):
            self.window_size, self.options["window_size"] = draw["window_size"], 7
        self.inputs = [rng.standard_normal((b, heads, draw["length"], size)) for size in (d, d, e)]
        self.cotangent = rng.standard_normal((b, heads, draw["length"], e))
        rows = {"a row for all": 1, "a row per sequence": b, "a row per head": b * heads}.get(draw["mask"])
        self.mask = None if rows is None else rng.random((rows, draw["length"])) < 0.7
        if draw["bias"] != "none":
            bias = rng.standard_normal((1 if draw["bias"] == "one head" else heads, draw["window_size"], span))
            if draw["bias"].endswith("infinity"):
                bias[rng.random(bias.shape) < 0.3] = -np.inf
            self.inputs.append(bias)

    def cell(self):
        return Attention(self.options, None if self.mask is None else ms.Tensor(self.mask), self.window_size)

    def definition(self, q, k, v, bias=None):
        options = attention_definition(vars(LocalAttention(**self.options).options), self.window_size)
        return reference.attention(q, k, v, mask=self.mask, attn_bias=bias, **options)


def check(case):
    """Output as defined in float64, and gradients as the portable backend has them."""
    value, gradients = value_and_gradients(case.cell(), case.inputs, case.cotangent)
    np.testing.assert_allclose(value, case.definition(*case.inputs), rtol=0, atol=1e-5, err_msg=str(case.drawn))
    other = portable(case.cell)
    assert isinstance(other.attention.attend, BlockedAttention)
    _, wanted = value_and_gradients(other, case.inputs, case.cotangent)
    for name, gradient, of_portable in zip(("q", "k", "v", "bias"), gradients, wanted):
        np.testing.assert_allclose(gradient, of_portable, rtol=0, atol=2e-5, err_msg=f"{name} {case.drawn}")


# Any options

FEW = range(30)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(range(30, 250), marks=pytest.mark.slow)], ids=["few", "many"])
def test_any_options_give_full_attention_and_its_gradients(seeds):
    for seed in seeds:
        check(Case(seed))


def test_the_few_options_are_varied():
    drawn = [Case(seed).drawn for seed in FEW]
    for name, values in CHOICES.items():
        assert all(any(case[name] == value for case in drawn) for value in values), name


@in_a_graph
@pytest.mark.parametrize("seed", [6, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1000, 1012))])
def test_any_options_give_full_attention_and_its_gradients_in_a_graph(mode, seed):
    check(Case(seed))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_definition_across_tiles(causal):
    given = dict(window_size=16, length=TILE + 16, look_backward=1, look_forward=1, position="xpos", shared_qk=False)
    given |= dict(sizes=(4, 3), batch_and_heads=(2, 1), bias="one head", mask="a row per sequence")
    case = Case(0, causal=causal, exact_windowsize=causal, **given)
    _, gradients = value_and_gradients(case.cell(), case.inputs, case.cotangent)
    assert_gradients(case.definition, case.inputs, case.cotangent, gradients)


# Each option by itself, at the borders of windows and tiles


WEIGHTS = dict(shared_qk=False, position="none", mask="none", bias="none", batch_and_heads=(1, 1))


@pytest.mark.parametrize("window_size", [1, 3, 16, 40, 63, 64, 65, 100])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_each_query_sees_the_keys_that_it_should_and_no_others(window_size, causal, exact):
    n = 2 * TILE + 7
    rule = dict(window_size=window_size, causal=causal, exact_windowsize=exact, look_backward=1)
    attention = LocalAttention(**rule, autopad=True)
    weights = run(attention, np.zeros((1, n, 2)), np.zeros((1, n, 2)), np.eye(n)[None])[0]  # as values show them
    seen = reference.visibility(n, **rule, look_forward=int(not causal))
    np.testing.assert_allclose(weights, seen / seen.sum(-1, keepdims=True), atol=1e-6)
    assert (weights[~seen] == 0).all()


@both_modes
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradients(mode, rng):
    n, hidden = 150, 70
    mask = np.arange(n)[None] >= hidden  # with it, causal queries see nothing up to there: a tile and a part of one
    options = dict(window_size=16, causal=True, dim=4, autopad=True)
    inputs, cotangent = list(rng.standard_normal((3, 1, 2, n, 4))), rng.standard_normal((1, 2, n, 4))
    inputs.append(rng.standard_normal((2, 16, 32)))
    inputs[-1][1, 5] = -np.inf  # and in the second head, no query at this place of its window
    value, (dq, dk, dv, dbias) = value_and_gradients(Attention(options, ms.Tensor(mask)), inputs, cotangent)
    for x in (value, dq, dk, dv):
        assert np.isfinite(x).all() and (x[:, :, :hidden] == 0).all()
        assert (x[:, 0, hidden + 1 :] != 0).any(-1).all()  # the first that sees a key sees no other: dq = 0
    assert (value[:, 1, 5::16] == 0).all() and (dq[:, 1, 5::16] == 0).all()
    assert np.isfinite(dbias).all() and (dbias[1, 5] == 0).all() and (dbias[0, 5] != 0).any()


def test_the_gradient_of_a_bias_that_hides_a_key_is_zero(rng):
    bias = rng.standard_normal((1, 40, 80))
    bias[0, :, ::3] = -np.inf
    inputs, cotangent = [*rng.standard_normal((3, 2, 1, 150, 4)), bias], rng.standard_normal((2, 1, 150, 4))
    options = dict(window_size=40, causal=True, autopad=True)
    _, (*_, dbias) = value_and_gradients(Attention(options, None), inputs, cotangent)
    assert (dbias[:, :, ::3] == 0).all() and (dbias != 0).mean() > 0.3 and np.isfinite(dbias).all()


def test_scores_of_any_size_overflow_nothing(rng):
    case = Case(0, **WEIGHTS, window_size=40, length=150, causal=True, scale=1e4)
    value, gradients = value_and_gradients(case.cell(), case.inputs, case.cotangent)
    np.testing.assert_allclose(value, case.definition(*case.inputs), atol=1e-5)
    _, wanted = value_and_gradients(portable(case.cell), case.inputs, case.cotangent)
    np.testing.assert_allclose(gradients[2], wanted[2], atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_tensors_that_are_views_are_read_as_they_are(rng):
    inputs = [tensor(x) for x in rng.standard_normal((3, 2, 150, 4))]
    views = [tensor(x.asnumpy().swapaxes(1, 2)).swapaxes(1, 2) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    attention = LocalAttention(16, autopad=True)
    np.testing.assert_array_equal(attention(*views).asnumpy(), attention(*inputs).asnumpy())


# What is not a number is not hidden


@both_paths
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_what_is_not_a_number_reaches_all_that_see_it(which, bad, rng):
    n, at = 3 * TILE, TILE + 30
    rule = dict(window_size=8, causal=True)
    inputs = list(rng.standard_normal((3, 1, n, 4)))
    inputs[which][0, at] = bad
    value, gradients = value_and_gradients(LocalAttention(**rule, dim=4), inputs, rng.standard_normal((1, n, 4)))
    sees = reference.visibility(n, **rule)[:, at] if which else np.arange(n) == at
    finite = np.isfinite(value[0]).all(-1)
    assert not finite[sees].any()
    assert finite[:TILE].all() and finite[2 * TILE + 16 :].all()  # 0 times NaN is NaN, but only within a tile
    assert not all(np.isfinite(gradient).all() for gradient in gradients)


def test_scores_that_are_all_not_numbers_give_no_zeros(rng):
    inputs = list(rng.standard_normal((3, 1, 100, 4)))
    inputs[1][:] = np.nan
    value, (dq, dk, dv) = value_and_gradients(LocalAttention(16, autopad=True), inputs, np.ones((1, 100, 4)))
    assert all(np.isnan(x).all() for x in (value, dq, dk, dv))


# The choice


@both_modes
@pytest.mark.parametrize("window_size", [4, 50, 100])  # up to 52 within float32 for this base
def test_a_window_in_the_call_that_is_too_large_for_the_decay_in_tiles_is_computed_by_the_portable_backend(
    mode, window_size, rng
):
    options = dict(causal=True, autopad=True, dim=4, use_xpos=True, xpos_scale_base=2)
    attention, inputs = LocalAttention(4, **options), rng.standard_normal((3, 2, 150, 4))
    assert isinstance(attention.attend, FusedAttention)
    out = attention(*map(tensor, inputs), window_size=window_size).asnumpy()
    wanted = reference.attention(*inputs, window_size=window_size, causal=True, rotary=True, xpos_scale_base=2)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    assert isinstance(LocalAttention(window_size, **options).attend, FusedAttention) == (window_size <= 52)


def test_the_largest_window_is_that_whose_decay_is_within_float32(rng):
    options = dict(causal=False, exact_windowsize=True, autopad=True, dim=4, use_xpos=True, xpos_scale_base=2)
    attention = LocalAttention(4, **options)
    assert attention.attend.max_window == (110 * 2 - TILE) // 4
    q, k, v = rng.standard_normal((3, 1, 300, 4))
    out = attention(*map(tensor, (1e-3 * q, k, v)), window_size=attention.attend.max_window).asnumpy()
    assert np.isfinite(out).all()
    assert LocalAttention(4).attend.max_window == math.inf


def test_other_types_take_the_portable_path(rng):
    inputs = rng.standard_normal((3, 2, 12, 4))
    attention = LocalAttention(4)
    assert isinstance(attention.attend, FusedAttention)
    out = attention(*(ms.Tensor(x, ms.float64) for x in inputs))
    assert out.dtype == ms.float64
    np.testing.assert_allclose(out.asnumpy(), reference.attention(*inputs, window_size=4, look_forward=1), atol=1e-5)


def test_without_the_library_the_portable_backend_computes_the_same(rng):
    inputs, options = rng.standard_normal((3, 2, 150, 4)), dict(window_size=16, autopad=True, dim=4)
    fused, other = LocalAttention(**options), portable(lambda: LocalAttention(**options))
    assert (type(fused.attend), type(other.attend)) == (FusedAttention, BlockedAttention)
    np.testing.assert_allclose(run(fused, *inputs), run(other, *inputs), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(use_xpos=True, qk_rmsnorm=True, gate_values_per_head=True),
        dict(use_dynamic_pos_bias=True, shared_qk=True, num_residual_streams=2),
        dict(causal=False, look_backward=2, use_abs_pos_emb=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [pytest.param("graph", marks=pytest.mark.slow), "eager"], indirect=True)
def test_a_model_has_the_same_loss_and_gradients_by_either_path(mode, options):
    def model():
        return transformer(max_seq_len=150, local_attn_window_size=40, depth=2, **options)

    x = sequences(2, 151)
    losses, gradients = zip(*[value_and_parameter_gradients(Loss(m), x) for m in (model(), portable(model))])
    np.testing.assert_allclose(*losses, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], atol=1e-4, err_msg=name)


# Threads


@pytest.fixture
def library():
    return ctypes.CDLL(kernels.library())


@pytest.mark.parametrize("changed", ["one input less", "another type"])
def test_operators_refuse_arguments_of_another_number_or_type(library, changed, monkeypatch):
    call, refused = operators.call, []

    def call_with_changed(library, name, inputs, shapes):
        if changed == "one input less" and name == "global_norm":  # takes any number
            return call(library, name, inputs, shapes)
        last = inputs[-1].astype(np.float64)
        with pytest.raises(ValueError, match=f"{name} returned 1"):
            call(library, name, inputs[:-1] if changed == "one input less" else [*inputs[:-1], last], shapes)
        refused.append(name)
        return call(library, name, inputs, shapes)

    monkeypatch.setattr(operators, "call", call_with_changed)
    assert len(list(operators.results(library))) == 51
    assert len(refused) == (13 if changed == "one input less" else 14)


def test_attention_refuses_a_decay_for_another_window(library, rng):
    inputs = operators.attention_inputs(rng)
    inputs[6] = inputs[6][:, :-1]
    with pytest.raises(ValueError, match="returned 2"):
        operators.call(library, "local_attention_forward", inputs, [inputs[2].shape, (6, 200)])


def test_operators_write_all_of_their_outputs_and_give_the_same_bits_again(library):
    first, again = (list(operators.results(library)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def test_threads_that_call_operators_at_once_do_not_disturb_each_other(library):
    """One gets the pool, the others compute by themselves."""
    alone = [list(operators.results(library, seed)) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda i: list(operators.results(library, i % 3)), range(12)))
    for i, results in enumerate(together):
        for one, other in zip(results, alone[i % 3], strict=True):
            np.testing.assert_array_equal(one, other)


def test_results_do_not_depend_on_the_number_of_cores(library):
    command = [sys.executable, operators.__file__, "1", kernels.library(), operators.onednn()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == operators.digest(library)


def test_a_loop_may_have_more_tasks_than_a_ticket_of_the_pool_has_room_for():
    """2 ** 20 of them, here one per sequence."""
    x = np.ones((2**20 + 1, 1, 1), np.float32)
    np.testing.assert_array_equal(run(LocalAttention(1, causal=True), x, x, x), x)
