import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import nn

from local_attention.rotary import RotaryEmbedding, rotary_angles, rotary_table
from tests.local_attention import reference
from tests.local_attention.cells import both_modes, examples, tensor, value_and_gradients


class Scaled(nn.Cell):
    """A rotary embedding with a fixed scale, which has to be a Python number."""

    def __init__(self, rotary, scale):
        super().__init__()
        self.rotary, self.scale = rotary, scale

    def construct(self, x):
        return self.rotary(x, self.scale)


@both_modes
def test_rotation_and_its_gradient_are_those_of_complex_numbers(mode, rng):
    x, cotangent = rng.standard_normal((2, 3, 7, 6))
    value, (gradient,) = value_and_gradients(Scaled(RotaryEmbedding(6), 0.3), [x], cotangent)
    np.testing.assert_allclose(value, 0.3 * reference.rotate(x), atol=1e-5)
    (wanted,) = reference.numerical_gradients(lambda x: 0.3 * reference.rotate(x), [x], cotangent)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)


@given(n=st.integers(1, 9), pairs=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 99))
@examples(15)
def test_rotation_is_that_of_complex_numbers_for_any_size(n, pairs, groups, seed):
    x = np.random.default_rng(seed).standard_normal((groups, n, 2 * pairs))
    rotated = RotaryEmbedding(2 * pairs)(tensor(x), 1.0).asnumpy()
    np.testing.assert_allclose(rotated, reference.rotate(x), atol=1e-5)


@given(i=st.integers(0, 500), j=st.integers(0, 500), shift=st.integers(0, 10**6), seed=st.integers(0, 99))
@examples(50)
def test_the_product_of_rotated_vectors_depends_on_their_distance_alone(i, j, shift, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 8))
    rotary = RotaryEmbedding(8)

    def score(i, j):
        angles = rotary_angles([i, j], 8)
        rotated = rotary.rotate(tensor([q, k]), tensor(np.cos(angles)), tensor(np.sin(angles))).asnumpy()
        return rotated[0] @ rotated[1]

    assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-5


def test_the_table_is_exact_at_far_positions():
    length = 200_000  # there, a float32 product of position and frequency is wrong by 0.01
    cos, sin = (table.asnumpy() for table in rotary_table(1, length, 4, 1.0))
    unit = reference.rotate(np.tile([1.0, 1.0, 0.0, 0.0], (length, 1)))  # cos and sin of both frequencies
    np.testing.assert_allclose(np.concatenate([cos[:, :2], sin[:, :2]], -1), unit, atol=1e-7)


def test_the_table_of_the_same_arguments_is_one_pair_of_tensors():
    first, second = rotary_table(2, 5, 4, 1.0), rotary_table(2, 5, 4, 1.0)
    assert all(isinstance(a, ms.Tensor) and a is b for a, b in zip(first, second, strict=True))
    assert rotary_table(2, 5, 4, 2.0)[0] is not first[0]


@pytest.mark.parametrize("dim", [1, 7])
def test_an_odd_head_size_is_refused(dim):
    with pytest.raises(ValueError, match=f"even head size, got dim = {dim}"):
        RotaryEmbedding(dim)
