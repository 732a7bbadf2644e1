import json
import shlex

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from local_attention.torch_state import torch_state
from local_attention.training.build import load_model
from local_attention.training.checkpoint import Checkpoints, read
from local_attention.training.config import ModelConfig, run_config
from local_attention.training.errors import UsageError
from local_attention.training.schema import as_dict
from scripts.import_torch import import_config, inner_size, main, simplest_ff_mult
from scripts.torch_files import write_state
from tests.scripts.conftest import SIZES, logits
from tests.training.toys import composed, examples

WINDOW = f"model.local_attn_window_size={SIZES['local_attn_window_size']}"
INFERRED = [  # options that are inferred from a state dict
    dict(),
    dict(num_tokens=300, max_seq_len=9, dim=12, depth=1),
    dict(heads=4, dim_head=2),
    dict(ff_mult=2.5),
    dict(num_residual_streams=3),
    dict(qk_rmsnorm=True),
    dict(gate_values_per_head=True),
    dict(use_dynamic_pos_bias=True),
    dict(use_abs_pos_emb=False),
    dict(num_residual_streams=2, qk_rmsnorm=True, gate_values_per_head=True, use_dynamic_pos_bias=True),
]
GIVEN = [  # options that must be given
    dict(local_attn_window_size=4),
    dict(look_backward=2, exact_windowsize=False),
    dict(look_backward=[2, 2]),
    dict(use_xpos=True, xpos_scale_base=5.0),
    dict(qk_rmsnorm=True, qk_scale=3.0),
    dict(shared_qk=True),
    dict(attn_dropout=0.1, ff_dropout=0.2),
]


@pytest.fixture
def weights(made, tmp_path):
    """Writes the weights of a tiny model after changing its state dict; returns its config, the model and the file."""

    def weights(change=lambda state: None, **options):
        model, config = made(**options)
        state = torch_state(model)
        change(state)
        write_state(str(tmp_path / "weights.safetensors"), state)
        return config, model, tmp_path / "weights.safetensors"

    return weights


@pytest.fixture
def imported(tmp_path):
    """Imports a file like the command; returns the run directory."""

    def imported(path, *overrides):
        run_dir = tmp_path / "run, imported"
        config = composed("import_torch", f"weights={path}", f"run_dir='{run_dir}'", *overrides)
        main.__wrapped__(import_config(config))
        return run_dir

    return imported


def overrides_of(options):
    return [f"model.{key}={json.dumps(value)}" for key, value in options.items()]


