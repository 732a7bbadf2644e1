"""Atomic checkpoints: written to a temporary file, flushed to disk, renamed.

A checkpoint is ``step-00001000.safetensors`` (weights under ``model.``; the optimizer's state under ``optimizer.``,
unless the weights were imported) and a JSON sidecar with everything else. The sidecar is written after the tensors and
contains their checksum: a checkpoint without a sidecar is incomplete, one with another checksum is corrupt. It also
contains ``best_step``, which tells the *best* checkpoint, the one with the lowest validation bpb. The symbolic links
``last`` and ``best`` are for people; nothing is lost where a copy of the directory lacks them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from local_attention.training.errors import CheckpointError, RunError

FORMAT = 1

log = logging.getLogger("train")

Tensors = dict[str, np.ndarray]
Metadata = dict[str, Any]


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)``, flush the file to disk, and rename it to ``path``."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write(partial)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors creates files that only their owner may read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Flush ``directory`` to disk, so that files renamed in it survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text))


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: where they are; created when the first one is saved.
        keep_last: how many of the newest checkpoints to keep; the best one is always kept.
    """

    def __init__(self, directory: str | Path, keep_last: int = 2) -> None:
        self.directory, self.keep_last = Path(directory), keep_last

    def save(self, tensors: Tensors, meta: Metadata, best: bool = False) -> Path:
        """Write a checkpoint and let ``last`` (and ``best``) point to it.

        Args:
            tensors: name to array.
            meta: what to store in the sidecar, with ``step`` and ``best_step``.
            best: whether this is the best checkpoint so far.

        Returns:
            The path of the checkpoint.

        Raises:
            RunError, OSError: a tensor is not finite, or the disk is full or not writable. Completed checkpoints are
                kept.
        """
        not_finite = [name for name, array in tensors.items() if not np.isfinite(array).all()]
        if not_finite:
            raise RunError(
                f"step {meta['step']:,}: {not_finite[0]} contains NaN or infinity, so no checkpoint was written"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.path(meta["step"])
        checksum = None

        def write(partial: Path) -> None:
            nonlocal checksum
            save_file(tensors, partial)
            checksum = sha256_of(partial)

        try:
            write_atomically(path, write)
        except SafetensorError as error:
            raise RunError(f"cannot write the checkpoint {path}: {error}") from None
        write_text(sidecar(path), json.dumps({"format": FORMAT, "sha256": checksum, **meta}, indent=1) + "\n")
        self.link("last", path)
        if best:
            self.link("best", path)
        for old in self.complete()[: -self.keep_last]:
            if old not in (path, best_of(path, meta)):
                old.unlink()
                sidecar(old).unlink()
        return path

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.safetensors"

    def link(self, name: str, path: Path) -> None:
        """Atomically let the link ``name`` point to ``path``, where the file system has links."""
        partial = self.directory / f".{name}.partial-{os.getpid()}"
        partial.unlink(missing_ok=True)
        with suppress(OSError):
            partial.symlink_to(path.name)
            os.replace(partial, self.directory / name)
        flush_directory(self.directory)

    def copy(self, path: Path) -> None:
        """Copy a checkpoint of another run, and the best one of that run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        meta = read_meta(path)
        for name, source in (("best", best_of(path, meta)), ("last", path)):
            if source:
                target = self.path(read_meta(source)["step"])
                write_atomically(target, functools.partial(shutil.copyfile, source))
                write_atomically(sidecar(target), functools.partial(shutil.copyfile, sidecar(source)))
                self.link(name, target)

    def complete(self) -> list[Path]:
        """Return the paths of all complete checkpoints, oldest first."""
        return [path for path in sorted(self.directory.glob("step-*.safetensors")) if sidecar(path).exists()]

    def find(self, name: str) -> Path | None:
        """Return the checkpoint ``last`` or ``best``, or the newest valid one if that is corrupt; None without any.

        Corrupt checkpoints are skipped with a warning.

        Raises:
            CheckpointError: all checkpoints are corrupt.
        """
        complete = self.complete()
        for path in reversed(complete):
            if (meta := read_or_warn(path)) is not None:
                best = best_of(path, meta) if name == "best" else path
                return best if best and best != path and read_or_warn(best) else path
        if complete:
            raise CheckpointError(
                f"all checkpoints in {self.directory} are corrupt: restore one of them, or use another run_dir"
            )
        return None


def best_of(path: Path, meta: Metadata) -> Path | None:
    """Return the best checkpoint of a run up to the one at ``path``, if it is still there.

    Args:
        path: a checkpoint.
        meta: its metadata. In those of old runs, the link ``best`` counts.
    """
    checkpoints = Checkpoints(path.parent)
    link = path.with_name((path.parent / "best").resolve().name)
    best = link if "best_step" not in meta else meta["best_step"] and checkpoints.path(meta["best_step"])
    return best if best in checkpoints.complete() and best.name <= path.name else None


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def read_or_warn(path: Path) -> Metadata | None:
    try:
        return read_meta(path)
    except CheckpointError as error:
        log.warning(f"{error}; trying another one")
        return None


def remove_leftovers(directory: str | Path) -> None:
    """Delete the incomplete files of a process that was killed while writing to the directory."""
    for path in Path(directory).glob(".*.partial-*"):
        path.unlink()
    for path in Path(directory).glob("step-*.json"):
        if not path.with_suffix(".safetensors").exists():
            path.unlink()


def sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_meta(path: Path) -> Metadata:
    """Read the metadata of a checkpoint and verify the checksum of its tensors.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another format.
    """
    try:
        meta, checksum = json.loads(sidecar(path).read_text()), sha256_of(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint, or its sidecar {sidecar(path).name} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"the checkpoint {path} has format {found}, expected {FORMAT}")
    if meta.pop("sha256", checksum) != checksum:  # the first checkpoints had no checksum
        raise CheckpointError(f"the checkpoint {path} cannot be read: its checksum differs from that in its sidecar")
    return meta


def read(path: str | Path) -> tuple[Tensors, Metadata]:
    """Read the tensors and the metadata of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another format.
    """
    path = Path(path).resolve()
    meta = read_meta(path)
    try:
        return load_file(path), meta
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from None


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the number of elements of each tensor of a checkpoint, reading only the header of its file."""
    with safe_open(path, "numpy") as file:
        names = file.keys()
        return {name: math.prod(file.get_slice(name).get_shape()) for name in names}


def named_parameters(model: nn.Cell, optimizer: nn.Optimizer | None = None) -> dict[str, ms.Parameter]:
    """Return the parameters that a checkpoint stores, by their names in it."""
    named = {f"model.{parameter.name}": parameter for parameter in model.get_parameters()}
    if optimizer is not None:
        weights = {parameter.name for parameter in model.get_parameters()}
        state = [parameter for parameter in optimizer.get_parameters() if parameter.name not in weights]
        named |= {f"optimizer.{parameter.name}": parameter for parameter in state}
        if (scaler := getattr(optimizer, "loss_scaler", None)) is not None:
            named |= {"loss_scaler.scale": scaler.scale_value, "loss_scaler.counter": scaler.counter}
    return named


def tensors_of(model: nn.Cell, optimizer: nn.Optimizer | None = None) -> Tensors:
    """Return the values of :func:`named_parameters` as arrays."""
    return {name: parameter.asnumpy() for name, parameter in named_parameters(model, optimizer).items()}


def restore(tensors: Tensors, model: nn.Cell, optimizer: nn.Optimizer | None = None) -> None:
    """Load the tensors of a checkpoint into a model and, if given, its optimizer.

    The parameters take over the memory of the tensors: a copy of the n-gram table would be the peak of a run. If the
    checkpoint contains only weights, as an imported one does, the optimizer is not changed. A run that continues in
    another precision begins with a new loss scale, or needs none.

    Raises:
        CheckpointError: naming a tensor that is missing, unexpected or of another shape. Nothing was changed.
    """
    if not any(name.startswith("optimizer.") for name in tensors):
        optimizer = None
    wanted = named_parameters(model, optimizer)
    wanted = {name: wanted[name] for name in wanted if name in tensors or not name.startswith("loss_scaler.")}
    given = {
        name
        for name in tensors
        if name in wanted or name.startswith("model.") or (optimizer is not None and name.startswith("optimizer."))
    }
    for name in sorted(given ^ set(wanted)):
        what = "lacks the" if name in wanted else "has an unexpected"
        raise CheckpointError(f"the checkpoint {what} tensor {name}: it is of another model or optimizer")
    for name, parameter in wanted.items():
        if tuple(parameter.shape) != tensors[name].shape:
            shapes = f"shape {tensors[name].shape} in the checkpoint, expected {tuple(parameter.shape)}"
            raise CheckpointError(f"{name} has {shapes}: it is of another model")
    for name, parameter in wanted.items():
        parameter.set_data(ms.Tensor.from_numpy(tensors[name]))
