"""What a run writes for people and programs: ``metrics.jsonl``, TensorBoard events, ``train.log`` and the screen."""

import json
import logging
import math
import sys
import time
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path

import yaml
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

from local_attention.training.checkpoint import write_text
from local_attention.training.keys import flat

LOGGERS = ("train", "data")
NO_CURVES = ("kind", "step", "bytes_seen", "wall_s", "split", "whole_split", "prompt")  # in records
_kept = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)


class RunLog:
    """Records of a run, in ``metrics.jsonl`` and ``tensorboard/``.

    A run that goes on begins its event file anew, from ``metrics.jsonl``: one point a step, none missing, whenever the
    process before was killed.

    Args:
        run_dir: the run directory; it exists.
        step: records of later steps, written by a session that was cut off after its last checkpoint, are dropped.
        config: the run's config as a dictionary, to be shown in TensorBoard.
    """

    def __init__(self, run_dir, step=0, config=None):
        self.path, folder = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "tensorboard"
        earlier = list(self.complete_lines(step)) if self.path.exists() else []
        write_text(self.path, "".join(line + "\n" for line in earlier))
        self.file = self.path.open("a", encoding="utf-8")
        for events in folder.glob("events.*"):
            events.unlink()
        self.config = config or {}
        self.tensorboard = SummaryWriter(str(folder), purge_step=0)  # points that a server holds already: forget them
        self.tensorboard.add_text("config", "```\n" + yaml.safe_dump(self.config, sort_keys=False) + "```", 0)
        records = [json.loads(line) for line in earlier]
        for record in records:
            self.show(record, time.time() - records[-1]["wall_s"] + record["wall_s"])
        self.tensorboard.flush()

    def complete_lines(self, step):
        """The lines that are whole and not later than ``step``."""
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    yield line
            except (ValueError, KeyError):
                continue

    def record(self, kind, state, **values):
        """One line, and one point for each number (one text for each text).

        Args:
            kind: "train", "eval" or "sample".
            state: the :class:`RunState` of the moment.
            values: what was measured; those of "eval" have ``split``. Numbers that are not finite become null.
        """
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        values |= {name: None for name, value in numbers.items() if not math.isfinite(value)}
        common = {"kind": kind, "step": state.step, "bytes_seen": state.bytes_seen, "wall_s": round(state.wall_s, 3)}
        self.file.write(json.dumps(common | values) + "\n")
        self.file.flush()
        self.show(common | values)
        self.tensorboard.flush()

    def show(self, record, walltime=None):
        """The points and texts of a record."""
        group = ("whole_" if record.get("whole_split") else "") + record.get("split", record["kind"])
        for name, value in record.items():
            if value is None or name in NO_CURVES:
                continue
            if name == "text":
                self.tensorboard.add_text(group, "```\n" + value + "\n```", record["step"], walltime)
            else:
                self.tensorboard.add_scalar(f"{group}/{name}", value, record["step"], walltime)

    def compare(self, scores, step):
        """Show settings beside scores (name to number) in TensorBoard's table of runs, HPARAMS."""
        settings = {key: value for key, value in flat(self.config).items() if isinstance(value, int | float | str)}
        scores = {f"hparams/{name}": score for name, score in scores.items()}
        for summary in hparams(settings, scores):
            self.tensorboard.file_writer.add_summary(summary, step)
        for name, score in scores.items():
            self.tensorboard.add_scalar(name, score, step)

    def close(self):
        self.file.close()
        self.tensorboard.close()


class NoRunLog:
    """What a worker has instead of a :class:`RunLog` that does not lead: it writes nothing."""

    def record(self, kind, state, **values):
        pass

    def compare(self, scores, step):
        pass

    def close(self):
        pass


class TqdmHandler(logging.Handler):
    """Writes lines to standard output without tearing a progress bar; a closed one does not end the run."""

    def emit(self, record):
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def log_to_screen():
    """Show what the program logs; and keep it for :func:`log_to_file`."""
    for logger in map(logging.getLogger, LOGGERS):
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.handlers = [TqdmHandler(logging.INFO), _kept]


def log_to_file(run_dir, rank=0):
    """Write ``train.log`` (``worker-1.log`` for rank 1, …), with times, beginning with what has been logged so far."""
    path = Path(run_dir) / (f"worker-{rank}.log" if rank else "train.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _kept.setTarget(file)
    _kept.flush()
    for logger in map(logging.getLogger, LOGGERS):
        logger.handlers = [logger.handlers[0], file]
