"""What MindSpore 2.10 does otherwise than one expects, and that the workarounds work.

A test named "... needed" fails with a MindSpore that has changed: then the workaround it names can go.
"""

import gc
from typing import NamedTuple
from weakref import ref

import einops
import mindspore as ms
import numpy as np
import pytest
from einops._backends import get_backend
from mindspore import Parameter, Tensor, amp, nn, ops

from local_attention.backends.blocked import Attend
from local_attention.einops_mindspore import MindSporeBackend
from local_attention.mindspore_quirks import (
    EinopsBackend,
    TypedCell,
    addresses_of,
    assign_in_place,
    attach_hidden_parameter,
    call_without_checks,
    einops_steps,
    eval_mode,
    tanh,
)
from tests.local_attention.cells import both_modes, in_a_graph, run, tensor, value_and_gradients


def parameter(*values, name="weight"):
    return Parameter(tensor(np.array(values, float)), name=name)


class Scale(nn.Cell):
    """``x * weight``."""

    def __init__(self):
        super().__init__()
        self.weight = parameter(2.0, 3.0)

    def construct(self, x):
        return x * self.weight


ONES = np.ones(2)


class ScaleInALoop(Scale):
    """``x * weight ** count``."""

    def construct(self, x, count):
        i = Tensor(0, ms.int32)
        while i < count:
            x = x * self.weight
            i = i + 1
        return x


# call_without_checks


@both_modes
def test_a_cell_called_without_checks_computes_the_same(mode):
    cell = call_without_checks(Scale())
    for x in ([1, 2], [3, 4], [5, 6]):
        np.testing.assert_array_equal(run(cell, np.array(x, float)), np.array(x) * [2, 3])


@in_a_graph
def test_calling_without_checks_skips_them_and_is_needed(mode, monkeypatch):
    checked = []
    check = nn.Cell.compile_and_run

    def counting(cell, *args, **kwargs):
        checked.append(cell)
        return check(cell, *args, **kwargs)

    monkeypatch.setattr(nn.Cell, "compile_and_run", counting)
    ordinary, unchecked = Scale(), call_without_checks(Scale())
    for _ in range(3):
        run(ordinary, ONES)
        run(unchecked, ONES)
    assert (checked.count(ordinary), checked.count(unchecked)) == (3, 1)


# addresses_of, assign_in_place


@in_a_graph
def test_addresses_of_parameters_are_needed_as_set_data_does_not_reach_a_compiled_loop(mode):
    cell = ScaleInALoop()
    assert run(cell, ONES, 2).tolist() == [4, 9]
    before = addresses_of([cell.weight])
    cell.weight.set_data(tensor(np.array([5.0, 6.0])))
    assert addresses_of([cell.weight]) != before
    assert run(cell, ONES, 2).tolist() == [4, 9]  # what the weights were
    assert run(call_without_checks(ScaleInALoop()), ONES, 2).tolist() == [4, 9]


@in_a_graph
def test_a_graph_that_is_compiled_again_has_the_new_weights(mode):
    cell = ScaleInALoop()
    run(cell, ONES, 2)
    cell.weight.set_data(tensor(np.array([5.0, 6.0])))
    again = ScaleInALoop()
    again.weight = cell.weight
    assert run(again, ONES, 2).tolist() == [25, 36]


@in_a_graph
@pytest.mark.parametrize("unchecked", [False, True])
def test_values_assigned_in_place_reach_a_compiled_loop(mode, unchecked):
    cell = call_without_checks(ScaleInALoop()) if unchecked else ScaleInALoop()
    run(cell, ONES, 2)
    before = addresses_of([cell.weight])
    assign_in_place(cell.weight, np.array([5, 6], np.float32))
    assert addresses_of([cell.weight]) == before
    assert run(cell, ONES, 2).tolist() == [25, 36]


# eval_mode


class Mode(nn.Cell):
    """1 in training, else 0."""

    def construct(self, x):
        return x * 0 + (1 if self.training else 0)


