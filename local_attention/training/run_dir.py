"""The run directory: where a run writes, and the checkpoint that it resumes from or begins with."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import yaml
from mindspore import nn

from local_attention.training import checkpoint
from local_attention.training.checkpoint import Checkpoints, remove_leftovers, step_of, write_text
from local_attention.training.config import RunConfig, TrainConfig
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.errors import CheckpointError, UsageError
from local_attention.training.schema import as_dict

log = logging.getLogger("train")


@dataclass(frozen=True)
class RunPaths:
    """A run directory, and the checkpoint to resume from, or the one whose weights the run begins with, if any.

    ``is_new``: the directory has the default name and must be claimed; see :func:`claim`.
    """

    run_dir: Path
    checkpoint: Path | None
    init_from: Path | None = None
    is_new: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


def find_run_paths(config: RunConfig, experiment: str, distributed: Distributed = SINGLE_PROCESS) -> RunPaths:
    """Find out from ``run_dir``, ``resume`` and ``init_from`` where the run writes and what it starts from.

    ``resume=auto`` resumes the run in ``run_dir``, if there is one; ``resume=RUN_DIR`` that run, in place unless
    ``run_dir`` is another directory; ``resume=CHECKPOINT`` starts a new run from the state of the checkpoint.
    ``init_from`` is a checkpoint, or a run directory of which it means the best one. It is not used where there is a
    run to resume, so that the same command starts a run and continues it.

    Args:
        config: the config of the run.
        experiment: part of the default run directory.
        distributed: the processes of the run, which all use the paths of the main process.

    Raises:
        UsageError: ``resume`` or ``init_from`` does not exist, or the run directory contains a run that would be
            overwritten.
    """
    return distributed.broadcast_object(lambda: _find_run_paths(config, experiment))


def _find_run_paths(config: RunConfig, experiment: str) -> RunPaths:
    is_new = config.run_dir is None
    run_dir = Path(config.run_dir or Path("runs") / experiment / time.strftime("%Y-%m-%d_%H-%M-%S"))
    source = None if config.resume in (None, "auto") else Path(config.resume)
    if source and source.is_dir() and (is_new or run_dir.resolve() == source.resolve()):
        return RunPaths(source if is_new else run_dir, checkpoint_of(source, "last"))
    if config.resume != "auto" and not is_new:
        refuse_to_overwrite(run_dir)
    if source:
        return RunPaths(run_dir, checkpoint_at("resume", source, "last"), is_new=is_new)
    last = None if is_new else Checkpoints(run_dir / "checkpoints").find("last")
    if last or not config.init_from:
        return RunPaths(run_dir, last, is_new=is_new)
    return RunPaths(run_dir, None, checkpoint_at("init_from", Path(config.init_from), "best"), is_new)


def claim(paths: RunPaths, distributed: Distributed = SINGLE_PROCESS) -> RunPaths:
    """Create a run directory that has the default name, with a number if another run that began in this second has it.

    Returns:
        The paths with the directory that was created.
    """

    def create_first_free() -> RunPaths:
        for number in count(1):
            suffix = f"-{number}" if number > 1 else ""
            run_dir = paths.run_dir.with_name(paths.run_dir.name + suffix)
            try:
                run_dir.mkdir(parents=True)
            except FileExistsError:
                continue
            return replace(paths, run_dir=run_dir)
        raise AssertionError

    return distributed.broadcast_object(create_first_free) if paths.is_new else paths


def refuse_to_overwrite(run_dir: Path) -> None:
    if Checkpoints(run_dir / "checkpoints").complete():
        raise UsageError(f"{run_dir} already contains a run: continue it with resume=auto, or use another run_dir")


def checkpoint_of(run_dir: str | Path | None, name: str) -> Path:
    """Return the checkpoint "best" or "last" of a run, or the one at the path ``name``.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if name not in ("best", "last"):
        return without_link(Path(name))
    if run_dir is None or not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: no such run directory")
    path = Checkpoints(Path(run_dir) / "checkpoints").find(name)
    if path is None:
        raise CheckpointError(f"{run_dir} contains no checkpoint: was the run ended before the first one?")
    return path


def checkpoint_at(key: str, path: Path, name: str) -> Path:
    """Return the checkpoint that ``key=path`` means: ``name`` of a run directory, or the one at the path."""
    found = checkpoint_of(path, name) if path.is_dir() else without_link(path)
    if not found.exists():
        raise UsageError(f"{key}={path}: no such run directory or checkpoint")
    return found


def without_link(path: Path) -> Path:
    """Return the checkpoint that a path "…/best" or "…/last" means, also in a copy of a run without these links."""
    found = Checkpoints(path.parent).find(path.name) if path.name in ("best", "last") else None
    return found or path


def restore_best(
    paths: RunPaths, model: nn.Cell, distributed: Distributed = SINGLE_PROCESS, step: int | None = None
) -> None:
    """Load the best weights of the run in all processes, unless they are those of ``step``, which the model has."""
    if distributed.is_main and (best := Checkpoints(paths.checkpoints).find("best")) and step_of(best) != step:
        checkpoint.restore(checkpoint.read(best)[0], model)
    distributed.broadcast_parameters(model.get_parameters())


def create(run_dir: str | Path, config: RunConfig) -> int:
    """Create the directory and ``config.yaml``, which contains the whole config, enough to rebuild the model.

    Incomplete files of a process that was killed are removed.

    Returns:
        A file descriptor. While it is open, at the latest until the process ends, no other process can write there.

    Raises:
        UsageError: another process is writing to the directory.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    descriptor = lock(run_dir)
    remove_leftovers(run_dir)
    remove_leftovers(Path(run_dir) / "checkpoints")
    write_text(Path(run_dir) / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    return descriptor


def lock(run_dir: str | Path) -> int:
    """Lock a directory against other processes; returns and raises as :func:`create`."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"another process is writing to {run_dir}: wait until it has ended, or use another run_dir"
        ) from None
    return descriptor


def announce(paths: RunPaths, model: nn.Cell, train: TrainConfig, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Log the size of the model and of a step, and the run directory."""
    parameters = sum(parameter.size for parameter in model.trainable_params())
    micro_batches = f"{train.grad_accum_every} micro-batch{'es' if train.grad_accum_every > 1 else ''}"
    processes = f" in each of {distributed.world_size} workers" if distributed.world_size > 1 else ""
    log.info(
        f"{parameters:,} parameters; {train.batch_size} sequences x {train.seq_len:,} bytes x {micro_batches} per step"
        f"{processes}; writing to {paths.run_dir}"
    )