def refusal(imported, path, *overrides):
    with pytest.raises(UsageError) as error:
        imported(path, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# What a run of imported weights is


@pytest.mark.parametrize(
    ("options", "overrides"),
    [(options, [WINDOW]) for options in INFERRED]
    + [(options, overrides_of(SIZES | options)) for options in (INFERRED[0], INFERRED[-1])]
    + [(options, [WINDOW, *overrides_of(options)]) for options in GIVEN],
    ids=str,
)
def test_config_and_weights_are_those_of_the_model(weights, imported, options, overrides):
    config, model, path = weights(**options)
    loaded, meta = load_model(Checkpoints(imported(path, *overrides) / "checkpoints").find("best"))
    assert meta["config"] == {"model": as_dict(config)}
    wanted = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    found = {parameter.name: parameter.asnumpy() for parameter in loaded.get_parameters()}
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_logits_are_those_of_the_model(weights, imported):
    options = dict(num_residual_streams=2, qk_rmsnorm=True, gate_values_per_head=True, use_xpos=True, qk_scale=3.0)
    _, model, path = weights(**options)
    run_dir = imported(path, WINDOW, "model.use_xpos=true", "model.qk_scale=3")
    loaded, _ = load_model(Checkpoints(run_dir / "checkpoints").find("last"))
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_a_run_starts_at_step_0_and_records_only_its_model(weights, imported):
    config, _, path = weights()
    run_dir = imported(path, WINDOW)
    tensors, meta = read(Checkpoints(run_dir / "checkpoints").find("last"))
    assert (meta["step"], meta["bytes_seen"], meta["train_s"], meta["best_val_bpb"]) == (0, 0, 0.0, None)
    assert "data" not in meta and meta["config"].keys() == {"model"}
    assert {name.partition(".")[0] for name in tensors} == {"model"}
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == {"model": as_dict(config)}


@pytest.mark.parametrize(
    "options", [dict(max_seq_len=20), dict(max_seq_len=7), dict(qk_rmsnorm=True, qk_scale=3.0), dict(use_xpos=True)]
)
def test_the_command_that_is_printed_trains_the_imported_model(weights, imported, capsys, options):
    _, model, path = weights(**options)
    run_dir = imported(path, WINDOW, *overrides_of(options))
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines.keys() == {"sample", "score", "continue"}
    for line in lines.values():
        assert any(argument.endswith(f"={run_dir}") for argument in shlex.split(line))
    overrides = [argument for argument in shlex.split(lines["continue"])[2:] if not argument.startswith("run_dir=")]
    trained = as_dict(ModelConfig(**composed("train", *overrides)["model"]))
    assert trained == yaml.safe_load((run_dir / "config.yaml").read_text())["model"]
    if model.max_seq_len >= SIZES["local_attn_window_size"]:
        run_config(composed("train", *overrides))


def test_positions_that_are_all_zero_are_dropped_unless_requested(weights, imported):
    _, _, path = weights(use_abs_pos_emb=False)
    run_dir = imported(path, WINDOW, "model.use_abs_pos_emb=true")
    loaded, _ = load_model(Checkpoints(run_dir / "checkpoints").find("last"))
    assert loaded.use_abs_pos_emb and not loaded.pos_emb.embedding_table.asnumpy().any()


# Names that begin with something else


def renamed(prefix, **others):
    """Changes a state dict: all names begin with ``prefix``, and there are ``others``."""

    def rename(state):
        names = list(state)
        state.update({prefix + name: state.pop(name) for name in names} | others)

    return rename


SOME = np.ones(3, np.float32)


@pytest.mark.parametrize("prefix", ["model.", "net.", "ema_model.", "module._orig_mod.", "state_dict.model.net."])
def test_a_prefix_of_all_names_is_taken_off_and_printed(weights, imported, capsys, prefix):
    _, model, path = weights(renamed(prefix, initted=SOME, **{"optimizer.state.0.step": SOME}))
    loaded, _ = load_model(Checkpoints(imported(path, WINDOW) / "checkpoints").find("best"))
    for wanted, found in zip(model.get_parameters(), loaded.get_parameters(), strict=True):
        np.testing.assert_array_equal(found.asnumpy(), wanted.asnumpy(), err_msg=wanted.name)
    said, count = capsys.readouterr().out.splitlines()[:2]
    assert f"weights named {prefix}…, without this prefix; not imported: 2 others" in said
    assert " parameters of " in count


def test_without_a_prefix_other_names_are_refused(weights, imported):
    _, _, path = weights(renamed("", initted=SOME))
    assert "unexpected: initted (3,)" in refusal(imported, path, WINDOW)


def test_one_of_several_models_must_be_chosen(weights, imported):
    def two(state):
        for name in list(state):
            state[f"model.{name}"] = state[name] + 1
            state[f"ema.{name}"] = state.pop(name)

    _, model, path = weights(two)
    assert refusal(imported, path, WINDOW) == (
        f"{path} contains 2 models: choose one with prefix=ema. or prefix=model."
    )
    message = refusal(imported, path, WINDOW, "prefix=net.")
    assert message == f"prefix=net.: expected one of ema., model., as in {path}"
    loaded, _ = load_model(Checkpoints(imported(path, WINDOW, "prefix=ema.") / "checkpoints").find("best"))
    np.testing.assert_array_equal(loaded.norm.gamma.asnumpy(), model.norm.gamma.asnumpy())


# What is inferred and what is given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("num_tokens=257", "256"),
        ("max_seq_len=25", "24"),
        ("dim=9", "8"),
        ("depth=3", "2"),
        ("heads=4", "2"),
        ("dim_head=8", "4"),
        ("ff_mult=5.0", "4.0"),
        ("num_residual_streams=2", "1"),
        ("qk_rmsnorm=true", "false"),
        ("gate_values_per_head=true", "false"),
        ("use_dynamic_pos_bias=true", "false"),
        ("use_abs_pos_emb=false", "true"),
    ],
)
def test_what_contradicts_the_weights_is_refused_naming_both(weights, imported, given, expected):
    _, _, path = weights()
    assert refusal(imported, path, WINDOW, f"model.{given}") == f"model.{given}: expected {expected}, as in {path}"


def without_frequencies(state):
    for name in [name for name in state if "inv_freq" in name]:
        del state[name]


def test_heads_must_be_given_if_they_cannot_be_inferred(weights, imported):
    _, _, path = weights(without_frequencies, heads=4, dim_head=6)
    message = refusal(imported, path, WINDOW)
    assert "model.heads=NUMBER or model.dim_head=NUMBER" in message and "24 channels" in message
    assert "model.heads=5: expected a divisor of 24" in refusal(imported, path, WINDOW, "model.heads=5")
    assert "model.heads=0: expected a divisor of 24" in refusal(imported, path, WINDOW, "model.dim_head=25")
    assert "model.heads=2: expected 4" in refusal(imported, path, WINDOW, "model.heads=2", "model.dim_head=6")


