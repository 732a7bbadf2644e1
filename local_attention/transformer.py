"""Multi-head local attention, and the transformer built of it."""

from copy import deepcopy

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import Normal
from mindspore.ops import constexpr

from local_attention.constants import shared_constant
from local_attention.decoding import UncachedSession, context_of, decoder_of, generate_tokens
from local_attention.einops_mindspore import Rearrange
from local_attention.hyper_connections import connection, expand_streams, reduce_streams
from local_attention.layers import AddBias, CrossEntropy, FeedForward, L2Norm, LayerNorm, dense, tree_map
from local_attention.local_attention import LocalAttention
from local_attention.ngram import NgramEmbedding
from local_attention.position_bias import DynamicPositionBias


class LocalMHA(nn.Cell):
    """Multi-head attention within windows, of any length: ``x: (b, n, dim) -> (b, n, dim)``.

    Args:
        dim: channels of the input.
        window_size: tokens in a window.
        dim_head: channels of a head.
        heads: number of heads.
        dropout: share of the attention weights that training drops.
        causal: a query sees no later key.
        prenorm: LayerNorm before the projections.
        qk_rmsnorm: queries and keys are l2-normalised and multiplied by learned scales, one a channel (Dehghani et al.
            2023, arXiv 2302.05442, section 2, there with LayerNorm).
        qk_scale: factor of the scores with ``qk_rmsnorm``.
        use_xpos, xpos_scale_base: see :class:`LocalAttention`.
        exact_windowsize: see :class:`LocalAttention`; True unless given.
        gate_values_per_head: multiply the output of each head and token by a sigmoid gate made from the (normed) input.
        local_attention_kwargs: further arguments of :class:`LocalAttention`, such as ``look_backward``.

    Raises:
        ValueError: for sizes that are no positive numbers; for ``scale`` with ``qk_rmsnorm``; and as
            :class:`LocalAttention`.
    """

    def __init__(
        self,
        *,
        dim,
        window_size,
        dim_head=64,
        heads=8,
        dropout=0.0,
        causal=False,
        prenorm=False,
        qk_rmsnorm=False,
        qk_scale=8,
        use_xpos=False,
        xpos_scale_base=None,
        exact_windowsize=None,
        gate_values_per_head=False,
        **local_attention_kwargs,
    ):
        super().__init__()
        require_positive(dim=dim, dim_head=dim_head, heads=heads)
        if qk_rmsnorm:
            if local_attention_kwargs.get("scale") is not None:
                raise ValueError("expected qk_scale instead of scale with qk_rmsnorm")
            local_attention_kwargs = local_attention_kwargs | dict(scale=qk_scale)
        self.heads, self.dim_head = heads, dim_head
        inner = heads * dim_head
        self.norm = LayerNorm(dim) if prenorm else None
        self.to_q, self.to_k, self.to_v = dense(dim, inner), dense(dim, inner), dense(dim, inner)
        self.to_out = dense(inner, dim)
        self.qk_rmsnorm = qk_rmsnorm
        if qk_rmsnorm:
            self.l2_norm, self.matmul = L2Norm(), ops.MatMul()
            self.q_scale, self.k_scale = (
                Parameter(ms.Tensor(np.ones(dim_head, np.float32)), name=name) for name in ("q_scale", "k_scale")
            )
        self.to_v_gate = nn.Dense(dim, heads) if gate_values_per_head else None
        self.matmul_nt, self.add_bias = ops.MatMul(transpose_b=True), AddBias()
        self.split_heads = Rearrange("b n (h d) -> b h n d", h=heads)
        self.join_heads = Rearrange("b h n d -> (b n) (h d)")
        self.attention = LocalAttention(
            window_size,
            causal,
            dropout=dropout,
            dim=dim_head,
            autopad=True,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize,
            use_xpos=use_xpos,
            xpos_scale_base=xpos_scale_base,
            **local_attention_kwargs,
        )

    def construct(self, x, mask=None, attn_bias=None):
        """Attend.

        Args:
            x: ``(b, n, dim)`` float32.
            mask: ``(b, n)`` booleans, True where a token may be seen.
            attn_bias: ``(heads, window, span)`` float32, see :class:`LocalAttention`.

        Returns:
            ``(b, n, dim)``.
        """
        b, n, dim = x.shape
        q, k, v, gates = self.project(x.reshape((b * n, dim)))
        q, k, v = self.heads_of(q, b), self.heads_of(k, b), self.heads_of(v, b)
        out = self.join_heads(self.attention(q, k, v, mask=mask, attn_bias=attn_bias))
        return self.merge(out, gates).reshape((b, n, dim))

    def heads_of(self, x, b):
        """``(b n, h d) -> (b, h, n, d)``."""
        return self.split_heads(x.reshape((b, -1, x.shape[-1])))

    def project(self, x):
        """Queries, keys and values of all heads, each ``(rows, h d)``, of ``x: (rows, dim)``; and gates, or None.

        The gates ``(rows, h)`` are logits.
        """
        weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight)
        if self.to_v_gate is not None:
            weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight, self.to_v_gate.weight)
        products = tree_map(ops.partial(self.matmul_nt, x), weights) if self.norm is None else self.norm(x, weights)
        q, k, v = products[0], products[1], products[2]
        if self.qk_rmsnorm:
            q, k = self.normalise(q, self.q_scale), self.normalise(k, self.k_scale)
        if self.to_v_gate is None:
            return q, k, v, None
        return q, k, v, self.add_bias(products[3], self.to_v_gate.bias)

    def normalise(self, x, scale):
        """The heads of ``x: (rows, h d)`` with unit length, times ``scale: (d,)``."""
        heads = self.l2_norm(x.reshape((-1, self.dim_head)))
        scales = self.matmul(ops.ones((heads.shape[0], 1), x.dtype), scale.reshape((1, -1)))
        return (heads * scales).reshape(x.shape)

    def merge(self, out, gates):
        """The heads' outputs ``(rows, h d)``, gated, to ``(rows, dim)``."""
        if gates is not None:
            out = out * ops.matmul(ops.sigmoid(gates), spread_heads(self.heads, self.dim_head))
        return self.matmul_nt(out, self.to_out.weight)


