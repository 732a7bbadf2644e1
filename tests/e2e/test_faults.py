"""Failures while a run writes or computes."""

import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from local_attention.training import run_dir as run_dirs
from local_attention.training.config import RunConfig
from tests.e2e.conftest import DROPOUT, TINY


def checkpoints(run_dir):
    return sorted((run_dir / "checkpoints").glob("step-*.safetensors"))


def assert_all_complete(run_dir):
    for path in checkpoints(run_dir):
        assert path.with_suffix(".json").exists()
        for name, array in load_file(path).items():
            assert np.isfinite(array).all(), f"{path}: {name}"


@pytest.fixture
def undisturbed(finished_run):
    return finished_run[0]


@pytest.mark.slow
def test_a_file_size_limit_ends_the_run_with_one_line_keeps_complete_checkpoints_and_the_run_goes_on_without_it(
    commands, undisturbed
):
    run_dir = commands.folder / "runs/full"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    before = checkpoints(run_dir)
    size = before[-1].stat().st_size
    process = commands.start(
        "train.py",
        *TINY,
        f"data.path={commands.text}",
        f"run_dir={run_dir}",
        DROPOUT,
        "train.max_steps=30",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.decode().splitlines()[-1].startswith("error:") and "too large" in err.decode()
    assert checkpoints(run_dir) == before
    assert_all_complete(run_dir)
    assert not list(run_dir.rglob("*.partial-*"))
    assert commands.train(run_dir, DROPOUT, "train.max_steps=14").returncode == 0


# Permissions do not stop root, which CI uses, but on Linux nobody can create files in /sys.
@pytest.mark.skipif(sys.platform != "linux", reason="needs a directory in which nobody can write: /sys")
def test_a_directory_that_is_not_writable_is_an_error_before_compilation(commands):
    folder = "/sys/runs" if os.geteuid() == 0 else "/runs"
    result = commands.train(folder, DROPOUT)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:") and folder in line
    assert b"compiled" not in result.stdout


@pytest.mark.parametrize("damage", [pytest.param("truncated", marks=pytest.mark.slow), "changed"])
def test_a_corrupt_last_checkpoint_is_skipped_and_the_run_ends_the_same(commands, undisturbed, damage):
    run_dir = commands.folder / f"runs/{damage}"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    last = checkpoints(run_dir)[-1]
    content = bytearray(last.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-3] ^= 1  # a bit of a weight
    last.write_bytes(content)
    result = commands.train(run_dir.relative_to(commands.folder), DROPOUT)
    assert result.returncode == 0, result.stderr
    assert f"{last.name} cannot be read" in result.stdout.decode()
    ours, wanted = load_file(last), load_file(checkpoints(undisturbed)[-1])
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)


def test_if_all_checkpoints_are_corrupt_no_new_run_is_started(commands, undisturbed):
    run_dir = commands.folder / "runs/all-corrupt"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    for path in checkpoints(run_dir):
        path.write_bytes(b"")
    result = commands.train("runs/all-corrupt", DROPOUT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: all checkpoints in runs/all-corrupt/checkpoints are corrupt")


def test_a_diverging_run_skips_steps_and_ends_naming_the_step(commands):
    result = commands.train(
        "runs/diverging", DROPOUT, "optimizer.lr=1e30", "schedule.warmup_steps=0", "train.max_bad_steps=3"
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: step ") and "the last 3 steps were skipped" in line
    assert "lower optimizer.lr or train.clip_norm and start again, or raise" in line  # there is no checkpoint
    assert result.stdout.decode().count("skipped: loss") == 3
    assert_all_complete(commands.folder / "runs/diverging")


def test_a_run_directory_that_another_process_is_writing_to_is_refused(commands):
    lock = run_dirs.create(commands.folder / "runs/locked", RunConfig())
    result = commands.train("runs/locked", DROPOUT)
    os.close(lock)
    assert result.returncode == 2
    assert result.stderr.startswith("error: another process is writing to runs/locked")


@pytest.mark.slow
def test_a_run_locks_its_directory_while_it_trains(commands):
    arguments = [*TINY, f"data.path={commands.text}", "run_dir=runs/shared", DROPOUT, "train.max_steps=100000"]
    first = commands.start("train.py", *arguments)
    for line in first.stdout:
        if line.startswith(b"compiled"):
            break
    second = commands.train("runs/shared", DROPOUT)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert second.stderr.startswith("error: another process is writing to runs/shared")


@pytest.mark.slow
def test_allowed_changes_of_a_resumed_run_are_used_and_logged(commands, undisturbed):
    run_dir = commands.folder / "runs/retuned"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    result = commands.train("runs/retuned", DROPOUT, "train.max_steps=14", "optimizer.lr=1e-5")
    assert result.returncode == 0, result.stderr
    assert "changed since the checkpoint: optimizer.lr from 0.001 to 1e-05, train.max_steps" in result.stdout.decode()
    train = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] < 1.1e-5 for line in train if line["kind"] == "train"][-2:] == [True, True]
