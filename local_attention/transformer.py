"""Multi-head local attention, and the transformer built of it."""

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal
from mindspore.ops import constexpr

from local_attention.layers import CrossEntropy, FeedForward, LayerNorm, dense
from local_attention.local_attention import LocalAttention
from local_attention.rearrange import Rearrange


class LocalMHA(nn.Cell):
    """Multi-head attention within windows, of any length: ``x: (b, n, dim) -> (b, n, dim)``.

    Args:
        dim: channels of the input.
        window_size: tokens in a window.
        dim_head: channels of a head.
        heads: number of heads.
        causal: a query sees no later key.
        prenorm: LayerNorm before the projections.
        exact_windowsize: see :class:`LocalAttention`; True unless given.
        local_attention_kwargs: further arguments of :class:`LocalAttention`, such as ``look_backward``.

    Raises:
        ValueError: for sizes that are no positive numbers, and as :class:`LocalAttention`.
    """

    def __init__(
        self,
        *,
        dim,
        window_size,
        dim_head=64,
        heads=8,
        causal=False,
        prenorm=False,
        exact_windowsize=None,
        **local_attention_kwargs,
    ):
        super().__init__()
        require_positive(dim=dim, dim_head=dim_head, heads=heads)
        self.heads, self.dim_head = heads, dim_head
        inner = heads * dim_head
        self.norm = LayerNorm(dim) if prenorm else None
        self.to_q, self.to_k, self.to_v = dense(dim, inner), dense(dim, inner), dense(dim, inner)
        self.to_out = dense(inner, dim)
        self.split_heads = Rearrange("b n (h d) -> b h n d", h=heads)
        self.join_heads = Rearrange("b h n d -> (b n) (h d)")
        self.attention = LocalAttention(
            window_size,
            causal,
            dim=dim_head,
            autopad=True,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize,
            **local_attention_kwargs,
        )

    def construct(self, x):
        """``x: (b, n, dim)`` float32, returns ``(b, n, dim)``."""
        b, n, dim = x.shape
        q, k, v = self.project(x.reshape((b * n, dim)))
        q, k, v = [self.split_heads(t.reshape((b, n, -1))) for t in (q, k, v)]
        return self.to_out(self.join_heads(self.attention(q, k, v))).reshape((b, n, dim))

    def project(self, x):
        """Queries, keys and values of all heads, each ``(rows, h d)``, of ``x: (rows, dim)``."""
        if self.norm is None:
            return self.to_q(x), self.to_k(x), self.to_v(x)
        return self.norm(x, (self.to_q.weight, self.to_k.weight, self.to_v.weight))


class Layer(nn.Cell):
    """Attention and feed-forward, each with its residual connection."""

    def __init__(self, attention, feed_forward):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def construct(self, x):
        """``x: (b, n, dim)``."""
        x = x + self.attention(x)
        return x + self.feed_forward(x.reshape((-1, x.shape[-1]))).reshape(x.shape)


