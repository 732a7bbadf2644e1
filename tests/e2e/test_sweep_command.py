"""A sweep of real runs in one process: they do not affect each other, and nothing of them stays."""

import fcntl
import gc
import os
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file

from local_attention.training import build, run_dir
from tests.e2e.conftest import DROPOUT, TINY


@pytest.fixture(scope="module")
def sweep(commands):
    """A sweep whose first run diverges, and references to the models, which it has built, and to open directories."""
    models, locks, create = [], [], run_dir.create

    def building(config):
        models.append(weakref.ref(model := build_model(config)))
        return model

    def creating(*args):
        locks.append(create(*args))
        return locks[-1]

    build_model = build.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_model", building)
        patch.setattr(run_dir, "create", creating)
        result = commands.call(
            "train.py",
            *TINY,
            f"data.path={commands.text}",
            DROPOUT,
            "run_dir=runs/sweep",
            "-m",
            "optimizer.lr=1e30,1e-3",
            "train.max_bad_steps=2",
        )
    return result, models, locks


def test_the_others_run_though_one_diverges(sweep, commands):
    result, _, _ = sweep
    assert result.returncode == 1
    assert (commands.folder / "runs/sweep/lr=1e-3/summary.json").exists()
    head, row = result.stderr.splitlines()[-2:]
    assert head == "1 of 2 runs failed:"
    assert row.startswith("  lr=1e30: step ") and "the last 2 steps were skipped" in row


def test_a_run_of_a_sweep_is_the_same_to_the_bit_as_that_run_alone(sweep, commands, finished_run):
    ours, alone = (
        load_file(path / "checkpoints/step-00000012.safetensors")
        for path in (commands.folder / "runs/sweep/lr=1e-3", finished_run[0])
    )
    assert ours.keys() == alone.keys()
    for name, tensor in alone.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_the_command_to_continue_is_that_of_the_run(sweep):
    result, _, _ = sweep
    (line,) = (line for line in result.stdout.decode().splitlines() if line.startswith("continue:"))
    words = line.split()
    assert "-m" not in words and "optimizer.lr=1e-3" in words and "run_dir=runs/sweep/lr=1e-3" in words


def test_nothing_of_a_run_stays_in_memory(sweep):
    _, models, _ = sweep
    gc.collect()
    assert [model() for model in models] == [None, None]


def test_a_run_of_a_sweep_that_has_ended_can_be_continued_elsewhere_at_once(sweep, commands):
    for name in ("lr=1e30", "lr=1e-3"):
        directory = os.open(commands.folder / "runs/sweep" / name, os.O_RDONLY)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock of the run would refuse it
        os.close(directory)


def test_each_run_has_its_own_log(sweep, commands):
    for name in ("lr=1e30", "lr=1e-3"):
        log = (commands.folder / "runs/sweep" / name / "train.log").read_text()
        assert log.count("writing to ") == 1 and f"writing to runs/sweep/{name}\n" in log
