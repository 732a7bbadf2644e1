"""Token by token with a key/value cache, one compiled graph a token."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.hyper_connections import expand_streams, reduce_streams
from local_attention.local_attention import TOKEN_SELF_ATTN_VALUE
from local_attention.rotary import rotary_angles, xpos_decay
from local_attention.sampling import draw, next_token_probabilities
from local_attention.windows import hide, visible


class DecodeStep(nn.Cell):
    """The logits after one more token.

    The keys and values that later tokens may still see lie in a ring for each layer, of a size that depends on the
    window alone; keys already rotated, by their absolute positions (scores depend on the difference), but without the
    decay of xPos, which would leave float32's range.
    """

    def __init__(self, model, batch):
        super().__init__(auto_prefix=False)
        self.model = model
        attention, heads = model.layers[0].attention.attention, model.layers[0].attention.heads
        self.rel_pos, self.l2_norm, self.use_xpos = attention.rel_pos, attention.l2_norm, attention.use_xpos
        self.batch, self.rows = batch, batch * heads
        self.d, self.size = model.layers[0].attention.dim_head, ring_size(attention)
        shape = (self.rows * self.size, self.d)
        self.keys, self.values = (
            ms.ParameterTuple(
                Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{name}.{i}", requires_grad=False)
                for i in range(len(model.layers))
            )
            for name in ("cached_keys", "cached_values")
        )
        self.scale = self.d**-0.5 if attention.scale is None else attention.scale
        self.write = ops.ScatterUpdate()
        self.matmul, self.matmul_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.softmax = ops.Softmax(-1)

    def construct(self, tokens, position, slots, bias, cos, sin, distance, decay):
        """One step.

        Args:
            tokens: ``(b,)`` int32.
            position: ``(1,)`` int32, for learned positions.
            slots: ``(b * heads,)`` int32, the rows of the ring that take the new keys and values.
            bias: ``(1, 1, size)`` float32, 0 for the slots that are visible, hugely negative for the others.
            cos, sin: ``(b * heads, d)`` float32, of the position's rotary angles.
            distance: ``(size, 1)`` float32, tokens from each slot's to this one, for the dynamic bias.
            decay: ``(1, size, d)`` float32, that of xPos over these distances; without it anything.

        Returns:
            ``(b, num_tokens)``.
        """
        x = self.model.token_emb(tokens)
        if self.model.use_abs_pos_emb:
            x = x + self.model.pos_emb(position)
        if self.model.dynamic_pos_bias is not None:
            of_head = self.model.dynamic_pos_bias.mlp(distance).transpose(1, 0)
            bias = bias + ops.cat((of_head,) * self.batch, 0).reshape((self.rows, 1, self.size))
        x = expand_streams(x, self.model.streams)
        for i in range(len(self.keys)):
            layer = self.model.layers[i]
            taken, x, beta = layer.attention_connection.before(x)
            out = self.attend(i, layer.attention, taken, slots, bias, cos, sin, decay)
            x = layer.feed(layer.attention_connection.after(out, x, beta))
        return self.model.logits(reduce_streams(x, self.model.streams))

    def attend(self, i, mha, x, slots, bias, cos, sin, decay):
        q, k, v, gates = mha.project(x)
        q, k, v = [t.reshape((self.rows, self.d)) for t in (q, k, v)]
        if self.l2_norm is not None:
            k = self.l2_norm(k)
        if self.rel_pos is not None:
            q, k = self.rel_pos.rotate(q, cos, sin), self.rel_pos.rotate(k, cos, sin)
        ring = (self.rows, self.size, self.d)
        keys = self.write(self.keys[i], slots, k).reshape(ring)
        values = self.write(self.values[i], slots, v).reshape(ring)
        if self.rel_pos is not None and self.use_xpos:
            keys = keys * decay
        weights = self.softmax(self.matmul_nt(q.reshape((self.rows, 1, self.d)), keys) * self.scale + bias)
        return mha.merge(self.matmul(weights, values).reshape((x.shape[0], -1)), gates)


def ring_size(attention):
    """How many of the newest keys, its own included, a causal query may see."""
    window, back = attention.window_size, attention.look_backward
    return window * back + 1 if attention.exact_windowsize else window * (back + 1)


class Decoder:
    """Feeds tokens to a :class:`DecodeStep` and keeps track of positions.

    With learned positions the context starts again from its newest half when they run out, at ``max_seq_len``.

    Args:
        model: a causal ``LocalTransformer``.
        batch: sequences that run side by side.

    Raises:
        ValueError: for a model that is not causal, has no tokens or has global layers.
    """

    def __init__(self, model, batch=1):
        self.batch = batch
        self.attention = model.layers[0].attention.attention
        if model.num_tokens is None or not self.attention.causal:
            raise ValueError("expected a causal model with num_tokens, as later tokens are decoded from earlier ones")
        if any(layer.global_attention is not None for layer in model.layers):
            raise ValueError("expected a model without global_attn_layer: its keys are not cached")
        self.limit = model.max_seq_len if model.use_abs_pos_emb else None
        self.step = DecodeStep(model, batch)
        self.reset()

    def reset(self):
        """Forget the context."""
        self.position = 0
        self.newest = []  # as many tokens as it takes to start again; empty without learned positions

    def feed(self, tokens):
        """Append ``tokens: (b,)`` to the context; returns the logits of the next ones, ``(b, num_tokens)`` float32."""
        tokens = np.asarray(tokens, np.int32)
        if self.limit is not None:
            if self.position == self.limit:
                kept = self.newest[self.limit - self.limit // 2 :]
                self.reset()
                for earlier in kept:
                    self.feed(earlier)
            self.newest.append(tokens)
        logits = self.step(Tensor(tokens), *map(Tensor, self.inputs()))
        self.position += 1
        return logits.asnumpy()

    def inputs(self):
        """The arguments of :class:`DecodeStep` that depend on the position."""
        size, rows = self.step.size, self.step.rows
        distance = (self.position - np.arange(size)) % size  # to the newest position that falls to each slot
        held = self.position - distance
        seen = visible(
            self.position, held, length=self.position + 1, **dict(self.attention.layout(self.attention.window_size)[3])
        )
        itself = TOKEN_SELF_ATTN_VALUE * self.attention.shared_qk * (distance == 0)
        angles, decay = np.zeros((1, self.step.d)), np.zeros((size, self.step.d))
        if self.attention.rel_pos is not None:
            angles = rotary_angles([self.position], self.step.d, self.attention.rel_pos.theta)
            if self.attention.use_xpos:
                decay = xpos_decay(distance, self.step.d, self.attention.rel_pos.scale_base)
        angles = np.tile(angles, (rows, 1))
        return (
            np.array([self.position], np.int32),
            (np.arange(rows) * size + self.position % size).astype(np.int32),
            (hide(seen) + itself.astype(np.float32)).reshape(1, 1, size),
            np.cos(angles).astype(np.float32),
            np.sin(angles).astype(np.float32),
            distance.astype(np.float32)[:, None],
            decay.astype(np.float32)[None],
        )


def generate_tokens(decoder, prompt, length, *, temperature=1.0, top_k=None, top_p=None, seed=0):
    """Continue a prompt, in each row of the decoder's batch with another stream of random numbers.

    Args:
        decoder: a :class:`Decoder`; it forgets what it was fed before.
        prompt: ``(n,)`` integers, at least one.
        length: tokens to draw.
        temperature, top_k, top_p: see :func:`next_token_probabilities`.
        seed: a whole number from 0 to 2**32 - 1, or a tuple of them; with the same seed, prompt and weights row ``i``
            is the same, whatever the batch.

    Yields:
        ``(b,)`` int32, ``length`` times, each as soon as it is drawn.

    Raises:
        ValueError: for an empty prompt.
    """
    if len(prompt) == 0:
        raise ValueError("expected a prompt of at least one token, got none")
    streams = [np.random.RandomState([*np.atleast_1d(seed), row]) for row in range(decoder.batch)]
    decoder.reset()
    for token in prompt:
        logits = decoder.feed(np.full(decoder.batch, token))
    for i in range(length):
        probabilities = [next_token_probabilities(row, temperature, top_k, top_p) for row in logits]
        tokens = np.array([draw(p, s.random_sample()) for p, s in zip(probabilities, streams)], np.int32)
        yield tokens
        if i + 1 < length:
            logits = decoder.feed(tokens)
