"""The run directory: where a run writes, and the checkpoint that it resumes from."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from mindspore import nn

from local_attention.dropout import set_dropout_step
from local_attention.training import checkpoint
from local_attention.training.checkpoint import Checkpoints, Metadata, remove_leftovers, write_text
from local_attention.training.config import RunConfig, TrainConfig
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.errors import CheckpointError, UsageError
from local_attention.training.schema import as_dict, flatten
from local_attention.training.state import RunState

if TYPE_CHECKING:
    from data import Corpus

# Settings that must be the same in a resumed run as in its checkpoint.
FIXED = (
    *("model.", "seed", "data.fingerprint", "optimizer.name"),
    *("train.seq_len", "train.batch_size", "train.grad_accum_every"),
)

log = logging.getLogger("train")


@dataclass(frozen=True)
class RunPaths:
    """A run directory, and the checkpoint to resume from, if any."""

    run_dir: Path
    checkpoint: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


def find_run_paths(config: RunConfig, experiment: str, distributed: Distributed = SINGLE_PROCESS) -> RunPaths:
    """Find out from ``run_dir`` and ``resume`` where the run writes and what it resumes from.

    ``resume=auto`` resumes the run in ``run_dir``, if there is one; ``resume=RUN_DIR`` that run, in place unless
    ``run_dir`` is another directory; ``resume=CHECKPOINT`` starts a new run from the state of the checkpoint.

    Args:
        config: the config of the run.
        experiment: part of the default run directory.
        distributed: the processes of the run, which all use the paths of the main process.

    Raises:
        UsageError: ``resume`` does not exist, or the run directory contains a run that would be overwritten.
    """
    return distributed.broadcast_object(lambda: _find_run_paths(config, experiment))


def _find_run_paths(config: RunConfig, experiment: str) -> RunPaths:
    new = Path("runs") / experiment / time.strftime("%Y-%m-%d_%H-%M-%S")
    run_dir = Path(config.run_dir) if config.run_dir else None
    if config.resume in (None, "auto"):
        run_dir = run_dir or new
        if config.resume is None:
            refuse_to_overwrite(run_dir)
        return RunPaths(run_dir, Checkpoints(run_dir / "checkpoints").find("last"))
    source = Path(config.resume)
    if not source.exists():
        raise UsageError(f"resume={source}: no such run directory or checkpoint")
    if run_dir and not (source.is_dir() and run_dir.resolve() == source.resolve()):
        refuse_to_overwrite(run_dir)
    if not source.is_dir():
        return RunPaths(run_dir or new, source)
    return RunPaths(run_dir or source, checkpoint_of(source, "last"))


def refuse_to_overwrite(run_dir: Path) -> None:
    if Checkpoints(run_dir / "checkpoints").complete():
        raise UsageError(f"{run_dir} already contains a run: continue it with resume=auto, or use another run_dir")


def checkpoint_of(run_dir: str | Path | None, name: str) -> Path:
    """Return the checkpoint "best" or "last" of a run, or the path ``name``.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if name not in ("best", "last"):
        return Path(name)
    if run_dir is None or not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: no such run directory")
    path = Checkpoints(Path(run_dir) / "checkpoints").find(name)
    if path is None:
        raise CheckpointError(f"{run_dir} contains no checkpoint: was the run ended before the first one?")
    return path


def provenance(config: RunConfig, corpus: Corpus, distributed: Distributed = SINGLE_PROCESS) -> Metadata:
    """Return what a checkpoint records of its origin: the config, the data and the number of workers."""
    data = {"name": corpus.name, "fingerprint": corpus.fingerprint}
    return {"config": as_dict(config), "data": data, "workers": distributed.world_size}


