"""Workarounds for MindSpore 2.10, and what they work around; tests/local_attention/test_mindspore_quirks.py tells when
one is no longer needed, or no longer works.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from einops._backends import AbstractBackend
from einops.einops import _prepare_transformation_recipe, _reconstruct_from_shape_uncached
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import MixedPrecisionType
from mindspore.rewrite.common import namespace
from mindspore.train import amp

from local_attention.precision import cast, require_computable

# The base class by which einops finds a backend; private in einops 0.8.
EinopsBackend = AbstractBackend


def call_without_checks(cell: nn.Cell) -> nn.Cell:
    """Let MindSpore call a compiled cell without looking for changes in each of its cells, which takes 1 ms per call.

    The phase name "increment" is that of MindSpore's own decoding, for which it does so.
    """
    cell.phase = "increment"
    return cell


def addresses_of(parameters: Iterable[Parameter]) -> list[int]:
    """Where parameters lie in memory.

    A compiled graph with a loop keeps reading parameters where they were when it first ran, and ``Parameter.set_data``,
    which loads weights, may put them elsewhere. So such a graph has to be compiled again when this list changes.
    """
    return [parameter.data_ptr() for parameter in parameters]


def assign_in_place(parameter: Parameter, array: np.ndarray) -> None:
    """Give a parameter new values where it is, for the same reason: ``set_data`` would not reach a compiled graph."""
    ops.assign(parameter, Tensor(array))


@contextmanager
def eval_mode(cells: Iterable[nn.Cell]) -> Iterator[None]:
    """Switch dropout off meanwhile; afterwards each cell is as it was. ``set_train`` would set all cells alike.

    The phase goes with it, because graphs are kept by phase: one that was compiled for training has dropout.

    Args:
        cells: a model and all cells in it.
    """
    in_training = [(cell, cell.phase) for cell in cells if cell.training]
    for cell, _ in in_training:
        cell.phase = "predict"
        cell.add_flags(training=False)
    try:
        yield
    finally:
        for cell, phase in in_training:
            cell.phase = phase
            cell.add_flags(training=True)


def attach_hidden_parameter(cell: nn.Cell, name: str, parameter: Parameter) -> None:
    """Make a parameter a member of a cell that graphs can use and update, but that ``get_parameters`` does not list.

    ``Cell.__setattr__`` would register it; there is no other way to have state that is not saved or trained.
    """
    vars(cell)[name] = parameter


_FLAGS = {"fp16": ms.float16, "bf16": ms.bfloat16, "fp32": ms.float32}


class TypedCell(nn.Cell):
    """A cell that casts by itself. ``to_float`` and ``mindspore.amp`` only say what it computes in: ``compute_type``.

    MindSpore marks all cells within, shared ones included, and casts the inputs of marked cells, eagerly those of each
    operator, so that no norm could be in float32. Level "auto" of ``auto_mixed_precision`` replaces ``construct`` by a
    function that does so.
    """

    compute_type = None  # None: that of the inputs

    def add_flags(self, **flags: Any) -> nn.Cell:
        """As ``Cell.add_flags``; those of ``to_float`` set ``compute_type``."""
        for name in _FLAGS.keys() & flags.keys():
            if flags.pop(name):
                self.compute_type = require_computable(_FLAGS[name])
                self.mixed_precision_type = MixedPrecisionType.NOTSET  # eager: ends that of cells around this one
                self.compile_cache.clear()  # of graphs in another type
        return super().add_flags(**flags) if flags else self

    def typed(self, x):
        """An input in the type to compute in."""
        return x if self.compute_type is None else cast(x, self.compute_type)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "amp_strategy":
            self.to_float(value.get_amp_dtype())
        elif name != "construct" or getattr(value, "__globals__", None) is not vars(amp):
            super().__setattr__(name, value)


_rewrite = amp._auto_mixed_precision_rewrite


def _rewrite_or_compute_in(network: nn.Cell, dtype: Any, **lists: Any) -> nn.Cell:
    """Level O1 of ``auto_mixed_precision``: a :class:`TypedCell` gives float32, but computes in ``dtype``.

    MindSpore writes new source code for each cell, which knows no names of the module of the old one ("NameError").
    """
    if isinstance(network, TypedCell):
        return amp._OutputTo32(network.to_float(dtype))
    return _rewrite(network, dtype, **lists)


amp._auto_mixed_precision_rewrite = _rewrite_or_compute_in
namespace._subtree_black_list.append(TypedCell)  # within other networks, it is left as it is


class GradientByHand(TypedCell):
    """The base of a cell with a ``bprop``; its forward pass is that of another cell, which has none.

    In graphs ``Cell.recompute`` knows the operators of the backward pass by the name of their scope, which MindSpore
    sets only for gradients that it derives itself. Without it, compilation fails with "Graph cycle exists", or no
    memory is saved. Both passes of a cell have the same scope: hence the other cell.

    Args:
        args: for the next base, where ``bprop`` needs the methods of the other cell, too.
        forward: the other cell; by default one of the class of that base, with the same arguments.
    """

    def __init__(self, *args: Any, forward: nn.Cell | None = None) -> None:
        super().__init__(*args)
        bases = type(self).__mro__
        self.forward = bases[bases.index(GradientByHand) + 1](*args) if forward is None else forward

    def construct(self, *inputs):
        return self.forward(*inputs)

    def get_scope(self) -> str:
        return "Gradients/by_hand"


def keep_from_recompute(cell: nn.Cell) -> nn.Cell:
    """Let ``Cell.recompute`` of a cell that uses this one leave it unmarked, so that others can use it, too.

    Its operators are recomputed nevertheless: they are marked where they are called.
    """
    cell._has_config_recompute = True
    return cell


def tanh(x: Any) -> Any:
    """``2 sigmoid(2x) - 1``, with an error of 2e-6. ``ops.tanh`` is wrong by 1e-4 around ±5 on a CPU."""
    return ops.sigmoid(x * 2) * 2 - 1


def einops_steps(operation: str, pattern: str, axes: tuple[tuple[str, int], ...], shape: tuple[int, ...]) -> tuple:
    """The steps that einops takes for a pattern and a shape: private functions of einops 0.8.

    The parser of static graphs refuses einops' public functions ("Unsupported statement 'Try'").
    """
    recipe = _prepare_transformation_recipe(pattern, operation, tuple(name for name, _ in axes), len(shape))
    return _reconstruct_from_shape_uncached(recipe, list(shape), list(axes))
