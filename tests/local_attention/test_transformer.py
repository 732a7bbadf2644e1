import re
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from hypothesis import strategies as st
from mindspore import nn, ops

from local_attention import GlobalAttention, LocalMHA, LocalTransformer
from tests.local_attention import reference
from tests.local_attention.cells import (
    Loss,
    assert_gradients,
    both_modes,
    both_paths,
    directions_or_entries,
    for_all,
    in_a_graph,
    parameters,
    randomise,
    run,
    slowly_in_a_graph,
    tensor,
    value_and_parameter_gradients,
)

SIZES = dict(num_tokens=11, max_seq_len=24, dim=6, depth=2, local_attn_window_size=3, dim_head=4, heads=2, ff_mult=2)


def transformer(seed=0, **options):
    """A small LocalTransformer with parameters that matter, and those."""
    model = LocalTransformer(**SIZES | options)
    return model, randomise(model, seed)


def tokens(rng, *shape, num_tokens=11):
    return rng.integers(0, num_tokens, shape)


WANTED = dict(depth=2, heads=2, rotary=True, window_size=3, causal=True, exact_windowsize=True)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {}),
        (dict(use_abs_pos_emb=False), {}),
        (dict(exact_windowsize=False), dict(exact_windowsize=False)),
        (dict(causal=False), dict(causal=False, look_forward=1)),
        (dict(causal=False, look_forward=0, look_backward=2), dict(causal=False, look_backward=2)),
        (dict(look_backward=0), dict(look_backward=0)),
        (dict(use_rotary_pos_emb=False), dict(rotary=False)),
        (dict(local_attn_window_size=5), dict(window_size=5)),
        (dict(depth=3), dict(depth=3)),
        (dict(heads=3, dim_head=2), dict(heads=3)),
        (dict(heads=1, dim_head=8), dict(heads=1)),
        (dict(ff_mult=5), {}),
        (dict(scale=0.3), dict(scale=0.3)),
        (dict(use_xpos=True), dict(xpos_scale_base=1)),
        (dict(use_xpos=True, xpos_scale_base=4), dict(xpos_scale_base=4)),
        (dict(qk_rmsnorm=True, qk_scale=4), dict(qk_rmsnorm=True, qk_scale=4)),
        (dict(gate_values_per_head=True), dict(gate_values_per_head=True)),
        (dict(shared_qk=True), dict(shared_qk=True)),
        (dict(use_dynamic_pos_bias=True), dict(rotary=False)),
        (dict(use_dynamic_pos_bias=True, look_backward=2), dict(rotary=False, look_backward=2)),
        (
            dict(use_dynamic_pos_bias=True, causal=False, look_backward=0),
            dict(rotary=False, causal=False, look_forward=1, look_backward=0),
        ),
        (dict(local_attn_window_size=[2, 5], look_backward=[2, 0]), dict(window_size=[2, 5], look_backward=[2, 0])),
        (dict(local_attn_window_size=[2, 5], use_xpos=True), dict(window_size=[2, 5], xpos_scale_base=[1, 2])),
        (
            dict(local_attn_window_size=[2, 2, 4], depth=3, use_dynamic_pos_bias=True),
            dict(window_size=[2, 2, 4], depth=3, rotary=False),
        ),
        (
            dict(global_attn_layers=[2]),
            dict(window_size=[3, 24], look_backward=[1, 0], exact_windowsize=[True, False]),
        ),
        (
            dict(global_attn_layers=[1, 2], causal=False),
            dict(window_size=24, look_backward=0, exact_windowsize=False, causal=False),
        ),
        (dict(num_residual_streams=2), dict(streams=2)),
        (dict(num_residual_streams=3, use_dynamic_pos_bias=True), dict(streams=3, rotary=False)),
        (dict(embedding_skip=True), {}),
        (dict(embedding_skip=True, num_residual_streams=2), dict(streams=2)),
    ],
    ids=str,
)
def test_the_logits_are_those_of_the_definition(options, wanted, rng):
    model, p = transformer(**options)
    for n in (1, 3, 10):
        x = tokens(rng, 2, n)
        logits = run(model, x)
        assert logits.shape == (2, n, 11)
        np.testing.assert_allclose(logits, reference.transformer(x, p, **WANTED | wanted), atol=2e-5)


