import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from mindspore import nn

from data import Corpus
from local_attention.dropout import Dropout
from local_attention.training import start
from local_attention.training.build import build_model
from local_attention.training.checkpoint import Checkpoints, read, sha256_of, sidecar, tensors_of
from local_attention.training.config import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    fill_from_initial,
)
from local_attention.training.distributed import Distributed
from local_attention.training.errors import UsageError
from local_attention.training.optimizer import build_optimizer
from local_attention.training.run_dir import RunPaths, checkpoint_of
from local_attention.training.schema import as_dict, keys_of
from local_attention.training.start import check_same_run
from local_attention.training.state import RunState
from tests.training.toys import randomise


@pytest.fixture(autouse=True)
def log_level(caplog):
    caplog.set_level("INFO", logger="train")


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
    "device.matmul_precision": "bfloat16",
    "model.embedding_skip": True,
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
    "train.precision": "float16",
    "train.zero_init_outputs": True,
    "parallel": "data",
    "device.target": "CPU",
    "run_dir": "elsewhere",
    "resume": "elsewhere",
    "init_from": "elsewhere",
}
FIXED = {key for key in keys_of(RunConfig) if key.startswith("model.")}
FIXED |= {"seed", "optimizer.name", "train.seq_len", "train.batch_size", "train.grad_accum_every"}


def changed(key):
    """Return the default config with one changed value, and both values."""
    config = RunConfig()
    group, _, name = key.rpartition(".")
    holder = getattr(config, group) if group else config
    before = getattr(holder, name)
    value = CHANGED[key] if key in CHANGED else (before or 0) + 3
    assert value != before
    setattr(holder, name, value)
    return config, before, value


def saved(config, corpus=CORPUS):
    """Return the metadata of a checkpoint as they are read from disk."""
    return json.loads(json.dumps(start.provenance(config, corpus)))


@pytest.mark.parametrize("key", sorted(FIXED))
def test_changes_that_make_another_run_are_refused_naming_key_and_both_values(key):
    config, before, now = changed(key)
    with pytest.raises(UsageError) as error:
        check_same_run(config, CORPUS, saved(RunConfig()))
    assert f"{key} was {before} in the run and is {now} now" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", sorted(set(keys_of(RunConfig)) - FIXED))
def test_anything_else_may_change_and_is_logged(key, caplog):
    check_same_run(changed(key)[0], CORPUS, saved(RunConfig()))
    is_logged = f"changed since the checkpoint: {key} from " in caplog.text
    is_path = key in ("run_dir", "resume", "init_from") or key.startswith("data.")  # data has a fingerprint
    assert is_logged == (not is_path)


def test_an_unchanged_config_is_the_same_run():
    check_same_run(RunConfig(), CORPUS, saved(RunConfig()))


def test_other_data_is_refused_even_with_the_same_name():
    other = Corpus("some", CORPUS.bytes[::-1].copy())
    with pytest.raises(UsageError) as error:
        check_same_run(RunConfig(), other, saved(RunConfig()))
    assert f"data.fingerprint was {CORPUS.fingerprint} in the run and is {other.fingerprint} now" in str(error.value)


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


@pytest.mark.parametrize("split", ["val", "test"])
def test_another_file_for_validation_or_testing_is_allowed_and_logged_if_the_training_data_are_the_same(caplog, split):
    own, other = (Corpus("some", CORPUS.bytes, {split: np.full(9, value, np.uint8)}) for value in (1, 2))
    check_same_run(RunConfig(), other, saved(RunConfig(), own))
    fingerprints = f"data.fingerprint from {own.fingerprint} to {other.fingerprint}"
    assert caplog.messages == [f"changed since the checkpoint: {fingerprints}"]
    with pytest.raises(UsageError, match=r"data\.fingerprint was"):  # 5% more of its bytes are for training
        check_same_run(RunConfig(), own, saved(RunConfig()))


def sized(batch_size, grad_accum_every):
    return RunConfig(train=TrainConfig(batch_size=batch_size, grad_accum_every=grad_accum_every))


@pytest.mark.parametrize("now, workers", [((2, 4), 1), ((8, 1), 1), ((1, 4), 2), ((2, 2), 2), ((1, 2), 4)])
def test_the_sequences_of_a_step_may_be_divided_otherwise_which_is_logged(caplog, now, workers):
    check_same_run(sized(*now), CORPUS, saved(sized(4, 2)), Distributed(world_size=workers))
    assert caplog.messages[-1].endswith("divided otherwise: results differ by rounding")


