"""Cutting a sequence into blocks of queries, each with the blocks of keys around it."""

from mindspore import ops
from mindspore.ops import constexpr

# Blocks smaller than the window waste fewer scores: with a window of 256, blocks of 128 need 384 scores per query, not
# 512. Even smaller ones gain nothing, as the products become too small to be fast.
MIN_BLOCK = 128


@constexpr
def block_layout(window_size, exact_windowsize, look_backward, look_forward):
    """``(block, back, ahead)``: the length of a block, and how many blocks it looks back and ahead.

    A block is the smallest divisor of the window that is at least ``MIN_BLOCK``, else the window. Without
    ``exact_windowsize`` all queries of a window see the same windows, so the block is the window.
    """
    divisors = [b for b in range(MIN_BLOCK, window_size + 1) if window_size % b == 0]
    block = divisors[0] if exact_windowsize and divisors else window_size
    return block, look_backward * window_size // block, look_forward * window_size // block


def split_into_blocks(x, block):
    """``(g, n, d) -> (g, blocks, block, d)``, padded with zeros on the right."""
    groups, length, d = x.shape
    if length % block:
        x = ops.cat((x, ops.zeros((groups, -length % block, d), x.dtype)), 1)
    return x.reshape((groups, -1, block, d))


def look_around(x, back, ahead):
    """Give each block the blocks around it: ``(g, blocks, block, d) -> (g, blocks, (back + 1 + ahead) * block, d)``.

    Beyond the ends of the sequence there are zeros: concatenating them takes 0.5 ms, ``ops.pad`` 9.3.
    """
    groups, blocks, block, d = x.shape
    padded = (x,)
    if back > 0:
        padded = (ops.zeros((groups, back, block, d), x.dtype),) + padded
    if ahead > 0:
        padded = padded + (ops.zeros((groups, ahead, block, d), x.dtype),)
    padded = ops.cat(padded, 1)
    shifted = ()
    for shift in range(back + 1 + ahead):
        shifted = shifted + (padded[:, shift : shift + blocks],)
    return ops.cat(shifted, 2)
