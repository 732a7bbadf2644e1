"""Read and write PyTorch weights: ``.safetensors``; and ``.pt``, ``.pth``, ``.ckpt`` and ``.bin``, with PyTorch."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np

from local_attention.training.errors import RunError, UsageError

ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
State = dict[str, np.ndarray]


def require_ending(key: str, path: str) -> None:
    if not path.endswith(ENDINGS):
        raise UsageError(f"{key}={path}: expected a file that ends in {', '.join(ENDINGS)}")


def read_state(path: str) -> State:
    """Read the tensors in a file, name to array; those in nested dictionaries have names joined by dots.

    Raises:
        UsageError: the file cannot be read or contains no tensors.
        RunError: the file needs PyTorch, which is not installed.
    """
    Path(path).stat()  # raises an error that names a missing file
    return read_safetensors(path) if path.endswith(".safetensors") else read_pickled(path)


def read_safetensors(path: str) -> State:
    import mindspore as ms  # makes bfloat16 known to NumPy
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: ms.Tensor(array, ms.float32).asnumpy() for name, array in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def read_pickled(path: str) -> State:
    torch = import_torch(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and PyTorch raise many types
        expected = f"{path}: expected what torch.save(model.state_dict(), FILE) writes, got a {type(error).__name__}"
        why = "; objects other than tensors are not loaded, as they may run code" * isinstance(error, UnpicklingError)
        raise UsageError(expected + why) from None
    tensors = tensors_in(state, torch.Tensor)
    if not tensors:
        got = f"a {type(state).__name__}" + (f" of {', '.join(map(str, state))}" if isinstance(state, dict) else "")
        raise UsageError(f"{path}: expected a state dict, alone or in a dict, got {got}")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def tensors_in(content: Any, kind: type, prefix: str = "") -> dict[str, Any]:
    """The tensors in nested dictionaries, ``{"a": {"b": tensor}} -> {"a.b": tensor}``."""
    found: dict[str, Any] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        found |= {f"{prefix}{name}": value} if isinstance(value, kind) else tensors_in(value, kind, f"{prefix}{name}.")
    return found


def write_state(path: str, state: dict[str, Any]) -> None:
    """Atomically write a state dict, name to array; raises :class:`RunError` like :func:`read_state`."""
    from local_attention.training.checkpoint import write_atomically

    if path.endswith(".safetensors"):
        from safetensors.numpy import save_file as save
    else:
        torch = import_torch(path)
        state = {name: torch.from_numpy(array) for name, array in state.items()}
        save = torch.save
    write_atomically(path, lambda partial: save(state, partial))


def import_torch(path: str) -> ModuleType:
    try:
        import torch
    except ImportError:
        raise RunError(f"{path} needs PyTorch: pip install torch, or use a .safetensors file instead") from None
    return torch