def test_the_embedding_skip_changes_nothing_before_training_and_its_factors_are_learned(rng):
    model, x = LocalTransformer(**SIZES, embedding_skip=True), tokens(rng, 2, 10)
    plain = LocalTransformer(**SIZES)
    for parameter, own in zip(plain.get_parameters(), [p for p in model.get_parameters() if "factors" not in p.name]):
        parameter.set_data(own)
    np.testing.assert_array_equal(run(model, x), run(plain, x))
    randomise(model)
    _, gradients = value_and_parameter_gradients(Loss(model), x)
    for name in ("residual_factors", "embedding_factors"):
        assert gradients[name].shape == (2,) and (abs(gradients[name]) > 1e-4).all()


@in_a_graph
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            dict(num_residual_streams=2, use_dynamic_pos_bias=True, local_attn_window_size=[3, 2]),
            dict(streams=2, rotary=False, window_size=[3, 2]),
        ),
        pytest.param({}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_logits_are_those_of_the_definition_in_a_graph(mode, options, wanted, rng):
    model, p = transformer(**options)
    x = tokens(rng, 2, 10)
    np.testing.assert_allclose(run(model, x), reference.transformer(x, p, **WANTED | wanted), atol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, dict(use_dynamic_pos_bias=True), dict(shared_qk=True), dict(num_residual_streams=2)], ids=str
)
def test_a_mask_hides_tokens_from_all_layers(options, rng):
    model, p = transformer(**options)
    x, mask = tokens(rng, 2, 10), rng.random((2, 10)) < 0.6
    wanted = WANTED | dict(
        rotary="use_dynamic_pos_bias" not in options,
        shared_qk="shared_qk" in options,
        streams=options.get("num_residual_streams", 1),
    )
    logits = model(tensor(x), mask=ms.Tensor(mask)).asnumpy()
    np.testing.assert_allclose(logits, reference.transformer(x, p, **wanted, mask=mask), atol=2e-5)
    assert abs(logits - run(model, x)).max() > 1e-3


# Inserted global layers


class GlobalAverage(nn.Cell):
    """A causal layer that sees the whole sequence: the running mean of a projection."""

    def __init__(self, dim):
        super().__init__()
        self.to_out = nn.Dense(dim, dim)

    def construct(self, x):
        n = x.shape[1]
        weights = tensor(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None])
        return self.to_out(ops.matmul(weights, x))


def global_average(x, p, name):
    mean = np.cumsum(x, 1) / np.arange(1, x.shape[1] + 1)[:, None]
    return mean @ p[f"{name}to_out.weight"].T + p[f"{name}to_out.bias"]


@pytest.mark.parametrize(
    ("mode", "streams", "layers", "inserted"),
    [
        ("eager", 1, None, (1, 2)),
        ("eager", 1, (2,), (2,)),
        ("eager", 1, (), ()),
        ("eager", 2, None, (1, 2)),
        pytest.param("graph", 2, (1,), (1,), marks=pytest.mark.slow),
    ],
    indirect=["mode"],
)
def test_a_global_layer_goes_before_the_attention_of_the_layers_named(mode, layers, inserted, streams, rng):
    model, p = transformer(
        global_attn_layer=GlobalAverage(6), layers_insert_global_attn=layers, num_residual_streams=streams
    )
    x = tokens(rng, 2, 7)
    wanted = WANTED | dict(streams=streams, global_attention=global_average, inserted=inserted)
    np.testing.assert_allclose(run(model, x), reference.transformer(x, p, **wanted), atol=2e-5)


