import dataclasses
import inspect
import subprocess
import sys
from dataclasses import MISSING, dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt

from local_attention import LocalAttention, LocalMHA, LocalTransformer
from local_attention.options import (
    Help,
    LocalAttentionOptions,
    LocalMHAOptions,
    LocalTransformerOptions,
    accepts,
    check,
    markdown_table,
    options_of,
)

SCHEMAS = {
    LocalAttentionOptions: dict(window_size=4),
    LocalMHAOptions: dict(dim=8, window_size=4),
    LocalTransformerOptions: dict(num_tokens=8, max_seq_len=16, dim=8, depth=2),
}
DECLARED = [(schema, name) for schema in SCHEMAS for name in options_of(schema)]
CELLS = {LocalAttention: LocalAttentionOptions, LocalMHA: LocalMHAOptions, LocalTransformer: LocalTransformerOptions}


def identity(value):
    return value.__name__ if isinstance(value, type) else None


def limits_of(option):
    """``(limit, whether it is allowed itself, +1 where a larger value is out of range or -1)`` of each bound."""
    for bound in option.metadata:
        if isinstance(bound, Ge | Gt):
            yield (bound.ge, True, -1) if isinstance(bound, Ge) else (bound.gt, False, -1)
        if isinstance(bound, Le | Lt):
            yield (bound.le, True, 1) if isinstance(bound, Le) else (bound.lt, False, 1)


# Every declaration


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_option_has_one_line_of_help(schema, name):
    assert "\n" not in options_of(schema)[name].help() and len(options_of(schema)[name].help()) > 4


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_number_has_a_range(schema, name):
    option = options_of(schema)[name]
    assert bool(option.bounds) == bool({int, float} & set(option.kinds)) or name == "ignore_index"


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_range_is_enforced(schema, name):
    option = options_of(schema)[name]
    for limit, included, outwards in limits_of(option):
        step = 1 if int in option.kinds else 1e-6
        refused = [limit + outwards * step] + [limit] * (not included)
        for value in refused:
            with pytest.raises(ValueError, match=f"expected {name} .* got {value}"):
                schema(**{**SCHEMAS[schema], name: value})


@pytest.mark.parametrize(("schema", "name"), DECLARED, ids=identity)
def test_each_number_or_switch_refuses_a_text(schema, name):
    if {int, float, bool} & set(options_of(schema)[name].kinds):
        with pytest.raises(ValueError, match=f"expected {name} to be .*, got 'some'"):
            schema(**{**SCHEMAS[schema], name: "some"})


def test_an_option_means_the_same_wherever_it_is_declared():
    own = {
        ("LocalAttentionOptions", "dim"),
        ("LocalAttentionOptions", "exact_windowsize"),
    }  # per head; None not allowed
    declared = {}
    for schema, name in DECLARED:
        if (schema.__name__, name) not in own:
            option = options_of(schema)[name]
            assert declared.setdefault(name, option).metadata == option.metadata, name
            assert declared[name].kinds == option.kinds, name


# The constructors


@pytest.mark.parametrize("cell", CELLS, ids=identity)
def test_a_constructor_takes_the_declared_options_with_their_defaults(cell):
    arguments = inspect.signature(cell).parameters
    defaults = {name: MISSING if a.default is a.empty else a.default for name, a in arguments.items()}
    assert defaults == {name: option.default for name, option in options_of(CELLS[cell]).items()}


def test_local_attention_takes_its_options_in_the_order_of_the_original():
    assert [field.name for field in dataclasses.fields(LocalAttentionOptions)] == [
        *("window_size", "causal", "look_backward", "look_forward", "dropout", "shared_qk", "rel_pos_emb_config"),
        *("dim", "autopad", "exact_windowsize", "scale", "use_rotary_pos_emb", "use_xpos", "xpos_scale_base"),
    ]
    assert list(inspect.signature(LocalAttention).parameters) == list(options_of(LocalAttentionOptions))


class Taking:
    """A class that takes the options of LocalMHA."""

    @accepts(LocalMHAOptions)
    def __init__(self, options: LocalMHAOptions):
        """Begin."""
        self.options = options


def test_a_constructor_that_accepts_options_gets_them_checked():
    assert Taking(dim=8, window_size=4, heads=2).options == LocalMHAOptions(dim=8, window_size=4, heads=2)
    with pytest.raises(ValueError, match="expected heads >= 1, got 0"):
        Taking(dim=8, window_size=4, heads=0)
    for wrong in (dict(dim=8), dict(dim=8, window_size=4, head=2)):
        with pytest.raises(TypeError, match=r"window_size|head"):
            Taking(**wrong)
    with pytest.raises(TypeError):
        Taking(8, 4)


