"""What can go wrong while a run writes or computes, each produced for real."""

import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import TINY

QUICK = ["model.depth=1", "train.generate_every=1000", "train.checkpoint_every=4"]


def checkpoints(run_dir):
    return sorted((run_dir / "checkpoints").glob("step-*.safetensors"))


def assert_all_whole(run_dir):
    for path in checkpoints(run_dir):
        assert path.with_suffix(".json").exists()
        for name, array in load_file(path).items():
            assert np.isfinite(array).all(), f"{path}: {name}"


@pytest.fixture(scope="module")
def undisturbed(commands):
    result = commands.train("runs/short", *QUICK)
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/short"


def test_a_file_that_cannot_grow_ends_the_run_with_one_line_and_keeps_what_was_complete(commands, undisturbed):
    run_dir = commands.folder / "runs/full"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    before = checkpoints(run_dir)
    size = before[-1].stat().st_size
    process = commands.start(
        "train.py",
        *TINY,
        f"data.path={commands.text}",
        "run_dir=runs/full",
        *QUICK,
        "train.max_steps=30",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.decode().splitlines()[-1].startswith("error:") and "too large" in err.decode()
    assert checkpoints(run_dir) == before
    assert_all_whole(run_dir)
    assert not list(run_dir.rglob("*.partial-*"))
    assert commands.train("runs/full", *QUICK, "train.max_steps=14").returncode == 0


# As root, which CI is, permissions stop nobody; Linux has a folder that stops root, too.
@pytest.mark.skipif(sys.platform != "linux", reason="needs a directory in which nobody may write: /sys")
def test_a_directory_that_cannot_be_written_is_named_at_once(commands):
    place = "/sys/runs" if os.geteuid() == 0 else "/runs"
    result = commands.train(place, *QUICK)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:") and place in line
    assert b"compiled" not in result.stdout


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_last_checkpoint_is_passed_over_and_the_run_ends_the_same(commands, undisturbed, damage):
    run_dir = commands.folder / f"runs/{damage}"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    last = checkpoints(run_dir)[-1]
    content = bytearray(last.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-3] ^= 1  # a bit of a weight
    last.write_bytes(content)
    result = commands.train(run_dir.relative_to(commands.folder), *QUICK)
    assert result.returncode == 0, result.stderr
    assert f"{last.name} cannot be read" in result.stdout.decode()
    ours, wanted = load_file(last), load_file(checkpoints(undisturbed)[-1])
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)


def test_where_all_checkpoints_are_damaged_the_run_is_not_begun_anew(commands, undisturbed):
    run_dir = commands.folder / "runs/all-damaged"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    for path in checkpoints(run_dir):
        path.write_bytes(b"")
    result = commands.train("runs/all-damaged", *QUICK)
    assert result.returncode == 2
    assert result.stderr.startswith("error: all checkpoints in runs/all-damaged/checkpoints are damaged")


def test_a_diverging_run_skips_its_steps_and_gives_up_naming_the_step(commands):
    result = commands.train(
        "runs/diverging", *QUICK, "optimizer.lr=1e30", "schedule.warmup_steps=0", "train.max_bad_steps=3"
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: step ") and "the last 3 steps were skipped" in line
    assert result.stdout.decode().count("skipped: loss") == 3
    assert_all_whole(commands.folder / "runs/diverging")


def test_a_second_process_does_not_write_to_the_same_run(commands):
    arguments = [*TINY, f"data.path={commands.text}", "run_dir=runs/shared", *QUICK, "train.max_steps=100000"]
    first = commands.start("train.py", *arguments)
    for line in first.stdout:
        if line.startswith(b"compiled"):
            break
    second = commands.train("runs/shared", *QUICK)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert second.stderr.startswith("error: another process is writing to runs/shared")


def test_what_may_change_when_a_run_goes_on_is_taken_and_logged(commands, undisturbed):
    run_dir = commands.folder / "runs/retuned"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    result = commands.train("runs/retuned", *QUICK, "train.max_steps=14", "optimizer.lr=1e-5")
    assert result.returncode == 0, result.stderr
    assert "changed since the checkpoint: optimizer.lr from 0.001 to 1e-05, train.max_steps" in result.stdout.decode()
    train = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] < 1.1e-5 for line in train if line["kind"] == "train"][-2:] == [True, True]
