"""Where the time of a step goes: ``train.profile=true`` writes a table of operator times."""

import csv
import logging
from pathlib import Path

from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler
from mindspore.train import Callback

from local_attention.training.checkpoint import write_text

WARM_UP, STEPS = 5, 3  # steps before those that are looked at, and how many these are
COLUMNS = ("operator", "calls_a_step", "ms_a_step", "share")

log = logging.getLogger("train")


class Profile(Callback):
    """Looks at a few steps of the run, writes ``profile.csv`` and shows its first ten lines.

    Args:
        run_dir: the run directory; the profiler's own files go to ``profile/`` in it.
    """

    def __init__(self, run_dir):
        super().__init__()
        self.run_dir, self.steps, self.profiler = Path(run_dir), 0, None

    def on_train_step_begin(self, run_context):
        if self.steps == WARM_UP:
            folder = str(self.run_dir / "profile")
            self.profiler = profile(activities=[ProfilerActivity.CPU], on_trace_ready=tensorboard_trace_handler(folder))
            self.profiler.start()

    def on_train_step_end(self, run_context):
        self.steps += 1
        if self.profiler and self.steps == WARM_UP + STEPS:
            self.stop()
            self.report()

    def on_train_end(self, run_context):
        if self.profiler:
            self.stop()
            log.info(f"no profile: it takes {WARM_UP + STEPS} steps, and the run ended after {self.steps}")

    def stop(self):
        self.profiler.stop()
        self.profiler = None

    def report(self):
        newest = max((self.run_dir / "profile").rglob("cpu_op_type_info_*.csv"), key=lambda path: path.stat().st_mtime)
        rows = operator_times(newest.read_text(), STEPS)
        lines = [",".join(COLUMNS), *(f"{name},{calls:g},{ms:.3f},{share:.4f}" for name, calls, ms, share in rows)]
        write_text(self.run_dir / "profile.csv", "\n".join(lines) + "\n")
        log.info(
            f"operator times of a step, {sum(row[2] for row in rows):.1f} ms in all; {self.run_dir / 'profile.csv'}:"
        )
        for name, calls, ms, share in rows[:10]:
            log.info(f"    {name:36} {calls:6g} x {ms:10.2f} ms {share:7.1%}")


def operator_times(text, steps):
    """MindSpore's table of operator types as ``(name, calls a step, ms a step, share)``, the longest first."""
    rows = list(csv.DictReader(text.splitlines()))
    total = sum(float(row["total_compute_time"]) for row in rows) or 1.0
    table = [
        (row["op_type"], int(row["type_occurrences"]) / steps, float(row["total_compute_time"]) / steps) for row in rows
    ]
    return sorted(((*row, row[2] * steps / total) for row in table), key=lambda row: -row[2])