@pytest.mark.parametrize("given", ["heads=4", "dim_head=6"])
def test_heads_or_their_size_are_enough(weights, imported, given):
    config, _, path = weights(without_frequencies, heads=4, dim_head=6)
    _, meta = read(Checkpoints(imported(path, WINDOW, f"model.{given}") / "checkpoints").find("last"))
    assert meta["config"]["model"] == as_dict(config)


@pytest.mark.parametrize("options", [dict(gate_values_per_head=True), dict(qk_rmsnorm=True)])
def test_heads_are_inferred_from_gates_and_scales(weights, imported, options):
    config, _, path = weights(without_frequencies, heads=4, dim_head=6, **options)
    _, meta = read(Checkpoints(imported(path, WINDOW) / "checkpoints").find("last"))
    assert meta["config"]["model"] == as_dict(config)


@pytest.mark.parametrize(("dim", "ff_mult"), [(512, 4.0), (192, 4.0), (100, 2.7), (300, 3.5), (6, 3.0), (8, 1.5)])
def test_the_simplest_ff_mult_is_the_original_value(dim, ff_mult):
    assert simplest_ff_mult(dim, inner_size(dim, ff_mult)) == ff_mult


@given(st.integers(1, 5000), st.floats(1, 20))
@examples(300)
def test_the_simplest_ff_mult_gives_the_same_inner_size(dim, ff_mult):
    inner = inner_size(dim, ff_mult)
    assert inner_size(dim, simplest_ff_mult(dim, inner)) == inner


def test_an_ff_mult_that_gives_the_same_inner_size_is_kept(weights, imported):
    _, _, path = weights()
    assert inner_size(8, 4.05) == inner_size(8, 4.0)
    _, meta = read(Checkpoints(imported(path, WINDOW, "model.ff_mult=4.05") / "checkpoints").find("last"))
    assert meta["config"]["model"]["ff_mult"] == 4.05


# Refusals


def test_weights_that_do_not_fit_are_refused_naming_each_and_nothing_is_written(weights, imported):
    def spoil(state):
        del state["layers.1.1.branch.4.weight"]
        state["layers.0.0.branch.extra"] = np.ones(3, np.float32)
        state["to_logits.0.bias"] = np.ones(7, np.float32)

    _, _, path = weights(spoil)
    message = refusal(imported, path, WINDOW)
    for part in (
        "missing: layers.1.1.branch.4.weight (8, 21)",
        "unexpected: layers.0.0.branch.extra (3,)",
        "of another shape: to_logits.0.bias (7,), expected (8,)",
    ):
        assert part in message
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("name", ["token_emb.weight", "pos_emb.weight", "layers.0.1.branch.4.weight"])
def test_weights_of_something_else_are_refused_naming_what_was_looked_for(weights, imported, name):
    _, _, path = weights(lambda state: state.pop(name))
    message = refusal(imported, path, WINDOW)
    assert "expected the state dict of a LocalTransformer with num_tokens" in message and name in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "expected model.local_attn_window_size=NUMBER"),
        ([WINDOW, "weights=null"], "expected the weights to import"),
        (
            [WINDOW, "weights=a.onnx"],
            "weights=a.onnx: expected a file that ends in .pt, .pth, .ckpt, .bin, .safetensors",
        ),
        ([WINDOW, "run_dir=null"], "expected the directory to write"),
        ([WINDOW, "model.look_backward=-1"], "model.look_backward=-1: expected a whole number >= 0"),
        ([WINDOW, "model.scale=0.1", "model.use_xpos=abc"], "model.use_xpos=abc: expected true or false"),
        ([WINDOW, "model.xpos_scale_base=9"], "model.xpos_scale_base=9.0 needs model.use_xpos=true"),
        (["model.local_attn_window_size=[4,8]"], "local_attn_window_size=[4, 8]: in the original"),
        ([WINDOW, "model.global_attn_layers=[1]"], "global_attn_layers=[1]: the original has no global attention"),
        (["model.local_attn_window_size=[4]"], "model: expected local_attn_window_size to be a number, or a list of"),
        ([WINDOW, "model.use_rotary_pos_emb=false"], "use_rotary_pos_emb=False: the original has no model"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_a_mistake_is_one_line(weights, imported, overrides, expected):
    _, _, path = weights()
    assert expected in refusal(imported, path, *overrides)
    assert not (path.parent / "run, imported").exists()


def test_a_run_is_not_overwritten(weights, imported):
    _, _, path = weights()
    checkpoint = Checkpoints(imported(path, WINDOW) / "checkpoints").find("last")
    before = checkpoint.stat().st_mtime_ns
    assert "run, imported already contains a run" in refusal(imported, path, WINDOW)
    assert checkpoint.stat().st_mtime_ns == before