@shared_constant
def spread_heads(heads, dim_head):
    """``(h, h d)``: a product with it repeats the number of each head for all its channels."""
    return np.kron(np.eye(heads, dtype=np.float32), np.ones((1, dim_head), np.float32))


class Layer(nn.Cell):
    """Attention and feed-forward, each connected to the residual stream or streams.

    Args:
        attention: a :class:`LocalMHA`.
        feed_forward: a :class:`FeedForward`.
        global_attention: a cell that goes before them, ``(b, n, dim) -> (b, n, dim)``, or None.
        connections: their connections, see :mod:`hyper_connections`, in the order of the arguments.
    """

    def __init__(self, attention, feed_forward, global_attention, connections):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_connection, self.feed_forward_connection, global_connection = connections
        self.global_attention = global_attention
        if global_attention is not None:
            self.global_connection = global_connection

    def construct(self, x, batch, mask=None, attn_bias=None):
        """``x: (b * n, dim)``, or ``(b * n, s, dim)`` with ``s`` residual streams; returns the like."""
        if self.global_attention is not None:
            taken, x, beta = self.global_connection.before(x)
            out = self.global_attention(taken.reshape((batch, -1, taken.shape[-1])))
            x = self.global_connection.after(out.reshape(taken.shape), x, beta)
        taken, x, beta = self.attention_connection.before(x)
        out = self.attention(taken.reshape((batch, -1, taken.shape[-1])), mask, attn_bias)
        x = self.attention_connection.after(out.reshape(taken.shape), x, beta)
        taken, x, beta = self.feed_forward_connection.before(x)
        return self.feed_forward_connection.after(self.feed_forward(taken), x, beta)


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
        attn_dropout: share of the attention weights that training drops.
        ff_dropout: share of the feed-forwards' inner layers that training drops.
        ignore_index: labels of this value are left out of the loss.
        use_xpos, xpos_scale_base: see :class:`LocalAttention`.
        use_dynamic_pos_bias: a :class:`DynamicPositionBias` instead of rotary embeddings.
        global_attn_layer: a cell ``(b, n, dim) -> (b, n, dim)``; a copy goes before the local attention of layers. For
            fast generation it needs a method ``decoding_cell``, see :func:`decode.decoding_cells`.
        layers_insert_global_attn: the numbers of these layers, from 1 on; all unless given.
        num_residual_streams: above 1, as many streams with a :class:`HyperConnection` around each branch. (The
            original's default is 4.)
        use_abs_pos_emb: learned absolute positions. False: rotary ones or bias only, and no limit on the length.
        use_rotary_pos_emb: False: no rotary embeddings.
        max_ngram: above 1, an embedding of each n-gram of 2 to so many tokens is added to that of the token it ends
            with, see :class:`NgramEmbedding`. (Not in the original.)
        ngram_buckets: embeddings for each length of n-gram, whose n-grams share them.
        ngram_dim: channels of these embeddings, which a linear layer maps to ``dim``.
        mha_kwargs: further arguments of :class:`LocalMHA` and :class:`LocalAttention`, such as ``look_backward``.

    Raises:
        ValueError: for sizes that are no positive numbers; for layers to insert that do not exist, or without a
            cell to insert; for ``max_ngram`` without ``num_tokens``; and as :class:`LocalMHA` and
            :class:`NgramEmbedding`.
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
        attn_dropout=0.0,
        ff_dropout=0.0,
        ignore_index=-1,
        use_xpos=False,
        xpos_scale_base=None,
        use_dynamic_pos_bias=False,
        global_attn_layer=None,
        layers_insert_global_attn=None,
        num_residual_streams=1,
        use_abs_pos_emb=True,
        use_rotary_pos_emb=True,
        max_ngram=1,
        ngram_buckets=65521,
        ngram_dim=48,
        **mha_kwargs,
    ):
        super().__init__()
        require_positive(
            max_seq_len=max_seq_len,
            dim=dim,
            depth=depth,
            ff_mult=ff_mult,
            num_residual_streams=num_residual_streams,
            max_ngram=max_ngram,
        )
        inserted = layers_to_insert(global_attn_layer, layers_insert_global_attn, depth)
        self.num_tokens, self.max_seq_len, self.dim, self.ignore_index = num_tokens, max_seq_len, dim, ignore_index
        self.use_abs_pos_emb, self.streams = use_abs_pos_emb, num_residual_streams
        self.decoder = None  # made when first needed

        def layer(number):
            attention = LocalMHA(
                dim=dim,
                window_size=local_attn_window_size,
                dim_head=dim_head,
                heads=heads,
                dropout=attn_dropout,
                causal=causal,
                prenorm=True,
                use_xpos=use_xpos,
                xpos_scale_base=xpos_scale_base,
                use_rotary_pos_emb=use_rotary_pos_emb and not use_dynamic_pos_bias,
                **mha_kwargs,
            )
            global_attention = deepcopy(global_attn_layer) if number in inserted else None
            connections = [connection(dim, num_residual_streams, 3 * number + branch) for branch in range(3)]
            return Layer(attention, FeedForward(dim, ff_mult, ff_dropout), global_attention, connections)

        self.layers = nn.CellList([layer(number) for number in range(1, depth + 1)])
        self.dynamic_pos_bias = DynamicPositionBias(max(dim // 2, 1), heads) if use_dynamic_pos_bias else None
        self.ngram_emb = None
        if num_tokens is None and max_ngram > 1:
            raise ValueError(f"expected num_tokens with max_ngram = {max_ngram}, got None")
        if num_tokens is not None:
            require_positive(num_tokens=num_tokens)
            if max_ngram > 1:
                self.ngram_emb = NgramEmbedding(max_ngram, ngram_buckets, ngram_dim, dim)
            self.token_emb = nn.Embedding(num_tokens, dim, embedding_table=Normal(0.02))
            if use_abs_pos_emb:
                self.pos_emb = nn.Embedding(max_seq_len, dim, embedding_table=Normal(0.02))
            self.norm = LayerNorm(dim)
            self.to_logits = dense(dim, num_tokens)
            self.cross_entropy = CrossEntropy()

    def __call__(self, x, mask=None, cache=None, return_loss=False, return_cache=False, ngram_rows=None):
        """Logits or loss.

        Args:
            x: ``(b, n)`` int32 tokens; ``(b, n, dim)`` float32 with ``num_tokens=None``.
            mask: booleans of the shape ``(b, n)`` of the tokens, True where a token may be seen.
            cache: what a call with ``return_cache`` returned for the first of these tokens: only those that have come
                since are computed.
            return_loss: take ``(b, n + 1)`` tokens (and mask) and return the mean cross-entropy of each token given
                those before.
            return_cache: return the logits and a cache. It may be used again and again; its size depends on the window,
                not on the text. With learned positions the text starts again where they run out, as in
                :meth:`generate`. Not inside another cell in graph mode.
            ngram_rows: what ``ngram_emb.look_up`` finds for the tokens that are embedded, to take gradients of these
                rows alone, which are few, instead of the whole table.

        Returns:
            ``(b, n, num_tokens)``, with ``cache`` for the tokens that have come since; with ``return_loss`` a scalar in
            nats; with ``num_tokens=None`` ``(b, n, dim)``.

        Raises:
            ValueError: for more than ``max_seq_len`` tokens with learned absolute positions; for another shape; for
                ``return_loss`` without ``num_tokens``; for ``cache`` or ``return_cache`` with ``mask`` or
                ``return_loss``, for a cache of another batch or of as many tokens, and as
                :class:`decode.DecodingSession`.
        """
        if ngram_rows is not None:
            return super().__call__(x, mask, cache, return_loss, return_cache, ngram_rows)
        if cache is None and not return_cache:
            return super().__call__(x, mask, None, return_loss)
        if mask is not None or return_loss:
            raise ValueError("expected no mask and no return_loss with a cache")
        tokens = x.asnumpy()
        decoder = decoder_of(self, len(tokens))
        if cache is None:
            decoder.reset()
        else:
            if len(cache.newest) != len(tokens) or cache.length >= tokens.shape[1]:
                raise ValueError(
                    f"expected tokens ({len(cache.newest)}, n) with n > {cache.length} for this cache, got {x.shape}"
                )
            decoder.restore(cache)
            tokens = tokens[:, cache.length :]
        logits = ms.Tensor(decoder.feed(tokens))
        return (logits, decoder.snapshot()) if return_cache else logits

    def construct(self, x, mask=None, cache=None, return_loss=False, return_cache=False, ngram_rows=None):
        _check_no_cache(cache, return_cache)
        _check_input(x.shape, self.num_tokens, self.dim, return_loss)
        if return_loss:
            labels = x[:, 1:].reshape(-1)
            if mask is not None:
                mask = mask[:, :-1]
            counted = (labels != self.ignore_index).astype(ms.float32)
            return (self.token_losses(x[:, :-1], labels, mask, ngram_rows) * counted).sum() / counted.sum()
        hidden = self.hidden(x, mask, ngram_rows)
        if self.num_tokens is None:
            return hidden
        return self.logits(hidden).reshape(x.shape + (self.num_tokens,))

    def generate(
        self,
        prime,
        seq_len,
        temperature=1.0,
        filter_thres=0.9,
        use_kv_cache=True,
        top_k=None,
        top_p=None,
        seed=None,
    ):
        """Continue texts.

        With learned absolute positions the context starts again from its newest half where they run out.

        Args:
            prime: ``(b, n)`` int32 tokens, at least one.
            seq_len: tokens to draw.
            temperature: divides the logits; 0 takes the likeliest token.
            filter_thres: the share of the vocabulary, the least likely part, that is never drawn; at least one token is
                left. Not used where ``top_k`` or ``top_p`` is given.
            use_kv_cache: False: compute everything again for each token, as models do, with a warning, whose global
                layers cannot be fed token by token: see :func:`decode.decoding_cells`.
            top_k, top_p: see :func:`sampling.sampling_rule`.
            seed: a whole number from 0 to 2**32 - 1; the same one gives the same text. One is drawn from NumPy's
                generator, which ``mindspore.set_seed`` sets, unless given.

        Returns:
            ``(b, seq_len)`` int32, without the prime.

        Raises:
            ValueError: for a model that is not causal or has no tokens; for an empty prime.
        """
        prime = prime.asnumpy()
        if top_k is None and top_p is None:
            top_k = max(int((1 - filter_thres) * self.num_tokens), 1)
        if seed is None:
            seed = np.random.randint(2**32, dtype=np.int64)
        context = context_of(self, len(prime)) if use_kv_cache else UncachedSession(self, len(prime))
        drawn = generate_tokens(
            context, prime, seq_len, temperature=temperature, top_k=top_k, top_p=top_p, seed=int(seed)
        )
        return ms.Tensor(np.stack([np.zeros(len(prime), np.int32), *drawn], 1)[:, 1:])

    def hidden(self, x, mask=None, ngram_rows=None):
        """Tokens ``(b, n)`` (with ``num_tokens=None``: ``(b, n, dim)``) to the last layer's output ``(b, n, dim)``."""
        if self.num_tokens is not None:
            x = self.embed(x, mask, ngram_rows)
        b, n, dim = x.shape
        x = expand_streams(x.reshape((b * n, dim)), self.streams)
        attn_bias = self.position_bias()
        for layer in self.layers:
            x = layer(x, b, mask, attn_bias)
        return reduce_streams(x, self.streams).reshape((b, n, dim))

    def position_bias(self):
        """The dynamic bias ``(heads, window, span)``, or None."""
        if self.dynamic_pos_bias is None:
            return None
        attention = self.layers[0].attention.attention
        window, before = attention.window_size, attention.look_backward * attention.window_size
        return self.dynamic_pos_bias(window, before + (1 + attention.look_forward) * window, before)

    def embed(self, tokens, mask=None, ngram_rows=None):
        """``(b, n) -> (b, n, dim)``: token embedding plus, if there are any, those of n-grams and of the position."""
        b, n = tokens.shape
        x = self.token_emb(tokens)
        if self.ngram_emb is not None:
            x = x + self.ngram_emb(tokens, mask, ngram_rows).reshape(x.shape)
        if self.use_abs_pos_emb:
            _check_length(n, self.max_seq_len)
            positions = self.pos_emb.embedding_table[:n].reshape((1, n, self.dim))
            x = x + ops.cat((positions,) * b, 0)
        return x

    def logits(self, hidden):
        """``(..., dim) -> (rows, num_tokens)``."""
        (logits,) = self.norm(hidden.reshape((-1, self.dim)), (self.to_logits.weight,))
        return logits

    def token_losses(self, tokens, labels, mask=None, ngram_rows=None):
        """The cross-entropy in nats of each label: ``tokens: (b, n)``, ``labels: (b * n,)``, returns ``(b * n,)``.

        A label of ``ignore_index`` gets a number without meaning.
        """
        return self.cross_entropy(self.logits(self.hidden(tokens, mask, ngram_rows)), ops.relu(labels))


@constexpr
def _check_input(shape, num_tokens, dim, return_loss):
    if num_tokens is None and (len(shape) != 3 or shape[-1] != dim or return_loss):
        raise ValueError(f"without num_tokens, expected x: (b, n, {dim}) and return_loss=False, got x: {shape}")
    if num_tokens is not None and (len(shape) != 2 or shape[1] < 1 + return_loss):
        raise ValueError(f"expected tokens (b, n) with n >= {1 + return_loss}, got {shape}")


@constexpr
def _check_no_cache(cache, return_cache):
    if cache is not None or return_cache:
        raise ValueError("expected no cache and no return_cache inside another cell in graph mode")


@constexpr
def _check_length(n, max_seq_len):
    if n > max_seq_len:
        raise ValueError(f"expected at most max_seq_len = {max_seq_len} tokens, got {n}: learned positions end there")


def layers_to_insert(global_attn_layer, numbers, depth):
    """The set of layers that get a global layer; raises ``ValueError`` for those that cannot."""
    if global_attn_layer is None:
        if numbers:
            raise ValueError(f"expected a global_attn_layer to insert before the layers {tuple(numbers)}, got none")
        return set()
    numbers = range(1, depth + 1) if numbers is None else numbers
    if not all(1 <= number <= depth for number in numbers):
        raise ValueError(f"expected layers_insert_global_attn from 1 to depth = {depth}, got {tuple(numbers)}")
    return set(numbers)


def require_positive(**sizes):
    """Raise ``ValueError`` naming the sizes that are smaller than 1."""
    wrong = {name: size for name, size in sizes.items() if size < 1}
    if wrong:
        raise ValueError("expected " + ", ".join(f"{name} >= 1, got {size}" for name, size in wrong.items()))
