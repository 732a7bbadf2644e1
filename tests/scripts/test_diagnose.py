import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from scripts import diagnose
from scripts.diagnose import CELLS, DiagnoseConfig, attempt, isolated, other_value, use, without_paths

ROOT = Path(__file__).resolve().parents[2]
EVERY_OPTION = [(name, option.name) for name, schema in CELLS.items() for option in fields(schema)]


# Run in another process


def ready():
    return "ready"


def report(text):
    print("what MindSpore would print")
    return text


def fail():
    raise ValueError("\n the device has no such operator \n----\n- The C++ call stack")


def kill(number):
    os.kill(os.getpid(), number)


def test_a_check_that_fails_or_kills_its_process_or_takes_too_long_does_not_end_the_others(capfd):
    ending = [partial(kill, signal.SIGSEGV), partial(os._exit, 3), partial(time.sleep, 600)]
    checks = [partial(report, "a"), fail, *ending, partial(report, "b")]
    assert list(isolated(checks, ready, limit_s=6)) == [
        (True, "a"),
        (False, "ValueError: the device has no such operator"),
        (False, "the process ended: killed by SIGSEGV"),
        (False, "the process ended: status 3"),
        (False, "no result after 6 s"),
        (True, "b"),
    ]
    assert "print" not in capfd.readouterr().out


def test_without_the_device_every_check_says_why():
    assert list(isolated([ready, ready], fail)) == [(False, "ValueError: the device has no such operator")] * 2


def test_texts_do_not_contain_folders_or_the_name_of_the_machine(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "den-1")
    monkeypatch.setenv("HOME", "/home/ann b")
    assert without_paths("no /home/ann b/src/c.so, /opt/d.so: den-1, 1/2, den-11") == (
        "no …/c.so, …/d.so: HOST, 1/2, den-11"
    )
    assert attempt(lambda: "File '/opt/x/y.py', line 1") == (True, "File '…/y.py', line 1")


@pytest.mark.parametrize(("name", "option"), EVERY_OPTION)
def test_every_option_gets_a_value_that_is_not_its_default(name, option):
    options = other_value(name, option)
    assert options[option] != getattr(CELLS[name](**diagnose.BASE[name]), option)


@pytest.mark.parametrize(("kind", "first"), [*zip(diagnose.USES, ("loss", "norm", "then", "tokens"))])
def test_a_use_gives_what_it_computed(kind, first):
    works, found = attempt(partial(use, "float16", "eager", kind))
    assert works and found.split()[0] == first


def test_results_that_are_not_finite_are_a_failure():
    from mindspore import Tensor  # not above: the processes of the checks import this module

    assert diagnose.size(Tensor([3.0]), Tensor([[4.0]])) == pytest.approx(5)
    with pytest.raises(ValueError, match="expected finite results, got inf"):
        diagnose.size(Tensor([1.0, float("inf")]))


def test_a_failure_is_a_line_of_the_report_beside_what_works(monkeypatch, capsys):
    def without_a_process(checks, prepare):
        return (attempt(check) for check in checks)

    def computed(dtype, *_):
        return fail() if dtype == "float64" else "loss 1"

    def tried(name, dtype, options):
        return fail() if options == {"use_xpos": True} and dtype == "float16" else "norm 1"

    monkeypatch.setattr(diagnose, "isolated", without_a_process)
    monkeypatch.setattr(diagnose, "use", computed)
    monkeypatch.setattr(diagnose, "use_options", tried)
    assert diagnose.main.__wrapped__(DiagnoseConfig()) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "float16 graph generation ok, loss 1" in lines
    assert "float64 eager forward FAILS, ValueError: the device has no such operator" in lines
    assert "float16 LocalMHA FAILS, use_xpos=True: ValueError: the device has no such operator" in lines
    assert [line.split()[0] for line in lines if "LocalMHA ok" in line] == ["float32", "float16", "bfloat16"]


@pytest.mark.slow
def test_the_report_of_a_cpu_is_complete_and_quick(tmp_path):
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "scripts/diagnose.py"), "device.target=CPU"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and time.monotonic() - start < 240
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if "FAILS" in line] == ["bfloat16"] * 8
    assert sum(line.split()[0] in diagnose.TYPES for line in lines) == 4 * 8 - 2 + 2 * 2
    assert not any(tmp_path.iterdir())
    for private in (str(Path.home()), str(ROOT), platform.node()):
        assert private not in result.stdout
