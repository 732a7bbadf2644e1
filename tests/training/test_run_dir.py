import os
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from local_attention.training import run_dir
from local_attention.training.checkpoint import Checkpoints
from local_attention.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    run_config,
)
from local_attention.training.distributed import Distributed
from local_attention.training.errors import CheckpointError, UsageError
from local_attention.training.run_dir import RunPaths, checkpoint_of, claim, find_run_paths
from tests.training.toys import tiny_transformer


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made_run(path, *steps, best=None):
    """A run directory with checkpoints of these steps."""
    checkpoints = Checkpoints(path / "checkpoints", keep_last=9)
    for step in steps:
        meta = {"step": step, "best_step": best if best and best <= step else None}
        checkpoints.save({"model.w": np.zeros(1, np.float32)}, meta, best=step == best)
    return path


def paths(**values):
    return find_run_paths(RunConfig(**values), "quickstart")


def step_of(path):
    return int(path.stem.removeprefix("step-"))


# Where a run writes and what it resumes from.


@pytest.mark.parametrize("resume", ["auto", None])
def test_without_run_dir_a_new_one_is_named_after_experiment_and_time(resume):
    found = paths(resume=resume)
    assert re.fullmatch(r"runs/quickstart/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", str(found.run_dir))
    assert found.checkpoint is None
    assert found.checkpoints == found.run_dir / "checkpoints"
    assert not found.run_dir.exists()  # nothing was written


@pytest.mark.parametrize("resume", ["auto", None])
def test_a_run_dir_without_checkpoint_is_a_new_run(tmp_path, resume):
    assert paths(run_dir=str(tmp_path / "absent"), resume=resume) == RunPaths(tmp_path / "absent", None)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert paths(run_dir=str(tmp_path / "empty"), resume=resume) == RunPaths(tmp_path / "empty", None)


def test_auto_resumes_from_the_last_checkpoint_in_run_dir(tmp_path):
    made_run(tmp_path / "a", 1, 2, best=1)
    found = paths(run_dir=str(tmp_path / "a"), resume="auto")
    assert found.run_dir == tmp_path / "a"
    assert step_of(found.checkpoint) == 2


def test_null_refuses_a_run_dir_that_contains_a_run(tmp_path):
    made_run(tmp_path / "a", 1)
    with pytest.raises(UsageError, match=r"a already contains a run: continue it with resume=auto, or use another"):
        paths(run_dir=str(tmp_path / "a"), resume=None)


def test_a_run_directory_is_continued_in_paths(tmp_path):
    made_run(tmp_path / "a", 1, 2, best=1)
    found = paths(resume=str(tmp_path / "a"))
    assert found.run_dir == tmp_path / "a"
    assert step_of(found.checkpoint) == 2


def test_a_run_directory_is_resumed_in_another_run_dir(tmp_path):
    made_run(tmp_path / "a", 1, 2)
    found = paths(resume=str(tmp_path / "a"), run_dir=str(tmp_path / "b"))
    assert found.run_dir == tmp_path / "b"
    assert found.checkpoint.parent == (tmp_path / "a/checkpoints").resolve()
    assert step_of(found.checkpoint) == 2


def test_a_run_directory_without_checkpoint_cannot_be_resumed(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        paths(resume=str(tmp_path / "a"))


@pytest.mark.parametrize("name, step", [("step-00000001.safetensors", 1), ("best", 1), ("last", 2)])
def test_a_checkpoint_starts_a_new_run(tmp_path, name, step):
    file = made_run(tmp_path / "a", 1, 2, best=1) / "checkpoints" / name
    found = paths(resume=str(file))
    assert str(found.run_dir).startswith("runs/quickstart/")
    assert step_of(found.checkpoint.resolve()) == step
    assert paths(resume=str(file), run_dir="b").run_dir.name == "b"


def test_resume_from_a_missing_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"resume=\S*/nothing: no such run directory or checkpoint"):
        paths(resume=str(tmp_path / "nothing"))


@pytest.mark.parametrize("resume", ["a", "a/checkpoints/step-00000001.safetensors"])
def test_another_run_in_run_dir_is_not_overwritten_by_a_resumed_one(tmp_path, resume):
    made_run(tmp_path / "a", 1)
    made_run(tmp_path / "b", 7)
    with pytest.raises(UsageError, match="b already contains a run"):
        paths(resume=str(tmp_path / resume), run_dir=str(tmp_path / "b"))


def test_a_run_begins_with_the_best_weights_of_another_one_or_with_those_of_a_checkpoint(tmp_path):
    made_run(tmp_path / "a", 1, 2, 3, best=2)
    for init_from, step in (("a", 2), ("a/checkpoints/last", 3), ("a/checkpoints/step-00000001.safetensors", 1)):
        found = paths(init_from=init_from, run_dir="b")
        assert (found.run_dir.name, found.checkpoint, step_of(found.init_from)) == ("b", None, step)
    assert str(paths(init_from="a").run_dir).startswith("runs/quickstart/")


