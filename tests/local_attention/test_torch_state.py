import json
from pathlib import Path

import numpy as np
import pytest
from mindspore import nn

from local_attention import LocalTransformer
from local_attention.torch_state import load_torch_state, torch_state
from tests.local_attention.cells import parameters, randomise

ORIGINAL = json.loads(Path(__file__).with_name("fixtures").joinpath("torch_names.json").read_text())
SIZES = dict(num_tokens=9, max_seq_len=12, dim=6, depth=1, heads=3, dim_head=4, local_attn_window_size=4)


def model(global_layers=None, **options):
    options = SIZES | options
    if global_layers:
        linear = nn.Dense(options["dim"], options["dim"])
        options |= dict(global_attn_layer=linear, layers_insert_global_attn=global_layers)
    return LocalTransformer(**options)


def randomised(**options):
    cell = model(**options)
    randomise(cell)
    return cell


def identity(case):
    return "-".join(f"{key}={value}" for key, value in case["options"].items() if SIZES.get(key) != value)


# Names


@pytest.mark.parametrize("case", ORIGINAL, ids=identity)
def test_names_and_shapes_are_those_of_the_original(case):
    state = torch_state(model(**case["options"]))
    assert {name: list(array.shape) for name, array in state.items()} == case["state"]
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", ORIGINAL, ids=identity)
def test_every_parameter_comes_back_as_it_was(case):
    source, target = randomised(**case["options"]), model(**case["options"])
    load_torch_state(target, torch_state(source))
    wanted, found = parameters(source), parameters(target)
    assert wanted.keys() == found.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_matrices_are_stacked_in_the_original_s_order():
    cell = randomised()
    ours, state = parameters(cell), torch_state(cell)
    for theirs, layer, names in (
        ("layers.0.0.branch.to_qkv", "attention", ("to_q", "to_k", "to_v")),
        ("layers.0.1.branch.1", "feed_forward", ("to_value", "to_gate")),
    ):
        stacked = np.concatenate([ours[f"layers.0.{layer}.{name}.weight"] for name in names])
        np.testing.assert_array_equal(state[f"{theirs}.weight"], stacked)


def test_rotary_frequencies_are_part_of_the_state_though_no_parameters():
    name = "layers.0.0.branch.attn_fn.rel_pos.inv_freq"
    np.testing.assert_allclose(torch_state(model())[name], [1, 0.01], rtol=1e-6)
    assert name not in torch_state(model(use_dynamic_pos_bias=True))


def test_a_state_without_rotary_frequencies_is_enough():
    source, target = randomised(), model()
    load_torch_state(target, {name: array for name, array in torch_state(source).items() if "inv_freq" not in name})
    np.testing.assert_array_equal(target.to_logits.weight.asnumpy(), source.to_logits.weight.asnumpy())


# What only one of the two has


def test_without_learned_positions_those_of_the_state_are_zeros():
    positions = torch_state(randomised(use_abs_pos_emb=False))["pos_emb.weight"]
    assert positions.shape == (12, 6) and not positions.any()
    load_torch_state(model(use_abs_pos_emb=False), torch_state(randomised(use_abs_pos_emb=False)))


def test_learned_positions_are_not_left_out_in_silence():
    with pytest.raises(ValueError, match=r"pos_emb\.weight holds learned positions, but use_abs_pos_emb is False"):
        load_torch_state(model(use_abs_pos_emb=False), torch_state(randomised()))


def test_a_model_without_any_relative_positions_has_no_counterpart():
    cell = model(use_rotary_pos_emb=False)
    for call in (lambda: torch_state(cell), lambda: load_torch_state(cell, {})):
        with pytest.raises(ValueError, match="use_rotary_pos_emb=False: the original has no model"):
            call()
    assert torch_state(model(use_rotary_pos_emb=False, use_dynamic_pos_bias=True))


def test_a_model_with_n_grams_has_no_counterpart():
    cell = model(max_ngram=2, ngram_buckets=11)
    for call in (lambda: torch_state(cell), lambda: load_torch_state(cell, {})):
        with pytest.raises(ValueError, match="no embeddings of n-grams"):
            call()


# Refusals


def test_what_is_missing_unexpected_or_of_another_shape_is_named_and_the_model_unchanged():
    state, cell = torch_state(randomised()), model()
    before = parameters(cell)
    del state["layers.0.0.branch.to_out.weight"]
    state["layers.0.0.branch.q_scale"] = np.ones(4, np.float32)
    state["to_logits.1.weight"] = np.ones((8, 6), np.float32)
    state["layers.0.0.branch.attn_fn.rel_pos.inv_freq"] = np.ones(3, np.float32)
    with pytest.raises(ValueError) as error:
        load_torch_state(cell, state)
    for part in (
        "missing: layers.0.0.branch.to_out.weight (6, 12)",
        "unexpected: layers.0.0.branch.q_scale (4,)",
        "of another shape: to_logits.1.weight (8, 6), expected (9, 6)",
        "of another shape: layers.0.0.branch.attn_fn.rel_pos.inv_freq (3,), expected (2,)",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    for name, value in parameters(cell).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