def test_a_constructor_that_accepts_options_shows_them():
    signature = inspect.signature(Taking)
    assert str(signature).startswith("(*, dim: int, window_size: int, heads: int = 8, dim_head: int = 64, ")
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
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(schema, options, message):
    with pytest.raises(ValueError, match=message):
        schema(**{**SCHEMAS[schema], **options})


@pytest.mark.parametrize("options", [dict(use_rotary_pos_emb=False), dict(use_dynamic_pos_bias=True)], ids=str)
def test_an_odd_head_is_fine_without_rotary_embeddings(options):
    model = LocalTransformerOptions(**SCHEMAS[LocalTransformerOptions], dim_head=5, **options)
    assert not model.mha().attention().use_rotary_pos_emb


def test_the_options_of_a_model_reach_its_attention():
    model = LocalTransformerOptions(
        **SCHEMAS[LocalTransformerOptions] | dict(causal=False, local_attn_window_size=6, look_backward=2),
        **dict(look_forward=3, attn_dropout=0.1, use_xpos=True, xpos_scale_base=7.0, qk_rmsnorm=True, qk_scale=9),
        **dict(shared_qk=True, exact_windowsize=False, heads=3, dim_head=4, gate_values_per_head=True),
    )
    mha, attention = model.mha(), model.mha().attention()
    assert (mha.dim, mha.heads, mha.prenorm, mha.gate_values_per_head) == (8, 3, True, True)
    assert attention == LocalAttentionOptions(
        *(6, False, 2, 3, 0.1, True, None, 4, True, False, 9, True, True, 7.0)  # in the order of the constructor
    )


def test_attention_of_several_heads_is_exact_and_scaled_by_default_as_the_original():
    attention = LocalMHAOptions(dim=8, window_size=4, scale=0.2).attention()
    assert (attention.exact_windowsize, attention.scale, attention.look_forward) == (True, 0.2, None)


# Types and ranges


@dataclass
class Some:
    count: Annotated[int, Ge(1), Help("a count")] = 1
    rate: Annotated[float | None, Ge(0), Lt(1), Help("a rate", none="no rate")] = None
    on: bool = False
    name: Literal["a", "b"] | None = "a"
    text: str = ""
    any: object = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(count=0), "expected count >= 1, got 0"),
        (dict(count=1.5), "expected count to be a whole number >= 1, got 1.5"),
        (dict(count=True), "expected count to be a whole number >= 1, got True"),
        (dict(count=None), "expected count to be a whole number >= 1, got None"),
        (dict(rate=1), "expected rate >= 0 and < 1, got 1"),
        (dict(rate=float("nan")), "expected rate >= 0 and < 1, got nan"),
        (dict(rate=False), "expected rate to be a number >= 0 and < 1, or None, got False"),
        (dict(on=1), "expected on to be true or false, got 1"),
        (dict(name="c"), "expected name to be one of a, b, or None, got 'c'"),
        (dict(text=3), "expected text to be text, got 3"),
    ],
    ids=str,
)
def test_a_value_of_another_type_or_range_is_refused(options, message):
    with pytest.raises(ValueError) as error:
        check(Some(**options))
    assert str(error.value) == message


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_numbers_of_numpy_are_taken_as_they_are(kind):
    some = Some(count=kind(3), rate=np.float32(0.5), on=np.bool_(True))
    check(some)
    assert isinstance(some.count, kind)
    with pytest.raises(ValueError, match="expected count >= 1, got 0"):
        check(Some(count=kind(0)))


def test_whole_numbers_are_numbers_and_other_types_are_not_checked():
    check(Some(rate=0, name="b", any=[1]))
    check(Some(name=None, any="a"))


# The documentation


def test_a_table_has_a_row_for_each_option():
    assert markdown_table(Some).splitlines()[:4] == [
        "| option | default | value | meaning |",
        "| --- | --- | --- | --- |",
        "| `count` | `1` | a whole number >= 1 | a count |",
        "| `rate` | `None` | a number >= 0 and < 1, or None | a rate; None: no rate |",
    ]
    assert markdown_table(LocalMHAOptions).count("\n") == 2 + len(options_of(LocalMHAOptions))


def test_the_declarations_load_nothing_slow():
    program = (
        "import sys, local_attention.options; print([m for m in ('mindspore', 'numpy', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