@pytest.mark.parametrize("now, workers", [((2, 2), 1), ((2, 4), 2), ((4, 2), 2)])
def test_another_number_of_sequences_per_step_is_refused(now, workers):
    with pytest.raises(UsageError, match=rf"8 sequences per step, now {now[0] * now[1] * workers}\); restore"):
        check_same_run(sized(*now), CORPUS, saved(sized(4, 2)), Distributed(world_size=workers))


def test_steps_that_are_divided_as_before_are_not_mentioned(caplog):
    check_same_run(sized(4, 2), CORPUS, saved(sized(4, 2)))
    assert caplog.messages == []


@pytest.mark.parametrize(
    "key, advice",
    [
        ("optimizer.name", "begin a new run with these weights in another run_dir: init_from=runs/a"),
        ("model.ff_dropout", "begin a new run with these weights, if they fit, in another run_dir: init_from=runs/a"),
    ],
)
def test_a_refusal_names_the_way_to_use_the_weights_all_the_same(key, advice):
    changed_config = changed(key)[0] if key in CHANGED else RunConfig(model=ModelConfig(ff_dropout=0.5))
    with pytest.raises(UsageError, match=advice):
        check_same_run(changed_config, CORPUS, saved(RunConfig()), source="runs/a")


# Restoring a checkpoint, or its weights alone.

MODEL = ModelConfig(dim=16, depth=1, heads=2, dim_head=8, max_seq_len=16, local_attn_window_size=8, ff_dropout=0.1)
CONFIG = RunConfig(
    model=replace(MODEL, max_ngram=2, ngram_buckets=11, ngram_dim=4),
    train=TrainConfig(seq_len=16, batch_size=4, grad_accum_every=2, max_steps=12, eval_bytes=8),
    optimizer=OptimizerConfig(lr=1e-3),
    schedule=ScheduleConfig("cosine", warmup_steps=3),
)


@dataclass
class Run:
    """The parts of a run that restoring changes, and the config that it returns."""

    model: nn.Cell
    optimizer: nn.Optimizer
    state: RunState
    config: RunConfig | None = None


def parts(config):
    model = build_model(config.model)
    limits = config.train.max_steps, config.train.max_minutes
    return Run(model, build_optimizer(config.optimizer, model.trainable_params()), RunState(*limits))


def restored(paths, config=CONFIG, corpus=CORPUS):
    run = parts(config)
    run.config = start.restore(paths, config, corpus, run.model, run.optimizer, run.state)
    return run


def save(folder, step, best=None, config=CONFIG, **meta):
    """Save a checkpoint with random weights and state."""
    run = parts(config)
    randomise([*run.model.get_parameters(), *run.optimizer.get_parameters()], seed=step)
    best_val_bpb = None if best is None else 2.5
    state = replace(run.state, step=step, bytes_seen=100 * step, best_val_bpb=best_val_bpb, best_step=best)
    state.measured_on = start.measured_on(CORPUS, config.train)
    meta = {**state.state_dict(), **start.provenance(config, CORPUS), **meta}
    Checkpoints(folder / "checkpoints", keep_last=9).save(tensors_of(run.model, run.optimizer), meta, best == step)
    return RunPaths(folder, checkpoint_of(folder, "last"))


def dropout_calls(model):
    return {int(cell.calls.asnumpy()) for _, cell in model.cells_and_names() if isinstance(cell, Dropout)}


def test_a_run_begins_with_the_weights_of_a_checkpoint_and_with_nothing_else_of_it(tmp_path):
    path = save(tmp_path / "a", 8, best=8).checkpoint
    config = replace(CONFIG, optimizer=OptimizerConfig("muon"), init_from=str(tmp_path / "a"), seed=5)
    run = restored(RunPaths(tmp_path / "b", None, path), config, Corpus("other", CORPUS.bytes[::-1].copy()))
    weights, new = read(path)[0], parts(config)
    fresh = tensors_of(new.model, new.optimizer)
    tensors = tensors_of(run.model, run.optimizer)
    assert {"model.ngram_emb.embedding_table", "optimizer.squares", "optimizer.global_step"} < tensors.keys()
    for name, tensor in tensors.items():
        wanted = weights[name] if name.startswith("model.") else fresh[name]
        np.testing.assert_array_equal(tensor, wanted, err_msg=name)
    assert (run.state.step, run.state.bytes_seen, run.state.best_val_bpb) == (0, 0, None)
    assert dropout_calls(run.model) == {0}
    assert run.config == config


def test_checkpoints_of_a_run_record_the_weights_that_it_began_with(tmp_path, monkeypatch):
    path = save(tmp_path / "a", 8).checkpoint
    monkeypatch.chdir(tmp_path)
    run = restored(RunPaths(tmp_path / "b", None, path), replace(CONFIG, init_from="a"))
    origin = {"source": str(tmp_path / "a"), "path": str(path), "step": 8, "sha256": sha256_of(path)}
    assert run.state.state_dict()["init_from"] == origin
    continued = restored(save(tmp_path / "b", 3, init_from=origin))
    assert continued.state.state_dict()["init_from"] == origin


