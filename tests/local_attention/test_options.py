import dataclasses
import inspect
import re
import subprocess
import sys
from dataclasses import MISSING

import numpy as np
import pytest

from local_attention import GlobalAttention, LocalAttention, LocalMHA, LocalTransformer
from local_attention.options import (
    WHOLE_SEQUENCE,
    GlobalAttentionOptions,
    LocalAttentionOptions,
    LocalMHAOptions,
    LocalTransformerOptions,
    accepts,
)
from local_attention.training.schema import keys_of, markdown_table

SCHEMAS = {
    LocalAttentionOptions: dict(window_size=4),
    LocalMHAOptions: dict(dim=8, window_size=4),
    GlobalAttentionOptions: dict(dim=8),
    LocalTransformerOptions: dict(num_tokens=8, max_seq_len=16, dim=8, depth=2),
}
DECLARED = [(schema, name) for schema in SCHEMAS for name in keys_of(schema)]
CELLS = {
    LocalAttention: LocalAttentionOptions,
    LocalMHA: LocalMHAOptions,
    GlobalAttention: GlobalAttentionOptions,
    LocalTransformer: LocalTransformerOptions,
}


def identity(value):
    return value.__name__ if isinstance(value, type) else None


# Every declaration


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_option_has_one_line_of_help_and_each_number_a_range(schema, name):
    option = keys_of(schema)[name]
    assert "\n" not in option.help and len(option.help) > 4
    assert bool(option.bounds) == (option.kind in ("integer", "number")) or name == "ignore_index"


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_range_is_enforced(schema, name):
    option = keys_of(schema)[name]
    for sign, limit in re.findall(r"([<>]=?) ([\d.]+)", option.bounds):
        step = (1 if option.kind == "integer" else 1e-6) * ("=" in sign)
        value = float(limit) + (step if sign[0] == "<" else -step)
        with pytest.raises(ValueError, match=name):
            schema(**{**SCHEMAS[schema], name: int(value) if option.kind == "integer" else value})


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_number_or_switch_refuses_a_text(schema, name):
    if keys_of(schema)[name].kind in ("integer", "number", "boolean"):
        with pytest.raises(ValueError, match=name):
            schema(**{**SCHEMAS[schema], name: "some"})


def test_an_option_means_the_same_wherever_it_is_declared():
    own = {("LocalAttentionOptions", "dim"), ("LocalAttentionOptions", "exact_windowsize")}  # per head; never None
    declared = {}
    for schema, name in DECLARED:
        if (schema.__name__, name) not in own:
            option = keys_of(schema)[name]._replace(default=None, or_list=False)
            assert declared.setdefault(name, option) == option, name


# The constructors


@pytest.mark.parametrize("cell", CELLS, ids=identity)
def test_a_constructor_takes_the_declared_options_with_their_defaults(cell):
    arguments = inspect.signature(cell).parameters
    defaults = {name: MISSING if a.default is a.empty else a.default for name, a in arguments.items()}
    assert defaults == {name: option.default for name, option in keys_of(CELLS[cell]).items()}


def test_local_attention_takes_its_options_in_the_order_of_the_original():
    assert [field.name for field in dataclasses.fields(LocalAttentionOptions)] == [
        *("window_size", "causal", "look_backward", "look_forward", "dropout", "shared_qk", "rel_pos_emb_config"),
        *("dim", "autopad", "exact_windowsize", "scale", "use_rotary_pos_emb", "use_xpos", "xpos_scale_base"),
    ]
    assert list(inspect.signature(LocalAttention).parameters) == list(keys_of(LocalAttentionOptions))


class Taking:
    """A class that takes the options of LocalMHA."""

    @accepts(LocalMHAOptions)
    def __init__(self, options: LocalMHAOptions):
        """Begin."""
        self.options = options


