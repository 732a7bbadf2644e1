"""Drawing the next token."""

from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from local_attention.masks import MASK_VALUE


class SamplingRule(NamedTuple):
    """What :class:`Sampler` needs beside logits and random numbers; made by :func:`sampling_rule`."""

    inverse_temperature: np.ndarray  # (1, 1) float32
    rank_bias: np.ndarray  # (1, num_tokens) float32, 0 for as many of the likeliest as may be drawn
    top_p: np.ndarray  # (1, 1) float32


def sampling_rule(num_tokens, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from.

    Args:
        num_tokens: size of the vocabulary.
        temperature: divides the logits; 0 puts all weight on the largest.
        top_k: keep only the ``top_k`` most likely tokens.
        top_p: keep the most likely tokens until their sum reaches ``top_p`` (nucleus sampling, Holtzman et al. 2020,
            arXiv 1904.09751); always at least one.

    Returns:
        A :class:`SamplingRule`.

    Raises:
        ValueError: for a negative temperature or a ``top_k`` below 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"expected temperature >= 0 and top_k >= 1, got {temperature} and {top_k}")
    if temperature == 0:
        top_k, temperature = 1, 1.0
    ranks = np.arange(num_tokens)[None]
    kept = ranks < (num_tokens if top_k is None else top_k)
    return SamplingRule(
        np.full((1, 1), 1 / max(temperature, 1e-30), np.float32),  # larger, the divided logits would overflow
        np.where(kept, 0, MASK_VALUE).astype(np.float32),
        np.full((1, 1), 1.0 if top_p is None else top_p, np.float32),
    )


class Sampler(nn.Cell):
    """Draws a token for each row of ``logits: (b, num_tokens)``, in the graph that computes them.

    Tokens are ordered from the likeliest on; the one is drawn at which the running sum of their probabilities passes
    ``uniforms: (b, 1)``, float32 numbers from [0, 1), times the sum of those that are kept.
    """

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens = num_tokens
        self.softmax, self.running_sum, self.gather = ops.Softmax(-1), ops.CumSum(), ops.GatherD()

    def construct(self, logits, uniforms, inverse_temperature, rank_bias, top_p):
        """The last three are a :class:`SamplingRule`. Returns ``(b,)`` int32."""
        logits, order = ops.topk(logits, self.num_tokens)
        p = self.softmax(logits * inverse_temperature + rank_bias)
        after = self.running_sum(p, 1)
        before = after - p
        kept = (after * (before < top_p).astype(p.dtype)).max(1, keepdims=True)
        # never the first token beyond those kept, although a product with a number just below 1 may be rounded up
        passed = (before <= uniforms * kept * (1 - 2.0**-20)).astype(p.dtype)
        rank = passed.sum(1, keepdims=True).astype(ms.int32) - 1
        return self.gather(order, 1, rank).reshape(-1)
