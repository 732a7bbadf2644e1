"""What a run starts from: a checkpoint that it continues, the weights of another run, or random weights."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspore import nn

from local_attention.dropout import set_dropout_step
from local_attention.training import checkpoint
from local_attention.training.checkpoint import Metadata, best_of, step_of
from local_attention.training.config import ModelConfig, RunConfig, TrainConfig, fill_from_initial
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.errors import CheckpointError, UsageError
from local_attention.training.evaluate import eval_span
from local_attention.training.run_dir import RunPaths
from local_attention.training.schedule import learning_rate
from local_attention.training.schema import as_dict, flatten, parse
from local_attention.training.state import RunState

if TYPE_CHECKING:
    from data import Corpus

# Settings that must be the same in a resumed run as in its checkpoint.
FIXED = ("model.", "seed", "data.fingerprint", "optimizer.name", "train.seq_len")

# Settings whose product, the sequences per step, must be the same; train.batch_size is that of all workers together.
SEQUENCES_PER_STEP = ("train.batch_size", "train.grad_accum_every")

log = logging.getLogger("train")


def complete_config(
    config: RunConfig, paths: RunPaths, overrides: Sequence[str], distributed: Distributed = SINGLE_PROCESS
) -> RunConfig:
    """With ``init_from``, complete the config by the checkpoint; see :func:`fill_from_initial`."""
    source = paths.checkpoint or paths.init_from
    if not config.init_from or not source:
        return config
    meta = distributed.broadcast_object(lambda: checkpoint.read_meta(source.resolve()))
    return fill_from_initial(config, meta, overrides)


def provenance(config: RunConfig, corpus: Corpus, distributed: Distributed = SINGLE_PROCESS) -> Metadata:
    """Return what a checkpoint records of its origin: the config, the data and the number of workers."""
    train_fingerprint = hashlib.sha256(corpus.train.data).hexdigest()[:16]
    data = {"name": corpus.name, "fingerprint": corpus.fingerprint, "train_fingerprint": train_fingerprint}
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
    config: RunConfig,
    corpus: Corpus,
    meta: Metadata,
    distributed: Distributed = SINGLE_PROCESS,
    source: str | Path = "PATH",
) -> None:
    """Refuse to resume a run with changes that would make it another run; other changes are logged.

    Settings that did not exist when the checkpoint was written had their defaults. Groups of settings and data that the
    checkpoint does not record, as with imported weights, are not compared.

    Args:
        config: the current config.
        corpus: the current data.
        meta: the checkpoint's metadata, with its :func:`provenance`.
        distributed: the current processes.
        source: the run or checkpoint, for the advice in the error.

    Raises:
        UsageError: naming the setting and both values.
    """
    before, now = settings(meta), settings(provenance(config, corpus, distributed))
    sizes = [math.prod(values.get(key, 0) for key in SEQUENCES_PER_STEP) for values in (before, now)]
    fixed = list(FIXED) if sizes[0] == sizes[1] else [*FIXED, *SEQUENCES_PER_STEP]
    if before.get("data.train_fingerprint") == now["data.train_fingerprint"]:
        fixed.remove("data.fingerprint")  # only validation or test data differ
    changed = []
    for key, value in sorted(before.items()):
        if value == now.get(key):
            continue
        several = key == "train.batch_size" and max(distributed.world_size, meta.get("workers", 1)) > 1
        what = f"{key} times the number of workers" if several else key
        if key.startswith(tuple(fixed)):
            why = f" ({sizes[0]} sequences per step, now {sizes[1]})" if key in SEQUENCES_PER_STEP else ""
            fits = ", if they fit," if key.startswith("model.") else ""
            raise UsageError(
                f"cannot continue: {what} was {value} in the run and is {now.get(key)} now{why}; restore the old "
                f"value, or begin a new run with these weights{fits} in another run_dir: init_from={source}"
            )
        if key in now and key not in ("run_dir", "resume", "init_from"):
            changed.append(f"{what} from {value} to {now[key]}")
    if changed:
        log.info(f"changed since the checkpoint: {', '.join(changed)}")
    divided = [key for key in SEQUENCES_PER_STEP if key in before and before[key] != now[key]]
    if divided or meta.get("workers", 1) != distributed.world_size:
        log.info("the sequences of each step are the same as before, but divided otherwise: results differ by rounding")


def restore(
    paths: RunPaths,
    config: RunConfig,
    corpus: Corpus,
    model: nn.Cell,
    optimizer: nn.Optimizer,
    state: RunState,
    distributed: Distributed = SINGLE_PROCESS,
) -> RunConfig:
    """Restore model, optimizer and state from ``paths.checkpoint``, or the model from ``paths.init_from``, if any.

    In any case, all processes have the parameters and the clock of the main process afterwards.

    Returns:
        The config that the weights are trained with: ``config``, or, if the run is finished, that of the checkpoint.

    Raises:
        UsageError: the checkpoint is corrupt, or it is of another run or model; see :func:`check_same_run`.
    """
    state.measured_on = measured_on(corpus, config.train)
    if path := paths.checkpoint or paths.init_from:
        log.info(f"{'resuming from' if paths.checkpoint else 'beginning with the weights of'} {path}")
        tensors, meta = checkpoint.read(path) if distributed.is_main else ({}, {})
        meta = distributed.broadcast_object(lambda: meta | {"best_step": step_of_best(path.resolve(), meta)})
    if paths.checkpoint:
        source = config.resume if config.resume and config.resume != "auto" else paths.run_dir
        check_same_run(config, corpus, meta, distributed, source)
        if distributed.is_main:
            check_origin(config, meta, paths.run_dir)
            checkpoint.restore(tensors, model, optimizer)
        state.load_state_dict(meta)
        set_dropout_step(model, state.step * config.train.grad_accum_every)  # as if that had never been another number
    elif path and distributed.is_main:
        load_weights(tensors, meta, model, config)
        origin = {"path": str(path.resolve()), "step": meta["step"], "sha256": checkpoint.sha256_of(path)}
        state.init_from = {"source": os.path.abspath(str(config.init_from)), **origin}
    distributed.broadcast_parameters(checkpoint.named_parameters(model, optimizer).values())
    state.synchronise(distributed)
    if paths.checkpoint and state.finished:
        log.info(f"finished at step {state.step:,}; nothing to train: raise {state.reached_limit} to go on")
        return parse(RunConfig, meta["config"])
    if paths.checkpoint:
        check_best(state, meta, corpus, config.train)
        log_rise_of_learning_rate(config, meta, state)
    return config


def step_of_best(path: Path, meta: Metadata) -> int | None:
    best = best_of(path, meta)
    return step_of(best) if best else None


def check_origin(config: RunConfig, meta: Metadata, run_dir: Path) -> None:
    """With ``init_from``, refuse to continue a run that began with other weights."""
    if config.init_from is None:
        return
    if (meta.get("init_from") or {}).get("source") != os.path.abspath(config.init_from):
        raise UsageError(
            f"{run_dir} already contains a run that did not begin with the weights of {config.init_from}: continue it "
            "without init_from, or use another run_dir"
        )
    log.info(f"the run began with the weights of {config.init_from} and now continues with its own")


def load_weights(tensors: checkpoint.Tensors, meta: Metadata, model: nn.Cell, config: RunConfig) -> None:
    """Load the weights of a checkpoint into the model of a new run; raises :class:`UsageError` if they do not fit."""
    try:
        checkpoint.restore(tensors, model)
    except CheckpointError as error:
        before, now = as_dict(parse(ModelConfig, meta["config"]["model"])), as_dict(config.model)
        differing = [
            f"model.{key} is {value} in the checkpoint and {now[key]} here"
            for key, value in before.items()
            if value != now[key] and "dropout" not in key
        ]
        raise UsageError(f"init_from={config.init_from}: {', '.join(differing) or error}") from None


def measured_on(corpus: Corpus, train: TrainConfig) -> dict[str, Any]:
    """Return what evaluations are measured on; scores that are measured on something else cannot be compared."""
    data, start, stop = eval_span(corpus, "val", train.eval_bytes)
    digest = hashlib.sha256(data[max(start - 1, 0) : stop].tobytes()).hexdigest()[:16]
    return {"bytes": stop - start, "seq_len": train.eval_seq_len or train.seq_len, "fingerprint": digest}


def check_best(state: RunState, meta: Metadata, corpus: Corpus, train: TrainConfig) -> None:
    """Forget the best score if its weights are lost, or if evaluations now measure something else.

    The best checkpoint itself is kept until there is a new one.
    """
    if state.best_val_bpb is None:
        return
    if state.best_step is None:
        log.warning("the best checkpoint of the run is missing: the next evaluation begins a new best")
        state.best_val_bpb = None
        return
    now, before = measured_on(corpus, train), meta.get("measured_on")  # the first checkpoints did not record it
    before = before or measured_on(
        corpus, replace(train, eval_bytes=meta["config"]["train"]["eval_bytes"], eval_seq_len=None)
    )
    if before != now:
        key, what = ("bytes", "other bytes") if before["seq_len"] == now["seq_len"] else ("seq_len", "other sequences")
        log.info(
            f"evaluations now score {what} ({now[key]:,}, before {before[key]:,}): a new best begins, and "
            f"the {state.best_val_bpb:.3f} bpb of step {state.best_step:,} no longer count"
        )
        state.best_val_bpb = None


def log_rise_of_learning_rate(config: RunConfig, meta: Metadata, state: RunState) -> None:
    """Say so if changed settings raise the learning rate, as a later end of the run does to a schedule that decays."""
    if "schedule" not in meta["config"]:  # imported weights
        return
    recorded = parse(RunConfig, meta["config"])
    earlier = RunState(recorded.train.max_steps, recorded.train.max_minutes)
    earlier.load_state_dict(meta)
    earlier.synchronise(SINGLE_PROCESS)

    def rate(config: RunConfig, state: RunState) -> float:
        return learning_rate(config.schedule, config.optimizer.lr, state.step, state.progress)

    if rate(config, state) > 1.01 * rate(recorded, earlier):
        earlier.step -= 1  # the last step
        rise = f"from {rate(recorded, earlier):.2e} to {rate(config, state):.2e}"
        log.info(f"because of these changes, the learning rate rises {rise}")
