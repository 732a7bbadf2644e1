"""Generation with a KV cache: sequences are prefilled, then decoded token by token.

A session knows which tokens it was fed and where positions restart; a :class:`KVCache` for each kind of layer holds the
keys and values that later tokens can still see; :func:`generate_tokens` continues a prompt.
"""

from local_attention.decoding.cache import KVCache, cache_length, caches_of
from local_attention.decoding.generate import generate_tokens
from local_attention.decoding.kept import logits_with_cache, session_for
from local_attention.decoding.session import DecodingSession, Session, UncachedSession, decoding_cells

__all__ = [
    "DecodingSession",
    "KVCache",
    "Session",
    "UncachedSession",
    "cache_length",
    "caches_of",
    "decoding_cells",
    "generate_tokens",
    "logits_with_cache",
    "session_for",
]
