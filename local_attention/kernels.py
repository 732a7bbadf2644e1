"""The operators in C++ for CPUs, kernels.cpp.

They are optional: pip builds them where it finds a compiler. Without them, on other devices, and on systems other than
Linux, where MindSpore takes no operators in C++, MindSpore's own operators compute the same.
"""

import ctypes
import platform
from functools import cache
from importlib.util import find_spec

import mindspore as ms
from mindspore import nn, ops


@cache
def library() -> str | None:
    """Path of the library that pip built of kernels.cpp; None if there is none, or one for another machine."""
    spec = find_spec("local_attention._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        ctypes.CDLL(spec.origin)  # stays loaded, as its threads run until the process ends
    except OSError:
        return None
    return spec.origin


def kernels_run(cell: nn.Cell) -> bool:
    """Whether the operators are there, for the device in use and for the parameters of ``cell``."""
    in_float32 = all(parameter.dtype == ms.float32 for parameter in cell.get_parameters())
    on_cpu = platform.system() == "Linux" and ms.get_context("device_target") == "CPU"
    return library() is not None and in_float32 and on_cpu


def operator(name: str) -> ops.Custom:
    """An operator whose output has the shape of its first input."""
    return ops.Custom(f"{library()}:{name}", lambda x, *_: x, ms.float32, func_type="aot")
