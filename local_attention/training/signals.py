"""SIGINT and SIGTERM, in spite of MindSpore, which answers a SIGINT during a graph by killing the process."""

import _thread
import logging
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger("train")


def deliver_to_python():
    """Let Python's handlers see the signals, whatever MindSpore installs; the second one ends the process at once.

    The signals are blocked, in this thread and so in all that it starts (call this before MindSpore is imported); one
    thread waits for them and calls Python's handler in the main thread, as soon as that returns from a graph. A SIGTERM
    that nobody handles raises ``SystemExit(143)``, so that a process cleans up.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_deliver, name="signals", daemon=True).start()


def _deliver():
    _thread.interrupt_main(signal.sigwait(SIGNALS))
    os._exit(128 + signal.sigwait(SIGNALS))


class StopOnSignal:
    """While it is entered, SIGINT and SIGTERM end the run after the step at hand: they only set ``state.signal``."""

    def __init__(self, state):
        self.state = state

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.state.signal = number
        log.info("stopping after this step and saving; once more to stop at once")
