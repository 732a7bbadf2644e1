"""Fixtures of the tests of a training run."""

import mindspore as ms
import pytest

from local_attention.training import callbacks, state
from tests.training.toys import Clock


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    """Static graphs, as in a run; the mode found is put back."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def clock(monkeypatch):
    """The monotonic time of a run: stands still until a test moves it."""
    clock = Clock()
    monkeypatch.setattr(state, "time", clock)
    monkeypatch.setattr(callbacks, "time", clock)
    return clock
