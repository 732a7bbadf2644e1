"""``train.profile=true``: write a table of the time that each operator takes in a step."""

import csv
import logging
from pathlib import Path
from typing import Any, NamedTuple

from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler
from mindspore.train import Callback, RunContext

from local_attention.training.checkpoint import write_text

WARM_UP, STEPS = 5, 3  # number of steps before the profile, and in it

log = logging.getLogger("train")


class OperatorTime(NamedTuple):
    """The calls of one type of operator in a step: their number, their time, and its fraction of the step."""

    operator: str
    calls_per_step: float
    ms_per_step: float
    fraction: float


class Profile(Callback):
    """Profiles a few steps of the run, writes ``profile.csv`` and logs its first ten rows.

    Args:
        run_dir: the run directory; the profiler writes its own files to ``profile/`` in it.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir, self.steps = run_dir, 0
        self.profiler: Any = None

    def on_train_step_begin(self, run_context: RunContext) -> None:
        if self.steps == WARM_UP:
            folder = str(self.run_dir / "profile")
            self.profiler = profile(activities=[ProfilerActivity.CPU], on_trace_ready=tensorboard_trace_handler(folder))
            self.profiler.start()

    def on_train_step_end(self, run_context: RunContext) -> None:
        self.steps += 1
        if self.profiler and self.steps == WARM_UP + STEPS:
            self.stop()
            self.report()

    def on_train_end(self, run_context: RunContext) -> None:
        if self.profiler:
            self.stop()
            log.info(f"no profile: it needs {WARM_UP + STEPS} steps, but the run ended after {self.steps}")

    def stop(self) -> None:
        self.profiler.stop()
        self.profiler = None

    def report(self) -> None:
        newest = max((self.run_dir / "profile").rglob("cpu_op_type_info_*.csv"), key=lambda path: path.stat().st_mtime)
        rows = operator_times(newest.read_text(), STEPS)
        lines = [",".join(OperatorTime._fields)]
        lines += [f"{name},{calls:g},{ms:.3f},{fraction:.4f}" for name, calls, ms, fraction in rows]
        path = self.run_dir / "profile.csv"
        write_text(path, "\n".join(lines) + "\n")
        log.info(f"operator times per step, {sum(row.ms_per_step for row in rows):.1f} ms in total, see {path}:")
        for name, calls, ms, fraction in rows[:10]:
            log.info(f"    {name:36} {calls:6g} x {ms:10.2f} ms {fraction:7.1%}")


def operator_times(text: str, steps: int) -> list[OperatorTime]:
    """Parse MindSpore's table of operator types over a number of steps; the longest times come first."""
    rows = list(csv.DictReader(text.splitlines()))
    times = [float(row["total_compute_time"]) for row in rows]
    table = [
        OperatorTime(row["op_type"], int(row["type_occurrences"]) / steps, ms / steps, ms / (sum(times) or 1.0))
        for row, ms in zip(rows, times, strict=True)
    ]
    return sorted(table, key=lambda row: -row.ms_per_step)
