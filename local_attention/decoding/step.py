"""One decode step, and the loop that decodes several tokens per call, as compiled graphs."""

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.backends import can_compute, choose_backend
from local_attention.backends.cached import CachedMHA
from local_attention.backends.cached_cpu import CachedMHAOperator, FeedForwardOperator, PrefillMHAOperator
from local_attention.decoding.cache import KVCache, StepInputs
from local_attention.decoding.interface import DecodableModel
from local_attention.decoding.sampling import Sampler
from local_attention.precision import cast

INPUTS = len(StepInputs._fields)


class DecodeStep(nn.Cell):
    """The logits after each of ``count`` more tokens per sequence: the model's own forward pass, with a KV cache.

    Args:
        model: a causal model with tokens.
        caches: each :class:`KVCache` of the model, see :func:`decoding.cache.caches_of`.
        count: tokens per sequence and call.
        global_cells: the :func:`decoding_cells` of the model.
        kernels: whether layers may be computed by the operators in C++.
    """

    def __init__(
        self, model: DecodableModel, caches: Sequence[KVCache], count: int, global_cells: list, kernels: bool
    ) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.batch, self.count = model, caches[0].batch, count
        # of the caches that hold what local attention sees, as the dynamic position bias is for its windows alone
        self.biased_slots = tuple(0 if cache.is_global else cache.length + 1 for cache in caches)
        cached = {
            id(mha): (1 + i, keys, values)
            for i, cache in enumerate(caches)
            for mha, keys, values in zip(cache.mhas, cache.keys, cache.values)
        }
        operator = CachedMHAOperator if count == 1 else PrefillMHAOperator
        backends = [operator, CachedMHA] if kernels else [CachedMHA]
        remaining = iter(global_cells)
        layers, inputs_of_layers = [], []

        def with_cache(mha: nn.Cell) -> tuple[nn.Cell, int]:
            inputs, keys, values = cached[id(mha)]
            return choose_backend(backends, mha)(mha, keys, values), inputs

        for layer in model.layers:
            attention, of_attention = with_cache(layer.attention)
            feed_forward = layer.feed_forward
            if kernels and count == 1 and can_compute(FeedForwardOperator, feed_forward):
                feed_forward = FeedForwardOperator(feed_forward)
            global_attention, of_global = None, 0
            if id(layer.global_attention) in cached:
                global_attention, of_global = with_cache(layer.global_attention)
            elif layer.global_attention is not None:
                global_attention = next(remaining)
            layers.append(layer.with_branches(attention, feed_forward, global_attention))
            inputs_of_layers.append((of_attention, of_global))
        self.inputs_of_layers = tuple(inputs_of_layers)
        self.layers = nn.CellList(layers, auto_prefix=False)

    def construct(self, tokens, previous, positions, *step_inputs):
        """One step, for ``tokens: (b, count)`` int32; returns ``(b, count, num_tokens)`` float32.

        Args:
            tokens: ``(b, count)`` int32.
            previous: ``(b, max_ngram - 1)`` int32, 1 + the tokens before these, for n-grams; 0 where there is none.
            positions: ``(count,)`` int32, for learned positions.
            step_inputs: the :class:`StepInputs` of one step, of each cache, one behind the other.
        """
        return self.step(tokens, previous, positions, step_inputs)

    def step(self, tokens, previous, positions, step_inputs):
        """:meth:`construct`; a method, as MindSpore 2.10 never frees a cell that calls another with *step_inputs."""
        inputs = ((positions,),)
        for i, biased_slots in enumerate(self.biased_slots):
            slots, mask, rotation, distances, decay = step_inputs[INPUTS * i : INPUTS * (i + 1)]
            bias = self.model.distance_bias(distances, biased_slots) if biased_slots > 0 else None
            if bias is not None:
                biases = (cast(bias, mask.dtype),) * self.batch
                mask = mask + ops.cat(biases, 0).reshape((-1, self.count, mask.shape[-1]))
            inputs = inputs + ((slots, mask, rotation, decay),)
        x = self.model.embed_next(tokens, previous, positions)
        hidden = self.model.run_layers(self.layers, x, inputs, self.inputs_of_layers)
        return cast(self.model.logits(hidden), ms.float32)


class DecodeLoop(nn.Cell):
    """Decodes tokens one after another through a :class:`DecodeStep` of one token, and samples one after each.

    Args:
        step: the :class:`DecodeStep`.
        max_steps: the most tokens per call.
        num_tokens: size of the vocabulary.
    """

    def __init__(self, step: DecodeStep, max_steps: int, num_tokens: int) -> None:
        super().__init__(auto_prefix=False)
        self.step, self.sampler, self.use_ngrams = step, Sampler(num_tokens), step.model.ngram_emb is not None
        self.write = ops.ScatterUpdate()
        sampled = Tensor(np.zeros((max_steps, step.batch), np.int32))
        logits = Tensor(np.zeros((max_steps, step.batch, num_tokens), np.float32))
        self.sampled = Parameter(sampled, name="sampled", requires_grad=False)
        self.logits = Parameter(logits, name="logits", requires_grad=False)

    def construct(self, count, given, previous, uniforms, inverse_temperature, token_bias, rank_bias, top_p, *inputs):
        """Decode ``count`` tokens per sequence.

        Args:
            count: () int32, at most ``max_steps``.
            given: ``(max_steps, b)`` int32, the tokens to decode; -1: the one sampled just before.
            previous: see :class:`DecodeStep`.
            uniforms: ``(max_steps, b, 1)`` float32, a random number from [0, 1) for each token to sample.
            inverse_temperature, …: a :class:`SamplingRule`.
            inputs: the positions, and the :class:`StepInputs` of each cache.

        Returns:
            ``(max_steps, b)`` sampled tokens and ``(max_steps, b, num_tokens)`` logits; ``count`` are of this call.
        """
        i = Tensor(0, ms.int32)
        sampled = self.sampled[0]  # has no meaning yet
        while i < count:
            step_inputs = ()
            for stacked in inputs:
                step_inputs = step_inputs + (ops.gather(stacked, i, 0),)
            tokens = ops.gather(given, i, 0)
            tokens = ops.select(tokens < 0, sampled, tokens).reshape((-1, 1))
            logits = self.step.step(tokens, previous, step_inputs[0], step_inputs[1:])
            if self.use_ngrams:
                previous = ops.cat((previous, 1 + tokens), 1)[:, 1:]
            logits = logits.reshape((self.step.batch, -1))
            uniform = ops.gather(uniforms, i, 0)
            sampled = self.sampler(logits, uniform, inverse_temperature, token_bias, rank_bias, top_p)
            self.write(self.sampled, i.reshape(1), sampled.reshape((1, -1)))
            self.write(self.logits, i.reshape(1), logits.reshape((1, self.step.batch, -1)))
            i = i + 1
        return self.sampled, self.logits
