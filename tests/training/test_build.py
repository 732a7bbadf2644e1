import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from local_attention.training.build import build_model, compute_in, load_model, zero_outputs
from local_attention.training.checkpoint import Checkpoints, tensors_of
from local_attention.training.config import ModelConfig, OptimizerConfig, RunConfig
from local_attention.training.errors import CheckpointError
from local_attention.training.optimizer import build_optimizer
from local_attention.training.schema import as_dict

SMALL = dict(max_seq_len=16, dim=16, depth=1, heads=2, dim_head=8, local_attn_window_size=8)
TOKENS = Tensor(np.random.default_rng(0).integers(0, 256, (2, 16)), ms.int32)


@pytest.fixture(autouse=True)
def eager(graph_mode):
    """Eager mode, as each model is used only once."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def built(**options):
    return build_model(ModelConfig(**{**SMALL, **options}))


def shapes(model):
    return {parameter.name: tuple(parameter.shape) for parameter in model.trainable_params()}


def logits(model):
    """Return the logits with fixed weights, so that only the options make a difference."""
    rng = np.random.default_rng(0)
    for parameter in model.trainable_params():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape) * 0.3, ms.float32))
    return model(TOKENS).asnumpy()


@pytest.mark.parametrize(
    "options, name, shape",
    [
        ({"num_tokens": 300}, "to_logits.weight", (300, 16)),
        ({"max_seq_len": 24}, "pos_emb.embedding_table", (24, 16)),
        ({"dim": 24}, "token_emb.embedding_table", (256, 24)),
        ({"depth": 2}, "layers.1.attention.to_q.weight", (16, 16)),
        ({"heads": 3}, "layers.0.attention.to_q.weight", (24, 16)),
        ({"dim_head": 10}, "layers.0.attention.to_q.weight", (20, 16)),
        ({"ff_mult": 6.0}, "layers.0.feed_forward.to_out.weight", (16, 64)),
        ({"num_residual_streams": 3}, "layers.0.attention_connection.static_beta", (3,)),
        ({"use_dynamic_pos_bias": True}, "dynamic_pos_bias.mlp.0.weight", (8, 1)),
        ({"qk_rmsnorm": True}, "layers.0.attention.q_scale", (8,)),
        ({"gate_values_per_head": True}, "layers.0.attention.to_v_gate.weight", (2, 16)),
        ({"max_ngram": 3}, "ngram_emb.embedding_table", (2 * 65521, 48)),
        ({"max_ngram": 2, "ngram_buckets": 101}, "ngram_emb.embedding_table", (101, 48)),
        ({"max_ngram": 2, "ngram_dim": 5}, "ngram_emb.embedding_table", (65521, 5)),
    ],
)
def test_sizes_determine_the_shapes_of_weights(options, name, shape):
    assert shapes(built(**options))[name] == shape
    assert shapes(built()).get(name) != shape


@pytest.mark.parametrize(
    "others, options",
    [
        ({}, {"local_attn_window_size": 4}),
        ({}, {"look_backward": 0}),
        ({}, {"exact_windowsize": False}),
        ({}, {"use_rotary_pos_emb": False}),
        ({}, {"use_xpos": True}),
        ({"use_xpos": True}, {"xpos_scale_base": 20.0}),
        ({}, {"scale": 0.1}),
        ({"qk_rmsnorm": True}, {"qk_scale": 3.0}),
        ({}, {"shared_qk": True}),
    ],
)
def test_options_without_weights_change_the_logits(others, options):
    assert abs(logits(built(**others, **options)) - logits(built(**others))).max() > 1e-3


@pytest.mark.parametrize("option", ["attn_dropout", "ff_dropout"])
def test_dropout_applies_in_training_only(option):
    model, without = built(**{option: 0.5}), logits(built().set_train())
    assert abs(logits(model.set_train()) - without).max() > 1e-3
    np.testing.assert_allclose(logits(model.set_train(False)), without, atol=1e-5)


def test_learned_positions_are_optional():
    assert "pos_emb.embedding_table" not in shapes(built(use_abs_pos_emb=False))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a small model, and the model."""
    config = RunConfig(model=ModelConfig(**SMALL))
    model = build_model(config.model)
    tensors = tensors_of(model, build_optimizer(OptimizerConfig(), model.trainable_params()))
    path = Checkpoints(tmp_path).save(tensors, {"step": 7, "config": as_dict(config)})
    return path, model


def test_a_checkpoint_is_enough_to_rebuild_its_model(saved):
    path, model = saved
    loaded, meta = load_model(path)
    np.testing.assert_array_equal(loaded(TOKENS).asnumpy(), model(TOKENS).asnumpy())
    assert meta["step"] == 7
    assert loaded.training is False


def test_a_checkpoint_older_than_an_option_is_loaded_with_its_default(saved):
    path, model = saved
    meta = json.loads(path.with_suffix(".json").read_text())
    kept = {*SMALL, "num_tokens", "ff_mult", "look_backward", "exact_windowsize", "use_abs_pos_emb"}
    meta["config"]["model"] = {key: value for key, value in meta["config"]["model"].items() if key in kept}
    path.with_suffix(".json").write_text(json.dumps(meta))
    np.testing.assert_array_equal(load_model(path)[0](TOKENS).asnumpy(), model(TOKENS).asnumpy())


def test_a_checkpoint_whose_tensors_do_not_match_its_config_is_refused(saved):
    path, _ = saved
    meta = json.loads(path.with_suffix(".json").read_text())
    meta["config"]["model"]["dim"] = 24
    path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="expected"):
        load_model(path)


def test_a_checkpoint_of_any_run_is_loaded_to_compute_in_the_type_given(tmp_path):
    config = ModelConfig(**SMALL)
    model = compute_in(build_model(config), "float16")
    path = Checkpoints(tmp_path).save(tensors_of(model), {"step": 1, "config": as_dict(RunConfig(model=config))})
    single, half = load_model(path)[0], load_model(path, "float16")[0]
    assert (single.dtype, half.dtype) == (ms.float32, ms.float16)
    for parameter, same in zip(single.get_parameters(), half.get_parameters(), strict=True):
        assert parameter.dtype == same.dtype == ms.float32
        np.testing.assert_array_equal(parameter.asnumpy(), same.asnumpy())
    wanted, out = single(TOKENS).asnumpy(), half(TOKENS).asnumpy()
    assert 0 < abs(out - wanted).max() < 1e-2


@pytest.mark.parametrize("streams", [1, 2])
def test_with_zero_outputs_layers_change_nothing_but_learn(streams):
    model = built(depth=2, num_residual_streams=streams)
    positions = Tensor(np.arange(16), ms.int32)

    def difference():
        embedded = model.embed_next(TOKENS, None, positions) * streams  # whose sum goes to the logits
        return abs(model(TOKENS).asnumpy() - model.logits(embedded).asnumpy()).max()

    assert difference() > 1e-3
    zero_outputs(model)
    assert difference() < 1e-5
    weights = [layer.attention.to_out.weight for layer in model.layers]
    loss = ms.value_and_grad(lambda x: model(x, return_loss=True), None, weights)
    assert all(abs(gradient.asnumpy()).max() > 1e-6 for gradient in loss(TOKENS)[1])