def test_a_mask_hides_tokens_from_global_attention(rng):
    """Both from that which replaces local attention and from that which is inserted before it."""
    inserted = GlobalAttention(dim=6, heads=3, dim_head=2, causal=True)
    model, p = transformer(global_attn_layers=[1], global_attn_layer=inserted, layers_insert_global_attn=[2])
    x, mask = tokens(rng, 2, 10), rng.random((2, 10)) < 0.6
    whole = dict(window_size=24, look_backward=0, causal=True, rotary=True, mask=mask)
    wanted = WANTED | dict(window_size=[24, 3], look_backward=[0, 1], exact_windowsize=[False, True])
    wanted |= dict(mask=mask, inserted=[2])
    wanted["global_attention"] = partial(reference.mha, heads=3, prenorm=False, **whole)
    logits = model(tensor(x), mask=ms.Tensor(mask)).asnumpy()
    np.testing.assert_allclose(logits, reference.transformer(x, p, **wanted), atol=2e-5)


def test_each_layer_has_a_fresh_copy_of_the_global_layer():
    inserted = GlobalAverage(6)
    model = LocalTransformer(**SIZES, global_attn_layer=inserted)
    copies = [layer.global_attention for layer in model.layers]
    assert copies[0] is not copies[1] and inserted not in copies
    names = [name for name in parameters(model) if "global" in name]
    assert sorted(names) == [f"layers.{i}.global_attention.to_out.{w}" for i in (0, 1) for w in ("bias", "weight")]
    copies[0].to_out.weight.set_data(tensor(np.zeros((6, 6))))
    assert (parameters(model)["layers.1.global_attention.to_out.weight"] != 0).any()
    assert (inserted.to_out.weight.asnumpy() != 0).any()


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 5)])
def test_global_layers_beyond_the_depth_are_refused(layers):
    with pytest.raises(ValueError, match=r"from 1 to depth = 2, got \("):
        transformer(global_attn_layer=GlobalAverage(6), layers_insert_global_attn=layers)


def test_layers_to_insert_without_a_cell_are_refused():
    with pytest.raises(ValueError, match="expected a global_attn_layer"):
        transformer(layers_insert_global_attn=(1,))


def test_dropouts_of_the_transformer_work_in_training_only(rng):
    x = tokens(rng, 2, 7)
    for options in (dict(attn_dropout=0.5), dict(ff_dropout=0.5)):
        model, _ = transformer(**options)
        model.set_train(False)
        np.testing.assert_allclose(run(model, x), run(transformer()[0], x), atol=1e-5)
        model.set_train()
        assert abs(run(model, x) - run(model, x)).max() > 1e-3


LOSSES = [
    ({}, {}),
    (dict(causal=False, use_abs_pos_emb=False, depth=1), dict(causal=False, look_forward=1, depth=1)),
    (
        dict(depth=1, use_dynamic_pos_bias=True, qk_rmsnorm=True, gate_values_per_head=True),
        dict(depth=1, rotary=False, qk_rmsnorm=True, gate_values_per_head=True),
    ),
    (
        dict(depth=1, num_residual_streams=2, shared_qk=True, use_xpos=True),
        dict(depth=1, streams=2, shared_qk=True, xpos_scale_base=1),
    ),
]


@pytest.mark.parametrize(
    ("mode", "options", "wanted"),
    [("eager", *loss) for loss in LOSSES]
    + [pytest.param("graph", *LOSSES[0], marks=pytest.mark.slow), ("graph", *LOSSES[3])],
    indirect=["mode"],
)
@directions_or_entries
def test_the_loss_and_its_gradients_reach_every_parameter(mode, options, wanted, every_entry, rng):
    options = dict(num_tokens=5, max_seq_len=8, dim=4, dim_head=2, ignore_index=3) | options
    wanted = WANTED | wanted
    model, p = transformer(**options)
    x = tokens(rng, 2, 7, num_tokens=5)
    assert 3 in x[:, 1:]  # some label is left out
    loss, gradients = value_and_parameter_gradients(Loss(model), x)
    assert abs(loss - reference.language_model_loss(x, p, ignore_index=3, **wanted)) < 1e-5
    assert len(gradients) == len(p)
    for name in p:
        found = gradients[f"model.{name}"] if f"model.{name}" in gradients else gradients[name]

        def of_parameter(value, name=name):
            return reference.language_model_loss(x, p | {name: value}, ignore_index=3, **wanted)

        assert_gradients(of_parameter, [p[name]], 1, [found], every_entry, err_msg=name)
        if name != "dynamic_pos_bias.mlp.4.bias":  # the same for all keys, which softmax does not see
            assert abs(found).max() > 1e-3, name


