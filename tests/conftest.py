"""What all tests need."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Tests that were started in the background ignore SIGINT, and so would the programs that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
