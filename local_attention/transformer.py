"""The transformer: a language model whose layers attend within windows."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import Normal
from mindspore.ops import constexpr

from local_attention.constants import shared_cell
from local_attention.dropout import Recomputable
from local_attention.global_attention import GlobalAttention
from local_attention.hyper_connections import connection, expand_streams, reduce_streams
from local_attention.layers import CrossEntropy, FeedForward, LayerNorm, WeightedSum, dense
from local_attention.mha import LocalMHA, MultiHeadAttention
from local_attention.ngram import NgramEmbedding
from local_attention.options import LocalTransformerOptions, accepts
from local_attention.position_bias import DynamicPositionBias
from local_attention.precision import cast, checked_type, require_computable
from local_attention.tokens import as_integers, check_range

__all__ = ["Layer", "LocalMHA", "LocalTransformer"]

INTEGER_TYPES = (ms.int8, ms.int16, ms.int32, ms.int64, ms.uint8, ms.uint16, ms.uint32, ms.uint64)


class Layer(Recomputable):
    """Attention and feed-forward, each connected to the residual stream or streams.

    In training and evaluation, ``attention`` is :class:`LocalMHA` or :class:`GlobalAttention`; in decoding, cells that
    compute the same with the KV cache (:meth:`with_branches`).

    Args:
        attention: ``(b, n, dim), *attention_inputs -> (b, n, dim)``; local, or in some layers global.
        feed_forward: ``(b, n, dim) -> (b, n, dim)``.
        global_attention: ``(b, n, dim), *global_inputs -> (b, n, dim)``, goes before the other two; or None.
        connections: those of attention, feed-forward and global attention, see :mod:`hyper_connections`.
        auto_prefix: whether the cells' parameters get this layer's names.
    """

    def __init__(
        self,
        attention: nn.Cell,
        feed_forward: nn.Cell,
        global_attention: nn.Cell | None,
        connections: Sequence[nn.Cell],
        auto_prefix: bool = True,
    ) -> None:
        super().__init__(auto_prefix=auto_prefix)
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_connection, self.feed_forward_connection, global_connection = connections
        self.global_attention = global_attention
        if global_attention is not None:
            self.global_connection = global_connection

    def with_branches(self, attention: nn.Cell, feed_forward: nn.Cell, global_attention: nn.Cell | None) -> "Layer":
        """This layer, with its own connections, around other cells."""
        global_connection = self.global_connection if self.global_attention is not None else None
        connections = (self.attention_connection, self.feed_forward_connection, global_connection)
        return Layer(attention, feed_forward, global_attention, connections, auto_prefix=False)

    def attentions(self) -> list[MultiHeadAttention]:
        """What attends to other tokens through queries and keys, in the order of the layer."""
        cells = (self.global_attention, self.attention)
        return [cell for cell in cells if isinstance(cell, MultiHeadAttention)]

    def construct(self, x, batch, attention_inputs=(), global_inputs=()):
        """``x: (b * n, dim)``, or ``(b * n, s, dim)`` with ``s`` residual streams; returns the same shape."""
        if self.global_attention is not None:
            x = self.add_branch(x, batch, self.global_connection, self.global_attention, global_inputs)
        x = self.add_branch(x, batch, self.attention_connection, self.attention, attention_inputs)
        return self.add_branch(x, batch, self.feed_forward_connection, self.feed_forward, ())

    def add_branch(self, x, batch, connection, branch, inputs):
        """Give ``branch``, a sub-layer, its input from the residual streams, and add its output to them."""
        branch_input, x, beta = connection.pre(x)
        out = branch(branch_input.reshape((batch, -1, branch_input.shape[-1])), *inputs)
        return connection.post(cast(out, x.dtype).reshape(branch_input.shape), x, beta)


class LocalTransformer(Recomputable):
    """A language model whose layers attend within windows: tokens ``(b, n)`` to logits ``(b, n, num_tokens)``.

    The arguments are those of :class:`LocalTransformerOptions`.

    Raises:
        ValueError: for an option outside its range; for layers in ``layers_insert_global_attn`` that do not exist, or
            without a ``global_attn_layer``; for ``max_ngram`` without ``num_tokens``; and as :class:`LocalMHA`.
    """

    @accepts(LocalTransformerOptions)
    def __init__(self, options: LocalTransformerOptions) -> None:
        super().__init__()
        self.options = options
        num_tokens, dim, streams = options.num_tokens, options.dim, options.num_residual_streams
        self.num_tokens, self.dim, self.streams = num_tokens, dim, streams
        self.max_seq_len, self.use_abs_pos_emb = options.max_seq_len, options.use_abs_pos_emb
        self.ignore_index = options.ignore_index
        numbers = range(1, options.depth + 1)
        inserted = numbers if options.layers_insert_global_attn is None else options.layers_insert_global_attn

        def layer(number: int) -> Layer:
            attention = (
                GlobalAttention(**vars(options.global_attention()))
                if options.is_global(number)
                else LocalMHA(**vars(options.mha(number)))
            )
            feed_forward = FeedForward(dim, options.ff_mult, options.ff_dropout)
            global_attention = deepcopy(options.global_attn_layer) if number in inserted else None
            # the index of a branch decides which stream it reads before training
            connections = [connection(dim, streams, 3 * number + branch) for branch in range(3)]
            return Layer(attention, feed_forward, global_attention, connections)

        self.layers = nn.CellList([layer(number) for number in numbers])
        local = [layer.attention.attention for layer in self.layers if isinstance(layer.attention, LocalMHA)]
        sizes = [(attention.window_size, attention.look_backward, attention.look_forward) for attention in local]
        self.window_sizes = tuple(dict.fromkeys(sizes))  # each once: layers of the same windows share their bias
        of_windows = iter(2 + self.window_sizes.index(size) for size in sizes)
        self.inputs_of_layers = tuple(  # which of the inputs in `hidden` go to attention and to inserted attention
            (
                next(of_windows) if isinstance(layer.attention, LocalMHA) else 1,
                1 if isinstance(layer.global_attention, GlobalAttention) else 0,
            )
            for layer in self.layers
        )
        self.embedding_skip = options.embedding_skip
        if options.embedding_skip:  # changes nothing before training
            ones, zeros = (ms.Tensor(np.full(options.depth, value, np.float32)) for value in (1, 0))
            self.residual_factors = Parameter(ones, name="residual_factors")
            self.embedding_factors = Parameter(zeros, name="embedding_factors")
            self.weighted_sum = shared_cell(WeightedSum)
        self.dynamic_pos_bias = None
        if options.use_dynamic_pos_bias:
            self.dynamic_pos_bias = DynamicPositionBias(max(dim // 2, 1), options.heads)
        self.ngram_emb = None
        if num_tokens is not None:
            if options.max_ngram > 1:
                self.ngram_emb = NgramEmbedding(options.max_ngram, options.ngram_buckets, options.ngram_dim, dim)
            self.token_emb = nn.Embedding(num_tokens, dim, embedding_table=Normal(0.02))
            if options.use_abs_pos_emb:
                self.pos_emb = nn.Embedding(options.max_seq_len, dim, embedding_table=Normal(0.02))
                self.slice = ops.Slice()
            self.norm = LayerNorm(dim, 1)
            self.to_logits = dense(dim, num_tokens)
            self.cross_entropy = CrossEntropy()

    def __call__(self, x, mask=None, cache=None, return_loss=False, return_cache=False, ngram_rows=None):
        """Logits or loss.

        Args:
            x: ``(b, n)`` tokens of any integer type; ``(b, n, dim)`` of any floating type with
                ``num_tokens=None``.
            mask: booleans of the shape ``(b, n)`` of the tokens, True where a token may be seen.
            cache: what an earlier call with ``return_cache`` returned for the first of these tokens. Logits are
                computed and returned for the others only.
            return_loss: take ``(b, n + 1)`` tokens (and mask) and return the mean cross-entropy of each token given
                the tokens before it.
            return_cache: return the logits and a cache. It may be used again and again; its size depends on the window,
                not on the length, except with global attention. With learned positions the context restarts where they
                run out, as in :meth:`generate`. Not inside another cell in graph mode.
            ngram_rows: what ``ngram_emb.look_up`` finds for the tokens that are embedded, to take gradients of these
                few rows alone instead of the whole table.

        Returns:
            ``(b, n, num_tokens)``, with ``cache`` of the tokens that it does not hold; with ``return_loss`` a scalar in
            nats, 0 where every label is ``ignore_index``; with ``num_tokens=None`` ``(b, n, dim)``.

        Raises:
            ValueError: for more than ``max_seq_len`` tokens with learned absolute positions; for another shape or type;
                for tokens that the vocabulary does not have, except ``ignore_index`` with ``return_loss`` (not inside
                another compiled graph, which does not look at values); for ``return_loss`` without ``num_tokens``; for
                ``cache`` or ``return_cache`` with ``mask`` or ``return_loss``, for a cache of another batch or of as
                many tokens, and as :class:`decoding.DecodingSession`.
        """
        self._check_tokens(x, return_loss)
        if ngram_rows is not None:
            return super().__call__(x, mask, cache, return_loss, return_cache, ngram_rows)
        if cache is None and not return_cache:
            return super().__call__(x, mask, None, return_loss)
        if mask is not None or return_loss:
            raise ValueError("expected no mask and no return_loss with a cache")
        from local_attention.decoding import logits_with_cache

        logits, cache = logits_with_cache(self, x, cache)
        return (ms.Tensor(logits), cache) if return_cache else ms.Tensor(logits)

    @property
    def dtype(self) -> Any:
        """The type that a model with tokens computes in: that given to ``to_float``, else that of its embeddings."""
        return self.token_emb.embedding_table.dtype if self.compute_type is None else self.compute_type

    def _check_tokens(self, x, return_loss):
        """Look at the values, which a graph cannot; 10 µs for 32 rows of 1,024."""
        if self.num_tokens is not None and isinstance(x, ms.Tensor) and x.dtype in INTEGER_TYPES:
            tokens = x.asnumpy()
            check_range(tokens[tokens != self.ignore_index] if return_loss else tokens, self.num_tokens)

    def construct(self, x, mask=None, cache=None, return_loss=False, return_cache=False, ngram_rows=None):
        _check_no_cache(cache, return_cache)
        if self.num_tokens is None:
            x = self.typed(x)
        x = x.astype(_checked_type(x.shape, x.dtype, self.num_tokens, self.dim, return_loss))
        if return_loss:
            is_ignored = x == self.ignore_index
            counted = 1 - is_ignored[:, 1:].reshape(-1).astype(ms.float32)
            if not 0 <= self.ignore_index < self.num_tokens:
                x = ops.masked_fill(x, is_ignored, 0)  # any token, as it has to be embedded
            if mask is not None:
                mask = mask[:, :-1]
            losses = self.token_losses(x[:, :-1], x[:, 1:].reshape(-1), mask, ngram_rows) * counted
            return losses.sum() / ops.maximum(counted.sum(), 1.0)  # 0 where no label counts
        hidden = self.hidden(x, mask, ngram_rows)
        if self.num_tokens is None:
            return hidden
        return self.logits(hidden)

    def generate(
        self,
        prime: Any,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        use_kv_cache: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        lengths: Any = None,
    ) -> ms.Tensor:
        """Continue sequences.

        With learned absolute positions the context restarts from its newest half where they run out.

        Args:
            prime: ``(b, n)`` integer tokens, at least one: a tensor, an array or nested lists.
            seq_len: tokens to draw.
            temperature: divides the logits; 0 takes the most likely token.
            filter_thres: the fraction of the vocabulary, its least likely part, that is never drawn; at least one token
                is left. Not used where ``top_k`` or ``top_p`` is given.
            use_kv_cache: False: compute the whole context again for each token, as is done, with a warning, for models
                whose global layers cannot be decoded: see :func:`decoding.decoding_cells`.
            top_k, top_p: see :func:`decoding.sampling.sampling_rule`.
            seed: an integer from 0 to 2**32 - 1; the same one gives the same tokens. If it is None, one is drawn from
                NumPy's generator, which ``mindspore.set_seed`` seeds.
            lengths: ``(b,)`` integers, for rows of different lengths: the rest of each row is padding, of any values.
                Each row is continued as if it were alone, beginning after its own last token.

        Returns:
            ``(b, seq_len)`` int32, without the prime.

        Raises:
            ValueError: for a model that is not causal or has no tokens; for a prime of another shape or type; for
                tokens that the vocabulary does not have; for lengths outside 1 … n.
        """
        from local_attention.decoding import UncachedSession, generate_tokens, session_for

        sequences = as_integers(prime, "prime: (b, n) integers, n >= 1 (pad shorter rows, and give lengths)", 2)
        batch = len(sequences)
        session = session_for(self, batch) if use_kv_cache else UncachedSession(self, batch)
        if top_k is None and top_p is None:
            top_k = max(int((1 - filter_thres) * session.num_tokens), 1)
        if seed is None:
            seed = int(np.random.randint(2**32, dtype=np.int64))
        sampled = generate_tokens(
            session,
            sequences,
            seq_len,
            lengths=lengths,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        return ms.Tensor(np.stack([np.zeros(batch, np.int32), *sampled], 1)[:, 1:])

    def hidden(self, x, mask=None, ngram_rows=None):
        """Tokens ``(b, n)`` (with ``num_tokens=None``: ``(b, n, dim)``) to the last layer's output ``(b, n, dim)``."""
        if self.num_tokens is not None:
            x, positions = _without_negative(x, self.num_tokens), None
            if self.use_abs_pos_emb:
                _check_length(x.shape[1], self.max_seq_len)
                # not table[:n], which takes 7 ms for 1,024 rows of 256
                positions = self.slice(self.pos_emb.embedding_table, (0, 0), (x.shape[1], self.dim))
            if self.ngram_emb is not None and ngram_rows is None:
                ngram_rows = self.ngram_emb.look_up(self.ngram_emb.bucket_ids_of_sequence(x, mask))
            x = self.embed(x, ngram_rows, positions)
        inputs = ((), (mask,))
        for bias in self.window_biases():
            inputs = inputs + ((mask, bias),)
        return self.run_layers(self.layers, x, inputs, self.inputs_of_layers)

    def embed_next(self, tokens, previous, positions):
        """Embed ``tokens: (b, n)`` at ``positions: (n,)``; ``previous: (b, max_ngram - 1)`` are 1 + those before."""
        ngram_rows = position_rows = None
        if self.ngram_emb is not None:
            ngram_rows = self.ngram_emb.look_up(self.ngram_emb.bucket_ids(ops.cat((previous, 1 + tokens), 1)))
        if self.use_abs_pos_emb:
            position_rows = self.pos_emb(positions)
        return self.embed(tokens, ngram_rows, position_rows)

    def embed(self, tokens, ngram_rows, position_rows):
        """The sum of all embeddings of tokens ``(b, n)``, ``(b, n, dim)``.

        ``ngram_rows`` are rows of the table of n-grams, ``position_rows: (n, dim)`` learned positions; each is None
        where the model has none.
        """
        x = cast(self.token_emb(tokens), checked_type(self.dtype))
        if self.ngram_emb is not None:
            x = x + self.ngram_emb.combine(cast(ngram_rows, x.dtype)).reshape(x.shape)
        if self.use_abs_pos_emb:
            position_rows = cast(position_rows, x.dtype)
            x = x + ops.cat((position_rows.reshape((1, *position_rows.shape)),) * x.shape[0], 0)
        return x

    def run_layers(self, layers, x, inputs, inputs_of_layers):
        """``x: (b, n, dim)`` through the layers: this model's, or those that decode; see :class:`Layer`.

        ``inputs`` are tuples of what attention takes beside ``x``. ``inputs_of_layers`` says for each layer which of
        them its attention takes, and which its inserted global attention.
        """
        b, n, dim = x.shape
        x = expand_streams(x.reshape((b * n, dim)), self.streams)
        embeddings = x
        for i, layer in enumerate(layers):
            if self.embedding_skip:
                x = self.weighted_sum(x, embeddings, self.residual_factors[i], self.embedding_factors[i])
            of_attention, of_global = inputs_of_layers[i]
            x = layer(x, b, inputs[of_attention], inputs[of_global])
        return reduce_streams(x, self.streams).reshape((b, n, dim))

    def window_biases(self):
        """For each of ``window_sizes`` the dynamic position bias, ``(heads, window, span)``, or None."""
        biases = ()
        for window, back, ahead in self.window_sizes:
            bias = None
            if self.dynamic_pos_bias is not None:
                bias = self.dynamic_pos_bias(window, (back + 1 + ahead) * window, back * window)
            biases = biases + (bias,)
        return biases

    def distance_bias(self, distances, count):
        """The dynamic position bias for ``distances: (m,)`` below ``count``, ``(heads, m)``, or None."""
        if self.dynamic_pos_bias is None:
            return None
        return self.dynamic_pos_bias.gather(count, distances)

    def logits(self, hidden):
        """``(..., dim) -> (..., num_tokens)``."""
        (logits,) = self.norm(hidden.reshape((-1, self.dim)), (self.to_logits.weight,))
        return logits.reshape((*hidden.shape[:-1], self.num_tokens))

    def token_losses(self, tokens, labels, mask=None, ngram_rows=None):
        """The cross-entropy in nats of each label: ``tokens: (b, n)``, ``labels: (b * n,)``, returns ``(b * n,)``."""
        logits = self.logits(self.hidden(tokens, mask, ngram_rows))
        return self.cross_entropy(logits.reshape((-1, self.num_tokens)), _without_negative(labels, self.num_tokens))