def test_the_loss_is_the_mean_cross_entropy_of_the_logits(rng):
    model, _ = transformer()
    x = tokens(rng, 2, 9)
    logits = run(model, x[:, :-1])
    loss = float(model(tensor(x), return_loss=True))
    assert abs(loss - reference.cross_entropy(logits.astype(np.float64), x[:, 1:]).mean()) < 1e-5


def test_the_loss_of_a_single_next_token():
    model, _ = transformer()
    loss = float(model(tensor([[4, 7]]), return_loss=True))
    assert abs(loss - reference.cross_entropy(run(model, [[4]]).astype(np.float64), [[7]])[0, 0]) < 1e-5


@pytest.mark.parametrize("ignore_index", [0, 7, 10])
def test_labels_of_the_ignored_index_are_left_out_of_the_mean(ignore_index, rng):
    model, _ = transformer(ignore_index=ignore_index)
    x = tokens(rng, 4, 20)
    losses = reference.cross_entropy(run(model, x[:, :-1]).astype(np.float64), x[:, 1:])
    counted = x[:, 1:] != ignore_index
    assert 0 < counted.sum() < counted.size
    assert abs(float(model(tensor(x), return_loss=True)) - losses[counted].mean()) < 1e-5
    assert abs(losses[counted].mean() - losses.mean()) > 1e-3


@slowly_in_a_graph
def test_a_sequence_filled_up_with_minus_one_has_the_loss_of_the_sequence_alone(mode, rng):
    model, p = transformer(depth=1)
    x = tokens(rng, 1, 6)
    filled = np.concatenate([x, [[-1, -1, -1]]], 1)
    loss = float(model(tensor(filled), return_loss=True))
    assert abs(loss - reference.language_model_loss(x, p, **WANTED | dict(depth=1))) < 1e-5


@slowly_in_a_graph
@both_paths
def test_where_every_label_is_ignored_the_loss_and_all_gradients_are_zero(mode, rng):
    model, _ = transformer(depth=1, ignore_index=3)
    x = np.concatenate([tokens(rng, 2, 1), np.full((2, 23), 3)], 1)
    loss, gradients = value_and_parameter_gradients(Loss(model), x)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())  # NaN counts as True


INTEGER_TYPES = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("eager", dtype) for dtype in INTEGER_TYPES]
    + [pytest.param("graph", dtype, marks=pytest.mark.slow) for dtype in (np.uint8, np.int64)],
    indirect=["mode"],
)
def test_tokens_of_any_integer_type_are_the_same_tokens(mode, dtype, rng):
    model, _ = transformer(depth=1, max_ngram=2, ngram_buckets=13, ngram_dim=2)
    x = tokens(rng, 2, 8)
    np.testing.assert_array_equal(model(ms.Tensor(x.astype(dtype))).asnumpy(), run(model, x))
    loss = model(ms.Tensor(x.astype(dtype)), return_loss=True)
    assert float(loss) == float(model(tensor(x), return_loss=True))


@both_modes
@pytest.mark.parametrize("dtype", [ms.float32, ms.bool_], ids=str)
def test_tokens_of_another_type_are_refused(mode, dtype):
    with pytest.raises(ValueError, match=f"expected tokens of an integer type, got {dtype}"):
        transformer()[0](ops.ones((2, 8), dtype))


