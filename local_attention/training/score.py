"""Bits per byte of a text of any length, each byte predicted from all before it that the model can still see."""

import math

import numpy as np

from local_attention.decoding import DecodingSession
from local_attention.training.evaluate import Score

CHUNK = 256  # bytes a call of the compiled graph


def score_stream(model, pieces):
    """Score a text that comes in pieces, through the key/value cache of the model.

    The first byte is predicted from a newline. With learned positions the context starts again from its newest half
    where they run out.

    Args:
        model: a causal ``LocalTransformer``.
        pieces: ``(n,)`` uint8 arrays.

    Returns:
        A :class:`Score`, its sum taken in float64.

    Raises:
        ValueError: for a text of no bytes.
    """
    decoder = DecodingSession(model, prefill_chunk=CHUNK, prefill_threshold=1)
    nats, scored = 0.0, 0
    before = decoder.feed([[ord("\n")]])[0]
    for piece in pieces:
        after = decoder.feed(piece[None])[0]
        logits = np.concatenate([before, after[:-1]]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        nats += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(piece)), piece]).sum()
        scored += len(piece)
        before = after[-1:]
    if not scored:
        raise ValueError("expected a text of at least one byte, got none")
    return Score(nats / scored / math.log(2), scored)
