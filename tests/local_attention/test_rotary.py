import mindspore as ms
import numpy as np
import pytest
from hypothesis import strategies as st
from mindspore import nn, ops

from local_attention.rotary import (
    SinusoidalEmbeddings,
    apply_rotary,
    apply_rotary_pos_emb,
    rotary_angles,
    rotary_table,
    xpos_decay,
)
from tests.local_attention import reference
from tests.local_attention.cells import both_modes, for_all, run, tensor, value_and_gradients


class Rotated(nn.Cell):
    """Rotates ``x: (g, n, d)`` by position, times a fixed scale, which has to be a Python number."""

    def __init__(self, rotary, scale):
        super().__init__()
        self.rotary, self.scale = rotary, scale

    def construct(self, x):
        cos, sin = self.rotary.tables(x.shape[0], x.shape[1], self.scale)
        return apply_rotary(x, cos, sin)


@both_modes
def test_rotation_and_its_gradient_are_those_of_complex_numbers(mode, rng):
    x, cotangent = rng.standard_normal((2, 3, 7, 6))
    value, (gradient,) = value_and_gradients(Rotated(SinusoidalEmbeddings(6), 0.3), [x], cotangent)
    np.testing.assert_allclose(value, 0.3 * reference.rotate(x), atol=1e-5)
    (wanted,) = reference.numerical_gradients(lambda x: 0.3 * reference.rotate(x), [x], cotangent)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)


@for_all(8, 40, n=st.integers(1, 9), pairs=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_rotation_is_that_of_complex_numbers_for_any_size(n, pairs, groups, seed):
    x = np.random.default_rng(seed).standard_normal((groups, n, 2 * pairs))
    rotated = run(Rotated(SinusoidalEmbeddings(2 * pairs), 1.0), x)
    np.testing.assert_allclose(rotated, reference.rotate(x), atol=1e-5)


@for_all(15, 100, i=st.integers(0, 500), j=st.integers(0, 500), shift=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_the_product_of_rotated_vectors_depends_on_their_distance_alone(i, j, shift, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 8))

    def score(i, j):
        angles = rotary_angles([i, j], 8)
        rotated = apply_rotary(*map(tensor, ([q, k], np.cos(angles), np.sin(angles)))).asnumpy()
        return rotated[0] @ rotated[1]

    assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-5


def test_the_table_is_exact_at_far_positions():
    length = 200_000  # there, a float32 product of position and frequency is wrong by 0.01
    cos, sin = (table.asnumpy() for table in rotary_table(1, length, 4, 10000, 1.0, ms.float32))
    unit = reference.rotate(np.tile([1.0, 1.0, 0.0, 0.0], (length, 1)))  # cos and sin of both frequencies
    np.testing.assert_allclose(np.concatenate([cos[:, :2], sin[:, :2]], -1), unit, atol=1e-7)


def test_the_table_of_the_same_arguments_is_one_pair_of_tensors():
    first, second = rotary_table(2, 5, 4, 10000, 1.0, ms.float32), rotary_table(2, 5, 4, 10000, 1.0, ms.float32)
    assert all(isinstance(a, ms.Tensor) and a is b for a, b in zip(first, second, strict=True))
    assert rotary_table(2, 5, 4, 10000, 2.0, ms.float32)[0] is not first[0]


class ScoreOfEmbeddings(nn.Cell):
    """The scores of queries, the newest of the positions, for all keys, by the public functions."""

    def __init__(self, **options):
        super().__init__()
        self.embeddings = SinusoidalEmbeddings(4, **options)

    def construct(self, q, k):
        freqs, scale = self.embeddings(k)
        q, k = apply_rotary_pos_emb(q, k, freqs, scale)
        return ops.matmul(q, k.swapaxes(-1, -2))


@pytest.mark.parametrize(
    ("mode", "base"),
    [("eager", None), ("eager", 3), ("graph", 3), pytest.param("graph", None, marks=pytest.mark.slow)],
    indirect=["mode"],
)
def test_embeddings_and_their_application_give_rotated_and_decaying_scores(mode, base, rng):
    q, k = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 7, 4))
    options = {} if base is None else dict(scale_base=base, use_xpos=True)
    scores = run(ScoreOfEmbeddings(**options), q, k)
    q = np.concatenate([np.zeros((2, 4, 4)), q], 1)  # queries are the last of the positions
    factor = np.ones((7, 7, 4)) if base is None else reference.decay(7, 4, base)
    wanted = np.einsum("gic,gjc,ijc->gij", reference.rotate(q), reference.rotate(k), factor)[:, 4:]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_embeddings_are_angles_and_decay_of_each_position():
    freqs, scale = SinusoidalEmbeddings(4)(tensor(np.zeros((1, 3, 4))))
    np.testing.assert_allclose(freqs.asnumpy(), np.arange(3)[:, None] * [1, 0.01, 1, 0.01], rtol=1e-6)
    assert scale.asnumpy().tolist() == [1]
    freqs, scale = SinusoidalEmbeddings(4, 5, use_xpos=True, theta=100)(tensor(np.zeros((3, 4))))
    np.testing.assert_allclose(freqs.asnumpy(), np.arange(3)[:, None] * [1, 0.1, 1, 0.1], rtol=1e-6)
    rate = np.array([0.4 * 4, 2 + 0.4 * 4]) / (1.4 * 4)
    np.testing.assert_allclose(scale.asnumpy(), np.tile(rate, 2) ** (np.arange(-1, 2)[:, None] / 5), rtol=1e-6)


def test_a_scale_that_is_a_number_is_applied_to_both(rng):
    q, k, freqs = rng.standard_normal((3, 5, 4))
    plain = apply_rotary_pos_emb(tensor(q), tensor(k), tensor(freqs))
    scaled = apply_rotary_pos_emb(tensor(q), tensor(k), tensor(freqs), 2)
    np.testing.assert_allclose(scaled[0].asnumpy(), 2 * plain[0].asnumpy(), atol=1e-6)
    np.testing.assert_allclose(scaled[1].asnumpy(), plain[1].asnumpy() / 2, atol=1e-6)


def test_the_decay_is_a_power_of_the_position_and_equal_in_both_halves():
    decay = xpos_decay([0, 3, 6], 6, 3)
    np.testing.assert_allclose(decay[0], 1)
    np.testing.assert_allclose(decay[2], decay[1] ** 2)
    np.testing.assert_allclose(decay[1, :3], [2.4 / 8.4, 4.4 / 8.4, 6.4 / 8.4])
    np.testing.assert_allclose(decay[:, 3:], decay[:, :3])


@pytest.mark.parametrize("scale_base", [None, 0, -1])
def test_xpos_without_a_base_is_refused(scale_base):
    with pytest.raises(ValueError, match=f"scale_base > 0 with use_xpos, got {scale_base}"):
        SinusoidalEmbeddings(4, scale_base, use_xpos=True)


@pytest.mark.parametrize("dim", [1, 7])
def test_an_odd_head_size_is_refused(dim):
    with pytest.raises(ValueError, match=f"even head size, got dim = {dim}"):
        SinusoidalEmbeddings(dim)
