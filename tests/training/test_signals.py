import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.signals import SIGNALS, Interrupted, SignalCheck, StopOnSignal
from local_attention.training.state import RunState
from tests.training.toys import ROOT

PROGRAM = """
import sys, time
from types import SimpleNamespace
from local_attention.training.signals import StopOnSignal, deliver_to_python

deliver_to_python()
state = SimpleNamespace(received_signal=None, received_save_request=False)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_stored_and_does_not_interrupt(handlers, caplog, number):
    caplog.set_level("INFO", logger="train")
    state = SimpleNamespace(received_signal=None)
    with StopOnSignal(state):
        assert state.received_signal is None
        os.kill(os.getpid(), number)
        assert state.received_signal == number
    assert f"{number.name}: saving and stopping after the step or batch at hand" in caplog.text
    assert "press Ctrl-C again to stop at once" in caplog.text


def test_sigusr1_asks_for_a_checkpoint_and_does_not_stop(handlers):
    state = RunState(10, None, step=3)
    saved = []
    check = SignalCheck(state, SINGLE_PROCESS, lambda: saved.append(state.step))
    with StopOnSignal(state):
        check()
        os.kill(os.getpid(), signal.SIGUSR1)
        check()
        check()
    assert saved == [3] and state.signal is None


def test_a_check_ends_what_calls_it_after_a_signal(handlers):
    state = RunState(10, None)
    with StopOnSignal(state), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGHUP)
        SignalCheck(state, SINGLE_PROCESS, lambda: None)()
    assert state.signal == signal.SIGHUP


def test_an_ignored_sighup_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopOnSignal(SimpleNamespace(received_signal=None)):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


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

    def start(wait, prefix=()):
        command = [*prefix, sys.executable, "-c", PROGRAM.format(wait=wait)]
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_end_a_program_after_cleaning_up(program, number):
    process = program(UNHANDLED)
    process.send_signal(signal.SIGUSR1)  # there is nothing to save
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "cleaned up\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("wait", [UNHANDLED, HANDLED])
def test_under_nohup_sighup_changes_nothing(program, wait):
    process = program(wait, ["nohup"])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    if wait == HANDLED:
        assert process.stdout.readline() == "stopping for 15\n"
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_closed_terminal_may_send_sighup_twice_and_systemd_after_sigterm(program):
    process = program(HANDLED)
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "stopping for 1\n"
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
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
