"""Attention of each token to the whole sequence."""

from local_attention.backends.fused import FusedAttention
from local_attention.backends.tiled import TiledAttention
from local_attention.local_attention import LocalAttention
from local_attention.mha import MultiHeadAttention
from local_attention.options import GlobalAttentionOptions, accepts


class WholeSequenceAttention(LocalAttention):
    """:class:`LocalAttention` with a single window, which is longer than any sequence."""

    backends = (FusedAttention, TiledAttention)


class GlobalAttention(MultiHeadAttention):
    """Multi-head attention in which each token sees the whole sequence: ``x: (b, n, dim) -> (b, n, dim)``.

    With ``causal``, a token sees itself and the tokens before. Time grows with ``n ** 2``, memory with ``n``: scores
    are computed for one block of queries after another, in the backward pass once more. As the
    ``global_attn_layer`` of a :class:`LocalTransformer` it is decoded with a KV cache as long as the context.

    It has no residual connection, and a norm only with ``prenorm``. The options are those of :class:`LocalMHA` that are
    not about windows; xPos is not among them, because its decay over a whole sequence leaves float32's range.

    The arguments are those of :class:`GlobalAttentionOptions`.

    Raises:
        ValueError: for an option outside its range; for ``scale`` with ``qk_rmsnorm``; for an odd ``dim_head`` with
            rotary embeddings.
    """

    attention_cell = WholeSequenceAttention

    @accepts(GlobalAttentionOptions)
    def __init__(self, options: GlobalAttentionOptions) -> None:
        super().__init__(options)

    def construct(self, x, mask=None):
        """Attend.

        Args:
            x: ``(b, n, dim)`` of any floating type.
            mask: ``(b, n)`` booleans, True where a token may be seen.

        Returns:
            ``(b, n, dim)``.

        Raises:
            ValueError: for another shape or type.
        """
        return self.attend_to_itself(x, mask, None)
