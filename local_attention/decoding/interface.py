"""What decoding uses of a model; :class:`LocalTransformer` has it."""

from typing import Any, Protocol


class DecodableModel(Protocol):
    """A causal language model whose layers can be decoded with a KV cache."""

    num_tokens: int | None  # size of the vocabulary
    max_seq_len: int  # how many learned positions there are
    use_abs_pos_emb: bool  # if there are any
    dtype: Any  # the floating type that it computes in
    ngram_emb: Any  # None, or a cell whose ``context`` is the number of previous tokens that it needs
    layers: Any  # each a ``Layer``

    def embed_next(self, tokens: Any, previous: Any, positions: Any) -> Any:
        """``tokens: (b, n)`` at ``positions: (n,)`` to ``(b, n, dim)``; ``previous``: 1 + the tokens before, or 0."""

    def distance_bias(self, distances: Any, count: int) -> Any:
        """The bias of the scores for ``distances: (m,)`` below ``count``, ``(heads, m)``; or None."""

    def run_layers(self, layers: Any, x: Any, inputs: Any, inputs_of_layers: Any) -> Any:
        """``x: (b, n, dim)`` through ``layers``, which take some of ``inputs``; returns the same shape."""

    def logits(self, hidden: Any) -> Any:
        """``(b, n, dim) -> (b, n, num_tokens)``."""

    def get_parameters(self) -> Any: ...

    def cells_and_names(self) -> Any: ...
