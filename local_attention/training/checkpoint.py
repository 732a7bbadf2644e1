"""Checkpoints that are whole or not there: written beside, flushed, moved into place.

A checkpoint is ``step-00001000.safetensors`` (weights under ``model.``; the optimizer's state under ``optimizer.``,
unless the weights were imported) and a ``.json`` sidecar with what is no tensor. ``last`` and ``best`` are links to the
newest and the best one. The sidecar is written after the tensors, and a checkpoint counts as there once its sidecar is;
it holds their checksum, so that one that was damaged later is known as such.
"""

import hashlib
import json
import logging
import math
import os
from pathlib import Path

import mindspore as ms
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from local_attention.training.errors import CheckpointError, RunError

FORMAT = 1

log = logging.getLogger("train")


def write_atomically(path, write):
    """Call ``write(partial_path)``, flush what it wrote to the disk, then move it to ``path``."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write(partial)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush_directory(path.parent)


def flush_directory(directory):
    """Make renames within ``directory`` last through a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    write_atomically(path, lambda partial: partial.write_text(text))


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: created when the first one is saved.
        keep_last: how many of the newest stay; the best one always does.
    """

    def __init__(self, directory, keep_last=2):
        self.directory, self.keep_last = Path(directory), keep_last

    def save(self, tensors, meta, best=False):
        """Write ``tensors`` (name to array) and ``meta`` (with ``step``), then lead ``last`` (and ``best``) to them.

        Raises:
            RunError, OSError: for tensors that are not finite, and where the disk is full or cannot be written: then
                nothing is, and the checkpoints that were complete stay.
        """
        broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
        if broken:
            raise RunError(f"step {meta['step']:,}: {broken[0]} holds NaN or infinity, so no checkpoint was written")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{meta['step']:08d}.safetensors"
        checksum = None

        def write(partial):
            nonlocal checksum
            save_file(tensors, partial)
            checksum = checksum_of(partial)

        try:
            write_atomically(path, write)
        except SafetensorError as error:
            raise RunError(f"cannot write the checkpoint {path}: {error}") from None
        write_text(sidecar(path), json.dumps({"format": FORMAT, "sha256": checksum, **meta}, indent=1) + "\n")
        self.point("last", path)
        if best:
            self.point("best", path)
        self.prune()
        return path

    def point(self, name, path):
        """Let the link ``name`` lead to ``path``, at no instant to nothing."""
        partial = self.directory / f".{name}.partial-{os.getpid()}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(path.name)
        os.replace(partial, self.directory / name)
        flush_directory(self.directory)

    def prune(self):
        """Delete all but the newest ``keep_last`` and the ones that ``last`` and ``best`` lead to."""
        linked = {(self.directory / name).resolve().name for name in ("last", "best")}
        for path in self.complete()[: -self.keep_last]:
            if path.name not in linked:
                path.unlink()
                sidecar(path).unlink()

    def complete(self):
        """Paths of the complete checkpoints, oldest first."""
        return [path for path in sorted(self.directory.glob("step-*.safetensors")) if sidecar(path).exists()]

    def find(self, name):
        """The path that ``name`` leads to (``last`` or ``best``), or the newest one that is whole; None without any.

        A warning says which damaged ones are passed over.

        Raises:
            CheckpointError: where all are damaged.
        """
        complete = self.complete()
        named = self.directory / (self.directory / name).resolve().name
        for path in ([named] if named in complete else []) + [p for p in reversed(complete) if p != named]:
            try:
                read_meta(path)
            except CheckpointError as error:
                log.warning(f"{error}; looking for an older one")
            else:
                return path
        if complete:
            raise CheckpointError(
                f"all checkpoints in {self.directory} are damaged: restore one of them, or begin a new run elsewhere"
            )
        return None


def remove_leftovers(directory):
    """Delete what a process that was killed while it wrote left behind in the directory, if it is there."""
    for path in Path(directory).glob(".*.partial-*"):
        path.unlink()
    for path in Path(directory).glob("step-*.json"):
        if not path.with_suffix(".safetensors").exists():
            path.unlink()


def sidecar(path):
    return path.with_suffix(".json")


def checksum_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def read_meta(path):
    """The metadata of a checkpoint whose tensors are as they were written.

    Raises:
        CheckpointError: for a file that is missing, damaged or of another format.
    """
    try:
        meta, checksum = json.loads(sidecar(path).read_text()), checksum_of(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint, or one without its {sidecar(path).name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"the checkpoint {path} has format {found}, expected {FORMAT}")
    if meta.pop("sha256", checksum) != checksum:  # older ones have none
        raise CheckpointError(f"the checkpoint {path} cannot be read: its checksum is not that of its sidecar")
    return meta


def read(path):
    """The tensors (name to array) and the metadata of a checkpoint; raises ``CheckpointError`` as :func:`read_meta`."""
    path = Path(path).resolve()
    meta = read_meta(path)
    try:
        return load_file(path), meta
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from None


def shapes_of(path):
    """Name to number of elements, of the tensors of a checkpoint, from the head of its file alone."""
    with safe_open(path, "numpy") as file:
        names = file.keys()
        return {name: math.prod(file.get_slice(name).get_shape()) for name in names}


def named_parameters(model, optimizer=None):
    """What a checkpoint holds of a model and its optimizer: name to Parameter."""
    named = {f"model.{parameter.name}": parameter for parameter in model.get_parameters()}
    if optimizer is not None:
        weights = {parameter.name for parameter in model.get_parameters()}
        state = [parameter for parameter in optimizer.get_parameters() if parameter.name not in weights]
        named |= {f"optimizer.{parameter.name}": parameter for parameter in state}
    return named


def tensors_of(model, optimizer):
    """The values of :func:`named_parameters` as arrays."""
    return {name: parameter.asnumpy() for name, parameter in named_parameters(model, optimizer).items()}


def restore(tensors, model, optimizer=None):
    """Put the tensors of a checkpoint back; without ``optimizer`` only those of the model.

    One that holds weights alone, as an imported one does, leaves the optimizer as it is.

    Raises:
        CheckpointError: naming a tensor that is missing, left over or of another shape.
    """
    if not any(name.startswith("optimizer.") for name in tensors):
        optimizer = None
    wanted = named_parameters(model, optimizer)
    given = {name for name in tensors if optimizer is not None or name.startswith("model.")}
    for name in sorted(given ^ set(wanted)):
        what = "lacks the" if name in wanted else "has an unexpected"
        raise CheckpointError(f"the checkpoint {what} tensor {name}: it is of another model or optimizer")
    for name, parameter in wanted.items():
        if tuple(parameter.shape) != tensors[name].shape:
            shapes = f"shape {tensors[name].shape} in the checkpoint, expected {tuple(parameter.shape)}"
            raise CheckpointError(f"{name} has {shapes}: it is of another model")
    for name, parameter in wanted.items():
        parameter.set_data(ms.Tensor(tensors[name]))
