"""Where a run stands."""

import time
from dataclasses import asdict, dataclass

import numpy as np


@dataclass
class RunState:
    """What a run needs to go on, and what its lines in ``metrics.jsonl`` begin with.

    ``wall_s`` counts the seconds of training, evaluation and sampling, over all the sessions of a resumed run;
    ``progress`` goes by ``agreed_s``, which is the same for all workers.
    """

    max_steps: int | None
    max_minutes: float | None
    step: int = 0
    bytes_seen: int = 0
    train_s: float = 0.0  # in steps alone
    earlier_s: float = 0.0  # wall clock of earlier sessions
    best_val_bpb: float | None = None
    skipped_steps: int = 0  # whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    signal: int | None = None  # the signal that asked the run to end
    failure: str | None = None  # why the run cannot go on

    def __post_init__(self):
        self.started = time.monotonic()
        self.agreed_s = 0.0

    def agree(self, workers):
        """Take over the clock of the leading worker, and a signal that any of them got."""
        told = workers.gather(np.array([self.wall_s, self.signal or 0]))
        self.agreed_s, self.signal = float(told[0, 0]), int(told[:, 1].max()) or None

    @property
    def wall_s(self):
        return self.earlier_s + time.monotonic() - self.started

    @property
    def progress(self):
        """How much of the run is over, 0 … 1: by steps or by minutes, whichever ends it first."""
        by_steps = self.step / self.max_steps if self.max_steps else 0.0
        by_time = self.agreed_s / (60 * self.max_minutes) if self.max_minutes else 0.0
        return max(by_steps, by_time)

    @property
    def finished(self):
        return self.progress >= 1

    def seconds_left(self, seconds_a_step):
        """An estimate."""
        limits = []
        if self.max_steps:
            limits.append((self.max_steps - self.step) * seconds_a_step)
        if self.max_minutes:
            limits.append(60 * self.max_minutes - self.wall_s)
        return max(0.0, min(limits))

    def saved(self):
        """What a checkpoint's sidecar keeps."""
        kept = {"step", "bytes_seen", "train_s", "best_val_bpb", "skipped_steps", "skipped_in_a_row"}
        return {key: value for key, value in asdict(self).items() if key in kept} | {"wall_s": self.wall_s}

    def load(self, meta):
        """Go on from a checkpoint's sidecar."""
        self.step, self.bytes_seen, self.best_val_bpb = meta["step"], meta["bytes_seen"], meta["best_val_bpb"]
        self.train_s, self.earlier_s = meta["train_s"], meta["wall_s"]
        self.skipped_steps, self.skipped_in_a_row = meta.get("skipped_steps", 0), meta.get("skipped_in_a_row", 0)
