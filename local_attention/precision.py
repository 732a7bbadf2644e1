"""The types that are computed in: "Types" in docs/local_attention.md, in code.

Cells compute in the type of their inputs and cast parameters to it; softmax, norms and losses take at least float32.
"""

from typing import Any

import mindspore as ms
import numpy as np
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
