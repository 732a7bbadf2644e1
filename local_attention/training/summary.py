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

from local_attention.training.arguments import escape_interpolations, unquote
from local_attention.training.checkpoint import Checkpoints, step_of, write_text
from local_attention.training.device import peak_memory_bytes
from local_attention.training.distributed import SINGLE_PROCESS, Distributed
from local_attention.training.evaluate import Evaluator, Score, eval_span
from local_attention.training.run_log import NullRunLog, RunLog
from local_attention.training.signals import Interrupted, SignalCheck
from local_attention.training.state import RunState
from local_attention.training.terminal import format_duration

if TYPE_CHECKING:
    from data import Corpus

SPLITS = ("val", "test")

log = logging.getLogger("train")


def score_splits(
    evaluator: Evaluator,
    corpus: Corpus,
    state: RunState,
    run_log: RunLog | NullRunLog,
    max_bytes: int | None = None,
) -> dict[str, Score]:
    """Score the validation and test splits, and record the scores; what was scored before is not scored again.

    A signal ends the scoring, and the scores until then are returned. ``state.signal`` is then set.

    Args:
        evaluator: of the best weights.
        corpus: the data.
        state: the state at the end of the run.
        run_log: where to record the scores, each with a checksum of the weights and of the bytes that were scored.
        max_bytes: score only the first bytes of each split; None: all.

    Returns:
        The :class:`Score` of each split.
    """
    scores: dict[str, Score] = {}
    distributed = evaluator.distributed
    check_signals = SignalCheck(state, distributed, save=lambda: None)  # as all is saved
    bar = partial(tqdm, leave=False, disable=not sys.stderr.isatty())
    for split in () if max_bytes == 0 else SPLITS:
        span, whole = eval_span(corpus, split, max_bytes), eval_span(corpus, split)
        checksum = evaluator.checksum(*span)
        score = distributed.broadcast_object(partial(run_log.final_scores.get, checksum))
        again = "" if score is None else ", as scored before"
        if score is None:
            duration = format_duration(evaluator.estimate_seconds(*span))
            log.info(f"scoring {span.stop - span.start:,} bytes of {split} with the best weights, about {duration}")
            try:
                score = evaluator(*span, progress=bar, before_batch=check_signals)
            except Interrupted:
                kept = f"; the score of {' and '.join(scores)} is kept" if scores else ""
                log.info(f"interrupted while scoring {split}{kept}")
                break
            run_log.record(
                "eval",
                state,
                split=split,
                bpb=score.bpb,
                bytes_scored=score.bytes_scored,
                whole_split=span.stop == whole.stop,
                checksum=checksum,
            )
        scores[split] = score
        log.info(f"{split}: {score.bpb:.4f} bpb{again}")
    return scores


def write_summary(run_dir: str | Path, state: RunState, scores: dict[str, Score]) -> None:
    """Write ``summary.json``, with the scores of :func:`score_splits`; null for a split that was not scored.

    A summary that contains these scores is kept.
    """
    path = Path(run_dir) / "summary.json"
    results = {f"{split}_bpb": score.bpb for split, score in scores.items()}
    if path.exists() and results.items() <= json.loads(path.read_text()).items():
        return
    bytes_per_s, memory = state.bytes_seen / state.train_s, peak_memory_bytes()
    summary = {
        "steps": state.step,
        "bytes_seen": state.bytes_seen,
        **dict.fromkeys(f"{split}_bpb" for split in SPLITS),
        **results,
        "bytes_per_s": bytes_per_s,
        "peak_memory_bytes": memory,
        "wall_s": state.wall_s,
    }
    write_text(path, json.dumps(summary, indent=1) + "\n")
    log.info(
        f"{state.step:,} steps, {state.bytes_seen:,} bytes in {format_duration(state.wall_s)}, "
        f"{bytes_per_s:,.0f} bytes/s while training, peak memory {memory / 1e9:.2f} GB"
    )


def print_next_steps(
    run_dir: str | Path, state: RunState, overrides: Sequence[str], distributed: Distributed = SINGLE_PROCESS
) -> None:
    """Log the commands to sample, to show the curves, and to continue for twice as long."""
    longer = [f"train.max_steps={2 * max(state.max_steps, state.step)}"] if state.max_steps else []
    longer += [f"train.max_minutes={2 * state.max_minutes:g}"] if state.max_minutes else []
    longer += ["train.stop_after=null"] if state.stopped_early else []
    log.info(f'sample:    python generate.py run={shlex.quote(escape_interpolations(str(run_dir)))} prompt="The "')
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
    changes = [f"run_dir={escape_interpolations(str(run_dir))}", "resume=auto", *changes]
    replaced = {change.split("=")[0] for change in changes} | ({"parallel"} if world_size > 1 else set())
    kept = [unquote(override) for override in overrides if override.split("=")[0] not in replaced]
    return shlex.join([*program, *kept, *changes])
