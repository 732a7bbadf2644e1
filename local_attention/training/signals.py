"""Handle the signals that end a run or ask for a checkpoint, in Python.

By default, MindSpore kills the process on a SIGINT while a graph runs.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from local_attention.training.distributed import Distributed
    from local_attention.training.state import RunState

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

log = logging.getLogger("train")


class Interrupted(Exception):
    """A signal ends the run: raised between two batches of an evaluation, and within a sample."""


def handled_signals() -> list[signal.Signals]:
    """All ``SIGNALS`` except a SIGHUP that the process ignores, as it does under nohup."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def deliver_to_python() -> None:
    """Deliver signals to Python's handlers, whatever MindSpore installs.

    A second Ctrl-C or SIGTERM ends the process at once; not so SIGHUP, which a terminal that is closed sends twice, and
    which systemd sends after SIGTERM.

    Must be called before MindSpore is imported: it blocks the signals in this thread and thereby in all threads that it
    starts. One thread waits for them and runs Python's handler in the main thread, as soon as that returns from a
    graph. A SIGTERM or SIGHUP without another handler raises ``SystemExit(128 + number)``, so that the process cleans
    up; a SIGUSR1 without a handler has no effect.
    """
    numbers = handled_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in {signal.SIGTERM, signal.SIGHUP}.intersection(numbers):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_deliver, args=(numbers,), name="signals", daemon=True).start()


def _deliver(numbers: list[signal.Signals]) -> None:
    stopping = False
    while True:
        number = signal.Signals(signal.sigwait(numbers))
        if number in (signal.SIGINT, signal.SIGTERM):
            if stopping:
                os._exit(128 + number)
            stopping = True
        _thread.interrupt_main(number)


class StopOnSignal:
    """Context in which signals only change ``state``: the run stops, or saves, after the step or batch at hand."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.previous = {number: signal.signal(number, self.handle) for number in handled_signals()}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.state.received_save_request = True
            return
        self.state.received_signal = number
        name = signal.Signals(number).name
        log.info(f"{name}: saving and stopping after the step or batch at hand; press Ctrl-C again to stop at once")


class SignalCheck:
    """What is called between steps, and between the batches of an evaluation, a sample and the final scoring.

    All processes must call it at the same places, because they exchange the signals that they have received.

    Args:
        state: the state of the run.
        distributed: the processes of the run.
        save: called after a SIGUSR1.
    """

    def __init__(self, state: RunState, distributed: Distributed, save: Callable[[], object]) -> None:
        self.state, self.distributed, self.save = state, distributed, save

    def __call__(self) -> None:
        """Save a checkpoint if a process has received SIGUSR1.

        Raises:
            Interrupted: a process has received another signal, which is ``state.signal`` now.
        """
        state = self.state
        state.synchronise(self.distributed)
        if state.save_requested:
            state.received_save_request = state.save_requested = False
            self.save()
            log.info(f"step {state.step:>6,}  saved because of SIGUSR1; the run goes on")
        if state.signal:
            raise Interrupted
