"""Sessions: sequences that grow token by token, and what a model predicts for them."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from local_attention.backends import can_compute
from local_attention.backends.cached_cpu import CachedMHAOperator
from local_attention.decoding.cache import caches_of
from local_attention.decoding.interface import DecodableModel
from local_attention.decoding.sampling import Sampler, SamplingRule, sampling_rule
from local_attention.decoding.step import DecodeLoop, DecodeStep
from local_attention.mha import MultiHeadAttention
from local_attention.mindspore_quirks import addresses_of, assign_in_place, call_without_checks, eval_mode
from local_attention.tokens import as_integers, check_range

PREFILL_CHUNK = 256  # tokens of a prompt that one graph takes at once
# Tokens from which on prefill is used. Compiling its graph takes as long as decoding 1,000 tokens in C++.
PREFILL_THRESHOLD, PREFILL_THRESHOLD_WITH_KERNELS = 256, 1024
FIRST_CAPACITY = 1024  # tokens for which the cache of global attention has slots at first, without learned positions
STEPS_PER_CALL = 16  # 2.6 ms per token, one by one 4.7


class Session(ABC):
    """Sequences, ``batch`` of them side by side, that grow token by token.

    With learned positions the context restarts from its newest half when they run out, at ``max_seq_len``.

    Args:
        model: a causal model with tokens.
        batch: number of sequences.

    Raises:
        ValueError: for a model that is not causal or has no tokens.
    """

    kept = sys.maxsize  # how many tokens of the context a session remembers

    def __init__(self, model: DecodableModel, batch: int) -> None:
        attentions = [mha.attention for layer in model.layers for mha in layer.attentions()]
        if model.num_tokens is None or not all(attention.causal for attention in attentions):
            raise ValueError("expected a causal model with num_tokens, as later tokens are decoded from earlier ones")
        self.model, self.batch, self.num_tokens = model, batch, model.num_tokens
        self.max_context = model.max_seq_len if model.use_abs_pos_emb else sys.maxsize
        self.cells = [cell for _, cell in model.cells_and_names()]
        self.sampler = Sampler(self.num_tokens)
        self.reset()

    @abstractmethod
    def advance(self, tokens: np.ndarray) -> np.ndarray:
        """Append ``tokens: (b, n)``, for which there is room; returns the logits after each, ``(b, n, num_tokens)``."""

    @abstractmethod
    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """:meth:`sample` after the first of these tokens, as many as one call takes; they are not appended."""

    def sample_from(self, logits: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """A token for each row of ``logits: (b, num_tokens)``, by ``uniforms: (b, 1)``; returns ``(b, 1)``."""
        return self.sampler(*map(Tensor, (logits, uniforms.astype(np.float32), *rule))).asnumpy()[:, None]

    def reset(self) -> None:
        """Forget the sequences."""
        self.position = 0  # of the next token in the context
        self.newest = np.zeros((self.batch, 0), np.int32)  # the last tokens of the context

    def commit(self, tokens: np.ndarray) -> None:
        """Note that ``tokens: (b, n)`` were appended."""
        self.position += tokens.shape[1]
        self.newest = np.concatenate([self.newest, tokens], 1)[:, -self.kept :]

    def feed(self, tokens: Any) -> np.ndarray:
        """Append tokens and return the logits of the tokens after each of them.

        ``tokens: (b,)``, or ``(b, n)`` for several; returns ``(b, num_tokens)``, or ``(b, n, num_tokens)``, float32.
        """
        tokens = as_integers(tokens, "tokens: (b,) or (b, n) integers", 1, 2)
        if tokens.ndim == 1:
            return self.feed(tokens[:, None])[:, 0]
        check_range(tokens, self.num_tokens)
        tokens, logits = tokens.astype(np.int32), []
        with eval_mode(self.cells):
            while tokens.shape[1]:
                count = self.ensure_capacity(tokens.shape[1])
                logits.append(self.advance(tokens[:, :count]))
                tokens = tokens[:, count:]
        return np.concatenate(logits, 1)

    def sample(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """Append ``tokens: (b, m)``, where -1 is the one sampled just before, and sample one after each: ``(b, m)``.

        ``uniforms: (b, m)`` are random numbers from [0, 1).
        """
        tokens, sampled = np.array(tokens, np.int32), []
        with eval_mode(self.cells):
            while tokens.shape[1]:
                count = self.ensure_capacity(tokens.shape[1])
                some = self.sample_some(tokens[:, :count], uniforms[:, :count], rule)
                count = some.shape[1]
                following = tokens[:, 1 : count + 1]
                np.copyto(following, some[:, : following.shape[1]], where=following < 0)
                self.commit(tokens[:, :count])
                sampled.append(some)
                tokens, uniforms = tokens[:, count:], uniforms[:, count:]
        return np.concatenate(sampled, 1)

    def append(self, tokens: np.ndarray) -> None:
        """Append ``tokens: (b, n)`` so that there is room for one more; what a restart drops is not computed."""
        beyond = self.position + tokens.shape[1] + 1 - self.max_context
        if beyond > 0:
            half = self.max_context // 2
            context = np.concatenate([self.newest, tokens], 1)
            tokens = context[:, context.shape[1] - half - (beyond - 1) % (self.max_context - half) :]
            self.reset()
        if tokens.shape[1]:
            with eval_mode(self.cells):
                self.advance(tokens)

    def ensure_capacity(self, count: int) -> int:
        """How many of ``count`` more tokens fit before the context must restart; restarts it if none do."""
        self.append(self.newest[:, :0])
        return min(count, self.max_context - self.position)


class DecodingSession(Session):
    """A :class:`Session` with a KV cache: each token costs the same, however long the sequences.

    Except for global attention, whose cache is as long as the context: ``max_seq_len`` tokens with learned positions;
    without them, it doubles when it is full, and the graphs are compiled again.

    Args:
        model, batch: see :class:`Session`.
        prefill_chunk: tokens that prefill takes at once.
        prefill_threshold: fewer tokens than this are decoded one by one. None: as many as take less time so than the
            compilation of the graph of prefill.
        steps_per_call: the most tokens that a call of the graph decodes one by one.
        use_kernels: whether to decode by the operators in C++ of :mod:`kernels`; None: where they can be used.

    Raises:
        ValueError: as :class:`Session` and :func:`decoding_cells`; for ``use_kernels`` where they cannot be used.
    """

    def __init__(
        self,
        model: DecodableModel,
        batch: int = 1,
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_threshold: int | None = None,
        steps_per_call: int = STEPS_PER_CALL,
        use_kernels: bool | None = None,
    ) -> None:
        super().__init__(model, batch)
        in_cpp = all(can_compute(CachedMHAOperator, layer.attention) for layer in model.layers)
        can_use_kernels = in_cpp and model.dtype == ms.float32
        if use_kernels and not can_use_kernels:
            raise ValueError(
                "expected use_kernels=False: the operators need Linux, a C++ compiler when pip installs this package, "
                "a CPU, a model in float32, and options that all of them compute"
            )
        self.dtype = model.dtype
        self.use_kernels = can_use_kernels if use_kernels is None else use_kernels
        if prefill_threshold is None:
            decode_longer = self.use_kernels and self.max_context // 2 >= PREFILL_THRESHOLD_WITH_KERNELS
            prefill_threshold = PREFILL_THRESHOLD_WITH_KERNELS if decode_longer else PREFILL_THRESHOLD
        self.capacity = model.max_seq_len if model.use_abs_pos_emb else FIRST_CAPACITY
        self.global_cells, self.caches = decoding_cells(model, batch), caches_of(model, batch, self.capacity)
        self.prefill_chunk = min(prefill_chunk, *(cache.max_chunk() for cache in self.caches))
        self.prefill_threshold = prefill_threshold
        self.steps_per_call, self.greedy = steps_per_call, sampling_rule(self.num_tokens, temperature=0)
        self.ngram_context = 1 if model.ngram_emb is None else model.ngram_emb.context
        if not model.use_abs_pos_emb:
            self.kept = self.ngram_context
        self.weights = list(model.get_parameters())
        of_model = {id(parameter) for parameter in self.weights}
        self.of_global = [p for cell in self.global_cells for p in cell.get_parameters() if id(p) not in of_model]
        self.graphs: dict[int, nn.Cell] = {}  # by number of tokens per step, compiled when first needed
        self.addresses: list[int] = []

    def reset(self) -> None:
        super().reset()
        self.prefilled = -1  # the position up to which the context came through prefill

    @property
    def state(self) -> list[Parameter]:
        """What the session keeps of earlier tokens."""
        return [p for cache in self.caches for p in (*cache.keys, *cache.values)] + self.of_global

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.state)

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """Give :attr:`state` the values that it had, here or in another session of the model, at this position."""
        self.reserve(0)
        arrays = iter(state)
        for cache in self.caches:
            cache.load(list(islice(arrays, 2 * len(cache.mhas))))
        for parameter, array in zip(self.of_global, arrays):
            assign_in_place(parameter, array)

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more tokens in the caches of global attention."""
        if any(cache.is_global for cache in self.caches) and self.position + count > self.capacity:
            while self.position + count > self.capacity:
                self.capacity *= 2
            for cache in self.caches:
                cache.grow(self.capacity)
            self.graphs = {}

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        self.reserve(tokens.shape[1])
        use_prefill = tokens.shape[1] >= self.prefill_threshold and self.prefill_chunk > 1 and not self.global_cells
        most, logits = self.prefill_chunk if use_prefill else self.steps_per_call, []
        for i in range(0, tokens.shape[1], most):
            some = tokens[:, i : i + most]
            logits.append(
                self.prefill(some) if use_prefill else self.decode(some, np.zeros(some.shape), self.greedy)[1]
            )
            self.commit(some)
        if use_prefill:
            self.prefilled = self.position
        return np.concatenate(logits, 1)

    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        self.reserve(min(tokens.shape[1], self.steps_per_call))
        if self.position == self.prefilled and tokens.shape[1] == 1:
            # the first token comes before the graph that decodes the others is compiled
            return self.sample_from(self.prefill(tokens)[:, 0], uniforms, rule)
        return self.decode(tokens[:, : self.steps_per_call], uniforms[:, : self.steps_per_call], rule)[0]

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """The logits after each of ``tokens: (b, n)``, at most ``prefill_chunk`` of them, all at once."""
        chunk, count = self.prefill_chunk, tokens.shape[1]
        padded = np.pad(tokens, ((0, 0), (0, chunk - count)))
        inputs = [array[0] for array in self.step_inputs(1, chunk, count)]
        return self.graph(chunk)(*map(Tensor, (padded, self.previous(), *inputs))).asnumpy()[:, :count]

    def decode(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, np.ndarray]:
        """What is sampled after each of ``tokens``, see :meth:`sample`, one after another, and the logits for it."""
        count, steps = tokens.shape[1], self.steps_per_call
        padding = ((0, 0), (0, steps - count))
        given, uniforms = np.pad(tokens, padding).T, np.pad(uniforms, padding).T[..., None].astype(np.float32)
        inputs = self.step_inputs(steps, 1, 1)
        arguments = (np.array(count, np.int32), given, self.previous(), uniforms, *rule, *inputs)
        sampled, logits = self.graph(1)(*map(Tensor, arguments))
        # copies, because the next call overwrites the arrays
        return sampled.asnumpy()[:count].T.copy(), logits.asnumpy()[:count].transpose(1, 0, 2).copy()

    def step_inputs(self, steps: int, count: int, kept: int) -> list[np.ndarray]:
        """What :class:`DecodeStep` needs of the positions of ``steps`` steps, see :meth:`KVCache.step_inputs`."""
        positions = self.position + np.arange(steps * count).reshape((steps, count))
        positions = np.minimum(positions, self.model.max_seq_len - 1)  # padding may lie beyond the learned positions
        inputs = [array for cache in self.caches for array in cache.step_inputs(self.position, steps, count, kept)]
        return [positions.astype(np.int32), *inputs]

    def previous(self) -> np.ndarray:
        """1 + the last tokens of the context, for n-grams; 0 where there is none."""
        return np.pad(1 + self.newest, ((0, 0), (self.ngram_context, 0)))[:, -self.ngram_context :]

    def graph(self, count: int) -> nn.Cell:
        """The :class:`DecodeLoop` for tokens one by one, or a :class:`DecodeStep` of ``count`` tokens.

        A new one where the weights have moved in memory, see :func:`mindspore_quirks.addresses_of`.
        """
        addresses = addresses_of(self.weights)
        if addresses != self.addresses:
            self.graphs, self.addresses = {}, addresses
        if count not in self.graphs:
            graph: nn.Cell = DecodeStep(self.model, self.caches, count, self.global_cells, self.use_kernels)
            if count == 1:
                graph = DecodeLoop(graph, self.steps_per_call, self.num_tokens)
            self.graphs[count] = call_without_checks(graph)
        return self.graphs[count]


