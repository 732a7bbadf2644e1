"""Which keys a query sees, and what is added to the scores so that it sees no others."""

from typing import NamedTuple

import numpy as np
from mindspore import ops

from local_attention.blocks import look_around
from local_attention.constants import shared_constant
from local_attention.precision import constant

# Added to a score, it leaves a weight of 0. A quarter of the least float32, so that two of them and a bias stay finite.
MASK_VALUE = float(np.finfo(np.float32).min / 4)


class MaskSpec(NamedTuple):
    """The options of :class:`LocalAttention` that decide which keys a query sees."""

    window_size: int
    causal: bool
    exact_windowsize: bool
    look_backward: int
    look_forward: int


def visible(query, key, *, length, window_size, causal, exact_windowsize, look_backward, look_forward):
    """Whether the query at position ``query`` sees the key at position ``key``: the definition of local attention.

    Args:
        query, key: integer arrays of positions that broadcast against each other.
        length: positions outside ``0 … length - 1`` are never seen.

    Returns:
        Boolean array of the broadcast shape.
    """
    query_window, key_window = query // window_size, key // window_size
    seen = (key >= 0) & (key < length)
    seen = seen & (key_window >= query_window - look_backward) & (key_window <= query_window + look_forward)
    if causal:
        seen &= key <= query
    if exact_windowsize:
        seen = seen & (query - key <= window_size * look_backward)
        seen = seen & (causal | (key - query <= window_size * look_forward))
    return seen


def to_additive_mask(seen):
    """Booleans to float32: 0 where ``seen``, ``MASK_VALUE`` elsewhere."""
    return np.where(seen, 0, MASK_VALUE).astype(np.float32)


@shared_constant
def window_mask(groups, length, block, back, ahead, spec, self_value, dtype):
    """The additive mask of all blocks of a sequence, ``(groups * blocks, block, span)``.

    Full size, because a broadcasting addition keeps 16 bytes of index table per output element in the graph.

    Args:
        groups: how often the mask of one sequence is repeated (batch times heads).
        length: real length of the sequence; the last block may reach beyond it.
        back, ahead: how many blocks a block of queries looks back and ahead.
        spec: a :class:`MaskSpec`.
        self_value: added to the score of a token for itself.
        dtype: float32 or float64.
    """
    blocks = -(-length // block)
    start = np.arange(blocks)[:, None, None] * block
    query = start + np.arange(block)[:, None]
    key = start + np.arange(-back * block, (ahead + 1) * block)
    seen = visible(query, key, length=length, **MaskSpec(*spec)._asdict())
    mask = to_additive_mask(seen) + np.float32(self_value) * (query == key)
    return constant(np.tile(mask, (groups, 1, 1)), dtype)


def key_mask(mask, groups, block, back, ahead):
    """A mask of keys as an additive mask of all blocks.

    Copies are made by Tile, the fastest: 67 MB of them take 5 to 10 ms on a CPU, by BroadcastTo 46 to 97.

    Args:
        mask: ``(b, n)``, 1.0 where a key may be seen, 0.0 elsewhere; row ``i`` holds for ``groups // b`` neighbouring
            groups.

    Returns:
        ``(groups * blocks, block, span)``.
    """
    b, n = mask.shape
    masked = (1 - mask) * MASK_VALUE
    if n % block:
        masked = ops.cat((masked, ops.zeros((b, -n % block), masked.dtype)), 1)
    masked = look_around(masked.reshape((b, -1, block, 1)), back, ahead)
    blocks, span = masked.shape[1], masked.shape[2]
    masked = ops.tile(masked.reshape((b, 1, blocks, 1, span)), (1, groups // b, 1, block, 1))
    return masked.reshape((groups * blocks, block, span))


@shared_constant
def band_index(length, block, back, ahead):
    """Where the scores of all blocks are in a matrix ``(n, n)`` of queries by keys, one after another, int32.

    Queries and keys beyond the ends, which are masked anyway, have the place of the nearest.
    """
    start = np.arange(0, length, block)[:, None, None]
    query = np.minimum(start + np.arange(block)[:, None], length - 1)
    key = np.clip(start + np.arange(-back * block, (ahead + 1) * block), 0, length - 1)
    return (query * length + key).astype(np.int32).reshape(-1)


def query_key_mask(attn_mask, groups, block, back, ahead, dtype):
    """A mask per query and key, ``(b, n, n)`` booleans, as an additive mask of all blocks, as :func:`key_mask`."""
    b, length, _ = attn_mask.shape
    index = band_index(length, block, back, ahead)
    masked = (1 - ops.gather(attn_mask.reshape((b, -1)), index, 1).astype(dtype)) * MASK_VALUE
    return ops.tile(masked.reshape((b, 1, -1)), (1, groups // b, 1)).reshape((-1, block, (back + 1 + ahead) * block))


def window_bias(attn_bias, groups, blocks, block, back, ahead):
    """``attn_bias: (heads, window, window span)`` to ``(groups * blocks, block, span)``; group ``g`` has head
    ``g % heads``.

    A block that is part of a window sees the part of the window's span that begins where the block does.
    """
    heads, window, _ = attn_bias.shape
    span = (back + 1 + ahead) * block
    parts = ()
    for start in range(0, window, block):
        parts = parts + (attn_bias[:, start : start + block, start : start + span],)
    attn_bias = ops.stack(parts, 1).reshape((1, heads, 1, -1))
    windows = -(-blocks * block // window)
    tiled = ops.tile(attn_bias, (groups // heads, 1, windows, 1)).reshape((groups, -1, block * span))
    if tiled.shape[1] > blocks:
        tiled = tiled[:, :blocks]
    return tiled.reshape((groups * blocks, block, span))


def sees_a_key(mask):
    """``(g, i, j)`` additive to ``(g, i, 1)``: 1.0 for a query that sees a key, else 0.0."""
    return (mask.max(-1, keepdims=True) > MASK_VALUE / 2).astype(mask.dtype)
