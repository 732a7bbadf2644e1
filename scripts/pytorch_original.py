"""Import the PyTorch package ``local-attention``, which has the same import name as this project's package."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

from local_attention.training.config import ModelConfig
from local_attention.training.errors import UsageError

PARITY_PYTHON = Path(__file__).resolve().parents[1] / ".venv-parity/bin/python"  # set up by make parity


def folder_of_original() -> str | None:
    """Where the original is installed beside PyTorch; None if it is not."""
    try:
        return str(distribution("local-attention").locate_file(""))
    except PackageNotFoundError:
        return None


def python_with_original() -> str | None:
    """The Python that has the original: this one, or else that of ``make parity``; None without either."""
    if folder_of_original():
        return sys.executable
    return str(PARITY_PYTHON) if PARITY_PYTHON.exists() else None


def import_original() -> ModuleType:
    """Import the original's ``local_attention.transformer``. ``import local_attention`` still gives this project's.

    Where it is not installed, the program ends with a line that says how to run it.
    """
    folder = folder_of_original()
    if not folder:
        program = f".venv-parity/bin/python {sys.argv[0]}"
        sys.exit(f"error: expected PyTorch and its package local-attention: run make parity once, then {program}")
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
