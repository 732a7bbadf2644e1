"""Generation with a key/value cache."""

from local_attention.decoding.session import (
    DecodingSession,
    UncachedSession,
    cache_length,
    context_of,
    decoder_of,
    generate_tokens,
)

__all__ = ["DecodingSession", "UncachedSession", "cache_length", "context_of", "decoder_of", "generate_tokens"]
