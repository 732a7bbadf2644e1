"""Where a run writes, and what it goes on from."""

import fcntl
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from local_attention.training.checkpoint import Checkpoints, remove_leftovers, write_text
from local_attention.training.config import RunConfig
from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.errors import CheckpointError, UsageError
from local_attention.training.keys import as_dict, flat

# What a continued run must share with the run that wrote the checkpoint.
FIXED = ("model.", "seed", "data.fingerprint", "optimizer.name")
FIXED += ("train.seq_len", "train.batch_size", "train.grad_accum_every")

log = logging.getLogger("train")


@dataclass(frozen=True)
class RunPaths:
    """A run directory, and the checkpoint to go on from, if any."""

    run_dir: Path
    checkpoint: Path | None

    @property
    def checkpoints(self):
        return self.run_dir / "checkpoints"


def find_run_paths(config, experiment):
    """Decide from ``run_dir`` and ``resume`` of a ``RunConfig`` where the run writes and what it continues.

    ``resume=auto`` continues the run in ``run_dir``, if there is one; ``resume=RUN_DIR`` that run, in place unless
    ``run_dir`` names another directory; ``resume=CHECKPOINT`` begins a new run with the checkpoint's state.

    Raises:
        UsageError: where ``resume`` leads to nothing, or the run directory holds a run that would be overwritten.
    """
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


def refuse_to_overwrite(run_dir):
    if Checkpoints(run_dir / "checkpoints").complete():
        raise UsageError(f"{run_dir} holds a run already: continue it with resume=auto, or name another run_dir")


def checkpoint_of(run_dir, name):
    """The checkpoint ``name`` (``best`` or ``last``) of a run, or the file ``name``.

    Raises:
        CheckpointError: where there is none.
    """
    if name not in ("best", "last"):
        return Path(name)
    if not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: no such run directory")
    path = Checkpoints(Path(run_dir) / "checkpoints").find(name)
    if path is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint: was the run ended before the first one?")
    return path


def origin(config, corpus, workers=SINGLE_PROCESS):
    """What a checkpoint keeps of where it came from: the config, which bytes, and how many workers."""
    data = {"name": corpus.name, "fingerprint": corpus.fingerprint}
    return {"config": as_dict(config), "data": data, "workers": workers.count}


def settings(origin):
    """An :func:`origin` as dotted keys; ``train.batch_size`` is that of all workers together.

    Of the groups of settings that are there, what is younger than they are has its default.
    """
    config = origin["config"]
    values = flat({group: values for group, values in as_dict(RunConfig()).items() if group in config})
    values |= flat({**config, "data": origin.get("data", {})})
    if "train" in config:
        values["train.batch_size"] *= origin.get("workers", 1)
    return values


def check_same_run(config, corpus, meta, workers=SINGLE_PROCESS):
    """Refuse to go on with other settings or bytes than the checkpoint's where that would not be the same run.

    Other changes are logged. A setting that is younger than the checkpoint had its default there. Groups of settings
    and bytes of which the checkpoint says nothing, as one of imported weights does, may be any.

    Args:
        config: a ``RunConfig``.
        corpus: the data of now.
        meta: the checkpoint's metadata, with its :func:`origin`.
        workers: those of now.

    Raises:
        UsageError: naming the setting and both values.
    """
    before, now = settings(meta), settings(origin(config, corpus, workers))
    changed = []
    for key, value in sorted(before.items()):
        if value == now.get(key):
            continue
        if key.startswith(FIXED):
            several = key == "train.batch_size" and max(workers.count, meta.get("workers", 1)) > 1
            what = f"{key} times the number of workers" if several else key
            raise UsageError(
                f"cannot continue: {what} was {value} in the run and is {now.get(key)} now; "
                "give the old value, or begin a new run with another run_dir"
            )
        if key in now and key not in ("run_dir", "resume"):
            changed.append(f"{key} from {value} to {now[key]}")
    if changed:
        log.info(f"changed since the checkpoint: {', '.join(changed)}")


def create(run_dir, config):
    """Make the directory, with ``config.yaml``: the whole config, enough to rebuild the model.

    What a process that was killed left half-written is removed.

    Returns:
        A descriptor: as long as it is open, until the process ends, no other one can write there.

    Raises:
        UsageError: where another process is writing there.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another process is writing to {run_dir}: wait for its end, or name another run_dir"
        ) from None
    remove_leftovers(run_dir)
    remove_leftovers(Path(run_dir) / "checkpoints")
    write_text(Path(run_dir) / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    return lock


def announce(place, model, train, workers=SINGLE_PROCESS):
    """Say how large the model is, what a step sees and where the run is."""
    parameters = sum(parameter.size for parameter in model.trainable_params())
    workers = f" of each of {workers.count} workers" if workers.count > 1 else ""
    log.info(
        f"{parameters:,} parameters; {train.grad_accum_every} x {train.batch_size} crops of {train.seq_len:,} bytes "
        f"a step{workers}; {'continuing' if place.checkpoint else 'writing'} {place.run_dir}"
    )
