"""The device that MindSpore runs on, and what it says of the process."""

import logging
import os
import resource
import sys

import mindspore as ms

from local_attention.training.errors import UsageError

log = logging.getLogger("train")


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


def estimated_bytes(model, train):
    """Roughly what a run takes, in bytes: MindSpore, weights with gradients and the optimizer's state, activations.

    Within 15% of the peaks measured on a CPU for dim 256 to 512, depth 4 to 6, 4096 to 16,384 bytes a micro-batch.
    """
    table = 0 if model.ngram_emb is None else model.ngram_emb.embedding_table.size  # updated in place
    parameters = sum(parameter.size for parameter in model.trainable_params()) - table
    copies = 4 + (train.grad_accum_every > 1)  # weight, gradient, two moments; sums of gradients
    activations = 55 * model.dim * len(model.layers) * train.batch_size * train.seq_len
    return 300e6 + 4 * (table + copies * parameters + activations)


def warn_of_memory(model, train):
    """Say so if the run will probably not fit into this machine."""
    needed, there = estimated_bytes(model, train), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        log.warning(
            f"warning: this run takes about {needed / 1e9:.1f} GB, and this machine has {there / 1e9:.1f} GB: lower "
            "train.batch_size (and raise train.grad_accum_every), train.seq_len, model.dim or model.depth"
        )
