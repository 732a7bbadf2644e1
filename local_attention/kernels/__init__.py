"""The operators in C++ for CPUs; README.md beside this file says what they compute.

They are optional: pip builds them where it finds a compiler. Without them, on other devices, and on systems other than
Linux, where MindSpore takes no operators in C++, MindSpore's own operators compute the same.
"""

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import mindspore as ms
from mindspore import nn, ops

from local_attention.mindspore_quirks import TypedCell


@cache
def library() -> str | None:
    """Path of the library that pip built; None if there is none, or one for another machine."""
    spec = find_spec("local_attention._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        ctypes.CDLL(spec.origin)  # stays loaded, as its threads run until the process ends
    except OSError:
        return None
    return spec.origin


@cache
def has_gemm() -> bool:
    """Whether the library finds the matrix products of the oneDNN that MindSpore brings."""
    function = getattr(ctypes.CDLL(library()), "has_gemm", None)  # None: built from former sources
    return function is not None and bool(function())


def multiply_in_bfloat16(wanted: bool) -> None:
    """Let linear layers within the operators round what they multiply to bfloat16, and sum in float32; or no longer.

    As ``torch.set_float32_matmul_precision("medium")``: everything else, weights and results included, stays float32.

    Raises:
        ValueError: the operators do not run here, or the processor has no such products.
    """
    path = library()
    function = getattr(ctypes.CDLL(path), "multiply_in_bfloat16", None) if path and has_gemm() else None
    if function is None and wanted:
        raise ValueError("the operators in C++ do not run here, and MindSpore's own have no such products")
    if function is not None and function(int(wanted)):
        raise ValueError("this processor has neither AVX512-BF16 nor AMX")


def kernels_run(cell: nn.Cell) -> bool:
    """Whether the operators are there, for the device in use and for the parameters of ``cell``."""
    # int32: the step counter of an optimizer
    in_float32 = all(parameter.dtype in (ms.float32, ms.int32) for parameter in cell.get_parameters())
    on_cpu = platform.system() == "Linux" and ms.get_context("device_target") == "CPU"
    return library() is not None and in_float32 and on_cpu


def training_kernels_run(cell: nn.Cell) -> bool:
    """Whether those for whole sequences run, too, which multiply matrices by oneDNN."""
    return kernels_run(cell) and has_gemm()


class Operator(ops.Custom):
    """``ops.Custom``, which cannot be copied; as it has no state, a copy of a cell may share it."""

    def __deepcopy__(self, memo: dict) -> "Operator":
        return self


def operator(name: str, shapes: Callable = lambda x, *_: x, outputs: int = 1) -> Operator:
    """An operator whose ``outputs`` have the ``shapes`` that a function gives for those of its inputs.

    Raises:
        RuntimeError: the library was built from other sources, which do not contain it.
    """
    if not hasattr(ctypes.CDLL(library()), name):
        raise RuntimeError(
            f"{library()} was built from other sources, without {name}: pip install -e . builds it again"
        )
    dtypes = ms.float32 if outputs == 1 else (ms.float32,) * outputs
    return Operator(f"{library()}:{name}", shapes, dtypes, func_type="aot")


class OperatorCell(TypedCell):
    """An :func:`operator` as a cell."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.operator = operator(*args)

    def construct(self, *inputs):
        return self.operator(*inputs)
