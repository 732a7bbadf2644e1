"""What decoding uses of a model; :class:`LocalTransformer` has it."""

from typing import Any, Protocol


class DecodableModel(Protocol):
    """A causal language model whose layers can be decoded with a KV cache.

    Attributes:
        num_tokens: size of the vocabulary.
        max_seq_len, use_abs_pos_emb: how many learned absolute positions there are, if there are any.
        ngram_emb: None, or an embedding of n-grams, whose ``context`` is the number of previous tokens that it needs.
        layers: each a ``Layer``, with ``attention`` (a ``LocalMHA``), ``feed_forward`` and ``global_attention``; its
            ``with_branches`` gives one around other cells.
    """

    num_tokens: int | None
    max_seq_len: int
    use_abs_pos_emb: bool
    ngram_emb: Any
    layers: Any

    def embed_next(self, tokens: Any, previous: Any, positions: Any) -> Any:
        """``tokens: (b, n)`` at ``positions: (n,)`` to ``(b, n, dim)``; ``previous``: 1 + the tokens before, or 0."""

    def distance_bias(self, distances: Any, count: int) -> Any:
        """The bias of the scores for ``distances: (m,)`` below ``count``, ``(heads, m)``; or None."""

    def run_layers(self, layers: Any, x: Any, attention_inputs: Any, global_inputs: Any) -> Any:
        """``x: (b, n, dim)`` through ``layers``, returns the same shape."""

    def logits(self, hidden: Any) -> Any:
        """``(b, n, dim) -> (b, n, num_tokens)``."""

    def cells_and_names(self) -> Any: ...

    def get_parameters(self) -> Any: ...
