"""What a run writes for people and programs: ``metrics.jsonl``, TensorBoard events, ``train.log`` and the screen."""

import json
import logging
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from local_attention.training.checkpoint import write_text

LOGGERS = ("train", "data")
_kept = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)


class RunLog:
    """Records of a run, in ``metrics.jsonl`` and ``tensorboard/``.

    Args:
        run_dir: the run directory; it exists.
        step: records of later steps, written by a session that was cut off after its last checkpoint, are dropped.
    """

    def __init__(self, run_dir, step=0):
        self.path = Path(run_dir) / "metrics.jsonl"
        if self.path.exists():
            write_text(self.path, "".join(line + "\n" for line in self.complete_lines(step)))
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=step + 1 if step else None)

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
            values: what was measured; those of "eval" have ``split``.
        """
        common = {"kind": kind, "step": state.step, "bytes_seen": state.bytes_seen, "wall_s": round(state.wall_s, 3)}
        self.file.write(json.dumps(common | values) + "\n")
        self.file.flush()
        group = ("whole_" if values.get("whole_split") else "") + values.get("split", kind)
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.tensorboard.add_scalar(f"{group}/{name}", value, state.step)
            elif name == "text":
                self.tensorboard.add_text(group, "```\n" + value + "\n```", state.step)
        self.tensorboard.flush()

    def close(self):
        self.file.close()
        self.tensorboard.close()


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


def log_to_file(run_dir):
    """Write ``train.log``, with times, beginning with what has been logged so far."""
    file = logging.FileHandler(Path(run_dir) / "train.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _kept.setTarget(file)
    _kept.flush()
    for logger in map(logging.getLogger, LOGGERS):
        logger.handlers = [logger.handlers[0], file]
