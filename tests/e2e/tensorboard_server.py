"""A TensorBoard server, queried over HTTP like a browser does."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager


@contextmanager
def tensorboard(run_dir):
    """Start a server for ``run_dir``; yields a function that returns the JSON at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", run_dir, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield lambda address: ask(f"http://127.0.0.1:{port}{address}")
    finally:
        server.terminate()
        server.wait()


def ask(url):
    """Return the JSON at ``url``, waiting until the server has it."""
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)
            if found:
                return found
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no answer from {url}")
