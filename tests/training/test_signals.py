import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from local_attention.training.signals import SIGNALS, StopOnSignal
from tests.training.toys import ROOT

PROGRAM = """
import sys, time
from types import SimpleNamespace
from local_attention.training.signals import StopOnSignal, deliver_to_python

deliver_to_python()
state = SimpleNamespace(received_signal=None)
try:
    {wait}
except KeyboardInterrupt:
    print("KeyboardInterrupt")
finally:
    print("cleaned up", flush=True)
"""
UNHANDLED = """print("ready", flush=True)
    while True:
        time.sleep(0.01)"""
HANDLED = """with StopOnSignal(state):
        print("ready", flush=True)
        while state.received_signal is None:
            time.sleep(0.01)
        print("stopping for", state.received_signal, flush=True)
        while True:
            time.sleep(0.01)"""


@pytest.fixture
def handlers():
    """The current handlers; restored afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_stored_and_does_not_interrupt(handlers, caplog, number):
    caplog.set_level("INFO", logger="train")
    state = SimpleNamespace(received_signal=None)
    with StopOnSignal(state):
        assert state.received_signal is None
        os.kill(os.getpid(), number)
        assert state.received_signal == number
    assert "press Ctrl-C again to stop at once" in caplog.text


def test_the_handlers_are_restored(handlers):
    with StopOnSignal(SimpleNamespace(received_signal=None)):
        assert all(signal.getsignal(number) != handlers[number] for number in SIGNALS)
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_the_handlers_are_restored_after_an_error(handlers):
    with pytest.raises(ZeroDivisionError), StopOnSignal(SimpleNamespace(received_signal=None)):
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


@pytest.fixture
def program():
    """Starts a program that delivers signals to Python, and waits until it is ready."""
    running = []

    def start(wait):
        source = PROGRAM.format(wait=wait)
        running.append(subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "ready\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ctrl_c_is_a_keyboard_interrupt(program):
    process = program(UNHANDLED)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "KeyboardInterrupt\ncleaned up\n"


def test_sigterm_ends_a_program_with_143_after_cleaning_up(program):
    process = program(UNHANDLED)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "cleaned up\n"
    assert process.returncode == 143


@pytest.mark.parametrize("first, second, status", [("INT", "INT", 130), ("TERM", "TERM", 143), ("TERM", "INT", 130)])
def test_of_two_signals_the_first_stops_after_the_step_and_the_second_at_once(program, first, second, status):
    process = program(HANDLED)
    first, second = signal.Signals[f"SIG{first}"], signal.Signals[f"SIG{second}"]
    process.send_signal(first)
    assert process.stdout.readline() == f"stopping for {first.value}\n"
    process.send_signal(second)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == status