@both_modes
@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.int32], ids=str)
@pytest.mark.parametrize("cell", [LocalMHA, LocalTransformer])
def test_types_that_cannot_be_computed_in_are_refused_in_one_line(mode, cell, dtype):
    options = SIZES | dict(num_tokens=None) if cell is LocalTransformer else dict(dim=6, window_size=3)
    problem = "CPUs do not multiply matrices in bfloat16: use float32" if dtype == ms.bfloat16 else "got Int32"
    with pytest.raises(ValueError, match=problem):
        cell(**options)(ops.ones((2, 8, 6), dtype))


@both_modes
@pytest.mark.parametrize("bad", [-5, -1, 11, 300, 2**32 + 5])
def test_a_token_outside_the_vocabulary_is_refused_and_the_next_call_works(mode, bad, rng):
    model, _ = transformer(depth=1)
    x = tokens(rng, 2, 8)
    with_bad = ms.Tensor(np.where(np.arange(8) == 3, bad, x))
    with pytest.raises(ValueError, match=re.escape(f"expected tokens from 0 to 10, got {bad}")):
        model(with_bad)
    if bad != -1:  # the default of ignore_index
        with pytest.raises(ValueError, match="expected tokens from 0 to 10"):
            model(with_bad, return_loss=True)
    if bad == -5:
        assert np.isfinite(run(model, x)).all()


@pytest.mark.parametrize("place", [3, -1], ids=["input", "label"])
@both_paths
def test_a_negative_token_that_is_not_checked_is_an_error_and_no_other_token(place, rng):
    model, _ = transformer(depth=1, max_seq_len=80)
    x = tokens(rng, 2, 80)
    x[0, place] = -5
    with pytest.raises(RuntimeError):
        model.construct(tensor(x), return_loss=True)


@pytest.mark.parametrize("ignore_index", [-1, -100, 300])
def test_an_ignored_index_outside_the_vocabulary_fills_up_sequences(ignore_index, rng):
    model, _ = transformer(depth=1, ignore_index=ignore_index)
    x = tokens(rng, 2, 8)
    filled = np.concatenate([x, np.full((2, 5), ignore_index)], 1)
    loss, wanted = (float(model(tensor(tokens), return_loss=True)) for tokens in (filled, x))
    assert abs(loss - wanted) < 1e-6


def test_each_token_loss_is_the_cross_entropy_of_its_label(rng):
    model, _ = transformer()
    x, labels = tokens(rng, 2, 5), tokens(rng, 2, 5)
    losses = model.token_losses(tensor(x), tensor(labels.reshape(-1))).asnumpy()
    wanted = reference.cross_entropy(run(model, x).astype(np.float64), labels).reshape(-1)
    np.testing.assert_allclose(losses, wanted, atol=1e-5)


@both_modes
@pytest.mark.parametrize(
    ("num_tokens", "shape", "return_loss"),
    [(11, (5,), False), (11, (1, 1), True), (None, (1, 4, 3), False), (None, (1, 4, 8), True)],
)
def test_inputs_of_another_shape_are_refused(mode, num_tokens, shape, return_loss):
    model, _ = transformer(num_tokens=num_tokens, dim=8, depth=1)
    with pytest.raises(ValueError, match="expected"):
        model(tensor(np.zeros(shape, np.float32 if num_tokens is None else np.int32)), return_loss=return_loss)


@both_modes
def test_more_tokens_than_learned_positions_are_refused(mode, rng):
    model, _ = transformer(max_seq_len=5, depth=1)
    with pytest.raises(ValueError, match="at most max_seq_len = 5 tokens, got 6"):
        run(model, tokens(rng, 1, 6))


