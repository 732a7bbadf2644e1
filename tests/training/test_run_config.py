import math
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from local_attention.training.config import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OtherDataConfig,
    RunConfig,
    ScoreConfig,
    evaluate_config,
    fill_from_checkpoint,
    generate_config,
    run_config,
    score_config,
)
from local_attention.training.errors import UsageError
from local_attention.training.schema import as_dict, flatten, keys_of, parse, unknown_key
from local_attention.transformer import LocalTransformer
from scripts.diagnose import DiagnoseConfig, diagnose_config
from scripts.export_torch import ExportConfig, export_config
from scripts.import_torch import ImportConfig, import_config
from tests.training.toys import CONFIGS

INF, NAN = float("inf"), float("nan")
PRESETS = {
    "train": (RunConfig, run_config, {}),
    "generate": (GenerateConfig, generate_config, {"run": "runs/a"}),
    "evaluate": (EvaluateConfig, evaluate_config, {"run": "runs/a"}),
    "score": (ScoreConfig, score_config, {"run": "runs/a", "file": "a.txt"}),
    "import_torch": (
        ImportConfig,
        import_config,
        {"weights": "a.pt", "run_dir": "runs/a", "model.local_attn_window_size": 256},
    ),
    "export_torch": (ExportConfig, export_config, {"run": "runs/a", "output": "a.pt"}),
    "diagnose": (DiagnoseConfig, diagnose_config, {}),
}

# Of each range that keys have: values that are refused, values at the edge that are not.
EDGES = {
    "": ([], []),
    ">= 0": ([-1], [0]),
    ">= 1": ([0, -1], [1]),
    "> 0": ([0.0, -0.5, INF, NAN], [1e-9]),
    ">= 0 and < 1": ([-0.1, 1.0, NAN], [0.0, 0.999]),
    ">= 0 and <= 1": ([-0.01, 1.01, NAN], [0.0, 1.0]),
    "> 0 and <= 1": ([0.0, -0.1, 1.01, NAN], [1e-9, 1.0]),
    ">= 0 and <= 4294967295": ([-1, 2**32], [0, 2**32 - 1]),
    ">= 256": ([255, 0, -1], [256, 300]),
    ">= 2 and <= 262144": ([1, 0, 2**18 + 1], [2, 2**18]),
    "enwik8, stdlib, file": (["wikitext", ""], ["enwik8", "stdlib"]),
    "stdlib": (["file", ""], ["stdlib"]),
    "adam, adamw, muon": (["sgd", "Adam", ""], ["adam", "adamw", "muon"]),
    "constant, cosine, wsd": (["linear", ""], ["constant", "cosine", "wsd"]),
    "auto, CPU, GPU, Ascend": (["cpu", "TPU", ""], ["auto", "CPU", "GPU", "Ascend"]),
    "none, data": (["model", ""], ["none", "data"]),
    "float32, bfloat16": (["float16", ""], ["float32", "bfloat16"]),
    "float32, float16, bfloat16": (["half", "float64", ""], ["float32", "float16", "bfloat16"]),
    "train, val, test": (["valid", "Test", ""], ["train", "val", "test"]),
}


@pytest.fixture(scope="module")
def composed():
    """What Hydra composes, by the name of the config."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return {name: compose(name) for name in PRESETS}


@pytest.fixture
def checked(composed):
    """Checks the config of that name after changing some values."""

    def checked(name, **changes):
        config = OmegaConf.create(OmegaConf.to_container(composed[name]))
        OmegaConf.set_struct(config, False)
        for key, value in {**PRESETS[name][2], **changes}.items():
            OmegaConf.update(config, key.replace("__", "."), value, merge=False)
        return PRESETS[name][1](config)

    return checked


def message_of(checked, name, **changes):
    with pytest.raises(UsageError) as error:
        checked(name, **changes)
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


# Ranges


def tree_of(key, value):
    """``"a.b"`` and a value as nested dictionaries."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("name", PRESETS)
