"""The logs of a run: ``metrics.jsonl``, TensorBoard events, ``train.log`` and the terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import yaml
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

from local_attention.training.checkpoint import write_text
from local_attention.training.schema import flatten
from local_attention.training.state import RunState

LOGGERS = ("train", "data")
NOT_PLOTTED = ("kind", "step", "bytes_seen", "wall_s", "split", "whole_split", "prompt")  # keys of records
_buffer = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)  # until train.log is open


class RunLog:
    """Writes the metrics of a run to ``metrics.jsonl`` and ``tensorboard/``.

    A resumed run rewrites its event file from ``metrics.jsonl``, so that there is exactly one point per step even if
    the previous process was killed.

    Args:
        run_dir: the run directory, which must exist.
        step: the current step. Records of later steps are dropped; a session that was killed has written them after its
            last checkpoint.
        config: the config of the run, shown in TensorBoard.
    """

    def __init__(self, run_dir: str | Path, step: int = 0, config: dict[str, Any] | None = None) -> None:
        self.path, folder = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "tensorboard"
        earlier = list(self.complete_lines(step)) if self.path.exists() else []
        write_text(self.path, "".join(line + "\n" for line in earlier))
        files = ExitStack()
        self.close = weakref.finalize(self, files.close)  # at the latest when a run has failed
        self.file = files.enter_context(self.path.open("a", encoding="utf-8"))
        for events in folder.glob("events.*"):
            events.unlink()
        self.config = config or {}
        self.tensorboard = files.enter_context(
            SummaryWriter(str(folder), purge_step=0)
        )  # a running TensorBoard drops its points
        self.tensorboard.add_text("config", "```\n" + yaml.safe_dump(self.config, sort_keys=False) + "```", 0)
        records = [json.loads(line) for line in earlier]
        for record in records:
            self.write_events(record, time.time() - records[-1]["wall_s"] + record["wall_s"])
        self.tensorboard.flush()

    def complete_lines(self, step: int) -> Iterator[str]:
        """Yield the complete lines of ``metrics.jsonl`` up to ``step``."""
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    yield line
            except (ValueError, KeyError):
                continue

    def record(self, kind: str, state: RunState, **values: Any) -> None:
        """Write one line, and one TensorBoard event for each number or text.

        Args:
            kind: "train", "eval" or "sample".
            state: the current state.
            values: the metrics; for "eval" with ``split``. Numbers that are not finite become null.
        """
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        values |= {name: None for name, value in numbers.items() if not math.isfinite(value)}
        common = {"kind": kind, "step": state.step, "bytes_seen": state.bytes_seen, "wall_s": round(state.wall_s, 3)}
        self.file.write(json.dumps(common | values) + "\n")
        self.file.flush()
        self.write_events(common | values)
        self.tensorboard.flush()

    def write_events(self, record: dict[str, Any], walltime: float | None = None) -> None:
        """Write the TensorBoard events of a record."""
        group = ("whole_" if record.get("whole_split") else "") + record.get("split", record["kind"])
        for name, value in record.items():
            if value is None or name in NOT_PLOTTED:
                continue
            if name == "text":
                self.tensorboard.add_text(group, "```\n" + value + "\n```", record["step"], walltime)
            else:
                self.tensorboard.add_scalar(f"{group}/{name}", value, record["step"], walltime)

    def log_hparams(self, scores: dict[str, float], step: int) -> None:
        """Show the settings and the final scores of the run in TensorBoard's HPARAMS tab."""
        settings = {key: value for key, value in flatten(self.config).items() if isinstance(value, int | float | str)}
        scores = {f"hparams/{name}": score for name, score in scores.items()}
        for summary in hparams(settings, scores):
            self.tensorboard.file_writer.add_summary(summary, step)
        for name, score in scores.items():
            self.tensorboard.add_scalar(name, score, step)


class NullRunLog:
    """The :class:`RunLog` of all processes except the main process: it writes nothing."""

    def record(self, kind: str, state: RunState, **values: Any) -> None:
        pass

    def log_hparams(self, scores: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TqdmHandler(logging.Handler):
    """Writes to standard output without breaking a progress bar. A closed pipe does not end the run."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def log_to_terminal() -> None:
    """Show log messages on the terminal, and buffer them for :func:`log_to_file`."""
    _buffer.buffer.clear()  # what is left of an earlier run in this process
    for logger in map(logging.getLogger, LOGGERS):
        for handler in logger.handlers:
            handler.close()
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.handlers = [TqdmHandler(logging.INFO), _buffer]


def log_to_file(run_dir: str | Path, rank: int = 0) -> None:
    """Write log messages, including those buffered so far, to ``train.log`` (``worker-1.log`` for rank 1, …)."""
    path = Path(run_dir) / (f"worker-{rank}.log" if rank else "train.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _buffer.setTarget(file)
    _buffer.flush()
    for logger in map(logging.getLogger, LOGGERS):
        logger.handlers = [logger.handlers[0], file]
