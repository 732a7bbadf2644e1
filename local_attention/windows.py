"""Which keys a query sees, and how a sequence is cut into blocks so that it looks at little else."""

import numpy as np
from mindspore import ops
from mindspore.ops import constexpr

from local_attention.constants import shared_constant

# Blocks finer than the window waste fewer scores: with a window of 256, blocks of 128 need 384 scores a query, not 512.
# Finer still, the products become too small to be fast.
FINEST_BLOCK = 128


def block_size(window_size, exact_windowsize):
    """Length of the query blocks: the smallest divisor of the window that is at least FINEST_BLOCK, else the window.

    Without ``exact_windowsize`` all queries of a window see the same windows, so the block is the window itself.
    """
    divisors = [b for b in range(FINEST_BLOCK, window_size + 1) if window_size % b == 0]
    return divisors[0] if exact_windowsize and divisors else window_size


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


@constexpr
def window_layout(window_size, causal, exact_windowsize, look_backward, look_forward):
    """``(block, before, after, rule)``: length of the query blocks, how many blocks they look back and ahead, and the
    keyword arguments of :func:`visible` without ``length``, as a tuple of pairs."""
    block = block_size(window_size, exact_windowsize)
    rule = (
        ("window_size", window_size),
        ("causal", causal),
        ("exact_windowsize", exact_windowsize),
        ("look_backward", look_backward),
        ("look_forward", look_forward),
    )
    return block, look_backward * window_size // block, look_forward * window_size // block, rule


@shared_constant
def additive_mask(groups, length, block, before, after, rule, itself):
    """``(groups * blocks, block, span)`` float32: 0 where a query sees a key, hugely negative elsewhere.

    Full size, because a broadcasting addition keeps 16 bytes of index table an output element in the graph.

    Args:
        groups: how often the mask of one sequence is repeated (batch times heads).
        length: real length of the sequence; the last block may reach beyond it.
        before, after: how many blocks a block of queries looks back and ahead.
        rule: see :func:`window_layout`.
        itself: what is added where a token meets itself.
    """
    blocks = -(-length // block)
    start = np.arange(blocks)[:, None, None] * block
    query = start + np.arange(block)[:, None]
    key = start + np.arange(-before * block, (after + 1) * block)
    mask = hide(visible(query, key, length=length, **dict(rule))) + np.float32(itself) * (query == key)
    return np.tile(mask.astype(np.float32), (groups, 1, 1))


# Added to a score, it leaves a weight of 0; two of them and a bias make no infinity.
MASK_VALUE = float(np.finfo(np.float32).min / 4)


def hide(seen):
    """What to add to scores, float32: 0 where ``seen``, ``MASK_VALUE`` elsewhere."""
    return np.where(seen, 0, MASK_VALUE).astype(np.float32)


def look_around(x, before, after):
    """Give each block the blocks around it: ``(g, blocks, block, d) -> (g, blocks, (before + 1 + after) * block, d)``.

    Beyond the ends of the sequence there are zeros: concatenating them takes 0.5 ms, ``ops.pad`` 9.3.
    """
    groups, blocks, block, d = x.shape
    padded = (x,)
    if before > 0:
        padded = (ops.zeros((groups, before, block, d), x.dtype),) + padded
    if after > 0:
        padded = padded + (ops.zeros((groups, after, block, d), x.dtype),)
    padded = ops.cat(padded, 1)
    shifted = ()
    for shift in range(before + 1 + after):
        shifted = shifted + (padded[:, shift : shift + blocks],)
    return ops.cat(shifted, 2)
