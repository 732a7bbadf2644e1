"""Evaluation in bits per byte, scoring each byte of a span exactly once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import nn

from local_attention.mindspore_quirks import eval_mode
from local_attention.training.distributed import SINGLE_PROCESS, Distributed, digest_of

if TYPE_CHECKING:
    from data import Corpus


class TokenLosses(nn.Cell):
    """The cross-entropy of each label in nats: ``inputs, labels: (b, n)`` to ``(b, n)``."""

    def __init__(self, model: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, inputs, labels):
        return self.model.token_losses(inputs, labels.reshape(-1)).reshape(labels.shape)


class Score(NamedTuple):
    """The result of an evaluation."""

    bpb: float
    bytes_scored: int


class EvalSpan(NamedTuple):
    """The bytes ``data[start:stop]``, to be scored; those before ``start`` are context for the first one."""

    data: np.ndarray
    start: int
    stop: int


def eval_span(corpus: Corpus, split: str, max_bytes: int | None = None) -> EvalSpan:
    """Return the first ``max_bytes`` bytes of a split, or all of it."""
    start, stop = corpus.bounds(split)
    return EvalSpan(corpus.array(split), start, stop if max_bytes is None else min(stop, start + max_bytes))


def tokens_of(data: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return ``data[start:stop]`` after what predicts its first byte: the byte before it, or a newline at the start.

    Returns:
        ``(stop - start + 1,)`` int32.
    """
    previous = data[start - 1 : start] if start else np.frombuffer(b"\n", np.uint8)
    return np.concatenate([previous, data[start:stop]]).astype(np.int32)


class Window(NamedTuple):
    """The labels ``start … stop - 1``, which one row of a batch predicts; those before ``first_scored`` are context."""

    start: int
    first_scored: int
    stop: int


def windows(first: int, stop: int, seq_len: int, stride: int) -> Iterator[Window]:
    """Yield windows that together score each of the labels ``first … stop - 1`` once.

    The first window scores all its ``seq_len`` labels, each further one its last ``stride``. With ``stride = seq_len``
    the windows are disjoint; with a smaller stride, each label has at least ``seq_len - stride`` bytes of context.
    """
    start, scored = first, first
    while scored < stop:
        yield Window(start, scored, min(start + seq_len, stop))
        scored = start + seq_len
        start += stride


class Evaluator:
    """Scores spans of a byte array with a model. All spans use the same compiled graph.

    Args:
        model: a ``LocalTransformer``.
        seq_len: number of labels per window.
        batch_size: number of windows per call of the model.
        distributed: the processes that divide the work; all of them must call the evaluator.
    """

    def __init__(
        self, model: nn.Cell, seq_len: int, batch_size: int, distributed: Distributed = SINGLE_PROCESS
    ) -> None:
        self.model, self.seq_len, self.batch_size = model, seq_len, batch_size
        self.distributed = distributed
        self.token_losses = TokenLosses(model)

    def __call__(
        self,
        data: np.ndarray,
        start: int,
        stop: int,
        stride: int | None = None,
        progress: Callable[[list[list[Window]]], Iterable[list[Window]]] = iter,
        before_batch: Callable[[], object] = lambda: None,
    ) -> Score:
        """Score ``data[start:stop]``.

        The first byte is predicted from the byte before it, or from a newline at the beginning of the data.

        Args:
            data: ``(n,)`` uint8.
            start, stop: the span.
            stride: bytes from one window to the next, 1 … seq_len; by default ``seq_len``.
            progress: wraps the list of batches, like ``tqdm``.
            before_batch: called before each batch, equally often in all processes; an exception ends the evaluation.

        Returns:
            A :class:`Score`. The sum over batches is exact, so the score does not depend on the world size.

        Raises:
            ValueError: the span is empty, or the stride is out of range.
        """
        stride = self.seq_len if stride is None else stride
        if stop <= start or not 1 <= stride <= self.seq_len:
            expected = f"expected start < stop and a stride of 1 … {self.seq_len}"
            raise ValueError(f"{expected}, got {start}, {stop} and {stride}")
        tokens = tokens_of(data, start, stop)
        rows = list(windows(0, stop - start, self.seq_len, stride))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rank, world_size = self.distributed.rank, self.distributed.world_size
        rounds = math.ceil(len(batches) / world_size)
        batches += [[]] * (rounds * world_size - len(batches))
        sums = np.zeros((rounds, 2))  # nats and bytes of each batch of this process
        with eval_mode([cell for _, cell in self.model.cells_and_names()]):
            for i, batch in enumerate(progress(batches[rank::world_size])):
                before_batch()
                if batch:
                    sums[i] = self.score_batch(tokens, batch)
        nats, scored = (math.fsum(column) for column in self.distributed.all_gather(sums).reshape(-1, 2).T)
        return Score(nats / scored / math.log(2), int(scored))

    def estimate_seconds(self, data: np.ndarray, start: int, stop: int) -> float:
        """Estimate how long scoring takes, by scoring the first bytes twice: the first time compiles."""
        some = min(stop, start + 2 * self.seq_len * self.batch_size * self.distributed.world_size)
        for _ in range(2):
            begin = time.monotonic()
            self(data, start, some)
        return (time.monotonic() - begin) * (stop - start) / (some - start)

    def checksum(self, data: np.ndarray, start: int, stop: int) -> str:
        """A checksum of all that the score of ``data[start:stop]`` depends on: weights, bytes, length of sequences."""
        digest = digest_of(self.model.get_parameters())
        digest.update(np.ascontiguousarray(data[max(0, start - 1) : stop]).data)
        digest.update(repr((start > 0, self.seq_len)).encode())
        return digest.hexdigest()[:16]

    def score_batch(self, tokens: np.ndarray, batch: list[Window]) -> tuple[float, int]:
        """Return the sum of the losses in nats and the number of scored bytes. Padding counts for neither."""
        inputs = np.zeros((self.batch_size, self.seq_len), np.int32)
        labels, is_scored = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        for row, (start, first_scored, stop) in enumerate(batch):
            inputs[row, : stop - start] = tokens[start:stop]
            labels[row, : stop - start] = tokens[start + 1 : stop + 1]
            is_scored[row, first_scored - start : stop - start] = True
        losses = self.token_losses(ms.Tensor(inputs), ms.Tensor(labels)).asnumpy()
        return losses[is_scored].astype(np.float64).sum(), int(is_scored.sum())
