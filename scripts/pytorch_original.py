"""The PyTorch package ``local-attention`` beside this project's package of the same import name."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution

from local_attention.training.errors import UsageError


def import_original():
    """The original's module ``local_attention.transformer``, which leaves ``import local_attention`` as it was.

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


def original_arguments(config):
    """The keyword arguments with which the original's ``LocalTransformer`` is the model of a ``ModelConfig``.

    Raises:
        UsageError: for what the original cannot be.
    """
    try:
        return config.original_arguments()
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
