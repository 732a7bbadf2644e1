"""Generation with a key/value cache: one compiled graph a token, and one for the chunks of a prompt."""

import warnings
from itertools import count
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.einops_mindspore import Rearrange
from local_attention.hyper_connections import expand_streams, reduce_streams
from local_attention.local_attention import TOKEN_SELF_ATTN_VALUE
from local_attention.rotary import rotary_angles, xpos_decay
from local_attention.sampling import draw, next_token_probabilities
from local_attention.windows import hide, visible

CHUNK = 64  # tokens of a prompt that one graph takes at once
CHUNK_FROM = 256  # tokens from which on compiling that graph is worth while


class CachedStep(nn.Cell):
    """The logits after each of ``count`` more tokens.

    The keys and values that later tokens may still see lie in a ring for each layer, of a size that depends on the
    window alone; keys already rotated, by their absolute positions (scores depend on the difference), but without the
    decay of xPos, which would leave float32's range.

    Args:
        model: a causal ``LocalTransformer`` with tokens.
        batch: sequences side by side.
        count: tokens a call.
        rings: keys and values of all layers, each ``(b * heads * size, d)``.
        global_steps: the :func:`decoding_cells` of the model.
    """

    def __init__(self, model, batch, count, rings, global_steps):
        super().__init__(auto_prefix=False)
        self.model = model
        mha = model.layers[0].attention
        self.rel_pos, self.l2_norm, self.use_xpos = mha.attention.rel_pos, mha.attention.l2_norm, mha.attention.use_xpos
        self.keys, self.values = rings
        self.global_steps = nn.CellList(global_steps)
        self.batch, self.rows, self.count, self.d = batch, batch * mha.heads, count, mha.dim_head
        self.size = self.keys[0].shape[0] // self.rows
        self.scale = self.d**-0.5 if mha.attention.scale is None else mha.attention.scale
        self.split_heads = Rearrange("(b n) (h d) -> (b h n) d", b=batch, h=mha.heads)
        self.join_heads = Rearrange("(b h) n d -> (b n) (h d)", b=batch)
        self.write = ops.ScatterUpdate()
        self.matmul, self.matmul_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.softmax = ops.Softmax(-1)

    def construct(self, tokens, positions, slots, bias, cos, sin, distances, decay, query_decay):
        """One step; the arguments but ``tokens`` as :meth:`Decoder.inputs` gives them.

        Args:
            tokens: ``(b * count,)`` int32.
            positions: ``(count,)`` int32, for learned positions.
            slots: ``(b * heads * count,)`` int32, the rows of the rings that take the new keys and values.
            bias: ``(1, count, size)`` float32, 0 for the slots that a token sees, hugely negative for the others.
            cos, sin: ``(b * heads * count, d)`` float32, of the positions' rotary angles.
            distances: ``(count * size,)`` int32, tokens from each slot's to each of these, for the dynamic bias.
            decay, query_decay: ``(1, size, d)`` and ``(1, count, d)`` float32, whose product is the decay of xPos.

        Returns:
            ``(b, count, num_tokens)``.
        """
        x = self.model.token_emb(tokens)
        if self.model.use_abs_pos_emb:
            x = x + ops.cat((self.model.pos_emb(positions),) * self.batch, 0)
        if self.model.dynamic_pos_bias is not None:
            of_head = self.model.dynamic_pos_bias.gather(self.size, distances)
            bias = bias + ops.cat((of_head,) * self.batch, 0).reshape((self.rows, self.count, self.size))
        x = expand_streams(x, self.model.streams)
        inserted = 0
        for i in range(len(self.keys)):
            layer = self.model.layers[i]
            if layer.global_attention is not None:
                taken, x, beta = layer.global_connection.before(x)
                out = self.global_steps[inserted](taken.reshape((self.batch, self.count, -1)), positions)
                x = layer.global_connection.after(out.reshape(taken.shape), x, beta)
                inserted = inserted + 1
            taken, x, beta = layer.attention_connection.before(x)
            out = self.attend(i, layer.attention, taken, slots, bias, cos, sin, decay, query_decay)
            x = layer.feed(layer.attention_connection.after(out, x, beta))
        logits = self.model.logits(reduce_streams(x, self.model.streams))
        return logits.reshape((self.batch, self.count, -1))

    def attend(self, i, mha, x, slots, bias, cos, sin, decay, query_decay):
        q, k, v, gates = mha.project(x)
        q, k, v = [self.split_heads(t) for t in (q, k, v)]
        if self.l2_norm is not None:
            k = self.l2_norm(k)
        if self.rel_pos is not None:
            q, k = self.rel_pos.rotate(q, cos, sin), self.rel_pos.rotate(k, cos, sin)
        ring = (self.rows, self.size, self.d)
        q = q.reshape((self.rows, self.count, self.d))
        keys = self.write(self.keys[i], slots, k).reshape(ring)
        values = self.write(self.values[i], slots, v).reshape(ring)
        if self.rel_pos is not None and self.use_xpos:
            q, keys = q * query_decay, keys * decay
        weights = self.softmax(self.matmul_nt(q, keys) * self.scale + bias)
        return mha.merge(self.join_heads(self.matmul(weights, values)), gates)