def test_as_many_tokens_as_learned_positions_and_for_the_loss_one_more_are_not_refused(rng):
    model, _ = transformer(max_seq_len=5, depth=1)
    assert run(model, tokens(rng, 1, 5)).shape == (1, 5, 11)
    assert np.isfinite(float(model(tensor(tokens(rng, 1, 6)), return_loss=True)))
    with pytest.raises(ValueError, match="max_seq_len = 5"):
        model(tensor(tokens(rng, 1, 7)), return_loss=True)


def test_without_learned_positions_there_is_no_limit_on_the_length(rng):
    model, p = transformer(max_seq_len=5, use_abs_pos_emb=False)
    assert not any("pos_emb" in name for name in p)
    x = tokens(rng, 1, 40)
    np.testing.assert_allclose(run(model, x), reference.transformer(x, p, **WANTED), atol=2e-5)


def test_learned_positions_tell_equal_tokens_apart(rng):
    same = np.full((1, 3), 4)
    with_positions, without = (run(transformer(use_abs_pos_emb=use)[0], same)[0] for use in (True, False))
    assert abs(with_positions[1:] - with_positions[0]).max(-1).min() > 0.1
    # rotary positions turn queries and keys only: equal values have an average that no weights change
    np.testing.assert_allclose(without, np.broadcast_to(without[0], without.shape), atol=1e-5)


@slowly_in_a_graph
def test_without_num_tokens_hidden_states_go_in_and_come_out(mode, rng):
    model, p = transformer(num_tokens=None)
    assert not any(name.startswith(("token_emb", "pos_emb", "to_logits", "norm")) for name in p)
    x = rng.standard_normal((2, 7, 6))
    np.testing.assert_allclose(run(model, x), reference.layers(x, p, **WANTED), atol=2e-5)


def test_the_head_size_is_independent_of_dim_and_heads(rng):
    model, p = transformer(dim=5, heads=3, dim_head=8)
    assert p["layers.0.attention.to_q.weight"].shape == (24, 5)
    assert p["layers.0.attention.to_out.weight"].shape == (5, 24)
    x = tokens(rng, 1, 7)
    np.testing.assert_allclose(run(model, x), reference.transformer(x, p, **WANTED | dict(heads=3)), atol=2e-5)


@pytest.mark.parametrize(("options", "inner"), [({}, 16), (dict(ff_mult=3), 12), (dict(ff_mult=5), 20)], ids=str)
def test_ff_mult_sets_the_inner_size_of_every_feed_forward(options, inner):
    p = parameters(LocalTransformer(**{name: size for name, size in SIZES.items() if name != "ff_mult"} | options))
    assert [p[f"layers.{i}.feed_forward.to_out.weight"].shape for i in range(2)] == [(6, inner)] * 2


def test_embeddings_begin_small():
    p = parameters(LocalTransformer(**SIZES | dict(num_tokens=200, max_seq_len=200, dim=20, depth=1)))
    for name in ("token_emb", "pos_emb"):
        assert abs(p[f"{name}.embedding_table"].std() - 0.02) < 0.002


def test_layers_do_not_share_parameters():
    p = parameters(LocalTransformer(**SIZES))
    assert len(p) == len(set(p)) == 2 * 11 + 5
    assert (p["layers.0.attention.to_q.weight"] != p["layers.1.attention.to_q.weight"]).any()


@pytest.mark.parametrize(
    "name", ["num_tokens", "max_seq_len", "dim", "depth", "local_attn_window_size", "dim_head", "heads", "ff_mult"]
)
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused_by_name(name, size):
    with pytest.raises(ValueError, match=f"{name} >= 1.* got {size}"):
        LocalTransformer(**SIZES | {name: size})


# Who sees whom. With small scores every visible key has about the same weight, and an effect that cannot be missed.

models = st.fixed_dictionaries(
    dict(
        depth=st.integers(1, 3),
        local_attn_window_size=st.integers(1, 3),
        look_backward=st.integers(0, 2),
        exact_windowsize=st.booleans(),
        use_rotary_pos_emb=st.booleans(),
        use_xpos=st.booleans(),
        shared_qk=st.booleans(),
        use_dynamic_pos_bias=st.booleans(),
        gate_values_per_head=st.booleans(),
        num_residual_streams=st.sampled_from([1, 1, 2]),
        scale=st.just(0.01),
    )
)