def _without_negative(tokens, num_tokens):
    """Negative tokens become one that does not exist either: a look-up takes -5 for the fifth token from the end."""
    return ops.masked_fill(tokens, tokens < 0, num_tokens)


@constexpr
def _checked_type(shape, dtype, num_tokens, dim, return_loss):
    """The type to compute with: int32 for tokens."""
    if num_tokens is not None and dtype not in INTEGER_TYPES:
        raise ValueError(f"expected tokens of an integer type, got {dtype}")
    if num_tokens is None and (len(shape) != 3 or shape[-1] != dim or return_loss):
        raise ValueError(f"without num_tokens, expected x: (b, n, {dim}) and return_loss=False, got x: {shape}")
    if num_tokens is not None and (len(shape) != 2 or shape[1] < 1 + return_loss):
        raise ValueError(f"expected tokens (b, n) with n >= {1 + return_loss}, got {shape}")
    if num_tokens is not None:
        return ms.int32
    return require_computable(dtype)


@constexpr
def _check_no_cache(cache, return_cache):
    if cache is not None or return_cache:
        raise ValueError("expected no cache and no return_cache inside another cell in graph mode")


@constexpr
def _check_length(n, max_seq_len):
    if n > max_seq_len:
        raise ValueError(f"expected at most max_seq_len = {max_seq_len} tokens, got {n}: learned positions end there")
