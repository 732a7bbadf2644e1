"""Import the PyTorch package ``local-attention``, which has the same import name as this project's package."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

from local_attention.training.config import ModelConfig
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
    try:
        return config.original_arguments()
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