class UncachedSession(Session):
    """A :class:`Session` that computes the whole context again for each token: for comparison and global layers."""

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        logits = self.logits_after(tokens)
        self.commit(tokens)
        return logits

    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        return self.sample_from(self.logits_after(tokens[:, :1])[:, 0], uniforms[:, :1], rule)

    def logits_after(self, tokens: np.ndarray) -> np.ndarray:
        model: Any = self.model
        logits = model(Tensor(np.concatenate([self.newest, tokens], 1)))[:, -tokens.shape[1] :]
        return logits.asnumpy().astype(np.float32)


def decoding_cells(model: DecodableModel, batch: int) -> list[nn.Cell]:
    """For each inserted global layer, except :class:`GlobalAttention`, the cell that computes it token by token.

    A ``global_attn_layer`` takes part in cached decoding if it is a :class:`GlobalAttention`, whose keys and values go
    to a :class:`KVCache`, or has a method ``decoding_cell(batch)`` that returns a cell
    ``(x: (b, 1, dim), position: (1,) int32) -> (b, 1, dim)`` for the next token. That cell keeps what it needs of
    earlier tokens in parameters of its own, and begins a new sequence at position 0.

    Raises:
        ValueError: for a layer without this method.
    """
    if not can_be_decoded(model):
        raise ValueError("expected a global_attn_layer with a method decoding_cell, see decoding_cells")
    return [layer.decoding_cell(batch) for layer in inserted_cells(model)]


def can_be_decoded(model: DecodableModel) -> bool:
    """Whether all global layers of the model, if any, can be decoded, see :func:`decoding_cells`."""
    return all(hasattr(cell, "decoding_cell") for cell in inserted_cells(model))


def inserted_cells(model: DecodableModel) -> list[Any]:
    cells = [layer.global_attention for layer in model.layers]
    return [cell for cell in cells if cell is not None and not isinstance(cell, MultiHeadAttention)]