@both_modes
def test_in_eval_mode_no_cell_is_in_training_and_afterwards_each_is_as_it_was(mode):
    model = nn.CellList([Mode(), nn.SequentialCell(Mode(), Mode())])
    cells = [cell for _, cell in model.cells_and_names()]
    before = []
    for cell, training in zip(cells, (True, False, False, True, False), strict=True):
        before.append(cell.add_flags(training=training).training)
    with pytest.raises(KeyboardInterrupt), eval_mode(cells):
        assert not any(cell.training for cell in cells)
        raise KeyboardInterrupt
    assert [cell.training for cell in cells] == before


@both_modes
def test_a_graph_compiled_for_training_is_not_the_one_of_eval_mode(mode):
    cell = Mode().set_train()
    for _ in range(2):
        assert run(cell, ONES).tolist() == [1, 1]
        with eval_mode([cell]):
            assert run(cell, ONES).tolist() == [0, 0]


# A call with *arguments in a loop: decoding.step avoids it


class Multiply(nn.Cell):
    def construct(self, x, y):
        return x * y


class CallInALoop(nn.Cell):
    """Calls a cell with arguments from a tuple."""

    def __init__(self, starred):
        super().__init__()
        self.starred, self.multiply = starred, Multiply()

    def construct(self, count, *inputs):
        i, x = Tensor(0, ms.int32), inputs[0]
        while i < count:
            pair = (x, inputs[1])
            x = self.multiply(*pair) if self.starred else self.multiply(pair[0], pair[1])
            i = i + 1
        return x


@in_a_graph
@pytest.mark.parametrize("starred", [True, False])
def test_avoiding_starred_calls_in_loops_is_needed_as_their_cells_are_never_freed(mode, starred):
    cell = CallInALoop(starred)
    assert run(cell, 3, ONES, 2 * ONES).tolist() == [8, 8]
    cell = ref(cell)
    gc.collect()
    assert (cell() is not None) == starred


# attach_hidden_parameter


class Counter(nn.Cell):
    """Counts its calls in a hidden parameter."""

    def __init__(self):
        super().__init__()
        attach_hidden_parameter(self, "calls", parameter(0.0, name="calls"))

    def construct(self, x):
        return x + ops.assign_add(self.calls, Tensor([1.0], ms.float32))


@both_modes
def test_a_hidden_parameter_is_used_and_updated_but_not_listed(mode):
    cell = Counter()
    assert [run(cell, np.zeros(1)).item() for _ in range(3)] == [1, 2, 3]
    assert cell.calls.asnumpy() == 3
    assert list(cell.get_parameters()) == cell.trainable_params() == []


def test_hiding_a_parameter_is_needed():
    cell = nn.Cell()
    cell.calls = parameter(0.0, name="calls")
    assert len(list(cell.get_parameters())) == 1


# tanh

FROM_MINUS_TO_PLUS_EIGHT = np.linspace(-8, 8, 2001)


@both_modes
def test_tanh_is_exact_and_needed(mode):
    exact = np.tanh(FROM_MINUS_TO_PLUS_EIGHT)
    x = tensor(FROM_MINUS_TO_PLUS_EIGHT)
    assert abs(tanh(x).asnumpy() - exact).max() < 2e-6
    assert abs(ops.tanh(x).asnumpy() - exact).max() > 5e-5  # else ops.tanh will do


# einops_mindspore: graphs refuse einops' own functions, so its private ones are called while the graph is compiled.


class ByEinops(nn.Cell):
    def construct(self, x):
        return einops.rearrange(x, "a b -> b a")


@in_a_graph
def test_cells_for_einops_are_needed(mode):
    with pytest.raises(RuntimeError, match="Unsupported statement 'Try'"):
        run(ByEinops(), np.ones((2, 3)))