def test_a_constructor_that_accepts_options_gets_them_checked():
    assert Taking(dim=8, window_size=4, heads=2).options == LocalMHAOptions(dim=8, window_size=4, heads=2)
    with pytest.raises(ValueError, match=r"^expected heads >= 1, got 0$"):
        Taking(dim=8, window_size=4, heads=0)
    with pytest.raises(ValueError, match=r"^expected causal true or false, got 1$"):
        Taking(dim=8, window_size=4, causal=1)
    with pytest.raises(ValueError, match=r"^expected qk_scale instead of scale with qk_rmsnorm, got scale = 0.5$"):
        Taking(dim=8, window_size=4, qk_rmsnorm=True, scale=0.5)
    with pytest.raises(ValueError, match=r"^causal attention cannot look forward"):  # of the options derived from these
        Taking(dim=8, window_size=4, causal=True, look_forward=1)
    for wrong in (dict(dim=8), dict(dim=8, window_size=4, head=2)):
        with pytest.raises(TypeError, match=r"window_size|head"):
            Taking(**wrong)
    with pytest.raises(TypeError):
        Taking(8, 4)


def test_a_constructor_that_accepts_options_shows_them():
    signature = inspect.signature(Taking)
    assert {"dim", "window_size", "look_backward"} <= set(signature.parameters)
    assert signature.parameters["heads"].default == 8 and signature.parameters["heads"].annotation is int
    assert signature.parameters["scale"].annotation == float | None
    assert next(iter(inspect.signature(Taking.__init__).parameters)) == "self"
    assert Taking.__init__.__doc__ == "Begin."


