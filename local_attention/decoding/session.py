"""Sessions: sequences that grow token by token, and what a model predicts for them."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor, nn

from local_attention.backends import can_compute
from local_attention.backends.cached_cpu import CachedMHAOperator
from local_attention.decoding.cache import KVCache
from local_attention.decoding.interface import DecodableModel
from local_attention.decoding.sampling import Sampler, SamplingRule, sampling_rule
from local_attention.decoding.step import DecodeLoop, DecodeStep
from local_attention.mindspore_quirks import addresses_of, assign_in_place, call_without_checks

PREFILL_CHUNK = 256  # tokens of a prompt that one graph takes at once
# Tokens from which on prefill is used. Compiling its graph takes as long as decoding 1,000 tokens with kernels.cpp.
PREFILL_THRESHOLD, PREFILL_THRESHOLD_WITH_KERNELS = 256, 1024
# Tokens that one call of a graph decodes, one after another: 4.7 ms per token one by one, 2.6 sixteen at a time.
STEPS_PER_CALL = 16


class Session(ABC):
    """Sequences, ``batch`` of them side by side, that grow token by token.

    With learned positions the context restarts from its newest half when they run out, at ``max_seq_len``.

    Args:
        model: a causal model with tokens.
        batch: number of sequences.

    Raises:
        ValueError: for a model that is not causal or has no tokens.
    """

    def __init__(self, model: DecodableModel, batch: int) -> None:
        if model.num_tokens is None or not model.layers[0].attention.attention.causal:
            raise ValueError("expected a causal model with num_tokens, as later tokens are decoded from earlier ones")
        self.model, self.batch, self.num_tokens = model, batch, model.num_tokens
        self.max_context = model.max_seq_len if model.use_abs_pos_emb else None
        self.ngram_context = 0 if model.ngram_emb is None else model.ngram_emb.context
        self.reset()

    @abstractmethod
    def advance(self, tokens: np.ndarray) -> np.ndarray:
        """The logits after each of ``tokens: (b, n)``, ``(b, n, num_tokens)``."""

    @abstractmethod
    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """Append ``tokens: (b,)``; sample as many as one call gives, at most one for each of ``uniforms: (b, m)``."""

    def reset(self) -> None:
        """Forget the sequences."""
        self.length = 0  # tokens that were appended
        self.position = 0  # of the next token in the context
        self.newest = np.zeros((self.batch, 0), np.int32)  # what a restart and n-grams need

    def feed(self, tokens: Any) -> np.ndarray:
        """Append tokens and return the logits of the tokens after each of them.

        ``tokens: (b,)``, or ``(b, n)`` for several; returns ``(b, num_tokens)``, or ``(b, n, num_tokens)``, float32.
        """
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim == 1:
            return self.feed(tokens[:, None])[:, 0]
        logits = []
        with eval_mode(self.model):
            while tokens.shape[1]:
                count = self.ensure_capacity(tokens.shape[1])
                logits.append(self.advance(tokens[:, :count]))
                self.commit(tokens[:, :count])
                tokens = tokens[:, count:]
        return np.concatenate(logits, 1)

    def sample(self, tokens: Any, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """Append tokens and sample more of them; all but the last sampled one are appended, too.

        Args:
            tokens: ``(b, n)``, n >= 1.
            uniforms: ``(b, m)`` numbers from [0, 1), one for each token to sample.
            rule: a :class:`SamplingRule`.

        Returns:
            ``(b, m)`` int32.
        """
        tokens, sampled = np.asarray(tokens, np.int32), []
        last, tokens = tokens[:, -1:], self.truncate_prompt(tokens[:, :-1])
        if tokens.shape[1]:
            self.feed(tokens)
        with eval_mode(self.model):
            while uniforms.shape[1]:
                count = self.ensure_capacity(uniforms.shape[1])
                sampled.append(self.sample_some(last[:, 0], uniforms[:, :count], rule))
                self.commit(np.concatenate([last, sampled[-1][:, :-1]], 1))
                last, uniforms = sampled[-1][:, -1:], uniforms[:, sampled[-1].shape[1] :]
        return np.concatenate(sampled, 1)

    def truncate_prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Commit, but do not compute, those of ``tokens: (b, n)`` that a restart would drop; return the others."""
        if self.max_context is None or (beyond := self.position + tokens.shape[1] - self.max_context) <= 0:
            return tokens
        between_restarts = self.max_context - self.max_context // 2
        others = 1 + (beyond - 1) % between_restarts
        self.commit(tokens[:, :-others])
        self.position = self.max_context
        return tokens[:, -others:]

    def ensure_capacity(self, count: int) -> int:
        """How many of ``count`` more tokens fit before the context must restart; restarts it if none do."""
        if self.max_context is None:
            return count
        if self.position == self.max_context:
            length, kept = self.length, self.newest[:, self.max_context - self.max_context // 2 :]
            self.reset()
            if kept.shape[1]:
                self.advance(kept)
                self.commit(kept)
            self.length = length
        return min(count, self.max_context - self.position)

    def commit(self, tokens: np.ndarray) -> None:
        """Note that ``tokens: (b, n)`` were appended."""
        self.length += tokens.shape[1]
        self.position += tokens.shape[1]
        newest = np.concatenate([self.newest, tokens], 1)
        self.newest = newest[:, max(0, newest.shape[1] - (self.max_context or self.ngram_context)) :]


@contextmanager
def eval_mode(model: DecodableModel) -> Iterator[None]:
    """Switch dropout off meanwhile."""
    was_training = model.training
    if was_training:
        model.set_train(False)
    try:
        yield
    finally:
        if was_training:
            model.set_train(True)


class DecodingSession(Session):
    """A :class:`Session` with a KV cache: each token costs the same, however long the sequences.

    Args:
        model, batch: see :class:`Session`.
        prefill_chunk: tokens that prefill takes at once.
        prefill_threshold: fewer tokens than this are decoded one by one, because compiling the graph of prefill would
            take longer; with global layers all are. None: ``PREFILL_THRESHOLD``, or, with the operators in C++ and
            unless the context restarts often, ``PREFILL_THRESHOLD_WITH_KERNELS``.
        steps_per_call: the most tokens that a call of the graph decodes one by one.
        use_kernels: whether to decode by the operators in C++ of :mod:`kernels`; None: where they can be used.

    Raises:
        ValueError: as :class:`Session`; for a model with global layers that cannot be decoded, see
            :func:`decoding_cells`; for ``use_kernels`` where they cannot be used.
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
        can_use_kernels = all(can_compute(CachedMHAOperator, layer.attention) for layer in model.layers)
        if use_kernels and not can_use_kernels:
            raise ValueError(
                "expected use_kernels=False: the operators need Linux, a C++ compiler when pip installs this package, "
                "a CPU, a model in float32, and options that all of them compute"
            )
        self.use_kernels = can_use_kernels if use_kernels is None else use_kernels
        if not can_be_decoded(model):
            raise ValueError(
                "expected a global_attn_layer with a method decoding_cell, as it is to be fed token by token"
            )
        self.global_cells = decoding_cells(model, batch)
        self.cache = KVCache(model, batch)
        if prefill_threshold is None:
            restarts_often = self.max_context is not None and self.max_context // 2 < PREFILL_THRESHOLD_WITH_KERNELS
            decode_longer = self.use_kernels and not restarts_often
            prefill_threshold = PREFILL_THRESHOLD_WITH_KERNELS if decode_longer else PREFILL_THRESHOLD
        self.prefill_chunk, self.prefill_threshold = min(prefill_chunk, self.cache.max_chunk()), prefill_threshold
        self.steps_per_call = steps_per_call
        weights = {id(parameter) for parameter in model.get_parameters()}
        of_global = [p for cell in self.global_cells for p in cell.get_parameters() if id(p) not in weights]
        self.state = [*self.cache.keys, *self.cache.values, *of_global]
        self.graphs: dict[int, nn.Cell] = {}  # by number of tokens per step, compiled when first needed
        self.weights: list = list(model.get_parameters())
        self.addresses: list[int] = []
        self.greedy = sampling_rule(self.num_tokens, temperature=0)

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        use_prefill = tokens.shape[1] >= self.prefill_threshold and self.prefill_chunk > 1 and not self.global_cells
        count, run = (self.prefill_chunk, self.prefill) if use_prefill else (self.steps_per_call, self.decode)
        logits = []
        for i in range(0, tokens.shape[1], count):
            logits.append(run(tokens[:, i : i + count], self.previous(tokens[:, :i]), self.position + i))
        return np.concatenate(logits, 1)

    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        previous = self.previous(tokens[:, None][:, :0])
        return self.run_loop(tokens[:, None], uniforms[:, : self.steps_per_call], rule, previous, self.position)[0]

    def previous(self, tokens: np.ndarray) -> np.ndarray:
        """1 + the last tokens of the context and of ``tokens: (b, n)`` after it, for n-grams; 0 where there is none."""
        context = max(1, self.ngram_context)
        numbers = np.pad(1 + np.concatenate([self.newest, tokens], 1), ((0, 0), (context, 0)))
        return numbers[:, -context:].astype(np.int32)

    def prefill(self, tokens: np.ndarray, previous: np.ndarray, position: int) -> np.ndarray:
        """The logits after each of ``tokens: (b, n)``, at most ``prefill_chunk`` of them, all at once."""
        count = tokens.shape[1]
        inputs = [array[0] for array in self.cache.step_inputs(position, 1, self.prefill_chunk, count)]
        padded = np.pad(tokens, ((0, 0), (0, self.prefill_chunk - count)))
        logits = self.graph(self.prefill_chunk)(*map(Tensor, (padded, previous, *inputs)))
        return logits.asnumpy()[:, :count]

    def decode(self, tokens: np.ndarray, previous: np.ndarray, position: int) -> np.ndarray:
        """The logits after each of ``tokens: (b, n)``, at most ``steps_per_call`` of them, one after another."""
        return self.run_loop(tokens, np.zeros(tokens.shape), self.greedy, previous, position)[1]

    def run_loop(
        self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule, previous: np.ndarray, position: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode ``tokens: (b, n)`` and then what is sampled, until one is sampled for each of ``uniforms: (b, m)``.

        Returns:
            What was sampled after each, ``(b, m)``, and the logits for it, ``(b, m, num_tokens)``.
        """
        count, max_steps = uniforms.shape[1], self.steps_per_call
        given = np.pad(tokens, ((0, 0), (0, max_steps - tokens.shape[1])), constant_values=-1).T.astype(np.int32)
        uniforms = np.pad(uniforms, ((0, 0), (0, max_steps - count))).T[..., None].astype(np.float32)
        inputs = self.cache.step_inputs(position, max_steps, 1, 1)
        arguments = (np.array(count, np.int32), given, previous, uniforms, *rule, *inputs)
        sampled, logits = self.graph(1)(*map(Tensor, arguments))
        # copies, because the next call overwrites the arrays
        return sampled.asnumpy()[:count].T.copy(), logits.asnumpy()[:count].transpose(1, 0, 2).copy()

    def graph(self, count: int) -> nn.Cell:
        """The :class:`DecodeLoop` for tokens one by one, or a :class:`DecodeStep` of ``count`` tokens.

        A new one where the weights have moved in memory, see :func:`mindspore_quirks.addresses_of`.
        """
        addresses = addresses_of(self.weights)
        if addresses != self.addresses:
            self.graphs, self.addresses = {}, addresses
        if count not in self.graphs:
            graph = DecodeStep(self.model, self.batch, count, self.cache, self.global_cells, self.use_kernels)
            if count == 1:
                graph = DecodeLoop(graph, self.steps_per_call, self.num_tokens)
            self.graphs[count] = call_without_checks(graph)
        return self.graphs[count]

    def snapshot(self) -> "Snapshot":
        """The session as it is now."""
        return Snapshot(self.length, self.position, self.newest, [p.asnumpy().copy() for p in self.state])

    def restore(self, snapshot: "Snapshot") -> None:
        """Continue from a :meth:`snapshot` of a session of the same model and batch."""
        self.length, self.position, self.newest = snapshot.length, snapshot.position, snapshot.newest
        for parameter, array in zip(self.state, snapshot.state):
            assign_in_place(parameter, array)


class Snapshot(NamedTuple):
    """What a :class:`DecodingSession` knows of its sequences."""

    length: int
    position: int
    newest: np.ndarray
    state: list[np.ndarray]


class UncachedSession(Session):
    """A :class:`Session` that computes the whole context again for each token: for comparison and global layers."""

    sampler: Sampler | None = None

    def reset(self) -> None:
        super().reset()
        self.context = self.newest

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        self.context = np.concatenate([self.context, tokens], 1)
        model: Any = self.model
        return model(Tensor(self.context)).asnumpy()[:, -tokens.shape[1] :]

    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        self.sampler = self.sampler or Sampler(self.num_tokens)
        logits = self.advance(tokens[:, None])[:, 0]
        sampled = self.sampler(Tensor(logits), Tensor(uniforms[:, :1].astype(np.float32)), *map(Tensor, rule))
        return sampled.asnumpy()[:, None]


def decoding_cells(model: DecodableModel, batch: int) -> list[nn.Cell]:
    """For each inserted global layer the cell that computes it token by token.

    A ``global_attn_layer`` takes part in cached decoding if it has a method ``decoding_cell(batch)`` that returns a
    cell ``(x: (b, 1, dim), position: (1,) int32) -> (b, 1, dim)`` for the next token. That cell keeps what it needs of
    earlier tokens in parameters of its own, and begins a new sequence at position 0.
    """
    return [layer.decoding_cell(batch) for layer in global_layers(model)]


def can_be_decoded(model: DecodableModel) -> bool:
    """Whether all global layers of the model, if any, can be computed token by token: see :func:`decoding_cells`."""
    return all(hasattr(layer, "decoding_cell") for layer in global_layers(model))


def global_layers(model: DecodableModel) -> list[Any]:
    return [layer.global_attention for layer in model.layers if layer.global_attention is not None]


def session_for(model: DecodableModel, batch: int) -> Session:
    """A :class:`DecodingSession`, or an :class:`UncachedSession`, with a warning, where global layers have no cells."""
    if can_be_decoded(model):
        return kept_session(model, batch)
    warnings.warn(
        "global_attn_layer has no method decoding_cell: each token computes the whole context again", stacklevel=3
    )
    return UncachedSession(model, batch)


def kept_session(model: DecodableModel, batch: int) -> DecodingSession:
    """A model's :class:`DecodingSession`. The last one is kept, because its graphs take seconds to compile.

    It is kept in the model's ``__dict__``, so that it lives as long as the model.
    """
    session = vars(model).get("_decoding_session")
    if session is None or session.batch != batch:
        session = vars(model)["_decoding_session"] = DecodingSession(model, batch)
    return session


def logits_with_cache(model: DecodableModel, tokens: np.ndarray, cache: Snapshot | None) -> tuple[np.ndarray, Snapshot]:
    """The logits after each of ``tokens: (b, n)`` that ``cache`` does not hold yet, and a cache that holds all of them.

    Raises:
        ValueError: for a cache of another batch, or of as many tokens.
    """
    session = kept_session(model, len(tokens))
    if cache is None:
        session.reset()
    else:
        if len(cache.newest) != len(tokens) or cache.length >= tokens.shape[1]:
            raise ValueError(
                f"expected tokens ({len(cache.newest)}, n) with n > {cache.length} for this cache, got {tokens.shape}"
            )
        session.restore(cache)
        tokens = tokens[:, cache.length :]
    return session.feed(tokens), session.snapshot()