def keys_seen(attention):
    """How many of the newest keys, its own included, a causal query may see."""
    window, back = attention.window_size, attention.look_backward
    return window * back + 1 if attention.exact_windowsize else window * (back + 1)


class Context:
    """A text of ``batch`` rows that grows token by token, and what a model says to it.

    With learned positions the context starts again from its newest half when they run out, at ``max_seq_len``.

    Args:
        model: a causal ``LocalTransformer`` with tokens.
        batch: sequences that run side by side.

    Raises:
        ValueError: for a model that is not causal or has no tokens.
    """

    def __init__(self, model, batch):
        if model.num_tokens is None or not model.layers[0].attention.attention.causal:
            raise ValueError("expected a causal model with num_tokens, as later tokens are decoded from earlier ones")
        self.model, self.batch = model, batch
        self.limit = model.max_seq_len if model.use_abs_pos_emb else None
        self.reset()

    def reset(self):
        """Forget the context."""
        self.length = 0  # tokens fed
        self.position = 0  # those of them that count
        self.newest = np.zeros((self.batch, 0), np.int32)  # what it takes to start again

    def feed(self, tokens):
        """Append tokens to the context and return the logits of those that come after each of them.

        ``tokens: (b,)``, or ``(b, n)`` for several; returns ``(b, num_tokens)``, or ``(b, n, num_tokens)``, float32.
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim == 1:
            return self.feed(tokens[:, None])[:, 0]
        if self.model.training:  # no dropout here
            self.model.set_train(False)
            try:
                return self.feed(tokens)
            finally:
                self.model.set_train()
        logits = []
        while tokens.shape[1]:
            if self.position == self.limit:
                self.begin_again(self.newest[:, self.limit - self.limit // 2 :])
            room = tokens.shape[1] if self.limit is None else self.limit - self.position
            logits.append(self.extend(tokens[:, :room]))
            tokens = tokens[:, room:]
        return np.concatenate(logits, 1)

    def begin_again(self, tokens):
        length = self.length
        self.reset()
        if tokens.shape[1]:
            self.extend(tokens)
        self.length = length

    def extend(self, tokens):
        logits = self.advance(tokens)
        self.length += tokens.shape[1]
        self.position += tokens.shape[1]
        if self.limit is not None:
            self.newest = np.concatenate([self.newest, tokens], 1)
        return logits


class Decoder(Context):
    """A :class:`Context` with a key/value cache: each token costs the same, however long the text.

    Args:
        model, batch: see :class:`Context`.
        chunk: tokens that are fed at once where many come together.
        chunk_from: how many are many. Below, they are fed one by one, and nothing is compiled for them. With global
            layers tokens are always fed one by one.

    Raises:
        ValueError: as :class:`Context`, and for a model with global layers that cannot be fed token by token, see
            :func:`decoding_cells`.
    """

    def __init__(self, model, batch=1, chunk=CHUNK, chunk_from=CHUNK_FROM):
        super().__init__(model, batch)
        if not can_be_cached(model):
            raise ValueError(
                "expected a global_attn_layer with a method decoding_cell, as it is to be fed token by token"
            )
        self.global_steps = decoding_cells(model, batch)
        mha = model.layers[0].attention
        self.attention, self.rows, self.d = mha.attention, batch * mha.heads, mha.dim_head
        self.chunk, self.chunk_from = chunk, chunk_from
        self.size = keys_seen(mha.attention) + chunk - 1
        shape = (self.rows * self.size, self.d)
        self.rings = [
            ms.ParameterTuple(
                Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{name}.{i}", requires_grad=False)
                for i in range(len(model.layers))
            )
            for name in ("cached_keys", "cached_values")
        ]
        weights = {id(parameter) for parameter in model.get_parameters()}
        of_global_steps = [p for cell in self.global_steps for p in cell.get_parameters() if id(p) not in weights]
        self.state = [*self.rings[0], *self.rings[1], *of_global_steps]
        self.steps = {}  # by number of tokens, made when first needed

    def advance(self, tokens):
        """The logits after each of ``tokens: (b, n)``, ``(b, n, num_tokens)``."""
        count = self.chunk if tokens.shape[1] >= self.chunk_from and not self.global_steps else 1
        if count not in self.steps:
            self.steps[count] = CachedStep(self.model, self.batch, count, self.rings, self.global_steps)
        logits = []
        for start in range(0, tokens.shape[1], count):
            part = tokens[:, start : start + count]
            length = part.shape[1]
            # What fills up the last chunk is overwritten by the next tokens before any token can see it.
            part = np.pad(part, ((0, 0), (0, count - length)))
            inputs = self.inputs(self.position + start, count)
            logits.append(self.steps[count](Tensor(part.reshape(-1)), *map(Tensor, inputs)).asnumpy()[:, :length])
        return np.concatenate(logits, 1)

    def inputs(self, position, count):
        """The arguments of :class:`CachedStep` that depend on the positions, ``position`` to ``position + count - 1``.

        A slot holds the newest position that falls to it. In float64, exact however long the text.
        """
        positions = position + np.arange(count)
        last = positions[-1]
        held = last - (last - np.arange(self.size)) % self.size
        distances = positions[:, None] - held
        rule = dict(self.attention.layout(self.attention.window_size)[3])
        bias = hide(visible(positions[:, None], held, length=last + 1, **rule))
        bias += np.float32(TOKEN_SELF_ATTN_VALUE * self.attention.shared_qk) * (distances == 0)
        angles = np.zeros((count, self.d))
        decay, query_decay = np.zeros((1, self.d)), np.zeros((1, self.d))
        if self.attention.rel_pos is not None:
            angles = rotary_angles(positions, self.d, self.attention.rel_pos.theta)
            if self.attention.use_xpos:
                base = self.attention.rel_pos.scale_base
                decay, query_decay = (
                    xpos_decay(position - held, self.d, base),
                    xpos_decay(np.arange(count), self.d, base),
                )
        angles = np.tile(angles, (self.rows, 1))
        slots = np.arange(self.rows)[:, None] * self.size + positions % self.size
        return (
            # what fills up a chunk may lie beyond the learned positions
            np.minimum(positions, self.model.max_seq_len - 1).astype(np.int32),
            slots.reshape(-1).astype(np.int32),
            bias[None].astype(np.float32),
            np.cos(angles).astype(np.float32),
            np.sin(angles).astype(np.float32),
            np.clip(distances, 0, self.size - 1).reshape(-1).astype(np.int32),
            decay[None].astype(np.float32),
            query_decay[None].astype(np.float32),
        )

    def snapshot(self):
        """The context as it is now, a :class:`Cache`."""
        return Cache(self.length, self.position, self.newest, [p.asnumpy().copy() for p in self.state])

    def restore(self, cache):
        """Go on from a :meth:`snapshot` of a decoder of the same model and batch."""
        self.length, self.position, self.newest = cache.length, cache.position, cache.newest
        for parameter, array in zip(self.state, cache.state):
            parameter.set_data(Tensor(array))


class Cache(NamedTuple):
    """What a :class:`Decoder` knows of a text."""

    length: int
    position: int
    newest: np.ndarray
    state: list


class UncachedContext(Context):
    """A :class:`Context` that computes everything again for each token: slow, for comparison and for global layers."""

    def reset(self):
        super().reset()
        self.text = self.newest

    def advance(self, tokens):
        """The logits after each of ``tokens: (b, n)``, ``(b, n, num_tokens)``."""
        self.text = np.concatenate([self.text, tokens], 1)
        return self.model(Tensor(self.text)).asnumpy()[:, -tokens.shape[1] :]


def decoding_cells(model, batch):
    """For each inserted global layer the cell that computes it token by token.

    A ``global_attn_layer`` takes part in cached decoding if it has a method ``decoding_cell(batch)`` that returns a
    cell ``(x: (b, 1, dim), position: (1,) int32) -> (b, 1, dim)`` for the text's next token. That cell keeps what it
    needs of earlier tokens in parameters of its own, and begins a new text at position 0.
    """
    return [layer.decoding_cell(batch) for layer in global_layers(model)]


def can_be_cached(model):
    """Whether all global layers of the model, if any, can be computed token by token: see :func:`decoding_cells`."""
    return all(hasattr(layer, "decoding_cell") for layer in global_layers(model))


def global_layers(model):
    return [layer.global_attention for layer in model.layers if layer.global_attention is not None]


def decoder_of(model, batch):
    """A model's :class:`Decoder`; the last one is kept, as its graphs take seconds to compile."""
    if model.decoder is None or model.decoder.batch != batch:
        model.decoder = Decoder(model, batch)
    return model.decoder


