"""The end of a run: its summary, and what the person may do next."""

import json
import logging
import shlex
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from local_attention.training.checkpoint import write_text
from local_attention.training.device import peak_memory_bytes
from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.terminal import duration

log = logging.getLogger("train")


def score_splits(evaluator, corpus, state, run_log):
    """Score all of validation and test, and record the scores.

    Args:
        evaluator: an ``Evaluator`` of the best weights.
        corpus: a ``Corpus``.
        state: the ``RunState`` at the end.
        run_log: a ``RunLog``.

    Returns:
        Split name to ``Score``.
    """
    scores = {}
    for split in ("val", "test"):
        start, stop = corpus.bounds(split)
        log.info(f"scoring all {stop - start:,} bytes of {split} with the best weights")
        bar = partial(tqdm, leave=False, disable=not sys.stderr.isatty())
        score = scores[split] = evaluator(corpus.bytes, start, stop, progress=bar)
        run_log.record("eval", state, split=split, bpb=score.bpb, bytes_scored=score.bytes_scored, whole_split=True)
        log.info(f"{split}: {score.bpb:.4f} bpb")
    return scores


def summarise(run_dir, state, scores):
    """Write ``summary.json``; ``scores`` as from :func:`score_splits`."""
    summary = {
        "steps": state.step,
        "bytes_seen": state.bytes_seen,
        **{f"{split}_bpb": score.bpb for split, score in scores.items()},
        "bytes_per_s": state.bytes_seen / state.train_s,
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_s": state.wall_s,
    }
    write_text(Path(run_dir) / "summary.json", json.dumps(summary, indent=1) + "\n")
    log.info(
        f"{state.step:,} steps, {state.bytes_seen:,} bytes in {duration(state.wall_s)}, "
        f"{summary['bytes_per_s']:,.0f} bytes/s while training, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def print_next_steps(run_dir, state, overrides, workers=SINGLE_PROCESS):
    """Three commands: sample, look at curves, continue for twice as long."""
    longer = [f"train.max_steps={2 * state.max_steps}"] if state.max_steps else []
    longer += [f"train.max_minutes={2 * state.max_minutes:g}"] if state.max_minutes else []
    log.info(f'sample:    python generate.py run={shlex.quote(str(run_dir))} prompt="The "')
    log.info(f"curves:    tensorboard --logdir {shlex.quote(str(run_dir))}")
    log.info(f"continue:  {continue_command(run_dir, overrides, longer, workers)}")


def interrupted(run_dir, state, overrides, workers=SINGLE_PROCESS):
    """Say where an interrupted run was saved; returns its exit status."""
    log.info(f"interrupted: saved step {state.step:,} in {Path(run_dir) / 'checkpoints'}")
    log.info(f"continue:  {continue_command(run_dir, overrides, workers=workers)}")
    return 128 + state.signal


def continue_command(run_dir, overrides, changes=(), workers=SINGLE_PROCESS):
    """The command line that goes on with a run: the one that began it, with its directory and ``changes``."""
    program = ["python", "train.py"] if workers.count == 1 else ["scripts/launch.sh", str(workers.count)]
    changes = [f"run_dir={run_dir}", "resume=auto", *changes]
    replaced = {change.split("=")[0] for change in changes} | ({"parallel"} if workers.count > 1 else set())
    kept = [override for override in overrides if override.split("=")[0] not in replaced]
    return shlex.join([*program, *kept, *changes])
