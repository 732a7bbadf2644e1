"""Runs of the commands, as a person would start them: from a folder of their own, nothing but the command line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    sources = sorted((ROOT / "local_attention").rglob("*.py"))
    text.write_bytes(b"".join(path.read_bytes() for path in sources)[:60_000])
    return Commands(folder, text)


@pytest.fixture(scope="session")
def finished_run(commands):
    """An uninterrupted run: its directory and what it printed."""
    result = commands.train("runs/whole")
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/whole", result