class LocalTransformer(nn.Cell):
    """A language model whose layers attend within windows: tokens ``(b, n)`` to logits ``(b, n, num_tokens)``.

    Args:
        num_tokens: size of the vocabulary; None: no embedding and no logits, ``(b, n, dim)`` in and out.
        max_seq_len: longest sequence that learned absolute positions allow.
        dim: channels.
        depth: layers.
        causal: a token sees no later one.
        local_attn_window_size: tokens in a window.
        dim_head: channels of a head.
        heads: number of heads.
        ff_mult: see :class:`FeedForward`.
        ignore_index: labels of this value are left out of the loss.
        use_abs_pos_emb: learned absolute positions. False: rotary ones only, and no limit on the length.
        mha_kwargs: further arguments of :class:`LocalMHA` and :class:`LocalAttention`, such as ``look_backward``.

    Raises:
        ValueError: for sizes that are no positive numbers, and as :class:`LocalAttention`.
    """

    def __init__(
        self,
        *,
        num_tokens,
        max_seq_len,
        dim,
        depth,
        causal=True,
        local_attn_window_size=512,
        dim_head=64,
        heads=8,
        ff_mult=4,
        ignore_index=-1,
        use_abs_pos_emb=True,
        **mha_kwargs,
    ):
        super().__init__()
        require_positive(max_seq_len=max_seq_len, dim=dim, depth=depth, ff_mult=ff_mult)
        self.num_tokens, self.max_seq_len, self.dim, self.ignore_index = num_tokens, max_seq_len, dim, ignore_index
        self.use_abs_pos_emb = use_abs_pos_emb
        self.layers = nn.CellList(
            [
                Layer(
                    LocalMHA(
                        dim=dim,
                        window_size=local_attn_window_size,
                        dim_head=dim_head,
                        heads=heads,
                        causal=causal,
                        prenorm=True,
                        **mha_kwargs,
                    ),
                    FeedForward(dim, ff_mult),
                )
                for _ in range(depth)
            ]
        )
        if num_tokens is not None:
            require_positive(num_tokens=num_tokens)
            self.token_emb = nn.Embedding(num_tokens, dim, embedding_table=Normal(0.02))
            if use_abs_pos_emb:
                self.pos_emb = nn.Embedding(max_seq_len, dim, embedding_table=Normal(0.02))
            self.norm = LayerNorm(dim)
            self.to_logits = dense(dim, num_tokens)
            self.cross_entropy = CrossEntropy()

    def construct(self, x, return_loss=False):
        """Logits or loss.

        Args:
            x: ``(b, n)`` int32 tokens; ``(b, n, dim)`` float32 with ``num_tokens=None``.
            return_loss: take ``(b, n + 1)`` tokens and return the mean cross-entropy of each token given those before.

        Returns:
            ``(b, n, num_tokens)``; with ``return_loss`` a scalar in nats; with ``num_tokens=None`` ``(b, n, dim)``.

        Raises:
            ValueError: for more than ``max_seq_len`` tokens with learned absolute positions; for another shape; for
                ``return_loss`` without ``num_tokens``.
        """
        _check_input(x.shape, self.num_tokens, self.dim, return_loss)
        if return_loss:
            labels = x[:, 1:].reshape(-1)
            counted = (labels != self.ignore_index).astype(ms.float32)
            return (self.token_losses(x[:, :-1], labels) * counted).sum() / counted.sum()
        hidden = self.hidden(x)
        if self.num_tokens is None:
            return hidden
        return self.logits(hidden).reshape(x.shape + (self.num_tokens,))

    def hidden(self, x):
        """Tokens ``(b, n)`` (with ``num_tokens=None``: ``(b, n, dim)``) to the last layer's output ``(b, n, dim)``."""
        if self.num_tokens is not None:
            x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def embed(self, tokens):
        """``(b, n) -> (b, n, dim)``: token embedding plus, with ``use_abs_pos_emb``, that of the position."""
        b, n = tokens.shape
        x = self.token_emb(tokens)
        if self.use_abs_pos_emb:
            _check_length(n, self.max_seq_len)
            positions = self.pos_emb.embedding_table[:n].reshape((1, n, self.dim))
            x = x + ops.cat((positions,) * b, 0)
        return x

    def logits(self, hidden):
        """``(..., dim) -> (rows, num_tokens)``."""
        (logits,) = self.norm(hidden.reshape((-1, self.dim)), (self.to_logits.weight,))
        return logits

    def token_losses(self, tokens, labels):
        """The cross-entropy in nats of each label: ``tokens: (b, n)``, ``labels: (b * n,)``, returns ``(b * n,)``.

        A label of ``ignore_index`` gets a number without meaning.
        """
        return self.cross_entropy(self.logits(self.hidden(tokens)), ops.relu(labels))


@constexpr
def _check_input(shape, num_tokens, dim, return_loss):
    if num_tokens is None and (len(shape) != 3 or shape[-1] != dim or return_loss):
        raise ValueError(f"without num_tokens, expected x: (b, n, {dim}) and return_loss=False, got x: {shape}")
    if num_tokens is not None and (len(shape) != 2 or shape[1] < 1 + return_loss):
        raise ValueError(f"expected tokens (b, n) with n >= {1 + return_loss}, got {shape}")


@constexpr
def _check_length(n, max_seq_len):
    if n > max_seq_len:
        raise ValueError(f"expected at most max_seq_len = {max_seq_len} tokens, got {n}: learned positions end there")


def require_positive(**sizes):
    """Raise ``ValueError`` naming the sizes that are smaller than 1."""
    wrong = {name: size for name, size in sizes.items() if size < 1}
    if wrong:
        raise ValueError("expected " + ", ".join(f"{name} >= 1, got {size}" for name, size in wrong.items()))
