"""Fixtures of the tests of training."""

import mindspore as ms
import pytest

from local_attention.training import callbacks, state
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
