"""What all tests need."""

import signal

import numpy as np
import pytest

from local_attention import kernels


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Tests that were started in the background ignore SIGINT, and so would the programs that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def path(request, monkeypatch):
    """Let cells that the test builds compute by operators in C++ where these are there, or by MindSpore's own alone."""
    if request.param == "portable":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
