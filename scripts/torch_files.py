"""Files of PyTorch weights: ``.safetensors``, and ``.pt`` or ``.pth``, which take PyTorch."""

import re
from pathlib import Path

from local_attention.training.errors import RunError, UsageError

ENDINGS = (".pt", ".pth", ".safetensors")
WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys under which checkpoints keep the state dict
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of data parallelism and of torch.compile


def require_ending(key, path):
    if not path.endswith(ENDINGS):
        raise UsageError(f"{key}={path}: expected a file that ends in {', '.join(ENDINGS)}")


def read_state(path):
    """The state dict in a file, ``{name: array}``.

    Raises:
        UsageError: for what cannot be read or is no state dict.
        RunError: for a file that takes PyTorch where there is none.
    """
    Path(path).stat()  # a file that is not there: an error that names it
    state = read_safetensors(path) if path.endswith(".safetensors") else read_pickled(path)
    return {PREFIXES.sub("", str(name)): array for name, array in state.items()}


def read_safetensors(path):
    import mindspore as ms  # with which NumPy knows bfloat16
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: ms.Tensor(array, ms.float32).asnumpy() for name, array in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def read_pickled(path):
    torch = import_torch(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile, PyTorch and others
        kind = type(error).__name__
        raise UsageError(f"{path}: expected what torch.save(model.state_dict(), FILE) writes, got a {kind}") from None
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        got = f"a {type(state).__name__}" + (f" of {', '.join(map(str, state))}" if isinstance(state, dict) else "")
        raise UsageError(f"{path}: expected a state dict, alone or as {' or '.join(WRAPPERS)} of a dict, got {got}")
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def write_state(path, state):
    """Write a state dict, ``{name: array}``, whole or not at all; raises :class:`RunError` as :func:`read_state`."""
    from local_attention.training.checkpoint import write_atomically

    if path.endswith(".safetensors"):
        from safetensors.numpy import save_file as save
    else:
        torch = import_torch(path)
        state = {name: torch.from_numpy(array) for name, array in state.items()}
        save = torch.save
    write_atomically(path, lambda partial: save(state, partial))


def import_torch(path):
    try:
        import torch
    except ImportError:
        raise RunError(f"{path} takes PyTorch: pip install torch, or use a .safetensors file instead") from None
    return torch
