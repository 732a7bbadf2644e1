"""What writes to the run directory. Only the main process does; the other processes have silent counterparts."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, NamedTuple

from mindspore import nn
from mindspore.train import Callback

from local_attention.training import run_dir, start
from local_attention.training.callbacks import Save, Saver, save_nothing
from local_attention.training.checkpoint import Checkpoints
from local_attention.training.config import RunConfig, as_dict
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.profile import Profile
from local_attention.training.run_log import NullRunLog, RunLog, log_to_file
from local_attention.training.state import RunState

if TYPE_CHECKING:
    from data import Corpus


class Writers(NamedTuple):
    """The metrics log, the function that saves checkpoints, and the callbacks that write something else."""

    run_log: RunLog | NullRunLog
    save: Save
    callbacks: list[Callback]


def open_run_dir(
    paths: run_dir.RunPaths,
    config: RunConfig,
    corpus: Corpus,
    model: nn.Cell,
    optimizer: nn.Optimizer,
    state: RunState,
    distributed: Distributed = SINGLE_PROCESS,
) -> Writers:
    """Create the run directory, start ``train.log``, and return what writes there in this process.

    A run that is resumed from a checkpoint of another directory gets copies of it and of the best one, so that the
    directory can be continued from the beginning. The summary of a run that continues is no longer true and is removed.

    Raises:
        UsageError: another run is writing to the directory.
    """
    lock = None
    if distributed.is_main:
        lock = run_dir.create(paths.run_dir, config)
        if paths.checkpoint and paths.checkpoint.resolve().parent != paths.checkpoints.resolve():
            Checkpoints(paths.checkpoints).copy(paths.checkpoint.resolve())
        if not state.finished:
            (paths.run_dir / "summary.json").unlink(missing_ok=True)
    distributed.barrier()
    log_to_file(paths.run_dir, distributed.rank)
    if lock is None:
        return Writers(NullRunLog(), save_nothing, [])
    checkpoints = Checkpoints(paths.checkpoints, config.train.keep_last)
    saver = Saver(checkpoints, model, optimizer, state, start.provenance(config, corpus, distributed))
    weakref.finalize(saver, os.close, lock)  # a process may run several runs, one after another
    callbacks = [Profile(paths.run_dir)] if config.train.profile else []
    return Writers(RunLog(paths.run_dir, state, as_dict(config)), saver, callbacks)
