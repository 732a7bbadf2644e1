"""Fixtures of the library's tests."""

import mindspore as ms
import pytest

MODES = {"graph": ms.GRAPH_MODE, "eager": ms.PYNATIVE_MODE}


@pytest.fixture(scope="session", autouse=True)
def blocking_launch():
    """Eager operators run where they are called: a small model takes 28 ms so, and 440 ms with a thread for them."""
    ms.runtime.launch_blocking()


@pytest.fixture(autouse=True)
def mode(request, monkeypatch, tmp_path):
    """Run the test eagerly, or as ``@both_modes`` says; the mode found is put back."""
    name = getattr(request, "param", "eager")
    if name == "graph":
        monkeypatch.chdir(tmp_path)  # where a compilation that fails leaves its rank_0
    before = ms.get_context("mode")
    ms.set_context(mode=MODES[name])
    yield
    ms.set_context(mode=before)
