"""The device that MindSpore runs on, and what it says of the process."""

import resource
import sys

import mindspore as ms

from local_attention.training.errors import UsageError


def use_device(target):
    """Compile static graphs for ``target``: CPU, GPU or Ascend; auto: what this installation of MindSpore is built for.

    Raises:
        UsageError: for a target that this installation does not support.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    if target == "auto":
        return
    try:
        ms.set_device(target)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device.target={target} cannot be used by this installation of MindSpore: {reason}") from None


def peak_memory_bytes():
    """The most memory that this process ever had resident on the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
