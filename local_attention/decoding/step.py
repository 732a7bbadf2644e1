"""One decode step, and the loop that decodes several tokens per call, as compiled graphs."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.backends import can_compute, choose_backend
from local_attention.backends.cached import CachedMHA
from local_attention.backends.cached_cpu import CachedMHAOperator, FeedForwardOperator, PrefillMHAOperator
from local_attention.decoding.cache import KVCache
from local_attention.decoding.interface import DecodableModel
from local_attention.decoding.sampling import Sampler


class DecodeStep(nn.Cell):
    """The logits after each of ``count`` more tokens per sequence.

    The model's own forward pass, with layers that attend to the KV cache.

    Args:
        model: a causal model with tokens.
        batch: number of sequences.
        count: tokens per sequence and call.
        cache: their :class:`KVCache`.
        global_cells: the :func:`decoding_cells` of the model.
        use_kernels: whether layers may be computed by the operators in C++.
    """

    def __init__(
        self,
        model: DecodableModel,
        batch: int,
        count: int,
        cache: KVCache,
        global_cells: list[nn.Cell],
        use_kernels: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.batch, self.count, self.slots_per_row = model, batch, count, cache.length + 1
        operator = CachedMHAOperator if count == 1 else PrefillMHAOperator
        backends = [operator, CachedMHA] if use_kernels else [CachedMHA]
        remaining = iter(global_cells)
        layers = []
        for layer, keys, values in zip(model.layers, cache.keys, cache.values):
            attention = choose_backend(backends, layer.attention)(layer.attention, keys, values)
            feed_forward = layer.feed_forward
            if use_kernels and count == 1 and can_compute(FeedForwardOperator, feed_forward):
                feed_forward = FeedForwardOperator(feed_forward)
            global_attention = next(remaining) if layer.global_attention is not None else None
            layers.append(layer.with_branches(attention, feed_forward, global_attention))
        self.layers = nn.CellList(layers, auto_prefix=False)

    def construct(self, tokens, previous, positions, slots, mask, rotation, distances, decay):
        """One step.

        Args:
            tokens: ``(b, count)`` int32.
            previous: ``(b, max_ngram - 1)`` int32, 1 + the tokens before these, for n-grams; 0 where there is none.
            positions, …: a :class:`StepInputs`, of one step.

        Returns:
            ``(b, count, num_tokens)``.
        """
        bias = self.model.distance_bias(distances, self.slots_per_row)
        if bias is not None:
            mask = mask + ops.cat((bias,) * self.batch, 0).reshape((-1, self.count, mask.shape[-1]))
        x = self.model.embed_next(tokens, previous, positions)
        return self.model.logits(self.model.run_layers(self.layers, x, (slots, mask, rotation, decay), (positions,)))


class DecodeLoop(nn.Cell):
    """Decodes tokens one after another through a :class:`DecodeStep`: given ones, and those sampled just before.

    Args:
        step: a :class:`DecodeStep` of one token.
        steps_per_call: the most tokens per call.
        num_tokens: size of the vocabulary.
    """

    def __init__(self, step: DecodeStep, steps_per_call: int, num_tokens: int) -> None:
        super().__init__(auto_prefix=False)
        self.step, self.sampler, self.use_ngrams = step, Sampler(num_tokens), step.model.ngram_emb is not None
        self.write = ops.ScatterUpdate()

        def output(name: str, shape: tuple[int, ...], dtype: type) -> Parameter:
            return Parameter(Tensor(np.zeros(shape, dtype)), name=name, requires_grad=False)

        self.sampled = output("sampled", (steps_per_call, step.batch), np.int32)
        self.logits = output("logits", (steps_per_call, step.batch, num_tokens), np.float32)

    def construct(self, count, given, previous, uniforms, inverse_temperature, rank_bias, top_p, *inputs):
        """Decode ``count`` tokens per sequence, and sample one after each.

        Args:
            count: () int32, at most ``steps_per_call``.
            given: ``(steps_per_call, b)`` int32, the tokens to decode; -1: the one sampled just before.
            previous: see :class:`DecodeStep`.
            uniforms: ``(steps_per_call, b, 1)`` float32, a random number from [0, 1) for each token to sample.
            inverse_temperature, rank_bias, top_p: see :class:`Sampler`.
            inputs: a :class:`StepInputs`.

        Returns:
            ``(steps_per_call, b)`` sampled tokens and ``(steps_per_call, b, num_tokens)`` logits, of which the first
            ``count`` are of this call.
        """
        i = Tensor(0, ms.int32)
        sampled = self.sampled[0]  # has no meaning yet
        while i < count:
            step_inputs = ()
            for stacked in inputs:
                step_inputs = step_inputs + (ops.gather(stacked, i, 0),)
            tokens = ops.gather(given, i, 0)
            tokens = ops.select(tokens < 0, sampled, tokens).reshape((-1, 1))
            logits = self.step(tokens, previous, *step_inputs)
            if self.use_ngrams:
                previous = ops.cat((previous, 1 + tokens), 1)[:, 1:]
            logits = logits.reshape((self.step.batch, -1))
            sampled = self.sampler(logits, ops.gather(uniforms, i, 0), inverse_temperature, rank_bias, top_p)
            self.write(self.sampled, i.reshape(1), sampled.reshape((1, -1)))
            self.write(self.logits, i.reshape(1), logits.reshape((1, self.step.batch, -1)))
            i = i + 1
        return self.sampled, self.logits
