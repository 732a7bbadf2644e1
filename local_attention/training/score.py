"""Bits per byte of a text of any length, with all the context that the model can attend to."""

import math
from collections.abc import Iterable

import numpy as np

from local_attention.decoding import DecodingSession
from local_attention.training.evaluate import Score
from local_attention.transformer import LocalTransformer

CHUNK = 256  # bytes per call of the compiled graph


def score_stream(model: LocalTransformer, chunks: Iterable[np.ndarray]) -> Score:
    """Score a text that arrives in chunks, using the model's KV cache.

    The first byte is predicted from a newline. Where learned positions end, the context restarts from its newest half.

    Args:
        model: a causal ``LocalTransformer``.
        chunks: ``(n,)`` uint8 arrays.

    Returns:
        A :class:`Score`, whose sum is computed in float64.

    Raises:
        ValueError: the text is empty.
    """
    session = DecodingSession(model, prefill_chunk=CHUNK, prefill_threshold=1)
    nats, scored = 0.0, 0
    last_logits = session.feed([[ord("\n")]])[0]
    for chunk in chunks:
        next_logits = session.feed(chunk[None])[0]
        logits = np.concatenate([last_logits, next_logits[:-1]]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        nats += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(chunk)), chunk]).sum()
        scored += len(chunk)
        last_logits = next_logits[-1:]
    if not scored:
        raise ValueError("expected a text of at least one byte, got an empty one")
    return Score(nats / scored / math.log(2), scored)
