"""Small causal models, and sequences for them, that several test modules share."""

import numpy as np
import pytest
from mindspore import Parameter, nn, ops

from local_attention import LocalTransformer
from local_attention.kernels import library
from tests.local_attention.cells import randomise, tensor

NUM_TOKENS = 11
SIZES = dict(
    num_tokens=NUM_TOKENS, max_seq_len=32, dim=6, depth=1, local_attn_window_size=3, dim_head=4, heads=2, ff_mult=2
)
NGRAMS = dict(max_ngram=4, ngram_buckets=97, ngram_dim=3)

# The operators in C++ are optional: nothing but the speed of decoding on a CPU depends on them.
needs_kernels = pytest.mark.skipif(library() is None, reason="pip found no C++ compiler to build the operators")
with_and_without_kernels = pytest.mark.parametrize(
    "use_kernels", [pytest.param(True, marks=needs_kernels, id="kernels"), pytest.param(False, id="operators")]
)


def transformer(seed=0, **options):
    """A small causal LocalTransformer with parameters that matter."""
    model = LocalTransformer(**SIZES | options)
    randomise(model, seed)
    return model


def sequences(*shape, seed=0):
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, NUM_TOKENS, shape)


def feed_in_pieces(session, x, lengths):
    """The logits after each token of ``x: (b, n)``, fed in pieces of these lengths."""
    ends = np.cumsum(lengths)
    assert ends[-1] == x.shape[1]
    return np.concatenate([session.feed(piece) for piece in np.split(x, ends[:-1], 1)], 1)


class Mean(nn.Cell):
    """A global layer: the mean of the tokens so far, projected."""

    def __init__(self, dim):
        super().__init__()
        self.to_out = nn.Dense(dim, dim)

    def construct(self, x):
        n = x.shape[1]
        return self.to_out(ops.matmul(tensor(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]), x))


class DecodableMean(Mean):
    """:class:`Mean` with a cell that decodes it."""

    def decoding_cell(self, batch):
        return MeanStep(self, batch)


class MeanStep(nn.Cell):
    """:class:`Mean`, token by token."""

    def __init__(self, mean, batch):
        super().__init__(auto_prefix=False)
        self.mean = mean
        shape = (batch, 1, mean.to_out.in_channels)
        self.sum = Parameter(tensor(np.zeros(shape)), name="sum", requires_grad=False)

    def construct(self, x, position):
        total = x + self.sum * (position > 0).astype(x.dtype)
        ops.assign(self.sum, total)
        return self.mean.to_out(total / (position + 1).astype(x.dtype))
