"""Runs the commands as a user would: from the command line, in a working directory of their own."""

import importlib
import io
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from local_attention.training import command, run_dir, run_log

ROOT = Path(__file__).resolve().parents[2]

MIRROR = "http://127.0.0.1:9/enwik8.zip"  # nothing listens there

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


DROPOUT = "model.ff_dropout=0.1"


@dataclass
class Commands:
    """Runs the project's programs with ``folder`` as the working directory; ``text`` is a file to train on."""

    folder: Path
    text: Path

    def start(self, program, *arguments, **options):
        environment = {**os.environ, "ENWIK8_MIRRORS": MIRROR}
        return subprocess.Popen(
            [sys.executable, str(ROOT / program), *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def call(self, program, *arguments, stdin=b""):
        """Like :meth:`run`, but within this process, which saves its start and imports; no signals."""
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        loggers = [logging.getLogger(name) for name in (None, *run_log.LOGGERS)]
        before = {logger: (logger.level, logger.propagate, logger.handlers) for logger in loggers}
        mode = ms.get_context("mode")
        logging.getLogger().handlers = []  # those of pytest
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            patch.setenv("ENWIK8_MIRRORS", MIRROR)
            patch.setattr(sys, "argv", [program, *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr(command, "deliver_to_python", lambda: None)
            patch.setattr(run_dir.fcntl, "flock", lambda *_: None)  # a lock is held until the process ends
            try:
                module.main()
                status = 0
            except SystemExit as end:
                status = end.code
        ms.set_context(mode=mode)
        run_log._buffer.buffer.clear()
        for logger, (level, propagate, handlers) in before.items():
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        return subprocess.CompletedProcess(arguments, status, out.buffer.getvalue(), err.buffer.getvalue().decode())

    def run(self, program, *arguments):
        process = self.start(program, *arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err.decode())

    def train(self, run_dir, *overrides):
        return self.run("train.py", *TINY, f"data.path={self.text}", f"run_dir={run_dir}", *overrides)

    def train_until(self, line, number, run_dir, *overrides):
        """Train, and send the signal ``number`` when a line begins with ``line``; returns status, output and errors."""
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
    """Return words of an artificial language with Zipf's distribution, always the same.

    With other texts a gradient may be almost zero somewhere, but Adam still makes a step of full size. Runs that should
    agree then differ there because of rounding errors.
    """
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(ord("a"), ord("z") + 1, length).tolist()) for length in rng.integers(1, 9, 300)]
    frequency = 1 / np.arange(1, 301)
    chosen = rng.choice(300, size, p=frequency / frequency.sum())
    sentences = [b" ".join(words[i] for i in chosen[k : k + 9]).capitalize() for k in range(0, size, 9)]
    return b".\n".join(sentences)[:size]


@pytest.fixture(scope="session")
def finished_run(commands):
    """An uninterrupted run with dropout: its directory and its output."""
    result = commands.train("runs/whole", DROPOUT)
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/whole", result
