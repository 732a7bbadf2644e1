"""Generation with a KV cache: sequences are prefilled, then decoded token by token.

``DecodingSession`` knows which tokens were fed and where positions restart; ``KVCache`` holds the keys and values that
later tokens can still see; ``DecodeStep`` is the model's forward pass with that cache, and ``DecodeLoop`` decodes and
samples several tokens per call; ``generate_tokens`` continues a prompt.
"""

from local_attention.decoding.cache import KVCache, cache_length
from local_attention.decoding.generate import generate_tokens
from local_attention.decoding.kept import logits_with_cache, session_for
from local_attention.decoding.session import DecodingSession, Session, UncachedSession, decoding_cells

__all__ = [
    "DecodingSession",
    "KVCache",
    "Session",
    "UncachedSession",
    "cache_length",
    "decoding_cells",
    "generate_tokens",
    "logits_with_cache",
    "session_for",
]
