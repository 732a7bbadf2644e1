"""What is wrong in the PyTorch package ``local-attention`` 1.11.2 and right here, number by number."""

from itertools import product

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from local_attention import LocalAttention, LocalTransformer
from local_attention.decoding import DecodingSession, UncachedSession
from tests.local_attention import reference
from tests.local_attention.cells import Loss, in_a_graph, randomise, run, tensor, value_and_gradients


def qkv(rng, *shape):
    return rng.standard_normal((3, *shape))


def model(seed=0, **options):
    sizes = dict(num_tokens=11, max_seq_len=64, dim=8, depth=2, local_attn_window_size=4, dim_head=4, heads=2)
    cell = LocalTransformer(**sizes | options)
    randomise(cell, seed)
    return cell


def sequences(*shape):
    return np.random.default_rng(1).integers(0, 11, shape)


def assert_cached_equals_full(model, length=17, batch=2):
    """Over four windows and one token."""
    x = sequences(batch, length)
    np.testing.assert_allclose(DecodingSession(model, batch).feed(x), run(model, x), atol=1e-4)


@pytest.mark.parametrize("n", [1, 5, 7, 9])
def test_defect_1_without_causal_and_mask_padding_is_not_attended_to(n, rng):
    q, k, v = qkv(rng, 2, n, 4)
    unpadded = reference.softmax(q @ k.transpose(0, 2, 1) / 2) @ v  # the windows hold the whole sequence
    np.testing.assert_allclose(run(LocalAttention(10, autopad=True), q, k, v), unpadded, atol=1e-5)
    np.testing.assert_allclose(run(LocalAttention(5, autopad=True), q, k, v), unpadded, atol=1e-5)


class Masked(nn.Cell):
    def __init__(self, attention, mask):
        super().__init__()
        self.attention, self.mask = attention, mask

    def construct(self, q, k, v):
        return self.attention(q, k, v, mask=self.mask)


@pytest.mark.parametrize(
    ("mode", "causal", "shared_qk"),
    [
        *(("eager", *options) for options in product([True, False], [True, False])),
        ("graph", True, True),
        *(pytest.param("graph", *o, marks=pytest.mark.slow) for o in [(True, False), (False, True), (False, False)]),
    ],
    indirect=["mode"],
)
def test_defect_2_a_query_without_a_visible_key_gets_zeros_and_zero_gradients(mode, causal, shared_qk, rng):
    mask = np.array([[False, False, True, True, False, False, False]])
    attention = LocalAttention(2, causal=causal, look_backward=0, autopad=True, shared_qk=shared_qk, look_forward=0)
    inputs, cotangent = rng.standard_normal((3, 1, 7, 4)), rng.standard_normal((1, 7, 4))
    out, gradients = value_and_gradients(Masked(attention, ms.Tensor(mask)), list(inputs), cotangent)
    blind = [0, 1, 4, 5, 6]
    assert (out[:, blind] == 0).all() and (out[:, [2, 3]] != 0).any(-1).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and (gradient[:, blind] == 0).all()
    assert (gradients[2][:, [2, 3]] != 0).any()


@pytest.mark.parametrize("look_forward", [1, 2])
@pytest.mark.parametrize("use_xpos", [True, False])
def test_defect_3_with_look_forward_rotary_scores_depend_on_the_distance_alone(look_forward, use_xpos, rng):
    base = 4 if use_xpos else None
    options = dict(look_backward=1, look_forward=look_forward)
    q, k, v = qkv(rng, 1, 12, 4)
    attention = LocalAttention(3, dim=4, use_xpos=use_xpos, xpos_scale_base=base, **options)
    wanted = reference.attention(q, k, v, window_size=3, rotary=True, xpos_scale_base=base, **options)
    np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5)


@pytest.mark.parametrize("exact_windowsize", [True, False])
def test_defect_4_a_window_in_the_call_holds_for_padding_and_exact_masks(exact_windowsize, rng):
    q, k, v = qkv(rng, 1, 11, 4)
    rule = dict(causal=True, exact_windowsize=exact_windowsize)
    attention = LocalAttention(8, **rule, autopad=True, dim=4, use_xpos=True, xpos_scale_base=4)
    out = attention(*map(tensor, (q, k, v)), window_size=3).asnumpy()
    wanted = reference.attention(q, k, v, window_size=3, rotary=True, xpos_scale_base=4, **rule)
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_defect_5_cached_keys_are_not_rotated_twice():
    assert_cached_equals_full(model())


@pytest.mark.parametrize("look_backward", [0, 1, 2])
def test_defect_6_in_whole_windows_no_window_of_keys_is_lost(look_backward):
    assert_cached_equals_full(model(exact_windowsize=False, look_backward=look_backward))


@pytest.mark.parametrize("options", [dict(qk_rmsnorm=True, qk_scale=3), dict(shared_qk=True)], ids=str)
@pytest.mark.parametrize("exact_windowsize", [True, False])
def test_defect_7_the_cached_path_knows_qk_scale_normalisation_and_the_self_mask(options, exact_windowsize):
    assert_cached_equals_full(model(exact_windowsize=exact_windowsize, **options))


