"""What all tests need."""

import signal

import mindspore as ms
import numpy as np
import pytest

from local_attention import kernels


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Tests in the background ignore SIGINT, those under nohup SIGHUP, and so would the programs that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def random_numbers():
    """Start each test from the same random numbers, whichever tests ran before it; not fixtures of whole modules."""
    ms.set_seed(0)


@pytest.fixture
def path(request, monkeypatch):
    """Let cells that the test builds compute by operators in C++ where these are there, or by MindSpore's own alone."""
    if request.param == "portable":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