def test_a_value_out_of_range_is_refused_naming_key_value_and_range_and_one_at_its_edge_is_not(name):
    schema = PRESETS[name][0]
    for key, option in keys_of(schema).items():
        wanted = option.bounds or option.names
        refused, allowed = EDGES[wanted]
        for value in refused:
            with pytest.raises(UsageError) as error:
                parse(schema, tree_of(key, value))
            assert str(error.value).startswith(f"{key}={value}: expected ") and wanted in str(error.value)
        for value in allowed:
            assert flatten(as_dict(parse(schema, tree_of(key, value))))[key] == value


@pytest.mark.parametrize("name", PRESETS)
def test_null_is_taken_where_a_key_is_optional_and_nowhere_else(name):
    schema = PRESETS[name][0]
    for key, option in keys_of(schema).items():
        if option.optional:
            assert flatten(as_dict(parse(schema, tree_of(key, None))))[key] is None
        else:
            with pytest.raises(UsageError, match=f"^{key}=null: expected "):
                parse(schema, tree_of(key, None))


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("train", "train.batch_size", 0, "a whole number >= 1"),
        ("train", "model.num_tokens", 255, "a whole number >= 256"),  # tokens are bytes
        ("train", "model.ngram_buckets", 2**18 + 1, "a whole number >= 2 and <= 262144"),
        ("train", "model.attn_dropout", 1.0, "a number >= 0 and < 1"),
        ("train", "seed", 2**32, "a whole number >= 0 and <= 4294967295"),  # as far as NumPy's generator takes one
        ("generate", "temperature", -0.1, "a number >= 0"),
        ("generate", "top_p", 0.0, "a number > 0 and <= 1, or null"),
        ("evaluate", "split", "valid", "one of train, val, test"),
        ("evaluate", "dynamic_rate", 0.0, "a number > 0"),
        ("import_torch", "model.ff_mult", 0.5, "a number >= 1, or null"),
        ("score", "device.target", "cpu", "one of auto, CPU, GPU, Ascend"),
        ("train", "train.precision", "half", "one of float32, float16, bfloat16"),
        ("train", "train.loss_scale", 0.5, "a number >= 1"),
        ("evaluate", "device.precision", "float64", "one of float32, float16, bfloat16"),
    ],
)
def test_a_command_refuses_a_value_out_of_range(checked, name, key, value, expected):
    assert message_of(checked, name, **{key: value}) == f"{key}={value}: expected {expected}"