def test_weights_to_begin_with_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(UsageError, match="init_from=nothing: no such run directory or checkpoint"):
        paths(init_from="nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty contains no checkpoint"):
        paths(init_from="empty")


def test_a_run_that_began_with_other_weights_is_continued_by_the_same_command_even_if_those_are_gone(tmp_path):
    made_run(tmp_path / "b", 1)
    found = paths(init_from="nothing", run_dir="b")
    assert (step_of(found.checkpoint), found.init_from) == (1, None)
    with pytest.raises(UsageError, match="b already contains a run"):
        paths(init_from="nothing", run_dir="b", resume=None)


@pytest.mark.parametrize("resume", ["auto", None])
def test_of_runs_that_begin_in_the_same_second_each_gets_a_directory_of_its_own(tmp_path, monkeypatch, resume):
    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-31_10-00-00")
    directories = []
    for _ in range(6):
        found = claim(paths(resume=resume))
        assert found.checkpoint is None  # not that of another run
        made_run(found.run_dir, 1)
        directories.append(found.run_dir.name)
    assert directories == ["2026-01-31_10-00-00", *(f"2026-01-31_10-00-00-{number}" for number in range(2, 7))]


def test_only_the_main_process_creates_a_directory(tmp_path):
    class Worker(Distributed):
        def broadcast_object(self, make):
            return "what the main process has created"

    assert claim(paths(), Worker(rank=1, world_size=2)) == "what the main process has created"
    assert not (tmp_path / "runs").exists()


def test_a_run_dir_that_somebody_named_keeps_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    assert claim(paths(run_dir="a")) == RunPaths(run_dir.Path("a"), None)


# Which checkpoint to sample from or score.


def test_best_and_last_of_a_run(tmp_path):
    made_run(tmp_path, 1, 2, best=1)
    assert step_of(checkpoint_of(tmp_path, "best")) == 1
    assert step_of(checkpoint_of(str(tmp_path), "last")) == 2


@pytest.mark.parametrize("links", ["gone", "copied as files"])
def test_best_and_last_are_found_in_a_copy_without_links(tmp_path, links):
    made_run(tmp_path / "a", 1, 2, 3, best=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as cp -rL does
    if links == "gone":
        for name in ("best", "last"):
            (tmp_path / "b/checkpoints" / name).unlink()
    for name, step in (("best", 2), ("last", 3)):
        wanted = tmp_path / f"b/checkpoints/step-0000000{step}.safetensors"
        assert checkpoint_of("b", name).absolute() == wanted
        assert checkpoint_of(None, f"b/checkpoints/{name}").absolute() == wanted
        assert paths(resume=f"b/checkpoints/{name}").checkpoint.absolute() == wanted


def test_any_other_name_is_a_file(tmp_path):
    assert str(checkpoint_of(tmp_path, "some/step-00000001.safetensors")) == "some/step-00000001.safetensors"


def test_a_run_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: no such run directory"):
        checkpoint_of(tmp_path / "nothing", "best")
    with pytest.raises(CheckpointError, match="contains no checkpoint: was the run ended before the first one"):
        checkpoint_of(tmp_path, "best")


# The directory.


def test_config_yaml_can_be_read_back_into_the_same_config(tmp_path):
    config = RunConfig(
        data=DataConfig("file", "Bücher/it's 1: #a.txt", max_bytes=10**8),
        model=ModelConfig(dim=24, use_abs_pos_emb=False, ff_mult=2.5),
        optimizer=OptimizerConfig("adamw", lr=1e-5, eps=1e-12),
        schedule=ScheduleConfig("wsd", 7),
        train=TrainConfig(max_steps=None, max_minutes=1.5),
        run_dir="null",
        seed=2**32 - 1,
    )
    run_dir.create(tmp_path / "runs/a", config)
    assert run_config(OmegaConf.load(tmp_path / "runs/a/config.yaml")) == config


def test_an_existing_directory_gets_the_current_config(tmp_path):
    os.close(run_dir.create(tmp_path, RunConfig()))  # as when its process ends
    run_dir.create(tmp_path, RunConfig(seed=5))
    assert run_config(OmegaConf.load(tmp_path / "config.yaml")).seed == 5


def test_size_and_directory_of_a_run_are_logged(tmp_path, caplog):
    caplog.set_level("INFO", logger="train")
    model = tiny_transformer()
    run_dir.announce(RunPaths(tmp_path, None), model, replace(TrainConfig(), grad_accum_every=2, batch_size=3))
    size = sum(parameter.asnumpy().size for parameter in model.trainable_params())
    sizes = f"{size:,} parameters; 3 sequences x 1,024 bytes x 2 micro-batches per step"
    assert caplog.messages == [f"{sizes}; writing to {tmp_path}"]
