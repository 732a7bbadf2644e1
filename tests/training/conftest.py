"""Fixtures of the tests of training."""

import sys
from functools import partial

import mindspore as ms
import pytest

from local_attention.training import callbacks, command, state
from local_attention.training.config import GenerateConfig
from local_attention.training.schema import parse
from tests.training.toys import Clock


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    """Use static graphs, as a run does, and restore the mode afterwards."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def clock(monkeypatch):
    """Replaces the monotonic clock of a run by one that the tests advance."""
    clock = Clock()
    monkeypatch.setattr(state, "time", clock)
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


@pytest.fixture
def program(monkeypatch):
    """Runs a command line with ``task`` in the place of the program's, and returns its status."""
    for name in ("HYDRA_FULL_ERROR", "GLOG_v"):  # restored at the end
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(command, "deliver_to_python", lambda: None)  # its thread would take the tests' signals

    def run(task, *arguments, name="generate", schema=GenerateConfig, check=None):
        namespace = {"__name__": "program", "task": task}
        exec("def main(config):\n    return task(config)", namespace)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            command.command(name, schema, check or partial(parse, schema))(namespace["main"])()
        except SystemExit as end:
            return end.code
        return None

    return run
