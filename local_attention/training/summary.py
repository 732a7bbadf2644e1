"""The end of a run: final scores, summary, and the commands to use next."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from local_attention.training.checkpoint import Checkpoints, step_of, write_text
from local_attention.training.device import peak_memory_bytes
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.evaluate import Evaluator, Score, eval_span
from local_attention.training.run_log import NullRunLog, RunLog
from local_attention.training.state import RunState
from local_attention.training.terminal import format_duration

if TYPE_CHECKING:
    from data import Corpus

log = logging.getLogger("train")


def score_splits(
    evaluator: Evaluator, corpus: Corpus, state: RunState, run_log: RunLog | NullRunLog
) -> dict[str, Score]:
    """Score the whole validation and test splits, and record the scores.

    Args:
        evaluator: of the best weights.
        corpus: the data.
        state: the state at the end of the run.
        run_log: where to record the scores.

    Returns:
        The :class:`Score` of each split.
    """
    scores = {}
    for split in ("val", "test"):
        data, start, stop = eval_span(corpus, split)
        log.info(f"scoring all {stop - start:,} bytes of {split} with the best weights")
        bar = partial(tqdm, leave=False, disable=not sys.stderr.isatty())
        score = scores[split] = evaluator(data, start, stop, progress=bar)
        run_log.record("eval", state, split=split, bpb=score.bpb, bytes_scored=score.bytes_scored, whole_split=True)
        log.info(f"{split}: {score.bpb:.4f} bpb")
    return scores


def write_summary(run_dir: str | Path, state: RunState, scores: dict[str, Score]) -> None:
    """Write ``summary.json``, with the scores of :func:`score_splits`, unless it already contains them."""
    path = Path(run_dir) / "summary.json"
    results = {f"{split}_bpb": score.bpb for split, score in scores.items()}
    if path.exists() and results.items() <= json.loads(path.read_text()).items():
        return
    summary = {
        "steps": state.step,
        "bytes_seen": state.bytes_seen,
        **results,
        "bytes_per_s": state.bytes_seen / state.train_s,
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_s": state.wall_s,
    }
    write_text(path, json.dumps(summary, indent=1) + "\n")
    log.info(
        f"{state.step:,} steps, {state.bytes_seen:,} bytes in {format_duration(state.wall_s)}, "
        f"{summary['bytes_per_s']:,.0f} bytes/s while training, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def print_next_steps(
    run_dir: str | Path, state: RunState, overrides: Sequence[str], distributed: Distributed = SINGLE_PROCESS
) -> None:
    """Log the commands to sample, to show the curves, and to continue for twice as long."""
    longer = [f"train.max_steps={2 * max(state.max_steps, state.step)}"] if state.max_steps else []
    longer += [f"train.max_minutes={2 * state.max_minutes:g}"] if state.max_minutes else []
    log.info(f'sample:    python generate.py run={shlex.quote(str(run_dir))} prompt="The "')
    log.info(f"curves:    tensorboard --logdir {shlex.quote(str(run_dir))}")
    log.info(f"continue:  {continue_command(run_dir, overrides, longer, distributed)}")


def explain_failure(run_dir: str | Path, state: RunState, distributed: Distributed = SINGLE_PROCESS) -> str:
    """Return why a run has failed and what to do."""
    saved = distributed.broadcast_object(Checkpoints(Path(run_dir) / "checkpoints").complete)
    again = f"continue from the last checkpoint, step {step_of(saved[-1]):,}" if saved else "start again"
    return f"{state.failure}; lower optimizer.lr or train.clip_norm and {again}, or raise train.max_bad_steps"


def print_interruption(
    run_dir: str | Path, state: RunState, overrides: Sequence[str], distributed: Distributed = SINGLE_PROCESS
) -> None:
    """Log where an interrupted run was saved, and the command to continue it."""
    log.info(f"interrupted: saved step {state.step:,} in {Path(run_dir) / 'checkpoints'}")
    log.info(f"continue:  {continue_command(run_dir, overrides, distributed=distributed)}")


def continue_command(
    run_dir: str | Path,
    overrides: Sequence[str],
    changes: Sequence[str] = (),
    distributed: Distributed = SINGLE_PROCESS,
) -> str:
    """Return the command line that continues a run.

    Args:
        run_dir: the run directory.
        overrides: those of the command that started the run.
        changes: overrides that are added, or replace earlier ones.
        distributed: the processes of the run.
    """
    world_size = distributed.world_size
    program = ["python", "train.py"] if world_size == 1 else ["scripts/launch.sh", str(world_size)]
    changes = [f"run_dir={run_dir}", "resume=auto", *changes]
    replaced = {change.split("=")[0] for change in changes} | ({"parallel"} if world_size > 1 else set())
    kept = [override for override in overrides if override.split("=")[0] not in replaced]
    return shlex.join([*program, *kept, *changes])
