"""The progress of a run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from local_attention.training.distributed import Distributed


@dataclass
class RunState:
    """The counters and clocks of a run that are saved in checkpoints and in each line of ``metrics.jsonl``.

    A run is finished at ``max_steps``, after ``max_minutes``, or after ``stop_after`` evaluations without a new best.

    ``wall_s`` is the time spent in training, evaluation and sampling, including earlier sessions of a resumed run.
    ``progress`` uses ``synchronised_s`` instead, the ``wall_s`` of the main process, which is the same in all
    processes.
    """

    max_steps: int | None
    max_minutes: float | None
    stop_after: int | None = None  # evaluations without a new best
    step: int = 0
    bytes_seen: int = 0
    train_s: float = 0.0  # time in training steps only
    earlier_s: float = 0.0  # wall_s of earlier sessions
    best_val_bpb: float | None = None
    best_step: int | None = None
    measured_on: dict[str, Any] | None = None  # which bytes, and how, best_val_bpb was measured
    init_from: dict[str, Any] | None = None  # the checkpoint whose weights the run began with
    evaluations_since_best: int = 0
    events: dict[str, int] = field(default_factory=dict)  # the step of the last "eval" and of the last "sample"
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    received_signal: int | None = None  # a signal that this process has received
    signal: int | None = None  # the signal that ends the run, the same in all processes
    received_save_request: bool = False  # this process has received SIGUSR1
    save_requested: bool = False  # any process has
    failure: str | None = None  # why the run cannot continue

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.synchronised_s = 0.0

    def synchronise(self, distributed: Distributed) -> None:
        """Use the clock of the main process in all processes, and share the signals that any of them has received."""
        number = self.signal or self.received_signal or 0
        gathered = distributed.all_gather(np.array([self.wall_s, number, self.received_save_request]))
        self.synchronised_s = float(gathered[0, 0])
        self.signal = int(gathered[:, 1].max()) or None
        self.save_requested = bool(gathered[:, 2].any())

    @property
    def wall_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, 0 … 1: of the steps or of the minutes, whichever is larger."""
        by_steps = self.step / self.max_steps if self.max_steps else 0.0
        by_time = self.synchronised_s / (60 * self.max_minutes) if self.max_minutes else 0.0
        return max(by_steps, by_time)

    @property
    def stopped_early(self) -> bool:
        return self.stop_after is not None and self.evaluations_since_best >= self.stop_after

    @property
    def finished(self) -> bool:
        return self.progress >= 1 or self.stopped_early

    def has_happened(self, event: str) -> bool:
        """Whether the "eval" or "sample" of the current step is done; if a signal has interrupted it, it is not."""
        return self.events.get(event, 0) == self.step

    @property
    def reached_limit(self) -> str:
        """The key of the limit at which the run is finished."""
        if self.max_steps and self.step >= self.max_steps:
            return "train.max_steps"
        return "train.max_minutes" if self.progress >= 1 else "train.stop_after"

    def seconds_left(self, seconds_per_step: float) -> float:
        """Estimate the remaining time of the run."""
        limits = []
        if self.max_steps:
            limits.append((self.max_steps - self.step) * seconds_per_step)
        if self.max_minutes:
            limits.append(60 * self.max_minutes - self.wall_s)
        return max(0.0, min(limits))

    def state_dict(self) -> dict[str, Any]:
        """Return the part that is stored in a checkpoint's sidecar."""
        saved = {"step", "bytes_seen", "train_s", "skipped_steps", "skipped_in_a_row"}
        saved |= {"best_val_bpb", "best_step", "measured_on", "init_from", "evaluations_since_best", "events"}
        return {key: value for key, value in asdict(self).items() if key in saved} | {"wall_s": self.wall_s}

    def load_state_dict(self, meta: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint's sidecar."""
        self.step, self.bytes_seen, self.best_val_bpb = meta["step"], meta["bytes_seen"], meta["best_val_bpb"]
        self.train_s, self.earlier_s = meta["train_s"], meta["wall_s"]
        self.skipped_steps, self.skipped_in_a_row = meta.get("skipped_steps", 0), meta.get("skipped_in_a_row", 0)
        self.best_step, self.init_from = meta.get("best_step"), meta.get("init_from")
        self.evaluations_since_best = meta.get("evaluations_since_best", 0)
        self.events = dict(meta.get("events", {"eval": self.step, "sample": self.step}))
