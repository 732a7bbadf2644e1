"""What the benchmarks share: each thing measured has a process of its own, and their rounds alternate."""

import json
import subprocess
import sys
import time

from local_attention.training.device import peak_memory_bytes


def elapsed(function):
    """Seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Worker:
    """A process that runs the script once more, as one of the things that it measures.

    In one process the threads of two frameworks would get into each other's way.
    """

    def __init__(self, name):
        command = [sys.executable, sys.argv[0], "--worker", name, *sys.argv[1:]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self):
        """``{"result": what the next round gave, "memory": peak bytes of the process}``."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: a measured process ended, see above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def work(rounds):
    """The worker's side: take a result of the iterator ``rounds`` for each line that comes."""
    for _ in sys.stdin:
        result = next(rounds)
        print(json.dumps({"result": result, "memory": peak_memory_bytes()}), flush=True)
