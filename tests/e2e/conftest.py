"""Runs of the commands, as a person would start them: from a folder of their own, nothing but the command line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

TINY = [
    "data=file",
    "model.dim=32",
    "model.depth=1",
    "model.heads=2",
    "model.dim_head=16",
    "model.local_attn_window_size=16",
    "train.seq_len=32",
    "train.batch_size=4",
    "train.grad_accum_every=2",
    "train.max_steps=12",
    "train.log_every=1",
    "train.eval_every=4",
    "train.eval_bytes=500",
    "train.checkpoint_every=5",
    "train.generate_every=6",
    "train.generate_length=20",
    "schedule.warmup_steps=3",
]


@dataclass
class Commands:
    """Starts the project's programs with ``folder`` as the working directory."""

    folder: Path
    text: Path

    def start(self, program, *arguments, **options):
        environment = {**os.environ, "ENWIK8_MIRRORS": "http://127.0.0.1:9/enwik8.zip"}  # nothing listens there
        return subprocess.Popen(
            [sys.executable, str(ROOT / program), *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, program, *arguments):
        process = self.start(program, *arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err.decode())

    def train(self, run_dir, *overrides):
        return self.run("train.py", *TINY, f"data.path={self.text}", f"run_dir={run_dir}", *overrides)

    def train_until(self, line, number, run_dir, *overrides):
        """Send the signal ``number`` once a line that begins with ``line`` is printed; returns status and output."""
        arguments = [*TINY, f"data.path={self.text}", f"run_dir={run_dir}", *overrides]
        process = self.start("train.py", *arguments)
        printed = []
        for text in process.stdout:
            printed.append(text.decode())
            if printed[-1].startswith(line):
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=300)
        return process.returncode, "".join(printed) + out.decode(), err.decode()


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    text = folder / "text with spaces, and commas.txt"
    text.write_bytes(some_text(60_000))
    return Commands(folder, text)


def some_text(size):
    """Words of a made-up language, some more frequent than others, always the same.

    With another text a gradient may be next to nothing somewhere, of which Adam makes a step of full size all the same:
    then runs that should agree differ there by their rounding errors, as large as the step.
    """
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(ord("a"), ord("z") + 1, length).tolist()) for length in rng.integers(1, 9, 300)]
    frequency = 1 / np.arange(1, 301)
    chosen = rng.choice(300, size, p=frequency / frequency.sum())
    sentences = [b" ".join(words[i] for i in chosen[k : k + 9]).capitalize() for k in range(0, size, 9)]
    return b".\n".join(sentences)[:size]


@pytest.fixture(scope="session")
def finished_run(commands):
    """An uninterrupted run: its directory and what it printed."""
    result = commands.train("runs/whole")
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/whole", result
