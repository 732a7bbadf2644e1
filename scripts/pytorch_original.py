"""Import the PyTorch package ``local-attention``, which has the same import name as this project's package."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

from local_attention.training.config import ModelConfig, as_dict
from local_attention.training.errors import UsageError


def import_original() -> ModuleType:
    """Import the original's ``local_attention.transformer``. ``import local_attention`` still gives this project's.

    Needs the parity extra: ``pip install -e '.[parity]'``.
    """
    try:
        folder = str(distribution("local-attention").locate_file(""))
    except PackageNotFoundError:
        sys.exit("error: expected the PyTorch package local-attention: pip install -e '.[parity]'")
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "local_attention"}
    sys.path.insert(0, folder)
    try:
        return import_module("local_attention.transformer")
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "local_attention"]:
            del sys.modules[name]
        sys.modules.update(ours)


def original_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments with which the original's ``LocalTransformer`` is the same model.

    Raises:
        UsageError: the original does not have an option.
    """
    if config.scale is not None:
        raise UsageError(f"model.scale={config.scale}: the original has no model with another scale than the default")
    if not config.use_rotary_pos_emb and not config.use_dynamic_pos_bias:
        raise UsageError(
            "model.use_rotary_pos_emb=false: the original has no model without rotary embeddings but one with "
            "model.use_dynamic_pos_bias=true"
        )
    if config.use_dynamic_pos_bias and config.look_backward != 1:
        raise UsageError(
            f"model.look_backward={config.look_backward} with model.use_dynamic_pos_bias=true: the original's bias is "
            "for one window back and no other number"
        )
    if config.max_ngram > 1:
        raise UsageError(f"model.max_ngram={config.max_ngram}: the original has no embeddings of n-grams")
    only_ours = {"scale", "use_rotary_pos_emb", "max_ngram", "ngram_buckets", "ngram_dim"}
    only_ours |= {"use_abs_pos_emb"}  # in the original, the embeddings are zeros instead
    return {key: value for key, value in as_dict(config).items() if key not in only_ours}
