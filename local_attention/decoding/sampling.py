"""Sampling the next token."""

from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from local_attention.masks import MASK_VALUE


class SamplingRule(NamedTuple):
    """The distribution that :class:`Sampler` samples from; made by :func:`sampling_rule`."""

    inverse_temperature: np.ndarray  # (1, 1) float32
    token_bias: np.ndarray  # (1, vocabulary) float32, added to the logits: 0 for the tokens that may be sampled
    rank_bias: np.ndarray  # (1, vocabulary) float32, additive: 0 for the ranks that may be sampled
    top_p: np.ndarray  # (1, 1) float32


def sampling_rule(
    vocabulary: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_tokens: int | None = None,
) -> SamplingRule:
    """The distribution to sample from.

    Args:
        vocabulary: its size.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep only the ``top_k`` most likely tokens.
        top_p: keep the most likely tokens until the sum of their probabilities reaches ``top_p`` (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751); always at least one.
        num_tokens: sample among the first ``num_tokens`` tokens of the vocabulary only; None: among all.

    Returns:
        A :class:`SamplingRule`.

    Raises:
        ValueError: for a negative temperature, or a ``top_k`` or ``num_tokens`` below 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (num_tokens is not None and num_tokens < 1):
        raise ValueError(
            f"expected temperature >= 0, top_k >= 1 and num_tokens >= 1, got {temperature}, {top_k} and {num_tokens}"
        )
    if temperature == 0:
        top_k, temperature = 1, 1.0

    def only_first(count: int | None) -> np.ndarray:
        kept = np.arange(vocabulary)[None] < (vocabulary if count is None else count)
        return np.where(kept, 0, MASK_VALUE).astype(np.float32)

    return SamplingRule(
        # a larger factor would let logits overflow, a smaller one lift the bias of tokens that may not be sampled
        np.full((1, 1), 1 / min(max(temperature, 1e-30), 1e30), np.float32),
        only_first(num_tokens),
        only_first(top_k),
        np.full((1, 1), 1.0 if top_p is None else top_p, np.float32),
    )


class Sampler(nn.Cell):
    """Samples a token for each row of ``logits: (b, num_tokens)``, in the graph that computes them.

    The tokens are sorted by probability. The sampled one is the first at which the cumulative probability exceeds
    ``uniforms: (b, 1)``, float32 numbers from [0, 1), times the total probability of the kept tokens.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.softmax, self.cumsum, self.gather = ops.Softmax(-1), ops.CumSum(), ops.GatherD()

    def construct(self, logits, uniforms, inverse_temperature, token_bias, rank_bias, top_p):
        """The last four are a :class:`SamplingRule`. Returns ``(b,)`` int32."""
        logits, order = ops.topk(logits + token_bias, self.num_tokens)
        p = self.softmax(logits * inverse_temperature + rank_bias)
        after = self.cumsum(p, 1)
        before = after - p
        kept = (after * (before < top_p).astype(p.dtype)).max(1, keepdims=True)
        # the factor keeps rounding from reaching the first token that is not kept
        passed = (before <= uniforms * kept * (1 - 2.0**-20)).astype(p.dtype)
        rank = passed.sum(1, keepdims=True).astype(ms.int32) - 1
        return self.gather(order, 1, rank).reshape(-1)
