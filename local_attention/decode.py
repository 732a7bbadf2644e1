"""Token by token with a key/value cache, one compiled graph a token."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.rotary import rotary_angles
from local_attention.sampling import draw, next_token_probabilities
from local_attention.windows import hide, visible


class DecodeStep(nn.Cell):
    """The logits after one more token, for a model with learned, rotary or no positions.

    The keys and values that later tokens may still see lie in a ring for each layer, of a size that depends on the
    window alone; keys already rotated, by their absolute positions (scores depend on the difference).
    """

    def __init__(self, model, batch):
        super().__init__(auto_prefix=False)
        self.model = model
        attention, heads = model.layers[0].attention.attention, model.layers[0].attention.heads
        self.rotary = attention.rotary
        self.rows, self.d, self.size = batch * heads, model.layers[0].attention.dim_head, ring_size(attention)
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

    def construct(self, tokens, position, slots, hidden, cos, sin):
        """One step.

        Args:
            tokens: ``(b,)`` int32.
            position: ``(1,)`` int32, for learned positions.
            slots: ``(b * heads,)`` int32, the rows of the ring that take the new keys and values.
            hidden: ``(1, 1, size)`` float32, 0 for the slots that are visible, hugely negative for the others.
            cos, sin: ``(b * heads, d)`` float32, of the position's rotary angles.

        Returns:
            ``(b, num_tokens)``.
        """
        x = self.model.token_emb(tokens)
        if self.model.use_abs_pos_emb:
            x = x + self.model.pos_emb(position)
        for i in range(len(self.keys)):
            layer = self.model.layers[i]
            x = x + self.attend(i, layer.attention, x, slots, hidden, cos, sin)
            x = x + layer.feed_forward(x)
        return self.model.logits(x)

    def attend(self, i, mha, x, slots, hidden, cos, sin):
        q, k, v = [t.reshape((self.rows, self.d)) for t in mha.project(x)]
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, cos, sin), self.rotary.rotate(k, cos, sin)
        ring = (self.rows, self.size, self.d)
        keys = self.write(self.keys[i], slots, k).reshape(ring)
        values = self.write(self.values[i], slots, v).reshape(ring)
        weights = self.softmax(self.matmul_nt(q.reshape((self.rows, 1, self.d)), keys) * self.scale + hidden)
        return mha.to_out(self.matmul(weights, values).reshape((x.shape[0], -1)))


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
        ValueError: for a model that is not causal or has no tokens.
    """

    def __init__(self, model, batch=1):
        self.batch = batch
        self.attention = model.layers[0].attention.attention
        if model.num_tokens is None or not self.attention.causal:
            raise ValueError("expected a causal model with num_tokens, as later tokens are decoded from earlier ones")
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
        held = self.position - (self.position - np.arange(size)) % size  # the newest position that falls to each slot
        seen = visible(self.position, held, length=self.position + 1, **dict(self.attention.rule))
        angles = np.tile(rotary_angles([self.position], self.step.d), (rows, 1))
        return (
            np.array([self.position], np.int32),
            (np.arange(rows) * size + self.position % size).astype(np.int32),
            hide(seen).reshape(1, 1, size),
            np.cos(angles).astype(np.float32),
            np.sin(angles).astype(np.float32),
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
