"""From configs and checkpoints to models."""

from local_attention.training.checkpoint import read, restore
from local_attention.training.config import ModelConfig
from local_attention.training.keys import as_dict, parse
from local_attention.transformer import LocalTransformer


def build_model(config):
    """The ``LocalTransformer`` of a ``ModelConfig``."""
    return LocalTransformer(**as_dict(config))


def load_model(checkpoint):
    """The model of a checkpoint, in evaluation mode, and the checkpoint's metadata; raises ``CheckpointError``."""
    tensors, meta = read(checkpoint)
    model = build_model(parse(ModelConfig, meta["config"]["model"]))
    restore(tensors, model)
    return model.set_train(False), meta