def test_the_steps_of_einops_are_as_expected():
    """Of a split of heads, the order in which axes are moved; of a sum, which go; of a repetition, which come."""
    split, order, reduced, added, final, rank = einops_steps(
        "rearrange", "b n (h d) -> b h n d", (("h", 3),), (2, 5, 6)
    )
    assert (list(split), list(order), list(reduced), dict(added), rank) == ([2, 5, 3, 2], [0, 2, 1, 3], [], {}, 4)
    assert final is None or list(final) == [2, 3, 5, 2]
    _, order, reduced, _, final, _ = einops_steps("sum", "b n d -> d 1", (), (2, 3, 4))
    assert sorted(order[axis] for axis in reduced) == [0, 1] and list(final) == [4, 1]
    assert dict(einops_steps("repeat", "a -> a c", (("c", 3),), (4,))[3]) == {1: 3}


def test_einops_finds_the_backend_among_the_subclasses_of_its_base():
    assert issubclass(MindSporeBackend, EinopsBackend)
    assert isinstance(get_backend(tensor(ONES)), MindSporeBackend)


@pytest.mark.parametrize(("x", "right"), [(np.array([[1.0]], np.float32), True), (np.array([[256]], np.int32), True)])
def test_casts_to_booleans_are_needed_as_any_takes_bytes_of_other_types_for_them(x, right):
    assert ops.any(Tensor(x), 1).asnumpy().item() is not right
    assert ops.any(Tensor(x).astype(ms.bool_), 1).asnumpy().item() is right


# Graphs


class Pair(NamedTuple):
    first: object
    second: object


class Product(Scale):
    """The sum of ``weight * x * x``, through a pair."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def construct(self, x):
        pair = Pair(x * self.weight, x) if self.pair == "named" else (x * self.weight, x)
        return (pair[0] * pair[1]).sum()


@in_a_graph
def test_plain_tuples_are_needed_in_graphs_as_named_ones_cut_gradients(mode):
    """Therefore a MaskSpec is handed on as a tuple."""
    x = tensor(3 * ONES)
    plain, named = Product("plain"), Product("named")
    assert plain(x).asnumpy() == named(x).asnumpy() == 45
    assert [ops.grad(cell)(x).asnumpy().tolist() for cell in (plain, named)] == [[12, 18], [0, 0]]


class AttendByFunction(Attend):
    """With the function ``ops.softmax`` instead of the operator ``ops.Softmax``."""

    def weights(self, q, k, mask):
        return ops.softmax(self.matmul_nt(q, k) + mask, -1)

    def construct(self, q, k, v, mask):
        return self.matmul(self.weights(q, k, mask), v)


@in_a_graph
def test_operators_are_needed_where_a_cell_and_its_gradient_call_the_same(mode, rng):
    q, k, v, mask = (rng.standard_normal((2, 4, 4)) for _ in range(4))
    assert value_and_gradients(Attend(), [q, k, v, mask], q)[0].shape == (2, 4, 4)
    with pytest.raises(RuntimeError, match="func graph is empty"):
        value_and_gradients(AttendByFunction(), [q, k, v, mask], q)


# Types


class Inner(nn.Cell):
    """A sum that says that it is in float32."""

    def construct(self, x):
        return x.astype(ms.float32) * 1.5


def test_typed_cells_are_needed_as_to_float_casts_what_was_cast_to_float32():
    class Typed(TypedCell, Inner):
        pass

    x = tensor(np.ones((2, 2)))
    assert nn.SequentialCell(Inner()).to_float(ms.float16)(x).dtype == ms.float16
    assert nn.SequentialCell(Typed()).to_float(ms.float16)(x).dtype == ms.float32


LIMIT = 2.0


class WithModuleLevelName(nn.Cell):
    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, x):
        return self.matmul(x, x) * LIMIT


class TypedWithModuleLevelName(TypedCell, WithModuleLevelName):
    pass


def test_own_handling_of_level_o1_is_needed_as_it_knows_no_names_of_the_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it writes new source code
    x = tensor(np.ones((2, 2)))
    with pytest.raises(NameError, match="LIMIT"):
        amp.auto_mixed_precision(WithModuleLevelName(), "O1")(x)
    cell = TypedWithModuleLevelName()
    assert amp.auto_mixed_precision(cell, "O1")(x).dtype == ms.float32
    assert cell.compute_type == ms.float16
