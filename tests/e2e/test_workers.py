"""Data parallelism with two processes on this machine, started by scripts/launch.sh."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import ROOT, TINY

STEPS = 20
OVERRIDES = [
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=10",
    "train.eval_every=10",
    "model.max_ngram=3",
    "model.ngram_buckets=997",
    "model.ngram_dim=8",
]


@pytest.fixture(scope="module", autouse=True)
def loopback():
    """Skip where there is no loopback interface, as in some containers, since msrun needs it."""
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
    except OSError as error:
        pytest.skip(f"msrun cannot bind the loopback: {error}")


class Launched:
    """A run of ``scripts/launch.sh 2`` in the background."""

    def __init__(self, commands, run_dir, *overrides):
        self.path = commands.folder / run_dir
        arguments = [*TINY, f"data.path={commands.text}", f"run_dir={run_dir}", "train.batch_size=2", *overrides]
        self.process = subprocess.Popen(
            [str(ROOT / "scripts/launch.sh"), "2", *arguments],
            cwd=commands.folder,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def worker(self, rank):
        """Return the process id of a worker."""
        log = self.path / (f"worker-{rank}.log" if rank else "train.log")
        return int(re.search(rf"worker {rank} of 2: process (\d+)", log.read_text())[1])

    def wait_for_step(self, step):
        metrics = self.path / "metrics.jsonl"
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def end(self):
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out.decode(), err.decode()


def launch(commands, run_dir, *overrides):
    status, out, err = Launched(commands, run_dir, *overrides).end()
    assert status == 0, out + err
    return commands.folder / run_dir, out


def records(run_dir, kind):
    return [r for r in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def assert_same_run(one, other, tolerance):
    """Compare losses, norms, scores and the last checkpoints."""
    for kind, names in (("train", ("bpb", "grad_norm", "lr")), ("eval", ("bpb", "bytes_scored"))):
        assert len(records(one, kind)) == len(records(other, kind)) > 0
        for ours, theirs in zip(records(one, kind), records(other, kind)):
            assert (ours["step"], ours["bytes_seen"]) == (theirs["step"], theirs["bytes_seen"])
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], abs=tolerance), (kind, ours["step"], name)
    tensors, wanted = (load_file(run_dir / "checkpoints" / "last") for run_dir in (one, other))
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def two(commands):
    """An undisturbed run of two workers, and its output."""
    return launch(commands, "runs/two", *OVERRIDES)


@pytest.mark.slow
def test_two_workers_compute_the_same_as_one_with_twice_the_batch(commands, two):
    run_dir, out = two
    result = commands.train("runs/one", *OVERRIDES, "train.batch_size=4")
    assert result.returncode == 0, result.stderr
    assert_same_run(run_dir, commands.folder / "runs/one", 1e-5)
    assert "2 sequences x 32 bytes x 2 micro-batches per step in each of 2 workers" in out
    assert "DISTRIBUTED" not in out


def test_the_weights_of_both_are_identical_to_the_bit(two):
    logs = [(two[0] / name).read_text() for name in ("train.log", "worker-1.log")]
    digests = [re.findall(r"weights ([0-9a-f]{64})", log) for log in logs]
    assert len(digests[0]) == 1
    assert digests[0] == digests[1]


def test_only_worker_0_writes_the_run_and_each_worker_has_a_log(two):
    run_dir, _ = two
    assert {path.name for path in run_dir.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "train.log", "worker-1.log"),
    }
    logs = [(run_dir / name).read_text() for name in ("train.log", "worker-1.log")]
    scores = [re.findall(r"(?:val|test): (.*) bpb", log) for log in logs]
    assert len(scores[0]) == 2
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_after_a_signal_two_workers_save_and_one_continues_their_run(commands, two):
    run = Launched(commands, "runs/stopped", *OVERRIDES)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGUSR1)
    run.process.send_signal(signal.SIGINT)
    status, out, err = run.end()
    assert (status, err) == (130, ""), out + err
    assert "saved because of SIGUSR1; the run goes on" in out
    step = int(re.search(r"interrupted: saved step (\d+) in runs/stopped", out)[1])
    assert 3 <= step < STEPS
    assert "continue:  scripts/launch.sh 2 " in out
    refused = commands.train("runs/stopped", *OVERRIDES, "train.batch_size=2")
    assert refused.returncode == 2
    assert "train.batch_size times the number of workers was 4 in the run and is 2 now" in refused.stderr
    result = commands.train("runs/stopped", *OVERRIDES, "train.batch_size=4")
    assert result.returncode == 0, result.stderr
    assert_same_run(run.path, two[0], 1e-5)


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_the_same_command_continues(commands, two):
    undisturbed, _ = two
    run = Launched(commands, "runs/killed2", *OVERRIDES)
    run.wait_for_step(11)
    other = run.worker(0)
    os.kill(run.worker(1), signal.SIGKILL)
    begin = time.monotonic()
    status, _, err = run.end()
    assert status == 1
    assert "error: worker 1 was killed by signal 9" in err
    assert time.monotonic() - begin < 60
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(other)], capture_output=True, text=True).stdout
    assert state.strip()[:1] in ("", "Z")  # gone, or a zombie
    run_dir, out = launch(commands, "runs/killed2", *OVERRIDES)
    assert "resuming from runs/killed2/checkpoints/step-" in out
    assert_same_run(run_dir, undisturbed, 0)


def test_a_usage_error_is_one_line(commands):
    status, out, err = Launched(commands, "runs/mistake", "train.batchsize=3").end()
    assert (status, err) == (2, "")
    assert out == "error: train.batchsize: no such key; did you mean train.batch_size?\n"
    assert not (commands.folder / "runs/mistake").exists()


@pytest.mark.parametrize("arguments", [[], ["experiment=quickstart"], ["0"]])
def test_the_launcher_requires_a_number_of_workers(arguments):
    result = subprocess.run([str(ROOT / "scripts/launch.sh"), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: expected the number of workers")
    assert result.stderr.count("\n") == 1


def test_a_worker_that_msrun_did_not_start_says_so(commands):
    result = commands.call("train.py", "data=stdlib", "run_dir=runs/single", "parallel=data")
    assert result.returncode == 2
    assert result.stderr.startswith("error: parallel=data: expected to be started by msrun")
    assert result.stderr.count("\n") == 1