# What goes together


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (LocalAttentionOptions, dict(causal=True, look_forward=1), "expected look_forward = 0, got 1"),
        (LocalMHAOptions, dict(causal=True, look_forward=2), "expected look_forward = 0, got 2"),
        (LocalMHAOptions, dict(qk_rmsnorm=True, scale=0.5), "expected qk_scale instead of scale .* got scale = 0.5"),
        (LocalMHAOptions, dict(dim_head=5), "an even head size, got dim_head = 5"),
        (LocalTransformerOptions, dict(dim_head=5), "an even head size, got dim_head = 5"),
        (LocalTransformerOptions, dict(look_forward=1), "expected look_forward = 0, got 1"),
        (LocalTransformerOptions, dict(num_tokens=None, max_ngram=2), "expected num_tokens with max_ngram = 2"),
        (LocalTransformerOptions, dict(layers_insert_global_attn=(1,)), "expected a global_attn_layer to insert"),
        (
            LocalTransformerOptions,
            dict(global_attn_layer="a cell", layers_insert_global_attn=(0, 3)),
            r"from 1 to depth = 2, got \(0, 3\)",
        ),
        (
            LocalTransformerOptions,
            dict(local_attn_window_size=[4, 8, 16]),
            r"local_attn_window_size to be a number, or a list of depth = 2 numbers, got 3: \[4, 8, 16\]",
        ),
        (
            LocalTransformerOptions,
            dict(global_attn_layers=[3]),
            r"global_attn_layers from 1 to depth = 2, .* got \[3\]",
        ),
        (LocalTransformerOptions, dict(global_attn_layers=[0]), "1"),
        (LocalTransformerOptions, dict(global_attn_layers=[2, 2]), r"each once, got \[2, 2\]"),
        (LocalTransformerOptions, dict(global_attn_layers=[1], use_xpos=True), "use_xpos=False, which is for windows"),
        (
            LocalTransformerOptions,
            dict(global_attn_layers=[1], use_dynamic_pos_bias=True),
            "use_dynamic_pos_bias=False",
        ),
        (GlobalAttentionOptions, dict(qk_rmsnorm=True, scale=0.5), "expected qk_scale instead of scale .* 0.5"),
        (GlobalAttentionOptions, dict(dim_head=5), "an even head size, got dim_head = 5"),
        (LocalTransformerOptions, dict(look_backward=[]), r"look_backward to be .* depth = 2 numbers, got 0: \[\]"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(schema, options, message):
    with pytest.raises(ValueError, match=message):
        schema(**{**SCHEMAS[schema], **options})


@pytest.mark.parametrize("options", [dict(use_rotary_pos_emb=False), dict(use_dynamic_pos_bias=True)], ids=str)
def test_an_odd_head_is_fine_without_rotary_embeddings(options):
    model = LocalTransformerOptions(**SCHEMAS[LocalTransformerOptions], dim_head=5, **options)
    assert not model.mha(1).attention().use_rotary_pos_emb


def test_the_options_of_a_model_reach_its_attention():
    model = LocalTransformerOptions(
        **SCHEMAS[LocalTransformerOptions] | dict(causal=False, local_attn_window_size=6, look_backward=2),
        **dict(look_forward=3, attn_dropout=0.1, use_xpos=True, xpos_scale_base=7.0, qk_rmsnorm=True, qk_scale=9),
        **dict(shared_qk=True, exact_windowsize=False, heads=3, dim_head=4, gate_values_per_head=True),
    )
    mha, attention = model.mha(1), model.mha(1).attention()
    assert (mha.dim, mha.heads, mha.prenorm, mha.gate_values_per_head) == (8, 3, True, True)
    assert attention == LocalAttentionOptions(
        *(6, False, 2, 3, 0.1, True, None, 4, True, False, 9, True, True, 7.0)  # in the order of the constructor
    )


def test_the_options_of_a_model_reach_its_global_attention():
    model = LocalTransformerOptions(
        **SCHEMAS[LocalTransformerOptions] | dict(global_attn_layers=[2], look_backward=2, attn_dropout=0.1, heads=3),
        **dict(dim_head=4, qk_rmsnorm=True, qk_scale=9, shared_qk=True, gate_values_per_head=True),
        **dict(use_rotary_pos_emb=False),
    )
    assert [model.is_global(number) for number in (1, 2)] == [False, True]
    assert model.global_attention() == GlobalAttentionOptions(
        **dict(dim=8, heads=3, dim_head=4, causal=True, dropout=0.1, prenorm=True, qk_rmsnorm=True, qk_scale=9),
        **dict(shared_qk=True, gate_values_per_head=True, use_rotary_pos_emb=False),
    )
    attention = model.global_attention().attention()
    assert (attention.window_size, attention.look_backward, attention.look_forward) == (WHOLE_SEQUENCE, 0, 0)


def test_windows_are_those_of_each_layer():
    model = LocalTransformerOptions(
        **SCHEMAS[LocalTransformerOptions], local_attn_window_size=(4, 6), look_backward=[0, 2]
    )
    attentions = [model.mha(number).attention() for number in (1, 2)]
    assert [(attention.window_size, attention.look_backward) for attention in attentions] == [(4, 0), (6, 2)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([4, 0], "expected local_attn_window_size >= 1, got 0"),
        ([4, "a"], "expected local_attn_window_size a whole number, got 'a'"),
        (0, "expected local_attn_window_size >= 1, got 0"),
        (None, "expected local_attn_window_size a whole number, got None"),
    ],
)
def test_a_wrong_number_of_a_layer_is_refused_as_one_of_all_layers(value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LocalTransformer(**SCHEMAS[LocalTransformerOptions], local_attn_window_size=value)


def test_attention_of_several_heads_is_exact_and_scaled_by_default_as_the_original():
    attention = LocalMHAOptions(dim=8, window_size=4, scale=0.2).attention()
    assert (attention.exact_windowsize, attention.scale, attention.look_forward) == (True, 0.2, None)


# Types and documentation


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_numbers_of_numpy_are_taken(kind):
    taken = Taking(dim=kind(8), window_size=kind(4), dropout=np.float32(0.5), causal=np.bool_(True)).options
    assert (taken.dim, taken.dropout, taken.causal) == (8, 0.5, True)
    with pytest.raises(ValueError, match="expected heads >= 1, got 0"):
        Taking(dim=8, window_size=4, heads=kind(0))


def test_a_table_has_a_row_for_each_option():
    lines = markdown_table(LocalMHAOptions).splitlines()
    assert lines[:2] == ["| option | default | meaning |", "| --- | --- | --- |"]
    assert "| `heads` | `8` | attention heads per layer (>= 1) |" in lines
    assert len(lines) == 2 + len(keys_of(LocalMHAOptions))


def test_the_declarations_load_nothing_slow():
    program = (
        "import sys, local_attention.options; print([m for m in ('mindspore', 'numpy', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
