"""Handle SIGINT and SIGTERM in Python. By default, MindSpore kills the process on a SIGINT while a graph runs."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from local_attention.training.state import RunState

SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger("train")


def deliver_to_python() -> None:
    """Deliver signals to Python's handlers, whatever MindSpore installs; a second signal ends the process at once.

    Must be called before MindSpore is imported: it blocks the signals in this thread and thereby in all threads that it
    starts. One thread waits for them and runs Python's handler in the main thread, as soon as that returns from a
    graph. A SIGTERM without another handler raises ``SystemExit(143)``, so that the process cleans up.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_deliver, name="signals", daemon=True).start()


def _deliver() -> None:
    _thread.interrupt_main(signal.Signals(signal.sigwait(SIGNALS)))
    os._exit(128 + signal.sigwait(SIGNALS))


class StopOnSignal:
    """Context in which SIGINT and SIGTERM only set ``state.received_signal``: the run ends after the current step."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.state.received_signal = number
        log.info("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")