def changes(model, x, j):
    """By how much the logits of each position change when token ``j`` of the sequence ``x: (n,)`` does."""
    other = x.copy()
    other[j] = (other[j] + 5) % 11
    return abs(run(model, other[None]) - run(model, x[None]))[0].max(-1)


@for_all(5, 40, models, st.booleans(), st.integers(1, 14), st.data())
def test_a_changed_future_byte_changes_no_earlier_logit(options, use_abs_pos_emb, n, data):
    model, _ = transformer(use_abs_pos_emb=use_abs_pos_emb, **options)
    x = tokens(np.random.default_rng(data.draw(st.integers(0, 99))), n)
    j = data.draw(st.integers(0, n - 1))
    changed = changes(model, x, j)
    assert (changed[:j] == 0).all() and changed[j] > 1e-3


@for_all(5, 40, models)
def test_the_receptive_field_is_exactly_the_windows_looked_back_in_all_layers(options):
    window = options["local_attn_window_size"]
    back = options["depth"] * options["look_backward"] * window
    model, _ = transformer(use_abs_pos_emb=False, **options)
    x = tokens(np.random.default_rng(1), back + 2 * window + 1)
    i = len(x) - 1
    border = i - back if options["exact_windowsize"] else i // window * window - back
    assert border > 0
    assert changes(model, x, border)[i] > 1e-5
    assert changes(model, x, border - 1)[i] == 0


@pytest.mark.parametrize("exact_windowsize", [True, False])
@pytest.mark.parametrize("look_forward", [0, 1, 2])
def test_the_receptive_field_ahead_is_exactly_the_windows_looked_forward_in_all_layers(exact_windowsize, look_forward):
    model, _ = transformer(
        use_abs_pos_emb=False, causal=False, exact_windowsize=exact_windowsize, look_forward=look_forward, scale=0.01
    )
    ahead = 2 * look_forward * 3
    x = tokens(np.random.default_rng(1), ahead + 6)
    border = ahead if exact_windowsize else ahead + 2  # seen from position 0
    assert changes(model, x, border)[0] > 1e-5
    assert changes(model, x, border + 1)[0] == 0


@for_all(5, 40, models, st.integers(1, 7), st.booleans())
def test_a_shift_of_all_positions_changes_nothing_without_learned_positions(options, shift, learned):
    options["scale"] = 0.5  # rotary positions matter
    window = options["local_attn_window_size"]
    shift *= 1 if options["exact_windowsize"] else window
    out_of_sight = (options["depth"] * options["look_backward"] + 1) * window
    model, _ = transformer(use_abs_pos_emb=learned, max_seq_len=64, **options)
    x = tokens(np.random.default_rng(1), 1, shift + out_of_sight + 4)
    difference = run(model, x)[:, shift + out_of_sight :] - run(model, x[:, shift:])[:, out_of_sight:]
    assert (abs(difference).max() > 1e-3) if learned else (abs(difference).max() < 2e-5)


def test_sequences_of_a_batch_do_not_see_each_other(rng):
    model, _ = transformer()
    x = tokens(rng, 3, 8)
    together = run(model, x)
    np.testing.assert_allclose(together, np.concatenate([run(model, row[None]) for row in x]), atol=1e-5)


# The example of the original's README


@pytest.mark.parametrize("length", [300, pytest.param(8192, marks=pytest.mark.slow)])
def test_readme_transformer_of_8192_tokens(length):
    model = LocalTransformer(
        num_tokens=256,
        dim=512,
        depth=6,
        max_seq_len=8192,
        causal=True,
        local_attn_window_size=256,
    )
    x = ms.ops.randint(0, 256, (1, length))
    logits = model(x)
    assert logits.shape == (1, length, 256)
