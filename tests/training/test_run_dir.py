import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from data import Corpus
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
from local_attention.training.errors import CheckpointError, UsageError
from local_attention.training.run_dir import RunPaths, check_same_run, checkpoint_of, find_run_paths
from local_attention.training.schema import keys_of
from tests.training.toys import tiny_transformer


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made_run(path, *steps, best=None):
    """A run directory with checkpoints of these steps."""
    checkpoints = Checkpoints(path / "checkpoints", keep_last=9)
    for step in steps:
        checkpoints.save({"model.w": np.zeros(1, np.float32)}, {"step": step}, best=step == best)
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


# Which checkpoint to sample from or score.


def test_best_and_last_of_a_run(tmp_path):
    made_run(tmp_path, 1, 2, best=1)
    assert step_of(checkpoint_of(tmp_path, "best")) == 1
    assert step_of(checkpoint_of(str(tmp_path), "last")) == 2


def test_any_other_name_is_a_file(tmp_path):
    assert str(checkpoint_of(tmp_path, "some/step-00000001.safetensors")) == "some/step-00000001.safetensors"


def test_a_run_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing: no such run directory"):
        checkpoint_of(tmp_path / "nothing", "best")
    with pytest.raises(CheckpointError, match="contains no checkpoint: was the run ended before the first one"):
        checkpoint_of(tmp_path, "best")


# What must not change in a resumed run.

CORPUS = Corpus("some", np.arange(200, dtype=np.uint8))
CHANGED = {  # key of a run's config: a value other than the default
    "data.source": "stdlib",
    "data.path": "elsewhere",
    "data.dir": "elsewhere",
    "data.fallback": "stdlib",
    "data.max_bytes": 5,
    "data.val_path": "elsewhere",
    "data.test_path": "elsewhere",
    "model.exact_windowsize": False,
    "model.use_abs_pos_emb": False,
    "model.use_rotary_pos_emb": False,
    "model.use_xpos": True,
    "model.xpos_scale_base": 64.0,
    "model.use_dynamic_pos_bias": True,
    "model.scale": 0.1,
    "model.qk_rmsnorm": True,
    "model.shared_qk": True,
    "model.gate_values_per_head": True,
    "optimizer.name": "muon",
    "schedule.name": "wsd",
    "train.max_minutes": 3.0,
    "parallel": "data",
    "device.target": "CPU",
    "run_dir": "elsewhere",
    "resume": "elsewhere",
}
FIXED = {key for key in keys_of(RunConfig) if key.startswith("model.")}
FIXED |= {"seed", "optimizer.name", "train.seq_len", "train.batch_size", "train.grad_accum_every"}


def changed(key):
    """Return the default config with one changed value, and both values."""
    config = RunConfig()
    group, _, name = key.rpartition(".")
    holder = getattr(config, group) if group else config
    before = getattr(holder, name)
    value = CHANGED[key] if key in CHANGED else before + 3
    assert value != before
    setattr(holder, name, value)
    return config, before, value


def saved(config, corpus=CORPUS):
    """Return the metadata of a checkpoint as they are read from disk."""
    return json.loads(json.dumps(run_dir.provenance(config, corpus)))


@pytest.mark.parametrize("key", sorted(FIXED))
def test_changes_that_make_another_run_are_refused_naming_key_and_both_values(key):
    config, before, now = changed(key)
    with pytest.raises(UsageError) as error:
        check_same_run(config, CORPUS, saved(RunConfig()))
    assert f"{key} was {before} in the run and is {now} now" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", sorted(set(keys_of(RunConfig)) - FIXED))
def test_anything_else_may_change_and_is_logged(key, caplog):
    caplog.set_level("INFO", logger="train")
    check_same_run(changed(key)[0], CORPUS, saved(RunConfig()))
    is_logged = f"changed since the checkpoint: {key} from " in caplog.text
    assert is_logged == (key not in ("run_dir", "resume") and not key.startswith("data."))  # data has a fingerprint


def test_an_unchanged_config_is_the_same_run():
    check_same_run(RunConfig(), CORPUS, saved(RunConfig()))


def test_other_data_is_refused_even_with_the_same_name():
    other = Corpus("some", CORPUS.bytes[::-1].copy())
    with pytest.raises(UsageError) as error:
        check_same_run(RunConfig(), other, saved(RunConfig()))
    assert f"data.fingerprint was {CORPUS.fingerprint} in the run and is {other.fingerprint} now" in str(error.value)


@pytest.mark.parametrize("split", ["val", "test"])
def test_another_file_for_validation_or_testing_is_other_data(split):
    own, other = (Corpus("some", CORPUS.bytes, {split: np.full(9, value, np.uint8)}) for value in (1, 2))
    check_same_run(RunConfig(), own, saved(RunConfig(), own))
    for now in (CORPUS, other):
        with pytest.raises(UsageError, match=r"data\.fingerprint was"):
            check_same_run(RunConfig(), now, saved(RunConfig(), own))


def test_the_same_data_with_another_name_is_allowed():
    check_same_run(RunConfig(), Corpus("other", CORPUS.bytes), saved(RunConfig()))


@pytest.mark.parametrize("key", sorted(key for key in FIXED if "." in key))
def test_a_setting_that_the_checkpoint_does_not_record_had_its_default(key):
    group, name = key.split(".")
    meta = saved(RunConfig())
    del meta["config"][group][name]
    check_same_run(RunConfig(), CORPUS, meta)
    config, before, now = changed(key)
    with pytest.raises(UsageError, match=re.escape(f"{key} was {before} in the run and is {now} now")):
        check_same_run(config, CORPUS, meta)


def test_a_checkpoint_that_records_only_its_model_is_resumed_with_any_other_settings():
    meta = {"config": {"model": saved(RunConfig())["config"]["model"]}}
    for key in sorted(set(keys_of(RunConfig)) - {key for key in FIXED if key.startswith("model.")}):
        check_same_run(changed(key)[0], CORPUS, meta)
    with pytest.raises(UsageError, match=r"model\.dim was 512 in the run and is 515 now"):
        check_same_run(changed("model.dim")[0], CORPUS, meta)


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


@pytest.mark.parametrize("checkpoint", [None, "x"])
def test_size_and_paths_of_a_run_are_logged(tmp_path, caplog, checkpoint):
    caplog.set_level("INFO", logger="train")
    model = tiny_transformer()
    run_dir.announce(RunPaths(tmp_path, checkpoint), model, replace(TrainConfig(), grad_accum_every=2, batch_size=3))
    size = sum(parameter.asnumpy().size for parameter in model.trainable_params())
    sizes = f"{size:,} parameters; 3 sequences x 1,024 bytes x 2 micro-batches per step"
    assert caplog.messages[-1] == f"{sizes}; writing to {tmp_path}"
    assert caplog.messages[:-1] == ([f"resuming from {checkpoint}"] if checkpoint else [])
