"""The logs of a run: ``metrics.jsonl``, TensorBoard events, ``train.log`` and the terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, ClassVar

import yaml
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

from local_attention.training.checkpoint import write_text
from local_attention.training.evaluate import Score
from local_attention.training.schema import flatten, format_value
from local_attention.training.state import RunState

LOGGERS = ("train", "data")
NOT_PLOTTED = (  # keys of records
    *("kind", "step", "bytes_seen", "wall_s", "split", "bytes_scored", "whole_split", "checksum", "text", "prompt"),
    "dynamic_rate",
)
HPARAMS = ("model.", "optimizer.", "schedule.", "train.", "seed")  # settings in TensorBoard's HPARAMS tab
TEXT_COLUMNS = 80
_buffer = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)  # until train.log is open


class RunLog:
    """Writes the metrics of a run to ``metrics.jsonl`` and ``tensorboard/``.

    TensorBoard shows the subfolders ``train``, ``val``, ``final/val`` and ``final/test`` as runs of their own, and the
    curves of equal names in one chart.

    A resumed run rewrites its event files from ``metrics.jsonl``, so that there is exactly one point per step even if
    the previous process was killed.

    Args:
        run_dir: the run directory, which must exist.
        state: the state of the run. Records of later steps are dropped; a session that was killed has written them
            after its last checkpoint. So are records of an event of this step that is still due.
        config: the config of the run, shown in TensorBoard.
    """

    def __init__(self, run_dir: str | Path, state: RunState, config: dict[str, Any] | None = None) -> None:
        self.path, self.folder = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "tensorboard"
        earlier = list(self.kept_records(state)) if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in earlier))
        self.files = ExitStack()
        self.close = weakref.finalize(self, self.files.close)  # at the latest when a run has failed
        self.file = self.files.enter_context(self.path.open("a", encoding="utf-8"))
        self.config = config or {}
        self.final_scores: dict[str, Score] = {}  # by "checksum", see :func:`summary.score_splits`
        self.writers: dict[str, SummaryWriter] = {}
        stale = list(self.folder.rglob("events.*"))
        for events in stale:
            events.unlink()
        for folder in {str(events.parent.relative_to(self.folder)) for events in stale}:
            self.writer(folder)
        self.writer(".").add_text("config", code_block(yaml.safe_dump(self.config, sort_keys=False)), 0)
        for record in earlier:
            self.write_events(record, time.time() - earlier[-1]["wall_s"] + record["wall_s"])
        self.flush()

    def kept_records(self, state: RunState) -> Iterator[dict[str, Any]]:
        """Yield the complete records of ``metrics.jsonl`` up to the state."""
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                record = json.loads(line)
                step, kind = record["step"], record["kind"]
            except (ValueError, KeyError, TypeError):
                continue
            is_due = kind in ("eval", "sample") and "whole_split" not in record and not state.has_happened(kind)
            if step < state.step or (step == state.step and not is_due):
                yield record

    def record(self, kind: str, state: RunState, **values: Any) -> None:
        """Write one line, and one TensorBoard event for each number or text.

        Args:
            kind: "train", "eval" or "sample".
            state: the current state.
            values: the metrics; for "eval" with ``split``, and for a final score with ``whole_split`` and ``checksum``.
                Numbers that are not finite become null.
        """
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        values |= {name: None for name, value in numbers.items() if not math.isfinite(value)}
        common = {"kind": kind, "step": state.step, "bytes_seen": state.bytes_seen, "wall_s": round(state.wall_s, 3)}
        self.file.write(json.dumps(common | values) + "\n")
        self.file.flush()
        self.write_events(common | values)
        self.flush()

    def write_events(self, record: dict[str, Any], walltime: float | None = None) -> None:
        """Write the TensorBoard events of a record."""
        if "checksum" in record and record["bpb"] is not None:
            self.final_scores[record["checksum"]] = Score(record["bpb"], record["bytes_scored"])
        step = record["step"]
        if record["kind"] == "sample":
            text = f"**Prompt**\n\n{code_block(record['prompt'])}\n\n**Sample**\n\n{code_block(record['text'])}"
            self.writer(".").add_text("sample", text, step, walltime)
        folder = ("final/" if "whole_split" in record else "") + record.get("split", record["kind"])
        for name, value in record.items():
            if value is not None and name not in NOT_PLOTTED:
                tag = name if name == "bpb" else f"train/{name}"
                self.writer(folder).add_scalar(tag, value, step, walltime)

    def log_hparams(self, step: int) -> None:
        """Show the settings of the run, beside the final scores, in TensorBoard's HPARAMS tab.

        Of all settings, TensorBoard shows five at first: those that differ between runs, if each run has its session
        and no description of the experiment.
        """
        settings = {key: value for key, value in flatten(self.config).items() if key.startswith(HPARAMS)}
        texts = {key: format_value(value) for key, value in settings.items() if not isinstance(value, int | float)}
        _, *session = hparams(settings | texts, {})
        for summary in session:
            self.writer("final").file_writer.add_summary(summary, step)
        self.flush()

    def writer(self, folder: str) -> SummaryWriter:
        """The writer to a subfolder."""
        if folder not in self.writers:
            # with purge_step, a running TensorBoard drops its points
            writer = SummaryWriter(str(self.folder / folder), purge_step=0)
            self.writers[folder] = self.files.enter_context(writer)
        return self.writers[folder]

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()


def code_block(text: str) -> str:
    """Text as code in Markdown, with its long lines wrapped, as TensorBoard would cut them off."""
    wrap = partial(
        textwrap.wrap, width=TEXT_COLUMNS, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
    )
    return "\n".join("    " + piece for line in text.split("\n") for piece in wrap(line) or [""])


class NullRunLog:
    """The :class:`RunLog` of all processes except the main process: it writes nothing."""

    final_scores: ClassVar[dict[str, Score]] = {}

    def record(self, kind: str, state: RunState, **values: Any) -> None:
        pass

    def log_hparams(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TqdmHandler(logging.Handler):
    """Writes to standard output without breaking a progress bar. What cannot be written does not end the run.

    The errors are those of a pipe or terminal that is gone, of an encoding, and of a signal's message within another.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError, RuntimeError):
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
    file = logging.FileHandler(path, encoding="utf-8", errors="replace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _buffer.setTarget(file)
    _buffer.flush()
    for logger in map(logging.getLogger, LOGGERS):
        logger.handlers = [logger.handlers[0], file]
