"""Build models from configs and checkpoints."""

from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore.common.initializer import initializer

from local_attention.training.checkpoint import read, restore
from local_attention.training.config import ModelConfig
from local_attention.training.schema import as_dict, parse
from local_attention.transformer import LocalTransformer


def build_model(config: ModelConfig) -> LocalTransformer:
    """Build the ``LocalTransformer`` that a config describes, in float32."""
    return LocalTransformer(**as_dict(config))


def compute_in(model: LocalTransformer, precision: str) -> LocalTransformer:
    """Let a model compute in ``precision``, with its weights in float32; returns it."""
    if precision != "float32":
        model.to_float(getattr(ms, precision))
    return model


def zero_outputs(model: LocalTransformer) -> None:
    """Set the last weights of attention and feed-forward to zero, so that layers change nothing before training."""
    for layer in model.layers:
        for branch in (layer.attention, layer.feed_forward):
            weight = branch.to_out.weight
            weight.set_data(initializer("zeros", weight.shape, weight.dtype))


def load_model(checkpoint: str | Path, precision: str = "float32") -> tuple[LocalTransformer, dict[str, Any]]:
    """Load a model in evaluation mode, to compute in ``precision``, and the metadata of its checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing or corrupt.
    """
    tensors, meta = read(checkpoint)
    model = compute_in(build_model(parse(ModelConfig, meta["config"]["model"])), precision)
    restore(tensors, model)
    return model.set_train(False), meta
