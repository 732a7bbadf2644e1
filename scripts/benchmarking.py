"""Shared by the benchmarks: each implementation is measured in its own process, and their rounds alternate."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from local_attention.training.device import peak_memory_bytes
from scripts.pytorch_original import python_with_original


def elapsed(function: Callable[[], object]) -> float:
    """Return the duration of a call in seconds."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Worker:
    """A process that runs the same script with ``--worker NAME`` to measure one implementation.

    Within one process, the threads of two frameworks would compete for the cores.
    """

    def __init__(self, name: str, options: Sequence[str] = (), python: str = sys.executable) -> None:
        command = [python, sys.argv[0], "--worker", name, *sys.argv[1:], *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self) -> dict[str, Any]:
        """Run the next round; returns its ``result`` and the peak ``memory`` of the process in bytes."""
        assert self.process.stdin and self.process.stdout  # pipes
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: a measured process has failed, see above")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def workers_of_original(*names: str, options: Sequence[str] = ()) -> dict[str, Worker]:
    """Workers that have PyTorch; none, and a line that says why, where nothing has set it up."""
    python = python_with_original()
    if not python:
        print("PyTorch is not measured: make parity sets up its environment", file=sys.stderr)
    return {name: Worker(name, options, python) for name in names if python}


def work(rounds: Iterator[Any]) -> None:
    """Run in a worker process: print the result of one round for each line on standard input."""
    for _ in sys.stdin:
        result = next(rounds)
        print(json.dumps({"result": result, "memory": peak_memory_bytes()}), flush=True)