class RunningMean(nn.Cell):
    """A causal layer that needs the whole sequence, and cannot be decoded token by token."""

    def construct(self, x):
        n = x.shape[1]
        return ops.matmul(tensor(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]), x)


def test_defect_8_a_global_layer_sees_the_whole_sequence_while_generating():
    with_global_layer = model(seed=11, global_attn_layer=RunningMean())
    prime = sequences(1, 9)
    with pytest.warns(UserWarning, match="no method decoding_cell: each token computes the whole context again"):
        generated = with_global_layer.generate(tensor(prime), 6, temperature=0).asnumpy()[0].tolist()
    whole = prime[0].tolist()
    for _ in range(6):
        whole.append(int(run(with_global_layer, [whole])[0, -1].argmax()))
    assert generated == whole[9:] and len(set(generated)) > 1


def test_defect_9_without_learned_positions_generation_goes_on_beyond_max_seq_len():
    assert_cached_equals_full(model(max_seq_len=4, use_abs_pos_emb=False))


def test_defect_9_with_learned_positions_the_context_starts_again_from_its_newest_half():
    limited, x = model(max_seq_len=8, depth=1), sequences(1, 14)
    session, context = DecodingSession(limited), np.zeros((1, 0), int)
    for token in x.T:
        if context.shape[1] == 8:
            context = context[:, 4:]
        context = np.concatenate([context, token[:, None]], 1)
        np.testing.assert_allclose(session.feed(token), run(limited, context)[:, -1], atol=1e-4)
    np.testing.assert_allclose(UncachedSession(limited, 1).feed(x)[:, -1], run(limited, context)[:, -1], atol=1e-4)


@pytest.mark.parametrize(
    ("causal", "look_backward", "look_forward"), [(True, 2, 0), (True, 0, 0), (False, 1, 1), (False, 2, 1)]
)
def test_defect_10_the_dynamic_bias_works_with_any_windows_looked_at(causal, look_backward, look_forward):
    options = dict(causal=causal, look_backward=look_backward, look_forward=look_forward)
    cell = model(use_dynamic_pos_bias=True, **options)
    p = randomise(cell)
    x = sequences(2, 13)
    wanted = reference.transformer(x, p, depth=2, heads=2, window_size=4, exact_windowsize=True, **options)
    np.testing.assert_allclose(run(cell, x), wanted, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_defect_11_a_filter_that_would_keep_no_token_keeps_the_most_likely(temperature):
    cell, prime = model(), tensor(sequences(2, 5))
    most_likely = cell.generate(prime, 3, temperature=0, filter_thres=0.0).asnumpy()
    for filter_thres in (0.95, 1.0):
        np.testing.assert_array_equal(cell.generate(prime, 3, temperature, filter_thres).asnumpy(), most_likely)


def test_defect_12_with_return_loss_the_mask_is_trimmed_like_the_tokens(rng):
    cell = model()
    p = randomise(cell)
    x, mask = sequences(2, 10), rng.random((2, 10)) < 0.7
    loss = float(cell(tensor(x), mask=ms.Tensor(mask), return_loss=True))
    options = dict(depth=2, heads=2, rotary=True, window_size=4, exact_windowsize=True, causal=True)
    assert abs(loss - reference.language_model_loss(x, p, mask=mask, **options)) < 1e-5
    assert abs(loss - reference.language_model_loss(x, p, **options)) > 1e-4


@in_a_graph
def test_defect_13_the_model_can_be_trained_in_mindspore(mode):
    cell, x = model(depth=1), tensor(sequences(2, 9))
    optimizer = nn.Adam(cell.trainable_params(), 1e-2)
    step = nn.TrainOneStepCell(Loss(cell), optimizer)
    before = {name: p.asnumpy().copy() for name, p in cell.parameters_and_names()}
    losses = [float(step(x).asnumpy()) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    assert all((p.asnumpy() != before[name]).any() for name, p in cell.parameters_and_names())


def test_defect_13_the_heads_of_a_bias_are_in_the_order_of_the_merged_rows(rng):
    q, k, v = qkv(rng, 2, 3, 4, 2)
    bias = rng.standard_normal((3, 2, 4))
    out = LocalAttention(2, look_forward=0)(*map(tensor, (q, k, v)), attn_bias=tensor(bias)).asnumpy()
    for head in range(3):
        alone = LocalAttention(2, look_forward=0)(
            *(tensor(x[:, head]) for x in (q, k, v)), attn_bias=tensor(bias[head : head + 1])
        )
        np.testing.assert_allclose(out[:, head], alone.asnumpy(), atol=1e-6)


def test_defect_13_generate_generates():
    assert model().generate(tensor(sequences(2, 5)), 7, seed=0).shape == (2, 7)
