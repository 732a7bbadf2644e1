"""Generation with a key/value cache: one compiled graph draws up to 16 tokens, another takes a prompt in chunks."""

import warnings
from contextlib import contextmanager
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.decoding.sampling import Sampler, sampling_rule
from local_attention.einops_mindspore import Rearrange
from local_attention.hyper_connections import expand_streams, reduce_streams
from local_attention.kernels import LayerKernels, can_use_kernels
from local_attention.local_attention import TOKEN_SELF_ATTN_VALUE
from local_attention.rotary import rotation_matrices, xpos_decay
from local_attention.windows import hide, visible

CHUNK = 256  # tokens of a prompt that one graph takes at once
# Tokens from which on compiling that graph, which takes as long as a thousand tokens with kernels.cpp, is worth while
CHUNK_FROM, CHUNK_FROM_WITH_KERNELS = 256, 1024
# Tokens that one call of a graph may draw, one after another: 4.7 ms per token one by one, 2.6 sixteen at a time
STEPS_PER_CALL = 16


class DecodeStep(nn.Cell):
    """The logits after each of ``count`` more tokens.

    The keys and values that later tokens may still see lie in a ring for each layer, of a size that depends on the
    window alone, and one slot more, which nobody sees, for what need not be kept; keys already rotated, by their
    absolute positions (scores depend on the difference), but without the decay of xPos, which would leave float32's
    range.

    Args:
        model: a causal ``LocalTransformer`` with tokens.
        batch: sequences side by side.
        count: tokens a call.
        rings: keys and values of all layers, each ``(b * heads * slots, d)``.
        global_steps: the :func:`decoding_cells` of the model.
        use_kernels: compute the layers by the operators in C++ of :mod:`kernels`; for a count of 1.
    """

    def __init__(self, model, batch, count, rings, global_steps, use_kernels):
        super().__init__(auto_prefix=False)
        self.model = model
        mha = model.layers[0].attention
        self.rel_pos, self.l2_norm, self.use_xpos = mha.attention.rel_pos, mha.attention.l2_norm, mha.attention.use_xpos
        self.keys, self.values = rings
        self.global_steps = nn.CellList(global_steps)
        self.batch, self.rows, self.count, self.d = batch, batch * mha.heads, count, mha.dim_head
        self.ring = (self.rows, self.keys[0].shape[0] // self.rows, self.d)
        self.scale = score_scale(mha)
        self.kernels = None
        if use_kernels:
            self.kernels = nn.CellList([LayerKernels(layer, self.scale) for layer in model.layers], auto_prefix=False)
        self.split_heads = Rearrange("(b n) (h d) -> (b h n) d", b=batch, h=mha.heads)
        self.tokens_first = Rearrange("(b h n) d -> n (b h) d", n=count, b=batch)
        self.tokens_last = Rearrange("n g d -> (g n) d")
        self.join_heads = Rearrange("(b h) n d -> (b n) (h d)", b=batch)
        self.write = ops.ScatterUpdate()
        self.matmul, self.matmul_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.softmax = ops.Softmax(-1)

    def construct(self, tokens, before, positions, slots, bias, turn_query, turn_key, distances, decay):
        """One step; the arguments from ``positions`` on as :meth:`DecodingSession.inputs` gives them, of one step.

        Args:
            tokens: ``(b * count,)`` int32.
            before: ``(b, max_ngram - 1)`` int32, 1 + the tokens before these, for n-grams; 0 where there is none.
            positions: ``(count,)`` int32, for learned positions.
            slots: ``(b * heads * count,)`` int32, the rows of the rings that take the new keys and values.
            bias: ``(1, count, span)`` float32, 0 for the keys that a token sees, hugely negative for the others. The
                keys are those of the rings' slots; of more than one token also their own, behind them.
            turn_query, turn_key: ``(count, d, d)`` float32, what each token's queries and keys are multiplied by: their
                rotation, for queries also the factor of the scores and the decay of xPos.
            distances: ``(count * span,)`` int32, tokens from each key's to each of these, for the dynamic bias.
            decay: ``(1, span, d)`` float32, the decay of xPos of the keys.

        Returns:
            ``(b, count, num_tokens)``.
        """
        x = self.model.token_emb(tokens)
        if self.model.ngram_emb is not None:
            keys = self.model.ngram_emb.keys(ops.cat((before, 1 + tokens.reshape((self.batch, -1))), 1))
            x = x + self.model.ngram_emb.combine(self.model.ngram_emb.look_up(keys))
        if self.model.use_abs_pos_emb:
            x = x + ops.cat((self.model.pos_emb(positions),) * self.batch, 0)
        if self.model.dynamic_pos_bias is not None:
            of_head = self.model.dynamic_pos_bias.gather(self.ring[1], distances)
            bias = bias + ops.cat((of_head,) * self.batch, 0).reshape((self.rows, self.count, -1))
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
            out = self.attend(i, layer.attention, taken, slots, bias, turn_query, turn_key, decay)
            x = layer.attention_connection.after(out, x, beta)
            taken, x, beta = layer.feed_forward_connection.before(x)
            x = layer.feed_forward_connection.after(self.feed_forward(i, layer, taken), x, beta)
        logits = self.model.logits(reduce_streams(x, self.model.streams))
        return logits.reshape((self.batch, self.count, -1))

    def attend(self, i, mha, x, slots, bias, turn_query, turn_key, decay):
        if self.kernels is not None:
            return self.kernels[i].attend(x, self.keys[i], self.values[i], slots, bias, turn_query, turn_key, decay)
        q, k, v, gates = mha.project(x)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        if self.l2_norm is not None:
            k = self.l2_norm(k)
        if self.rel_pos is None:
            q = q * self.scale
        else:
            q, k = self.turn(q, turn_query), self.turn(k, turn_key)
        of_heads = (self.rows, self.count, self.d)
        q, own_k, own_v = q.reshape(of_heads), k.reshape(of_heads), v.reshape(of_heads)
        if self.count == 1:
            keys, values = self.write(self.keys[i], slots, k), self.write(self.values[i], slots, v)
            return mha.merge(self.look(q, keys.reshape(self.ring), values.reshape(self.ring), bias, decay), gates)
        keys, values = self.keys[i].reshape(self.ring), self.values[i].reshape(self.ring)
        out = self.look(q, ops.cat((keys, own_k), 1), ops.cat((values, own_v), 1), bias, decay)
        # not before these tokens have seen what will be overwritten
        self.write(self.keys[i], slots, ops.depend(k, out))
        self.write(self.values[i], slots, ops.depend(v, out))
        return mha.merge(out, gates)

    def feed_forward(self, i, layer, x):
        if self.kernels is not None:
            return self.kernels[i].feed_forward(x)
        return layer.feed_forward(x)

    def look(self, q, keys, values, bias, decay):
        if self.rel_pos is not None and self.use_xpos:
            keys = keys * decay
        return self.join_heads(self.matmul(self.softmax(self.matmul_nt(q, keys) + bias), values))

    def turn(self, x, matrices):
        """Multiply the rows of each token ``x: (b * heads * count, d)`` by its matrix: one operator."""
        return self.tokens_last(self.matmul(self.tokens_first(x), matrices))


class DecodeLoop(nn.Cell):
    """Feeds tokens one after another through a :class:`DecodeStep`, given ones and those drawn just before.

    Args:
        step: a :class:`DecodeStep` of one token.
        burst: the most tokens a call.
        num_tokens: size of the vocabulary.
    """

    def __init__(self, step, burst, num_tokens):
        super().__init__(auto_prefix=False)
        self.step, self.sampler = step, Sampler(num_tokens)
        self.write = ops.ScatterUpdate()

        def output(name, shape, dtype):
            return Parameter(Tensor(np.zeros(shape, dtype)), name=name, requires_grad=False)

        self.drawn = output("drawn", (burst, step.batch), np.int32)
        self.logits = output("logits", (burst, step.batch, num_tokens), np.float32)

    def construct(self, count, given, continued, before, uniforms, inverse_temperature, rank_bias, top_p, *inputs):
        """Feed ``count`` tokens a row, and draw one after each.

        Args:
            count: () int32, at most ``burst``.
            given: ``(burst, b)`` int32, the tokens to feed; 0 for those drawn just before.
            continued: ``(burst, b)`` int32, 1 for those.
            before: see :class:`DecodeStep`.
            uniforms: ``(burst, b, 1)`` float32, a random number from [0, 1) for each token to draw.
            inverse_temperature, rank_bias, top_p: see :class:`Sampler`.
            inputs: those of the steps, each with an axis of steps in front.

        Returns:
            ``(burst, b)`` tokens drawn and ``(burst, b, num_tokens)`` logits, of which ``count`` are of this call.
        """
        i = Tensor(0, ms.int32)
        drawn = self.drawn[0]  # of no meaning yet
        while i < count:
            of_step = ()
            for stacked in inputs:
                of_step = of_step + (ops.gather(stacked, i, 0),)
            tokens = ops.gather(given, i, 0) + ops.gather(continued, i, 0) * drawn
            logits = self.step(tokens, before, *of_step)
            if self.step.model.ngram_emb is not None:
                before = ops.cat((before, 1 + tokens.reshape((-1, 1))), 1)[:, 1:]
            logits = logits.reshape((self.step.batch, -1))
            drawn = self.sampler(logits, ops.gather(uniforms, i, 0), inverse_temperature, rank_bias, top_p)
            self.write(self.drawn, i.reshape(1), drawn.reshape((1, -1)))
            self.write(self.logits, i.reshape(1), logits.reshape((1, self.step.batch, -1)))
            i = i + 1
        return self.drawn, self.logits


def use_phase_of_decoding(cell):
    """Let MindSpore call the cell's graph, once compiled, without looking cell by cell for changes: 1 ms a call."""
    cell.phase = "increment"


def score_scale(mha):
    """The factor of a :class:`LocalMHA`'s scores."""
    return mha.dim_head**-0.5 if mha.attention.scale is None else mha.attention.scale


def cache_length(attention):
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
        self.before = 0 if model.ngram_emb is None else model.ngram_emb.before  # tokens that a token's n-grams need
        self.reset()

    def reset(self):
        """Forget the context."""
        self.length = 0  # tokens fed
        self.position = 0  # those of them that count
        self.newest = np.zeros((self.batch, 0), np.int32)  # what it takes to start again, and for n-grams

    def feed(self, tokens):
        """Append tokens to the context and return the logits of those that come after each of them.

        ``tokens: (b,)``, or ``(b, n)`` for several; returns ``(b, num_tokens)``, or ``(b, n, num_tokens)``, float32.
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim == 1:
            return self.feed(tokens[:, None])[:, 0]
        logits = []
        with eval_mode(self.model):
            while tokens.shape[1]:
                room = self.room(tokens.shape[1])
                logits.append(self.advance(tokens[:, :room]))
                self.count(tokens[:, :room])
                tokens = tokens[:, room:]
        return np.concatenate(logits, 1)

    def draw(self, tokens, uniforms, rule):
        """Append tokens to the context and draw more of them; all but the last one drawn are appended, too.

        Args:
            tokens: ``(b, n)``, n >= 1.
            uniforms: ``(b, m)`` numbers from [0, 1), one for each token to draw.
            rule: a :class:`SamplingRule`.

        Returns:
            ``(b, m)`` int32.
        """
        tokens, drawn = np.asarray(tokens, np.int32), []
        newest, tokens = tokens[:, -1:], self.skip_forgotten(tokens[:, :-1])
        if tokens.shape[1]:
            self.feed(tokens)
        with eval_mode(self.model):
            while uniforms.shape[1]:
                drawn.append(self.draw_some(newest[:, 0], uniforms[:, : self.room(uniforms.shape[1])], rule))
                some = drawn[-1].shape[1]
                self.count(np.concatenate([newest, drawn[-1][:, :-1]], 1))
                newest, uniforms = drawn[-1][:, -1:], uniforms[:, some:]
        return np.concatenate(drawn, 1)

    def skip_forgotten(self, tokens):
        """Append those of ``tokens: (b, n)`` that the context's last start leaves behind, and return the others."""
        beyond = 0 if self.limit is None else self.position + tokens.shape[1] - self.limit
        if beyond <= 0:
            return tokens
        between_starts = self.limit - self.limit // 2
        others = 1 + (beyond - 1) % between_starts
        self.count(tokens[:, :-others])
        self.position = self.limit
        return tokens[:, -others:]

    def room(self, count):
        """How many of ``count`` more tokens the context takes before it starts again; it does so here, if it must."""
        if self.position == self.limit:
            length, kept = self.length, self.newest[:, self.limit - self.limit // 2 :]
            self.reset()
            if kept.shape[1]:
                self.advance(kept)
                self.count(kept)
            self.length = length
        return count if self.limit is None else min(count, self.limit - self.position)

    def count(self, tokens):
        """Note that these were fed."""
        self.length += tokens.shape[1]
        self.position += tokens.shape[1]
        newest = np.concatenate([self.newest, tokens], 1)
        self.newest = newest[:, max(0, newest.shape[1] - (self.limit or self.before)) :]


@contextmanager
def eval_mode(model):
    """No dropout meanwhile."""
    was_training = model.training
    if was_training:
        model.set_train(False)
    try:
        yield
    finally:
        if was_training:
            model.set_train()


class DecodingSession(Context):
    """A :class:`Context` with a key/value cache: each token costs the same, however long the text.

    Args:
        model, batch: see :class:`Context`.
        chunk: tokens that are fed at once where many come together.
        chunk_from: how many are many; None: ``CHUNK_FROM``, with kernels ``CHUNK_FROM_WITH_KERNELS`` unless the context
            starts again so often that compiling pays. Below, tokens are fed one by one, and nothing is compiled for
            them. With global layers they are always fed one by one.
        burst: the most tokens that are fed one by one in a call of the graph.
        use_kernels: feed them through the operators in C++ of :mod:`kernels`; None: where these can be used.

    Raises:
        ValueError: as :class:`Context`; for a model with global layers that cannot be fed token by token, see
            :func:`decoding_cells`; for ``use_kernels`` where they cannot be used.
    """

    def __init__(self, model, batch=1, chunk=CHUNK, chunk_from=None, burst=STEPS_PER_CALL, use_kernels=None):
        super().__init__(model, batch)
        if use_kernels and not can_use_kernels(model):
            raise ValueError(
                "expected use_kernels=False: the operators need Linux, a C++ compiler when pip installs this package, "
                "a CPU and a model in float32"
            )
        self.use_kernels = can_use_kernels(model) if use_kernels is None else use_kernels
        if not can_be_cached(model):
            raise ValueError(
                "expected a global_attn_layer with a method decoding_cell, as it is to be fed token by token"
            )
        self.global_steps = decoding_cells(model, batch)
        mha = model.layers[0].attention
        self.attention, self.rows, self.d = mha.attention, batch * mha.heads, mha.dim_head
        self.scale = score_scale(mha)
        if self.attention.rel_pos is not None and self.attention.use_xpos:
            # over a longer chunk the decay, 3.5 ** (chunk / base), would leave float32's range
            chunk = max(1, min(chunk, int(55 * self.attention.rel_pos.scale_base)))
        if chunk_from is None:
            often = self.limit is not None and self.limit // 2 < CHUNK_FROM_WITH_KERNELS  # as the context starts again
            chunk_from = CHUNK_FROM_WITH_KERNELS if self.use_kernels and not often else CHUNK_FROM
        self.chunk, self.chunk_from, self.burst = chunk, chunk_from, burst
        self.size = cache_length(mha.attention)
        shape = (self.rows * (self.size + 1), self.d)
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
        self.steps = {}  # by number of tokens a step, made when first needed
        self.weights, self.addresses = list(model.get_parameters()), None
        self.likeliest = sampling_rule(model.num_tokens, temperature=0)

    def advance(self, tokens):
        """The logits after each of ``tokens: (b, n)``, ``(b, n, num_tokens)``."""
        in_chunks = tokens.shape[1] >= self.chunk_from and self.chunk > 1 and not self.global_steps
        count, take = (self.chunk, self.take_chunk) if in_chunks else (self.burst, self.take_one_by_one)
        logits = []
        for i in range(0, tokens.shape[1], count):
            before = self.numbers_before(tokens[:, :i])
            logits.append(take(tokens[:, i : i + count], before, self.position + i))
        return np.concatenate(logits, 1)

    def numbers_before(self, tokens):
        """What :class:`NgramEmbedding` is to know of the text and ``tokens: (b, n)`` behind it, ``(b, before)``."""
        numbers = 1 + np.concatenate([self.newest, tokens], 1)
        numbers = np.pad(numbers, ((0, 0), (max(1, self.before), 0)))
        return numbers[:, -max(1, self.before) :].astype(np.int32)

    def take_chunk(self, tokens, before, position):
        step = self.step(self.chunk)
        inputs = [array[0] for array in self.inputs(position, 1, self.chunk, tokens.shape[1])]
        filled = np.pad(tokens, ((0, 0), (0, self.chunk - tokens.shape[1])))
        logits = step(*map(Tensor, (filled.reshape(-1), before, *inputs)))
        return logits.asnumpy()[:, : tokens.shape[1]]

    def take_one_by_one(self, tokens, before, position):
        return self.run_loop(tokens, np.zeros(tokens.shape), self.likeliest, before, position)[1]

    def draw_some(self, tokens, uniforms, rule):
        """Feed ``tokens: (b,)`` and draw as many as a burst allows, see :meth:`draw`."""
        before = self.numbers_before(tokens[:, None][:, :0])
        return self.run_loop(tokens[:, None], uniforms[:, : self.burst], rule, before, self.position)[0]

    def run_loop(self, tokens, uniforms, rule, before, position):
        """Feed ``tokens: (b, n)`` and then what is drawn, until one is drawn for each of ``uniforms: (b, m)``.

        Returns:
            What was drawn after each, ``(b, m)``, and the logits for it, ``(b, m, num_tokens)``.
        """
        step = self.step(1)
        count, given = uniforms.shape[1], tokens.shape[1]

        def filled(array, dtype):
            return np.pad(array, ((0, 0), (0, self.burst - array.shape[1]))).T.astype(dtype)

        continued = np.tile(np.arange(self.burst)[:, None] >= given, (1, self.batch))
        arguments = (
            np.array(count, np.int32),
            filled(tokens, np.int32),
            continued.astype(np.int32),
            before,
            filled(uniforms, np.float32)[..., None],
            *rule,
        )
        drawn, logits = step(*map(Tensor, (*arguments, *self.inputs(position, self.burst, 1, 1))))
        # copies, as the arrays lie where the next call writes
        return drawn.asnumpy()[:count].T.copy(), logits.asnumpy()[:count].transpose(1, 0, 2).copy()

    def step(self, count):
        """The :class:`DecodeLoop` for tokens one by one, or a :class:`DecodeStep` of ``count`` tokens.

        A graph with a loop goes on reading the weights where they lay when it was first run (MindSpore 2.10), and
        ``Parameter.set_data``, by which weights are loaded, lets them lie elsewhere. So it is compiled again then.
        """
        addresses = [parameter.data_ptr() for parameter in self.weights]
        if addresses != self.addresses:
            self.steps, self.addresses = {}, addresses
        if count not in self.steps:
            use_kernels = self.use_kernels and count == 1
            step = DecodeStep(self.model, self.batch, count, self.rings, self.global_steps, use_kernels)
            if count == 1:
                step = DecodeLoop(step, self.burst, self.model.num_tokens)
            use_phase_of_decoding(step)
            self.steps[count] = step
        return self.steps[count]

    def inputs(self, position, steps, count, kept):
        """The arguments of :class:`DecodeStep` that depend on positions, for ``steps`` steps of ``count`` tokens.

        Of each step the first ``kept`` tokens are kept in the rings, the others fill it up. A slot holds the newest
        position that falls to it. In float64, exact however long the text.
        """
        positions = position + np.arange(steps * count).reshape(steps, count)
        last = positions[:, -1:] if count == 1 else positions[:, :1] - 1
        held = last - (last - np.arange(self.size)) % self.size
        nobody = np.full((steps, 1), -1)
        held = np.concatenate([held, nobody] if count == 1 else [held, nobody, positions], 1)
        distances = positions[:, :, None] - held[:, None]
        rule = dict(self.attention.layout(self.attention.window_size)[3])
        bias = hide(visible(positions[:, :, None], held[:, None], length=positions.max() + 1, **rule))
        bias += np.float32(TOKEN_SELF_ATTN_VALUE * self.attention.shared_qk) * (distances == 0)
        newest = (np.arange(count) < kept) & (np.arange(count) >= kept - self.size)
        slots = np.where(newest, positions % self.size, self.size)
        slots = np.arange(self.rows)[:, None] * (self.size + 1) + slots[:, None]
        turn_query = turn_key = decay = np.zeros((steps, 1, 1))
        if self.attention.rel_pos is not None:
            turns = rotation_matrices(positions.reshape(-1), self.d, self.attention.rel_pos.theta)
            turn_key = turns.reshape((steps, count, self.d, self.d))
            turn_query = turn_key * self.scale
            if self.attention.use_xpos:
                base = self.attention.rel_pos.scale_base
                decay = xpos_decay((positions[:, :1] - held).reshape(-1), self.d, base)
                decay = decay.reshape((steps, -1, self.d))
                turn_query = turn_query * xpos_decay(np.arange(count), self.d, base)[:, None]
        return (
            # what fills up a chunk or a burst may lie beyond the learned positions
            np.minimum(positions, self.model.max_seq_len - 1).astype(np.int32),
            slots.reshape((steps, -1)).astype(np.int32),
            bias[:, None].astype(np.float32),
            turn_query.astype(np.float32),
            turn_key.astype(np.float32),
            np.clip(distances, 0, self.size).reshape((steps, -1)).astype(np.int32),
            decay[:, None].astype(np.float32),
        )

    def snapshot(self):
        """The context as it is now, a :class:`Cache`."""
        return Cache(self.length, self.position, self.newest, [p.asnumpy().copy() for p in self.state])

    def restore(self, cache):
        """Go on from a :meth:`snapshot` of a decoder of the same model and batch."""
        self.length, self.position, self.newest = cache.length, cache.position, cache.newest
        for parameter, array in zip(self.state, cache.state):
            ops.assign(parameter, Tensor(array))  # set_data would put them where the compiled graph does not look


class Cache(NamedTuple):
    """What a :class:`DecodingSession` knows of a text."""

    length: int
    position: int
    newest: np.ndarray
    state: list


class UncachedSession(Context):
    """A :class:`Context` that computes everything again for each token: slow, for comparison and for global layers."""

    sampler = None

    def reset(self):
        super().reset()
        self.text = self.newest

    def advance(self, tokens):
        """The logits after each of ``tokens: (b, n)``, ``(b, n, num_tokens)``."""
        self.text = np.concatenate([self.text, tokens], 1)
        return self.model(Tensor(self.text)).asnumpy()[:, -tokens.shape[1] :]

    def draw_some(self, tokens, uniforms, rule):
        """Feed ``tokens: (b,)`` and draw the next ones, ``(b, 1)``."""
        self.sampler = self.sampler or Sampler(self.model.num_tokens)
        logits = self.advance(tokens[:, None])[:, 0]
        drawn = self.sampler(Tensor(logits), Tensor(uniforms[:, :1].astype(np.float32)), *map(Tensor, rule))
        return drawn.asnumpy()[:, None]


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
    """A model's :class:`DecodingSession`; the last one is kept, as its graphs take seconds to compile."""
    if model.decoder is None or model.decoder.batch != batch:
        model.decoder = DecodingSession(model, batch)
    return model.decoder


def context_of(model, batch):
    """A :class:`DecodingSession`; with a warning an :class:`UncachedSession` where global layers do not allow it."""
    if can_be_cached(model):
        return decoder_of(model, batch)
    warnings.warn(
        "global_attn_layer has no method decoding_cell: each token computes the whole text again", stacklevel=3
    )
    return UncachedSession(model, batch)


def generate_tokens(context, prompt, length, *, temperature=1.0, top_k=None, top_p=None, seed=0):
    """Continue a prompt, in each row of the batch with another stream of random numbers.

    Args:
        context: a :class:`Context`; it forgets what it was fed before.
        prompt: integers, at least one: ``(n,)`` for all rows, or ``(b, n)``.
        length: tokens to draw; None: without end.
        temperature, top_k, top_p: see :func:`sampling_rule`.
        seed: a whole number from 0 to 2**32 - 1, or a tuple of them; with the same seed, prompt and weights row ``i``
            is the same, whatever the batch.

    Yields:
        ``(b,)`` int32, ``length`` times, in bursts: the first token alone, then twice as many together each time, up to
        ``STEPS_PER_CALL``.

    Raises:
        ValueError: for an empty prompt.
    """
    prompt = np.asarray(prompt, np.int32)
    if prompt.shape[-1] == 0:
        raise ValueError("expected a prompt of at least one token, got none")
    rule = sampling_rule(context.model.num_tokens, temperature, top_k, top_p)
    streams = [np.random.RandomState([*np.atleast_1d(seed), row]) for row in range(context.batch)]
    context.reset()
    tokens, drawn, burst = np.broadcast_to(prompt, (context.batch, prompt.shape[-1])), 0, 1
    while drawn != length:
        count = burst if length is None else min(burst, length - drawn)
        uniforms = np.stack([stream.random_sample(count) for stream in streams])
        texts = context.draw(tokens, uniforms, rule)
        yield from texts.T
        tokens, drawn, burst = texts[:, -1:], drawn + count, min(2 * burst, STEPS_PER_CALL)
