"""The types that are computed in: "Types" in docs/local_attention.md, in code.

Cells compute in the type of their inputs and cast parameters to it; softmax, norms and losses take at least float32.
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore._c_expression import MixedPrecisionType
from mindspore.ops import constexpr

FLOATS = (ms.float16, ms.bfloat16, ms.float32, ms.float64)


def cast(x, dtype):
    """``x`` in a type, without an operator where it has that type already."""
    if x.dtype == dtype:
        return x
    return x.astype(dtype)


def wide_type(dtype):
    """The type of softmax, norms, losses and the sums within them, where ``dtype`` is computed in."""
    return ms.float64 if dtype == ms.float64 else ms.float32


def widen(x):
    """``x`` in its :func:`wide_type`."""
    return cast(x, wide_type(x.dtype))


def numpy_type(dtype: Any) -> type[np.floating]:
    """The type for NumPy's part in computing in ``dtype``, at least float32."""
    return np.float64 if dtype == ms.float64 else np.float32


def constant(array: np.ndarray, dtype: Any) -> ms.Tensor:
    """A constant of a graph, made by NumPy in float64, in a floating type."""
    return ms.Tensor(np.ascontiguousarray(array, numpy_type(dtype)), dtype)


def require_computable(dtype: Any) -> Any:
    """``dtype``, if it is a floating type that the device in use multiplies matrices in.

    Raises:
        ValueError: for another.
    """
    if dtype not in FLOATS:
        raise ValueError(f"expected float16, bfloat16, float32 or float64, got {dtype}")
    if dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU":
        raise ValueError(
            "MindSpore's operators for CPUs do not multiply matrices in bfloat16: use float32, which is the fastest "
            "there, or float16; or a GPU or Ascend"
        )
    return dtype


checked_type = constexpr(require_computable)  # for graphs

_FLAGS = {"fp16": ms.float16, "bf16": ms.bfloat16, "fp32": ms.float32}


class TypedCell(nn.Cell):
    """A cell whose ``to_float`` says what to compute in, and which casts by itself.

    MindSpore marks each cell within instead, shared ones included, and casts what every operator gets, so that no sum
    could be in float32.
    """

    compute_type = None  # set by ``to_float``; None: that of the inputs

    def add_flags(self, **flags: Any) -> nn.Cell:
        """As ``Cell.add_flags``; those that ``to_float`` gives are kept as ``compute_type``."""
        for name in _FLAGS.keys() & flags.keys():
            if flags.pop(name):
                self.compute_type = require_computable(_FLAGS[name])
                self.compile_cache.clear()  # of graphs in another type
                self.mixed_precision_type = MixedPrecisionType.NOTSET  # ends that of cells around this one
        return super().add_flags(**flags) if flags else self

    def typed(self, x):
        """An input in the type to compute in."""
        return x if self.compute_type is None else cast(x, self.compute_type)
