"""The device that MindSpore uses, and the memory of the process."""

import logging
import os
import resource
import sys

import mindspore as ms

from local_attention import kernels
from local_attention.precision import require_computable
from local_attention.training.config import TrainConfig
from local_attention.training.errors import UsageError
from local_attention.transformer import LocalTransformer

log = logging.getLogger("train")


def use_device(
    target: str, precision: str = "float32", key: str = "device.precision", matmul_precision: str = "float32"
) -> None:
    """Compile static graphs for ``target``: CPU, GPU or Ascend, or "auto" for MindSpore's default.

    Args:
        target: the device.
        precision: the type that will be computed in.
        key: what gives the type on the command line, for the error.
        matmul_precision: "bfloat16" to let linear layers in C++ round what they multiply to it.

    Raises:
        UsageError: this installation of MindSpore does not support the target, or the target not the types.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    if target != "auto":
        try:
            ms.set_device(target)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"device.target={target} cannot be used by this installation of MindSpore: {reason}"
            ) from None
    try:
        require_computable(getattr(ms, precision))
    except ValueError as error:
        raise UsageError(f"{key}={precision}: {error}") from None
    try:
        kernels.multiply_in_bfloat16(matmul_precision == "bfloat16")
    except ValueError as error:
        raise UsageError(f"device.matmul_precision={matmul_precision}: {error}; use float32") from None


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process on the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def estimated_memory_bytes(model: LocalTransformer, train: TrainConfig) -> float:
    """Estimate the memory of a run: MindSpore, weights, gradients, optimizer state and activations.

    Within 15% of the peaks measured on a CPU for dim 256 to 512, depth 4 to 6, 4096 to 16,384 bytes per micro-batch; in
    float16 within 30%. That takes more there, as sums and products in it keep 16 bytes of index table per element.
    """
    table = 0 if model.ngram_emb is None else model.ngram_emb.embedding_table.size  # updated in place
    parameters = sum(parameter.size for parameter in model.trainable_params()) - table
    copies = 4 + (train.grad_accum_every > 1)  # weight, gradient, two moments; accumulated gradients
    numbers = 55 if train.precision == "float32" else 137
    activations = numbers * model.dim * len(model.layers) * train.batch_size * train.seq_len
    return 300e6 + 4 * (table + copies * parameters + activations)


def warn_if_memory_is_short(model: LocalTransformer, train: TrainConfig) -> None:
    """Log a warning if the run probably needs more memory than this machine has."""
    needed, available = estimated_memory_bytes(model, train), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        log.warning(
            f"warning: this run needs about {needed / 1e9:.1f} GB, and this machine has {available / 1e9:.1f} GB: "
            "lower train.batch_size (and raise train.grad_accum_every), train.seq_len, model.dim or model.depth"
        )
