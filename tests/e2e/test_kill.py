"""A run that is killed at random moments; test_train_command.py has a short form with one SIGKILL."""

import random
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import TINY
from tests.e2e.tensorboard_server import tensorboard
from tests.e2e.test_train_command import metrics

pytestmark = pytest.mark.slow

KILLS = 10
STEPS = 200
OVERRIDES = [
    f"train.max_steps={STEPS}",
    "model.ff_dropout=0.1",
    "train.checkpoint_every=3",
    "train.eval_every=50",
    "train.generate_every=1000",
]


@pytest.fixture(scope="module")
def killed(commands):
    """A run that was killed and resumed many times: its directory, and the last saved step at each kill."""
    rng, steps = random.Random(0), []
    for kill in range(KILLS):
        process = commands.start("train.py", *TINY, f"data.path={commands.text}", "run_dir=runs/killed", *OVERRIDES)
        line, steps_to_see = next(process.stdout), 4 * (kill % 2)  # every other session saves, even on a slow machine
        while not line.startswith(b"compiled"):
            line = next(process.stdout)
        while steps_to_see:
            steps_to_see -= next(process.stdout).startswith(b"step")
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        saved = sorted((commands.folder / "runs/killed/checkpoints").glob("step-*.json"))
        steps.append(int(saved[-1].stem.removeprefix("step-")) if saved else 0)
    result = commands.train("runs/killed", *OVERRIDES)
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/killed", steps


@pytest.fixture(scope="module")
def undisturbed(commands):
    result = commands.train("runs/undisturbed", *OVERRIDES)
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/undisturbed"


def final(run_dir):
    return load_file(run_dir / f"checkpoints/step-{STEPS:08d}.safetensors")


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(killed, undisturbed):
    run_dir, steps = killed
    assert steps == sorted(steps) and len(set(steps)) > 3 and steps[-1] < STEPS, steps
    ours, wanted = final(run_dir), final(undisturbed)
    assert ours.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)


def test_its_metrics_are_those_of_an_undisturbed_one(killed, undisturbed):
    assert metrics(killed[0]) == metrics(undisturbed)


def test_it_leaves_no_incomplete_files(killed):
    run_dir, _ = killed
    assert not [path for path in run_dir.rglob("*") if "partial" in path.name]
    checkpoints = {path.stem for path in (run_dir / "checkpoints").glob("step-*")}
    for stem in checkpoints:
        assert {path.suffix for path in (run_dir / "checkpoints").glob(f"{stem}.*")} == {".json", ".safetensors"}


def test_tensorboard_shows_exactly_one_point_per_step(killed):
    run_dir, _ = killed
    with tensorboard(run_dir) as ask:
        ask("/data/plugin/scalars/tags")
        for run, wanted in (("train", range(1, STEPS + 1)), ("val", range(50, STEPS + 1, 50))):
            points = ask(f"/data/plugin/scalars/scalars?run=tensorboard%2F{run}&tag=bpb")
            assert [step for _, step, _ in points] == list(wanted)
