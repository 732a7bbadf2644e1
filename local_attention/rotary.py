"""Rotary position embeddings, with the halves of a head as pairs, and their xPos decay.

Su et al. 2021, arXiv 2104.09864, section 3.2; Sun et al. 2022, arXiv 2212.10554, section 3.2. The library itself uses
:func:`apply_rotary`; :func:`apply_rotary_pos_emb` and calls of :class:`SinusoidalEmbeddings` are the interface of the
original.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from local_attention.constants import shared_constant
from local_attention.mindspore_quirks import TypedCell
from local_attention.precision import cast, constant


def rotary_angles(positions, dim, theta=10000.0):
    """Angles in radians, ``(n, dim)`` float64: ``position * theta ** (-2 (c mod dim/2) / dim)`` for channel ``c``.

    In float64, because a float32 product of position and frequency is wrong by whole turns on long sequences.
    """
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([angles, angles], axis=-1)


def xpos_decay(positions, dim, scale_base):
    """``(n, dim)`` float64: channel ``c`` at a position is ``((2c' + 0.4 dim) / 1.4 dim) ** (position / scale_base)``.

    With ``c' = c mod dim/2``. Queries are multiplied by it, keys divided: a score then decays with the distance.
    """
    rate = (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
    decay = rate ** (np.asarray(positions, np.float64)[:, None] / scale_base)
    return np.concatenate([decay, decay], axis=-1)


@shared_constant
def rotary_table(groups, length, dim, theta, scale, dtype):
    """``scale`` times cosine and sine of the angles of positions 0 … length - 1, each ``(groups * length, dim)``."""
    angles = np.tile(rotary_angles(np.arange(length), dim, theta), (groups, 1))
    return constant(scale * np.cos(angles), dtype), constant(scale * np.sin(angles), dtype)


@shared_constant
def decay_table(groups, first, length, middle, dim, scale_base, sign, dtype):
    """``(groups, length, dim)``: the decay to the power ``sign`` at positions from ``first`` on, 1 at ``middle``."""
    decay = xpos_decay(sign * (np.arange(first, first + length) - middle), dim, scale_base)
    if max(decay.max(), 1 / decay.min()) > 1e30:
        raise ValueError(
            f"expected a larger xpos_scale_base, got {scale_base}: its decay over {length} tokens overflows"
        )
    return constant(np.tile(decay, (groups, 1, 1)), dtype)


@shared_constant
def half_rotation(dim, dtype):
    """``(dim, dim)``: ``[x1, x2]`` times it is ``[-x2, x1]``."""
    half = np.eye(dim // 2)
    zero = np.zeros_like(half)
    return constant(np.block([[zero, half], [-half, zero]]), dtype)


# Up to this many rows, as in decoding, BatchMatMul is faster: 5 µs for 64 rows of 64 channels, MatMul takes 36.
FEW_ROWS = 256
_matmul, _batch_matmul = ops.MatMul(), ops.BatchMatMul()


def apply_rotary(x, cos, sin):
    """Rotate ``x: (..., d)`` by angles whose cosines and sines are given for each of its rows, ``(rows, d)``."""
    rows = x.reshape((-1, x.shape[-1]))
    return (rows * cos + _rotate_half(rows) * sin).reshape(x.shape)


def _rotate_half(rows):
    """``[x1, x2] -> [-x2, x1]`` along the channels of ``(rows, d)``; as a product 2.9 ms, as slices 4.0."""
    count, d = rows.shape
    matrix = half_rotation(d, rows.dtype)
    if count <= FEW_ROWS:
        return _batch_matmul(rows.reshape((1, count, d)), matrix.reshape((1, d, d))).reshape((count, d))
    return _matmul(rows, matrix)


@shared_constant
def embedding(length, dim, theta, scale_base):
    """What :class:`SinusoidalEmbeddings` returns for ``length`` positions."""
    angles = rotary_angles(np.arange(length), dim, theta).astype(np.float32)
    if scale_base is None:
        return angles, np.ones(1, np.float32)
    return angles, xpos_decay(np.arange(length) - length // 2, dim, scale_base).astype(np.float32)


class SinusoidalEmbeddings(TypedCell):
    """Rotary embeddings of heads of ``dim`` channels; scores then depend on the distance ``i - j`` alone.

    Called, it gives angles and decay for :func:`apply_rotary_pos_emb`, as the original does. :class:`LocalAttention`
    uses :meth:`tables`, :meth:`decay_queries` and :meth:`decay_keys` instead: rotation by absolute position, once,
    before keys are looked around; the decay relative to the block of queries, as it grows beyond float32 with position.

    Args:
        dim: head size, even.
        scale_base: tokens over which the decay of xPos reaches its rate; required with ``use_xpos``.
        use_xpos: whether scores decay with the distance.
        theta: base of the frequencies.

    Raises:
        ValueError: for an odd ``dim``; for ``use_xpos`` without a positive ``scale_base``.
    """

    def __init__(self, dim: int, scale_base: float | None = None, use_xpos: bool = False, theta: float = 10000) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"rotary embeddings need an even head size, got dim = {dim}")
        if use_xpos and (scale_base is None or scale_base <= 0):
            raise ValueError(f"expected scale_base > 0 with use_xpos, got {scale_base}")
        self.dim, self.theta = dim, theta
        self.use_xpos, self.scale_base = use_xpos, scale_base if use_xpos else None

    def construct(self, x):
        """Angles ``(n, dim)`` of positions 0 … n - 1, and their decay ``(n, dim)``, without xPos ``(1,)``.

        ``x: (..., n, d)``; only its length counts.
        """
        return embedding(x.shape[-2], self.dim, self.theta, self.scale_base)

    def tables(self, groups, length, scale, dtype=ms.float32):
        """Cosines and sines for :func:`apply_rotary`, times the Python number ``scale``, which costs nothing."""
        return rotary_table(groups, length, self.dim, self.theta, scale, dtype)

    def decay_queries(self, q, middle):
        """Apply the decay to ``q: (blocks, block, d)``, with positions relative to the first query of the block."""
        return q * decay_table(q.shape[0], 0, q.shape[1], middle, self.dim, self.scale_base, 1, q.dtype)

    def decay_keys(self, k, first, middle):
        """Apply the inverse decay to ``k: (blocks, span, d)``, whose first key is at position ``first``."""
        return k * decay_table(k.shape[0], first, k.shape[1], middle, self.dim, self.scale_base, -1, k.dtype)


def apply_rotary_pos_emb(
    q: ms.Tensor, k: ms.Tensor, freqs: ms.Tensor, scale: ms.Tensor | float = 1
) -> tuple[ms.Tensor, ms.Tensor]:
    """Rotate queries and keys, and let their scores decay.

    Args:
        q: ``(..., i, d)``, the last ``i`` positions.
        k: ``(..., n, d)``.
        freqs: ``(n, d)``, angles in radians.
        scale: ``(n, d)`` decay, or a tensor of one element or a number for none.

    Returns:
        ``q`` and ``k``, rotated; ``q`` times and ``k`` divided by the decay.
    """
    first = freqs.shape[0] - q.shape[-2]
    if isinstance(scale, ms.Tensor):
        scale = cast(scale, q.dtype)
    q_scale = scale[first:] if isinstance(scale, ms.Tensor) and scale.ndim == 2 else scale
    q = _rotate(q, freqs[first:]) * q_scale
    return q, _rotate(k, freqs) / scale


def _rotate(x, angles):
    """``x: (..., n, d)`` by ``angles: (n, d)``, the same for all leading axes."""
    count = x.size // angles.size
    cos, sin = cast(ops.cos(angles), x.dtype), cast(ops.sin(angles), x.dtype)
    return apply_rotary(x, ops.tile(cos, (count, 1)), ops.tile(sin, (count, 1)))