def settings(meta: Metadata) -> dict[str, Any]:
    """Return the :func:`provenance` in metadata as dotted keys; ``train.batch_size`` is that of all workers together.

    Settings that did not exist when the checkpoint was written have their defaults if their group exists.
    """
    config = meta["config"]
    values = flatten({group: values for group, values in as_dict(RunConfig()).items() if group in config})
    values |= flatten({**config, "data": meta.get("data", {})})
    if "train" in config:
        values["train.batch_size"] *= meta.get("workers", 1)
    return values


def check_same_run(
    config: RunConfig, corpus: Corpus, meta: Metadata, distributed: Distributed = SINGLE_PROCESS
) -> None:
    """Refuse to resume a run with changes that would make it another run; other changes are logged.

    Settings that did not exist when the checkpoint was written had their defaults. Groups of settings and data that the
    checkpoint does not record, as with imported weights, are not compared.

    Args:
        config: the current config.
        corpus: the current data.
        meta: the checkpoint's metadata, with its :func:`provenance`.
        distributed: the current processes.

    Raises:
        UsageError: naming the setting and both values.
    """
    before, now = settings(meta), settings(provenance(config, corpus, distributed))
    changed = []
    for key, value in sorted(before.items()):
        if value == now.get(key):
            continue
        if key.startswith(FIXED):
            several = key == "train.batch_size" and max(distributed.world_size, meta.get("workers", 1)) > 1
            what = f"{key} times the number of workers" if several else key
            raise UsageError(
                f"cannot continue: {what} was {value} in the run and is {now.get(key)} now; "
                "restore the old value, or start a new run in another run_dir"
            )
        if key in now and key not in ("run_dir", "resume"):
            changed.append(f"{key} from {value} to {now[key]}")
    if changed:
        log.info(f"changed since the checkpoint: {', '.join(changed)}")


def resume(
    paths: RunPaths,
    config: RunConfig,
    corpus: Corpus,
    model: nn.Cell,
    optimizer: nn.Optimizer,
    state: RunState,
    distributed: Distributed = SINGLE_PROCESS,
) -> None:
    """Restore model, optimizer and state from ``paths.checkpoint``, if there is one.

    In any case, all processes have the parameters of the main process afterwards.

    Raises:
        UsageError: the checkpoint is corrupt, or it is of another run; see :func:`check_same_run`.
    """
    if paths.checkpoint:
        path = paths.checkpoint
        tensors, meta = checkpoint.read(path) if distributed.is_main else ({}, {})
        meta = distributed.broadcast_object(lambda: meta)
        check_same_run(config, corpus, meta, distributed)
        if distributed.is_main:
            checkpoint.restore(tensors, model, optimizer)
        state.load_state_dict(meta)
        set_dropout_step(model, state.step * config.train.grad_accum_every)
    distributed.broadcast_parameters(checkpoint.named_parameters(model, optimizer).values())


def restore_best(paths: RunPaths, model: nn.Cell, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Load the best weights of the run in all processes."""
    if distributed.is_main and (best := Checkpoints(paths.checkpoints).find("best") or paths.checkpoint):
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
    lock = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another process is writing to {run_dir}: wait until it has ended, or use another run_dir"
        ) from None
    remove_leftovers(run_dir)
    remove_leftovers(Path(run_dir) / "checkpoints")
    write_text(Path(run_dir) / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    return lock


def announce(paths: RunPaths, model: nn.Cell, train: TrainConfig, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Log the size of the model and of a step, and the paths."""
    parameters = sum(parameter.size for parameter in model.trainable_params())
    micro_batches = f"{train.grad_accum_every} micro-batch{'es' if train.grad_accum_every > 1 else ''}"
    processes = f" in each of {distributed.world_size} workers" if distributed.world_size > 1 else ""
    if paths.checkpoint:
        log.info(f"resuming from {paths.checkpoint}")
    log.info(
        f"{parameters:,} parameters; {train.batch_size} sequences x {train.seq_len:,} bytes x {micro_batches} per step"
        f"{processes}; writing to {paths.run_dir}"
    )