def context_of(model, batch):
    """A :class:`Decoder`, or where global layers do not allow it, with a warning, an :class:`UncachedContext`."""
    if can_be_cached(model):
        return decoder_of(model, batch)
    warnings.warn(
        "global_attn_layer has no method decoding_cell: each token computes the whole text again", stacklevel=3
    )
    return UncachedContext(model, batch)


def generate_tokens(context, prompt, length, *, temperature=1.0, top_k=None, top_p=None, seed=0):
    """Continue a prompt, in each row of the batch with another stream of random numbers.

    Args:
        context: a :class:`Context`; it forgets what it was fed before.
        prompt: integers, at least one: ``(n,)`` for all rows, or ``(b, n)``.
        length: tokens to draw; None: without end.
        temperature, top_k, top_p: see :func:`next_token_probabilities`.
        seed: a whole number from 0 to 2**32 - 1, or a tuple of them; with the same seed, prompt and weights row ``i``
            is the same, whatever the batch.

    Yields:
        ``(b,)`` int32, ``length`` times, each as soon as it is drawn.

    Raises:
        ValueError: for an empty prompt.
    """
    prompt = np.asarray(prompt, np.int32)
    if prompt.shape[-1] == 0:
        raise ValueError("expected a prompt of at least one token, got none")
    streams = [np.random.RandomState([*np.atleast_1d(seed), row]) for row in range(context.batch)]
    context.reset()
    logits = context.feed(np.broadcast_to(prompt, (context.batch, prompt.shape[-1])))[:, -1]
    for i in count() if length is None else range(length):
        probabilities = [next_token_probabilities(row, temperature, top_k, top_p) for row in logits]
        tokens = np.array([draw(p, s.random_sample()) for p, s in zip(probabilities, streams)], np.int32)
        yield tokens
        if i + 1 != length:
            logits = context.feed(tokens)
