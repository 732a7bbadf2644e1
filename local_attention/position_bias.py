"""A bias of the scores that an MLP computes from the distance between query and key."""

import numpy as np
from mindspore import nn, ops

from local_attention.constants import shared_constant
from local_attention.mindspore_quirks import TypedCell
from local_attention.precision import cast


@shared_constant
def distances(count):
    """0 … count - 1 as a column, float32."""
    return np.arange(count, dtype=np.float32)[:, None]


@shared_constant
def distance_index(i, j, first):
    """``(i * j,)`` int32: how far query ``first + r`` is from each of the keys 0 … j - 1, row after row."""
    return abs(first + np.arange(i)[:, None] - np.arange(j)).astype(np.int32).reshape(-1)


class DynamicPositionBias(TypedCell):
    """A bias for each head and distance, ``MLP(|i - j|)``, with two hidden layers of SiLU.

    Wang et al. 2021, arXiv 2108.00154, section 3.4, there in two dimensions.

    Args:
        dim: channels of the hidden layers.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.mlp = nn.SequentialCell(nn.Dense(1, dim), nn.SiLU(), nn.Dense(dim, dim), nn.SiLU(), nn.Dense(dim, heads))

    def construct(self, i, j, first=None):
        """``(heads, i, j)``, the bias of ``i`` queries for ``j`` keys.

        The first query is at the position of key ``first``, by default ``j - i``: the last ones are then aligned.
        """
        if first is None:
            first = j - i
        farthest = max(first + i - 1, j - 1 - first)
        return self.gather(farthest + 1, distance_index(i, j, first)).reshape((-1, i, j))

    def gather(self, count, index):
        """The biases of the distances ``index: (m,)``, whole numbers below ``count``; ``(heads, m)``."""
        inputs = cast(distances(count), self.mlp[0].weight.dtype)
        return ops.gather(self.mlp(inputs).transpose(1, 0), index, 1)
