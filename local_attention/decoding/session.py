"""Sessions: sequences that grow token by token, and what a model predicts for them."""

import sys
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from local_attention.backends import can_compute
from local_attention.backends.cached_cpu import CachedMHAOperator
from local_attention.decoding.cache import KVCache
from local_attention.decoding.interface import DecodableModel
from local_attention.decoding.sampling import Sampler, SamplingRule, sampling_rule
from local_attention.decoding.step import DecodeLoop, DecodeStep
from local_attention.decoding.tokens import as_integers, check_range
from local_attention.mindspore_quirks import addresses_of, call_without_checks, eval_mode

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
        self.ngram_context = 1 if model.ngram_emb is None else model.ngram_emb.context
        self.kept = self.max_context or self.ngram_context
        self.cells = [cell for _, cell in model.cells_and_names()]
        self.reset()

    @abstractmethod
    def advance(self, tokens: np.ndarray) -> np.ndarray:
        """Append ``tokens: (b, n)``, for which there is room; returns the logits after each, ``(b, n, num_tokens)``."""

    @abstractmethod
    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """Sample after as many of ``tokens: (b, m)`` as one call takes, as :meth:`sample` does, but append none."""

    def reset(self) -> None:
        """Forget the sequences."""
        self.position = 0  # of the next token in the context
        self.newest = np.zeros((self.batch, 0), np.int32)  # the last ``kept`` tokens of the context

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

    def append(self, tokens: np.ndarray) -> None:
        """Append ``tokens: (b, n)``; what a restart of the context would drop is not computed."""
        if self.max_context is not None and (beyond := self.position + tokens.shape[1] - self.max_context) > 0:
            half = self.max_context // 2
            since_restart = 1 + (beyond - 1) % (self.max_context - half)
            tokens = np.concatenate([self.newest, tokens], 1)[:, -(half + since_restart) :]
            self.reset()
        if tokens.shape[1]:
            with eval_mode(self.cells):
                self.advance(tokens)

    def sample(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        """Append tokens, and sample one after each.

        Args:
            tokens: ``(b, m)``; -1: the one sampled just before.
            uniforms: ``(b, m)`` numbers from [0, 1).
            rule: a :class:`SamplingRule`.

        Returns:
            ``(b, m)`` int32.
        """
        tokens, sampled, done = np.array(tokens, np.int32), np.zeros(uniforms.shape, np.int32), 0
        with eval_mode(self.cells):
            while done < tokens.shape[1]:
                end = done + self.ensure_capacity(tokens.shape[1] - done)
                some = self.sample_some(tokens[:, done:end], uniforms[:, done:end], rule)
                end = done + some.shape[1]
                sampled[:, done:end] = some
                following = tokens[:, done + 1 : end + 1]
                np.copyto(following, sampled[:, done : done + following.shape[1]], where=following < 0)
                self.commit(tokens[:, done:end])
                done = end
        return sampled

    def ensure_capacity(self, count: int) -> int:
        """How many of ``count`` more tokens fit before the context must restart; restarts it if none do."""
        if self.max_context is None:
            return count
        if self.position == self.max_context:
            kept = self.newest[:, self.max_context - self.max_context // 2 :]
            self.reset()
            if kept.shape[1]:
                self.advance(kept)
        return min(count, self.max_context - self.position)

    def commit(self, tokens: np.ndarray) -> None:
        """Note that ``tokens: (b, n)`` were appended."""
        self.position += tokens.shape[1]
        self.newest = np.concatenate([self.newest, tokens], 1)[:, -self.kept :]


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
            raise ValueError("expected a global_attn_layer with a method decoding_cell, see decoding_cells")
        self.global_cells = decoding_cells(model, batch)
        self.cache = KVCache(model, batch)
        if prefill_threshold is None:
            restarts_often = self.max_context is not None and self.max_context // 2 < PREFILL_THRESHOLD_WITH_KERNELS
            decode_longer = self.use_kernels and not restarts_often
            prefill_threshold = PREFILL_THRESHOLD_WITH_KERNELS if decode_longer else PREFILL_THRESHOLD
        self.prefill_chunk, self.prefill_threshold = min(prefill_chunk, self.cache.max_chunk()), prefill_threshold
        self.steps_per_call = steps_per_call
        self.weights = list(model.get_parameters())
        of_model = {id(parameter) for parameter in self.weights}
        of_global = [p for cell in self.global_cells for p in cell.get_parameters() if id(p) not in of_model]
        self.state = [*self.cache.keys, *self.cache.values, *of_global]
        self.graphs: dict[int, nn.Cell] = {}  # by number of tokens per step, compiled when first needed
        self.addresses: list[int] = []
        self.greedy = sampling_rule(self.num_tokens, temperature=0)

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        use_prefill = tokens.shape[1] >= self.prefill_threshold and self.prefill_chunk > 1 and not self.global_cells
        count, run = (self.prefill_chunk, self.prefill) if use_prefill else (self.steps_per_call, self.decode)
        return np.concatenate([run(tokens[:, i : i + count]) for i in range(0, tokens.shape[1], count)], 1)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """:meth:`advance` by at most ``prefill_chunk`` tokens, all at once."""
        chunk, count = self.prefill_chunk, tokens.shape[1]
        padded = np.pad(tokens, ((0, 0), (0, chunk - count)))
        inputs = [array[0] for array in self.cache.step_inputs(self.position, 1, chunk, count)]
        logits = self.graph(chunk)(*map(Tensor, (padded, self.previous(), *inputs)))
        self.commit(tokens)
        return logits.asnumpy()[:, :count]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """:meth:`advance` by at most ``steps_per_call`` tokens, one after another."""
        _, logits = self.run_loop(tokens, np.zeros(tokens.shape), self.greedy)
        self.commit(tokens)
        return logits

    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        return self.run_loop(tokens[:, : self.steps_per_call], uniforms[:, : self.steps_per_call], rule)[0]

    def run_loop(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, np.ndarray]:
        """What is sampled after each of ``tokens: (b, m)``, and the logits for it; see :meth:`sample`."""
        count, steps = tokens.shape[1], self.steps_per_call
        missing = ((0, 0), (0, steps - count))
        given = np.pad(tokens, missing).T.astype(np.int32)
        uniforms = np.pad(uniforms, missing).T[..., None].astype(np.float32)
        inputs = self.cache.step_inputs(self.position, steps, 1, 1)
        arguments = (np.array(count, np.int32), given, self.previous(), uniforms, *rule, *inputs)
        sampled, logits = self.graph(1)(*map(Tensor, arguments))
        # copies, because the next call overwrites the arrays
        return sampled.asnumpy()[:count].T.copy(), logits.asnumpy()[:count].transpose(1, 0, 2).copy()

    def cache_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.state)

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
            graph = DecodeStep(self.model, self.batch, count, self.cache, self.global_cells, self.use_kernels)
            if count == 1:
                graph = DecodeLoop(graph, self.steps_per_call, self.num_tokens)
            self.graphs[count] = call_without_checks(graph)
        return self.graphs[count]


class UncachedSession(Session):
    """A :class:`Session` that computes the whole context again for each token: for comparison and global layers."""

    def __init__(self, model: DecodableModel, batch: int) -> None:
        super().__init__(model, batch)
        self.kept, self.sampler = sys.maxsize, Sampler(self.num_tokens)

    def advance(self, tokens: np.ndarray) -> np.ndarray:
        logits = self.logits_after(tokens)
        self.commit(tokens)
        return logits

    def sample_some(self, tokens: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> np.ndarray:
        logits, uniforms = self.logits_after(tokens[:, :1])[:, 0], uniforms[:, :1].astype(np.float32)
        return self.sampler(*map(Tensor, (logits, uniforms, *rule))).asnumpy()[:, None]

    def logits_after(self, tokens: np.ndarray) -> np.ndarray:
        model: Any = self.model
        return model(Tensor(np.concatenate([self.newest, tokens], 1))).asnumpy()[:, -tokens.shape[1] :]


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