@pytest.mark.parametrize(
    "changes, settings",
    [
        ({"dim": 32}, "model.dim is 16 in the checkpoint and 32 here"),
        ({"depth": 2, "ff_dropout": 0.5}, "model.depth is 1 in the checkpoint and 2 here"),
        ({"max_ngram": 1}, "model.max_ngram is 2 in the checkpoint and 1 here"),
        (
            {"heads": 4, "max_seq_len": 32},
            "model.max_seq_len is 16 in the checkpoint and 32 here, model.heads is 2 in the checkpoint and 4 here",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_naming_the_settings(tmp_path, changes, settings):
    path = save(tmp_path / "a", 8).checkpoint
    config = replace(CONFIG, model=replace(CONFIG.model, **changes), init_from="a")
    with pytest.raises(UsageError) as error:
        restored(RunPaths(tmp_path / "b", None, path), config)
    assert str(error.value) == f"init_from=a: {settings}"


def test_settings_of_the_model_that_are_not_given_are_those_of_the_checkpoint():
    meta = saved(replace(CONFIG, train=replace(CONFIG.train, seq_len=8)))
    config = RunConfig(train=TrainConfig(batch_size=3), init_from="a")
    config.model.ff_dropout = 0.5
    filled = fill_from_initial(config, meta, ["model.ff_dropout=0.5", "train.batch_size=3"])
    assert filled.model == replace(CONFIG.model, ff_dropout=0.5)
    assert filled.train == TrainConfig(batch_size=3, seq_len=8)
    for given in (["model=tiny"], ["model=tiny", "train.seq_len=1024"]):
        assert fill_from_initial(config, meta, given) == config


def test_sequences_longer_than_the_positions_of_the_checkpoint_are_refused():
    config = RunConfig(train=TrainConfig(seq_len=32), init_from="a")
    with pytest.raises(UsageError, match=r"max_seq_len=16 is shorter than train.seq_len=32: lower train.seq_len"):
        fill_from_initial(config, saved(CONFIG), ["train.seq_len=32"])


def test_weights_without_a_recorded_run_keep_the_length_of_the_sequences():
    filled = fill_from_initial(replace(CONFIG, init_from="a"), {"config": {"model": as_dict(CONFIG.model)}}, [])
    assert filled.train.seq_len == 16


def test_the_same_command_continues_a_run_that_began_with_weights_and_no_other_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, init_from="a")
    paths = save(tmp_path / "b", 3, init_from={"source": str(tmp_path / "a")})
    assert restored(paths, config).state.step == 3
    for other in (replace(CONFIG, init_from="c"), replace(CONFIG, init_from="b")):
        with pytest.raises(UsageError, match="already contains a run that did not begin with the weights of"):
            restored(paths, other)
    with pytest.raises(UsageError, match="use another run_dir"):
        restored(save(tmp_path / "d", 3), config)


def test_a_resumed_run_has_weights_optimizer_state_counters_and_dropout_of_its_checkpoint(tmp_path):
    paths = save(tmp_path, 4, best=4)
    run = restored(paths)
    for name, tensor in tensors_of(run.model, run.optimizer).items():
        np.testing.assert_array_equal(tensor, read(paths.checkpoint)[0][name], err_msg=name)
    assert (run.state.step, run.state.bytes_seen, run.state.best_val_bpb, run.state.best_step) == (4, 400, 2.5, 4)
    assert dropout_calls(run.model) == {8}
    divided = replace(CONFIG, train=replace(CONFIG.train, batch_size=1, grad_accum_every=8))
    assert dropout_calls(restored(paths, divided).model) == {32}


# The best score.


def test_another_measure_begins_a_new_best_which_is_logged_and_keeps_the_old_checkpoint(tmp_path, caplog):
    paths = save(tmp_path, 4, best=4)
    state = restored(paths, replace(CONFIG, train=replace(CONFIG.train, eval_bytes=9))).state
    assert (state.best_val_bpb, state.best_step) == (None, 4)
    line = "evaluations now score other bytes (9, before 8): a new best begins, and the 2.500 bpb of step 4 no longer"
    assert f"{line} count" in caplog.messages
    assert state.measured_on["bytes"] == 9


def test_sequences_of_another_length_in_evaluations_begin_a_new_best(tmp_path, caplog):
    config = replace(CONFIG, train=replace(CONFIG.train, eval_seq_len=8))
    assert restored(save(tmp_path, 4, best=4), config).state.best_val_bpb is None
    assert any("score other sequences (8, before 16): a new best begins" in line for line in caplog.messages)
    same = replace(CONFIG, train=replace(CONFIG.train, eval_seq_len=16))
    assert restored(save(tmp_path / "same", 4, best=4), same).state.best_val_bpb == 2.5


def test_other_validation_data_begin_a_new_best(tmp_path):
    bytes_ = CORPUS.bytes.copy()
    bytes_[187] += 1  # of the eight bytes that evaluations score, the last
    assert restored(save(tmp_path, 4, best=4), corpus=Corpus("some", bytes_)).state.best_val_bpb is None


def test_as_many_bytes_as_the_split_has_are_the_same_measure_whatever_is_asked_for(tmp_path):
    configs = [replace(CONFIG, train=replace(CONFIG.train, eval_bytes=count)) for count in (10, 99)]
    assert restored(save(tmp_path, 4, best=4, config=configs[0]), configs[1]).state.best_val_bpb == 2.5


@pytest.mark.parametrize("eval_bytes, best", [(8, 2.5), (9, None)])
def test_an_old_checkpoint_that_does_not_record_its_measure_was_measured_as_configured(tmp_path, eval_bytes, best):
    paths = save(tmp_path, 4, best=4)
    meta = json.loads(sidecar(paths.checkpoint).read_text())
    for key in ("measured_on", "best_step", "init_from"):
        del meta[key]
    sidecar(paths.checkpoint).write_text(json.dumps(meta))
    state = restored(paths, replace(CONFIG, train=replace(CONFIG.train, eval_bytes=eval_bytes))).state
    assert (state.best_val_bpb, state.best_step) == (best, 4)  # by the link


def test_without_the_best_checkpoint_a_new_best_begins(tmp_path, caplog):
    save(tmp_path, 4, best=4)
    paths = save(tmp_path, 6, best=4)
    assert restored(paths).state.best_val_bpb == 2.5
    (tmp_path / "checkpoints/step-00000004.safetensors").unlink()
    state = restored(paths).state
    assert (state.best_val_bpb, state.best_step) == (None, None)
    assert "the best checkpoint of the run is missing: the next evaluation begins a new best" in caplog.messages


# The end of a run, and what comes after it.


def test_a_finished_run_has_the_config_that_it_was_trained_with(tmp_path, caplog):
    paths = save(tmp_path, 12)
    other = replace(CONFIG, optimizer=OptimizerConfig(lr=0.5))
    run = restored(paths, other)
    assert run.config == CONFIG
    assert caplog.messages[-1] == "finished at step 12; nothing to train: raise train.max_steps to go on"
    longer = replace(other, train=replace(CONFIG.train, max_steps=13))
    assert restored(paths, longer).config == longer


def test_the_limit_that_ended_a_run_is_named(tmp_path, caplog):
    restored(save(tmp_path, 3, wall_s=7.0), replace(CONFIG, train=replace(CONFIG.train, max_minutes=0.1)))
    assert caplog.messages[-1] == "finished at step 3; nothing to train: raise train.max_minutes to go on"


def run_config(name, max_steps=12, lr=1e-3):
    schedule = ScheduleConfig(name, warmup_steps=3, decay_fraction=0.5, final_fraction=0.1)
    train = replace(CONFIG.train, max_steps=max_steps)
    return replace(CONFIG, schedule=schedule, train=train, optimizer=OptimizerConfig(lr=lr))


@pytest.mark.parametrize(
    "step, before, now, rise",
    [
        (12, run_config("cosine"), run_config("cosine", 24), "from 1.15e-04 to 5.50e-04"),
        (12, run_config("wsd"), run_config("wsd", 24), "from 2.50e-04 to 1.00e-03"),
        (6, run_config("constant"), run_config("constant", lr=2e-3), "from 1.00e-03 to 2.00e-03"),
        (6, run_config("cosine"), run_config("constant"), "from 6.66e-04 to 1.00e-03"),
        (12, run_config("constant"), run_config("constant", 24), None),
        (6, run_config("cosine"), run_config("cosine"), None),
        (2, run_config("cosine"), run_config("cosine"), None),  # the warm-up rises as planned
        (6, run_config("cosine"), run_config("cosine", 8), None),  # it falls
    ],
)
def test_changes_that_raise_the_learning_rate_are_followed_by_a_line_that_says_so(
    tmp_path, caplog, step, before, now, rise
):
    restored(save(tmp_path, step, config=before), now)
    lines = [line for line in caplog.messages if "learning rate" in line]
    assert lines == ([f"because of these changes, the learning rate rises {rise}"] if rise else [])