# Types and keys


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("train.batch_size", ["abc", 1.5, True, [1], ""], "a whole number >= 1"),
        ("train.max_steps", ["abc", 1.5, True], "a whole number >= 1, or null"),
        ("optimizer.lr", ["abc", True, [1.0], ""], "a number > 0"),
        ("train.max_minutes", ["abc", True, [1.0]], "a number > 0, or null"),
        ("model.use_xpos", ["maybe", 0.5, 1, [True], ""], "true or false"),
        ("data.path", [[1], 5, True], "text, or null"),
        ("optimizer.name", [[1], 5, True], "one of adam, adamw, muon"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_of_another_type_is_refused_naming_key_value_and_type(checked, key, values, expected):
    for value in values:
        shown = str(value).lower() if value is True else value
        assert message_of(checked, "train", **{key: value}) == f"{key}={shown}: expected {expected}"


def test_an_interpolation_that_leads_nowhere_is_refused_naming_the_key(checked):
    assert message_of(checked, "train", train__seq_len="${train.length}").startswith("train.seq_len: ")


def test_whole_numbers_are_numbers(checked):
    config = checked("train", train__max_minutes=3, model__ff_mult=2)
    assert (config.train.max_minutes, config.model.ff_mult) == (3.0, 2.0)
    assert isinstance(config.model.ff_mult, float)  # as the summary and the checkpoint compare it


@pytest.mark.parametrize(
    "name, key, resembling",
    [
        ("train", "train.seqlen", "train.seq_len"),
        ("train", "seq_len", "train.seq_len"),
        ("train", "model.windowsize", "model.exact_windowsize"),
        ("train", "optimizer.l_r", "optimizer.lr"),
        ("train", "resum", "resume"),
        ("generate", "temprature", "temperature"),
        ("evaluate", "strid", "stride"),
    ],
)
def test_an_unknown_key_is_refused_naming_one_that_resembles_it(checked, name, key, resembling):
    assert message_of(checked, name, **{key: 1}).endswith(f": no such key; did you mean {resembling}?")
    assert unknown_key(key, PRESETS[name][0]) == f"{key}: no such key; did you mean {resembling}?"


def test_an_unknown_key_that_resembles_none_leads_to_help(checked):
    assert message_of(checked, "train", xyz=1) == "xyz: no such key; --help lists them"


@pytest.mark.parametrize("key", ["train", "device"])
def test_a_value_in_the_place_of_a_group_is_refused_naming_the_group(checked, key):
    assert key in message_of(checked, "train", **{key: "some"}).split(":")[0]


@pytest.mark.parametrize("name, key", [("generate", "prompt"), ("generate", "run"), ("train", "train.batch_size")])
def test_omegaconfs_mark_of_a_missing_value_is_not_taken_for_the_default(checked, name, key):
    assert key in message_of(checked, name, **{key: "???"})


# What must go together


def test_a_run_needs_an_end(checked):
    message = message_of(checked, "train", train__max_steps=None, train__max_minutes=None)
    assert "train.max_steps or train.max_minutes" in message
    assert checked("train", train__max_steps=None, train__max_minutes=1.0).train.max_steps is None
    assert checked("train", train__max_steps=5, train__max_minutes=None).train.max_minutes is None


def test_a_sequence_is_whole_windows(checked):
    message = message_of(checked, "train", train__seq_len=1000, model__local_attn_window_size=256)
    assert "train.seq_len=1000 is not a multiple of model.local_attn_window_size=256" in message
    assert checked("train", train__seq_len=1000, model__local_attn_window_size=250)


def test_layers_may_have_windows_of_their_own(checked):
    windows = [32, 64, 64, 128, 128, 256]
    assert checked("train", model__local_attn_window_size=windows).model.local_attn_window_size == windows
    message = message_of(checked, "train", model__local_attn_window_size=[32, 100, 64, 128, 128, 256])
    assert "train.seq_len=1024 is not a multiple of model.local_attn_window_size=100" in message
    message = message_of(checked, "train", model__local_attn_window_size=[32, 64])
    assert message == (
        "model: expected local_attn_window_size to be a number, or a list of depth = 6 numbers, got 2: [32, 64]"
    )
    message = message_of(checked, "train", model__look_backward=[1, 1, 1, 1, 1, -1])
    assert message == "model.look_backward=-1: expected a whole number >= 0, or a list of one per layer"


def test_layers_may_be_global(checked):
    layers = dict(model__global_attn_layers=[6])
    assert checked("train", **layers).model.global_attn_layers == [6]
    checked("train", model__local_attn_window_size=[32, 64, 64, 128, 128, 100], **layers)  # it has no windows
    message = message_of(checked, "train", model__global_attn_layers=[7])
    assert message == "model: expected global_attn_layers from 1 to depth = 6, each once, got [7]"
    message = message_of(checked, "train", model__global_attn_layers=[0])
    assert message == "model.global_attn_layers=0: expected a list of whole numbers, or null"
    message = message_of(checked, "train", model__use_xpos=True, **layers)
    assert message == "model: expected use_xpos=False, which is for windows, with global_attn_layers = [6]"


def test_the_decay_of_xpos_is_checked_in_each_layer(checked):
    windows = dict(model__local_attn_window_size=[4, 4, 4, 4, 4, 512], model__use_xpos=True)
    message = message_of(checked, "train", model__xpos_scale_base=3, **windows)
    assert "with the base 3 overflows over 1024 bytes" in message and "use model.xpos_scale_base=10" in message
    assert checked("train", **windows)


def test_rotary_embeddings_need_an_even_head(checked):
    message = message_of(checked, "train", model__dim_head=7)
    assert message.startswith("model: rotary embeddings need an even head size, got dim_head = 7")
    assert checked("train", model__dim_head=7, model__use_rotary_pos_emb=False).model.dim_head == 7


def test_a_dynamic_bias_is_no_rotary_embedding(checked):
    assert checked("train", model__dim_head=7, model__use_dynamic_pos_bias=True).model.dim_head == 7


@pytest.mark.parametrize("off", [{"model__use_rotary_pos_emb": False}, {"model__use_dynamic_pos_bias": True}])
def test_xpos_needs_rotary_embeddings(checked, off):
    assert "model.use_xpos=true is for rotary" in message_of(checked, "train", model__use_xpos=True, **off)
    assert checked("train", model__use_xpos=True).model.use_xpos


def test_a_base_of_xpos_needs_xpos(checked):
    message = message_of(checked, "train", model__xpos_scale_base=64)
    assert message == "model.xpos_scale_base=64.0 needs model.use_xpos=true"
    assert checked("train", model__xpos_scale_base=64, model__use_xpos=True).model.xpos_scale_base == 64


@pytest.mark.parametrize("window, look_backward", [(256, 1), (64, 3)])
def test_a_base_of_xpos_whose_decay_overflows_is_refused_naming_one_that_does_not(checked, window, look_backward):
    sizes = dict(model__local_attn_window_size=window, model__look_backward=look_backward, model__use_xpos=True)
    least = window * (look_backward + 1) / 110
    message = message_of(checked, "train", model__xpos_scale_base=least - 0.01, **sizes)
    assert message.endswith(f"use model.xpos_scale_base={math.ceil(least)} or more")
    model = checked("train", model__xpos_scale_base=least + 0.01, **sizes).model
    small = LocalTransformer(**as_dict(replace(model, dim=4, depth=1, heads=1, dim_head=2)))
    small(ms.Tensor(np.zeros((1, window), np.int32)))  # the library allows it, too


def test_the_base_of_xpos_that_is_not_given_can_be_too_small_as_well(checked):
    sizes = dict(model__local_attn_window_size=4, model__use_xpos=True)
    message = message_of(checked, "train", model__look_backward=120, **sizes)
    assert "with the base 2 overflows over 484 bytes" in message and "use model.xpos_scale_base=5" in message
    assert checked("train", model__look_backward=50, **sizes).model.xpos_scale_base is None


def test_there_is_one_factor_of_scores(checked):
    message = message_of(checked, "train", model__scale=0.1, model__qk_rmsnorm=True)
    assert message == "model: expected qk_scale instead of scale with qk_rmsnorm, got scale = 0.1"
    assert checked("train", model__scale=0.1).model.scale == 0.1
    assert checked("train", model__qk_scale=9, model__qk_rmsnorm=True).model.qk_scale == 9


def test_learned_positions_reach_as_far_as_a_sequence(checked):
    message = message_of(checked, "train", train__seq_len=512, model__max_seq_len=511)
    assert "model.max_seq_len=511 is shorter than train.seq_len=512" in message
    assert checked("train", train__seq_len=512, model__max_seq_len=512)
    assert checked("train", train__seq_len=512, model__max_seq_len=1, model__use_abs_pos_emb=False)
    longer = dict(train__seq_len=512, train__eval_seq_len=513)
    assert "train.eval_seq_len=513: expected at most model.max_seq_len=512" in message_of(checked, "train", **longer)
    assert checked("train", **longer, model__use_abs_pos_emb=False)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_file_needs_its_path(checked, name):
    assert "data.path=FILE" in message_of(checked, name, data__source="file")
    assert checked(name, data__source="file", data__path="a").data.path == "a"


def test_a_run_begins_with_weights_or_continues(checked):
    with pytest.raises(UsageError, match=r"init_from=a begins a new run, resume=b continues one: give one of them"):
        checked("train", init_from="a", resume="b")
    for resume in ("auto", None):
        assert checked("train", init_from="a", resume=resume).init_from == "a"


@pytest.mark.parametrize(
    "name, keys",
    [
        ("train", ["run_dir", "resume", "data.path", "data.dir"]),
        ("train", ["run_dir", "init_from"]),
        ("generate", ["run", "checkpoint", "prompt_file"]),
        ("evaluate", ["run", "checkpoint", "data.path", "data.dir", "data.val_path", "data.test_path"]),
        ("score", ["run", "checkpoint", "file"]),
        ("import_torch", ["weights", "run_dir"]),
        ("export_torch", ["run", "checkpoint", "output"]),
    ],
)
def test_a_tilde_is_the_home_directory(checked, monkeypatch, tmp_path, name, keys):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = checked(name, **{key.replace(".", "__"): "~/a.pt" for key in keys})
    values = flatten(as_dict(config))
    assert [values[key] for key in keys] == [f"{tmp_path}/a.pt"] * len(keys)


def test_generating_takes_one_prompt(checked):
    assert "prompt and prompt_file" in message_of(checked, "generate", prompt="a", prompt_file="b")
    assert checked("generate", prompt="a").prompt == "a"
    assert checked("generate", prompt_file="b").prompt_file == "b"


@pytest.mark.parametrize("command", ["generate", "evaluate", "score", "export_torch"])
def test_what_uses_weights_needs_a_run_or_a_checkpoint_file(checked, command):
    for name in ("best", "last"):
        message = message_of(checked, command, run=None, checkpoint=name)
        assert "run=runs/" in message and "checkpoint=FILE" in message
    assert checked(command, run=None, checkpoint="a.safetensors").checkpoint == "a.safetensors"


def test_dynamic_evaluation_takes_one_sequence_after_the_other(checked):
    for key in ("stride", "batch_size"):
        message = message_of(checked, "evaluate", dynamic=True, **{key: 8})
        assert message == f"{key}=8: dynamic=true learns from one sequence after the other: leave out {key}"
    config = checked("evaluate", dynamic=True)
    assert (config.stride, config.batch_size, config.dynamic_rate) == (None, 1, 0.1)


def test_the_rate_of_dynamic_evaluation_needs_it(checked):
    assert message_of(checked, "evaluate", dynamic_rate=0.3) == "dynamic_rate=0.3 needs dynamic=true"
    assert checked("evaluate", dynamic_rate=0.3, dynamic=True).dynamic_rate == 0.3


# What an evaluation takes from a checkpoint


def meta_of(source="file", name="a.txt", **model):
    """The metadata of a checkpoint whose run was told ``source`` and saw the bytes called ``name``."""
    trained = RunConfig(data=DataConfig(source, "a.txt", "folder", "stdlib", 5000), model=ModelConfig(**model))
    return {"config": as_dict(trained), "data": {"name": name, "fingerprint": "0123456789abcdef"}}


def trained(meta, data=None, **values):
    return fill_from_checkpoint(EvaluateConfig(run="runs/a", data=OtherDataConfig(**(data or {})), **values), meta)


def refusal(meta, **values):
    with pytest.raises(UsageError) as error:
        trained(meta, **values)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_evaluation_has_the_sizes_and_the_data_of_the_run():
    config = trained(meta_of(), split="val")
    assert (config.seq_len, config.stride, config.batch_size) == (1024, 1024, 4)
    assert config.data == DataConfig("file", "a.txt", "folder", None, 5000)
    assert (config.run, config.split) == ("runs/a", "val")


def test_a_run_is_evaluated_as_during_training_about_as_many_bytes_at_once():
    meta = meta_of(use_abs_pos_emb=False)
    meta["config"]["train"]["eval_seq_len"] = 1500
    config, dynamic = trained(meta), trained(meta, dynamic=True)
    assert (config.seq_len, config.stride, config.batch_size) == (1500, 1500, 2)
    assert (dynamic.seq_len, trained(meta, seq_len=9999).batch_size) == (1024, 1)


def test_sizes_that_are_given_are_kept_and_the_stride_follows_seq_len():
    config = trained(meta_of(), seq_len=512, batch_size=3)
    assert (config.seq_len, config.stride, config.batch_size) == (512, 512, 3)
    assert trained(meta_of(), seq_len=512, stride=1).stride == 1


@pytest.mark.parametrize("key", ["seq_len", "batch_size"])
def test_sizes_that_neither_checkpoint_nor_person_names_are_asked_for(key):
    meta = meta_of()
    del meta["config"]["train"]
    given = {"seq_len": 8, "batch_size": 2}
    assert f"{key}=NUMBER" in refusal(meta, **{other: size for other, size in given.items() if other != key})
    assert trained(meta, **given).seq_len == 8


@pytest.mark.parametrize("sizes", [{"stride": 1025}, {"seq_len": 64, "stride": 65}])
def test_a_stride_that_would_leave_bytes_out_is_refused(sizes):
    seq_len = sizes.get("seq_len", 1024)
    assert f"stride={seq_len + 1}: expected a number from 1 to seq_len={seq_len}" in refusal(meta_of(), **sizes)
    assert trained(meta_of(), **{**sizes, "stride": seq_len}).stride == seq_len


def test_windows_reach_as_far_as_learned_positions():
    meta = meta_of(max_seq_len=2048)
    assert "seq_len=2049: expected at most the model's max_seq_len=2048" in refusal(meta, seq_len=2049)
    assert trained(meta, seq_len=2048).seq_len == 2048
    assert trained(meta_of(max_seq_len=1, use_abs_pos_emb=False), seq_len=2049).seq_len == 2049


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"dir": "b"}, DataConfig("enwik8", "a.txt", "b", None, 5000)),
        ({"fallback": "stdlib"}, DataConfig("enwik8", "a.txt", "folder", "stdlib", 5000)),
        ({"max_bytes": 7}, DataConfig("enwik8", "a.txt", "folder", None, 7)),
        ({"path": "b.txt"}, DataConfig("file", "b.txt", "folder", None, 5000)),
        ({"test_path": "t.txt"}, DataConfig("enwik8", "a.txt", "folder", None, 5000, None, "t.txt")),
        ({"source": "stdlib"}, DataConfig("stdlib")),
        ({"source": "file", "path": "b.txt"}, DataConfig("file", "b.txt")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_source_replaces_the_data_of_the_run_and_other_keys_change_it(changes, expected):
    assert trained(meta_of("enwik8", "enwik8"), data=changes).data == expected


def test_an_evaluation_has_the_own_files_of_the_run_unless_another_source_is_named():
    meta = meta_of()
    meta["config"]["data"] |= {"val_path": "v.txt", "test_path": "t.txt"}
    assert trained(meta).data == DataConfig("file", "a.txt", "folder", None, 5000, "v.txt", "t.txt")
    assert trained(meta, data={"val_path": "moved"}).data.val_path == "moved"
    assert trained(meta, data={"source": "stdlib"}).data == DataConfig("stdlib")


def test_a_run_that_fell_back_is_scored_on_what_it_fell_back_to():
    assert trained(meta_of("enwik8", "stdlib")).data.source == "stdlib"


def test_the_data_of_a_checkpoint_that_does_not_say_them_must_be_named():
    meta = meta_of()
    del meta["data"]
    for data in ({}, {"dir": "b"}):
        assert "data=enwik8, data=stdlib or data=file data.path=FILE" in refusal(meta, data=data)
    assert trained(meta, data={"source": "enwik8"}).data == DataConfig("enwik8")
    assert trained(meta, data={"path": "b.txt"}).data == DataConfig("file", "b.txt")


# The tree


def test_a_config_is_a_tree_of_dataclasses_with_the_values_given(checked):
    config = checked("train", model__dim=24, train__seq_len=512, seed=3)
    assert isinstance(config, RunConfig)
    assert (config.model.dim, config.train.seq_len, config.seed) == (24, 512, 3)
    assert config.model.max_seq_len == 512  # follows train.seq_len
    assert as_dict(config)["model"]["dim"] == 24
    assert parse(RunConfig, as_dict(config)) == config


def test_a_part_of_a_config_can_be_rebuilt(checked):
    model = checked("train").model
    assert parse(ModelConfig, as_dict(model)) == model


def test_a_text_without_end_is_the_only_sample(checked):
    assert checked("generate", length=0).length == 0
    assert checked("generate", length=0, num_samples=2, stop="\n").num_samples == 2
    with pytest.raises(UsageError, match="length=0 never ends: expected num_samples=1 with it, got 2"):
        checked("generate", length=0, num_samples=2)


def test_keys_are_dotted_and_complete():
    assert set(keys_of(GenerateConfig)) == {
        *("run", "checkpoint", "prompt", "prompt_file", "length", "temperature", "top_k", "top_p", "num_samples"),
        *("stop", "seed", "device.target", "device.precision", "device.matmul_precision"),
    }
