"""What all tests need."""

import signal

import numpy as np
import pytest

from local_attention import kernels


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Tests in the background ignore SIGINT, those under nohup SIGHUP, and so would the programs that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def path(request, monkeypatch):
    """Let cells that the test builds compute by operators in C++ where these are there, or by MindSpore's own alone."""
    if request.param == "portable":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
