"""Dynamic evaluation: each sequence is scored, then learned from (Krause et al. 2018, arXiv 1709.07432)."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import yaml
from mindspore import Tensor, nn

from local_attention.training.checkpoint import Checkpoints, read, read_meta, restore, write_text
from local_attention.training.config import OptimizerConfig, TrainConfig
from local_attention.training.errors import RunError
from local_attention.training.evaluate import Evaluator, Score, tokens_of
from local_attention.training.optimizer import build_optimizer, loss_scaler
from local_attention.training.run_dir import lock
from local_attention.training.run_log import RunLog
from local_attention.training.schema import parse
from local_attention.training.state import RunState
from local_attention.training.step import TrainStep

log = logging.getLogger("evaluate")


def load_step(checkpoint: str | Path, model: nn.Cell, rate: float, precision: str = "float32") -> TrainStep:
    """Build the train step that a run would continue with, for one sequence.

    Args:
        checkpoint: the weights, which are loaded into ``model``, and the optimizer's state. Imported weights have none;
            they, and their optimizer, begin with the defaults.
        model: a model as in the checkpoint.
        rate: the learning rate, as a fraction of ``optimizer.lr``.
        precision: the type that the model computes in.
    """
    tensors, meta = read(checkpoint)
    config, train = parse(OptimizerConfig, meta["config"].get("optimizer", {})), meta["config"].get("train", {})
    scaler = loss_scaler(precision, train.get("loss_scale", TrainConfig.loss_scale))
    optimizer = build_optimizer(config, model.trainable_params(), scaler)
    restore(tensors, model, optimizer)
    if not any(name.startswith("optimizer.") for name in tensors):
        log.info(f"the checkpoint has no optimizer: learning with a new {config.name}, optimizer.lr={config.lr:g}")
    step = TrainStep(model, optimizer, 1, train.get("clip_norm", TrainConfig.clip_norm))
    step.set_learning_rate(rate * config.lr)
    return step


def dynamic_score(
    step: TrainStep,
    data: np.ndarray,
    start: int,
    stop: int,
    seq_len: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Score:
    """Score ``data[start:stop]`` in sequences of ``seq_len`` bytes, and take a step with each after it was scored.

    Each byte is predicted from those before it in its sequence, as by an :class:`Evaluator`, and by weights that have
    seen only earlier sequences. There is no dropout.

    Args:
        step: a step with one micro-batch; it changes its model and its optimizer.
        data: ``(n,)`` uint8.
        start, stop: the span.
        seq_len: bytes per sequence; the last one may be shorter.
        progress: wraps the range of the positions where sequences begin, like ``tqdm``.

    Raises:
        RunError: a loss is NaN or infinite. Where only the gradient is, the weights remain and the loss counts.
    """
    step.set_train()
    model = step.network.model.set_train(False)  # without dropout
    rest = stop - (stop - start) % seq_len  # where the last, shorter sequence begins
    nats = []
    for begin in progress(range(start, rest, seq_len)):
        tokens = tokens_of(data, begin, begin + seq_len)
        loss, _, _ = step(Tensor(tokens[None, None]))  # the loss before the update
        nats.append(seq_len * require_finite(float(loss.asnumpy()), begin - start))
    if rest < stop:
        bpb, scored = Evaluator(model, seq_len, 1)(data, rest, stop)
        nats.append(scored * math.log(2) * require_finite(bpb, rest - start))
    return Score(math.fsum(nats) / (stop - start) / math.log(2), stop - start)


def require_finite(loss: float, position: int) -> float:
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss} after {position:,} bytes: lower dynamic_rate")
    return loss


def record_score(run_dir: str | Path, split: str, score: Score, rate: float) -> bool:
    """Add the dynamic score of a run's best weights to its summary, metrics and TensorBoard events.

    Returns:
        False, with nothing recorded, where the run has not ended.

    Raises:
        UsageError: another process is writing to the directory.
    """
    run_dir = Path(run_dir)
    path, descriptor = run_dir / "summary.json", lock(run_dir)
    try:
        last = Checkpoints(run_dir / "checkpoints").find("last")
        if last is None or not path.exists():
            return False
        state = RunState(None, None)
        state.load_state_dict(read_meta(last))
        log = RunLog(run_dir, state, yaml.safe_load((run_dir / "config.yaml").read_text()))
        log.record(
            "eval",
            state,
            split=f"{split}_dynamic",
            bpb=score.bpb,
            bytes_scored=score.bytes_scored,
            whole_split=True,
            dynamic_rate=rate,
        )
        log.log_hparams(state.step)
        log.close()
        summary = json.loads(path.read_text()) | {f"{split}_bpb_dynamic": score.bpb, "dynamic_rate": rate}
        write_text(path, json.dumps(summary, indent=1) + "\n")
    finally:
        os.close(descriptor)
    return True
