"""The sessions that a model keeps."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from local_attention.decoding.interface import DecodableModel
from local_attention.decoding.session import DecodingSession, Session, UncachedSession, can_be_decoded
from local_attention.tokens import as_integers

# How many sessions a model keeps, and of how large caches together; its last one it keeps in any case. Beside its
# cache, a session's graphs take some 50 MB for a model of 19 M parameters.
MAX_SESSIONS, MAX_BYTES = 4, 2**28


class KeptSessions(dict[int, DecodingSession]):
    """A model's sessions by batch size, the least recently used first. A copy of the model begins without any."""

    def __reduce__(self) -> tuple:
        return KeptSessions, ()


def kept_session(model: DecodableModel, batch: int) -> DecodingSession:
    """A model's :class:`DecodingSession`. The last ones are kept, because their graphs take seconds to compile.

    They are kept in the model's ``__dict__``, so that they live as long as the model.
    """
    kept = vars(model).setdefault("_decoding_sessions", KeptSessions())
    session = kept.pop(batch, None)
    if session is None or session.dtype != model.dtype:  # ``to_float`` came between
        session = DecodingSession(model, batch)
    kept[batch] = session
    while len(kept) > MAX_SESSIONS or (len(kept) > 1 and sum(s.nbytes for s in kept.values()) > MAX_BYTES):
        del kept[next(iter(kept))]
    return kept[batch]


def session_for(model: DecodableModel, batch: int) -> Session:
    """A :class:`DecodingSession`, or an :class:`UncachedSession`, with a warning, where global layers have no cells."""
    if can_be_decoded(model):
        return kept_session(model, batch)
    warnings.warn(
        "global_attn_layer has no method decoding_cell: each token computes the whole context again", stacklevel=3
    )
    return UncachedSession(model, batch)


class Cache(NamedTuple):
    """What a :class:`DecodingSession` knows of its sequences after ``length`` tokens."""

    length: int
    position: int
    newest: np.ndarray
    state: list[np.ndarray]


def logits_with_cache(model: DecodableModel, tokens: Any, cache: Cache | None) -> tuple[np.ndarray, Cache]:
    """The logits after each of ``tokens: (b, n)`` that ``cache`` does not hold yet, and a cache that holds all of them.

    Raises:
        ValueError: for a cache of another batch, or of as many tokens; and as :meth:`Session.feed`.
    """
    tokens = as_integers(tokens, "tokens: (b, n) integers", 2)
    session = kept_session(model, len(tokens))
    session.reset()
    length = 0
    if cache is not None:
        length = cache.length
        if len(cache.newest) != len(tokens) or length >= tokens.shape[1]:
            raise ValueError(
                f"expected tokens ({len(cache.newest)}, n) with n > {length} for this cache, got {tokens.shape}"
            )
        session.position, session.newest = cache.position, cache.newest
        session.restore(cache.state)
    logits = session.feed(tokens[:, length:])
    state = [parameter.asnumpy().copy() for parameter in session.state]
    return logits, Cache(tokens.shape[1], session.position, session.newest, state)
