import numpy as np
import pytest
from einops import rearrange
from mindspore import nn

from local_attention.blocks import block_layout, look_around, split_into_blocks
from tests.local_attention import reference
from tests.local_attention.cells import both_modes, tensor, value_and_gradients


@pytest.mark.parametrize(
    ("window_size", "exact_windowsize", "block"),
    [
        (1, True, 1),
        (100, True, 100),  # smaller than the smallest block
        (128, True, 128),
        (256, True, 128),
        (300, True, 150),
        (257, True, 257),  # prime
        (256, False, 256),  # its queries all see the same
    ],
)
def test_blocks_are_the_smallest_divisor_of_an_exact_window_from_128_on(window_size, exact_windowsize, block):
    assert block_layout(window_size, exact_windowsize, 2, 1) == (block, 2 * window_size // block, window_size // block)


@pytest.mark.parametrize("length", [1, 3, 4, 8, 10])
def test_a_sequence_is_split_into_blocks_and_filled_up_with_zeros(length, rng):
    x = rng.standard_normal((2, length, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (0, -length % 4), (0, 0)))
    np.testing.assert_array_equal(
        split_into_blocks(tensor(x), 4).asnumpy(), rearrange(padded, "g (w b) d -> g w b d", b=4)
    )


def surroundings(x, back, ahead):
    """``(g, blocks, block, d)`` to the blocks around each, with zeros beyond the ends."""
    groups, blocks, block, d = x.shape
    rows = np.zeros((groups, blocks, back + 1 + ahead, block, d))
    for w in range(blocks):
        for t in range(max(w - back, 0), min(w + ahead + 1, blocks)):
            rows[:, w, t - w + back] = x[:, t]
    return rearrange(rows, "g w s b d -> g w (s b) d")


@pytest.mark.parametrize(("back", "ahead"), [(0, 0), (1, 0), (0, 1), (2, 1), (4, 5)])
def test_look_around_gives_each_block_its_neighbours_and_zeros_beyond_the_ends(back, ahead, rng):
    x = rng.standard_normal((2, 3, 2, 4)).astype(np.float32)
    np.testing.assert_array_equal(look_around(tensor(x), back, ahead).asnumpy(), surroundings(x, back, ahead))


class LookAround(nn.Cell):
    def construct(self, x):
        return look_around(x, 2, 1)


@both_modes
def test_look_around_and_its_gradient(mode, rng):
    x = rng.standard_normal((2, 3, 2, 2)).astype(np.float32)
    cotangent = rng.standard_normal((2, 3, 8, 2))
    value, (gradient,) = value_and_gradients(LookAround(), [x], cotangent)
    np.testing.assert_array_equal(value, surroundings(x, 2, 1))
    (wanted,) = reference.numerical_gradients(lambda x: surroundings(x, 2, 1), [x], cotangent)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
