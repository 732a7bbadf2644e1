"""Bits per byte over a whole split, each byte scored exactly once."""

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import nn

from local_attention.training.distributed import SINGLE_PROCESS


class TokenLosses(nn.Cell):
    """``inputs, labels: (b, n)`` to the cross-entropy of each label in nats, ``(b, n)``."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, inputs, labels):
        return self.model.token_losses(inputs, labels.reshape(-1)).reshape(labels.shape)


@dataclass(frozen=True)
class Score:
    """The outcome of an evaluation."""

    bpb: float
    bytes_scored: int


def windows(first, stop, seq_len, stride):
    """``(start, first scored, stop)`` of each window's labels, so that each of ``first … stop - 1`` is scored once.

    The first window scores all its ``seq_len`` labels, each further one its last ``stride``; ``stride = seq_len`` gives
    disjoint windows, a smaller one gives every label at least ``seq_len - stride`` bytes of context.
    """
    start, scored = first, first
    while scored < stop:
        yield start, scored, min(start + seq_len, stop)
        scored = start + seq_len
        start += stride


class Evaluator:
    """Scores stretches of a byte array with a model, one compiled graph for all of them.

    Args:
        model: a ``LocalTransformer``.
        seq_len: labels a window.
        batch_size: windows a call of the model.
        workers: who share the work; all must call.
    """

    def __init__(self, model, seq_len, batch_size, workers=SINGLE_PROCESS):
        self.model, self.seq_len, self.batch_size = model, seq_len, batch_size
        self.workers = workers
        self.token_losses = TokenLosses(model)

    def __call__(self, data, start, stop, stride=None, progress=iter):
        """Score ``data[start:stop]``.

        The first byte is predicted from the byte before it, so that it counts, too; at the beginning of the data from
        a newline.

        Args:
            data: ``(bytes,)`` uint8.
            start, stop: the stretch.
            stride: bytes from one window to the next, 1 … seq_len; ``seq_len`` unless given.
            progress: wraps the list of batches, as ``tqdm`` does.

        Returns:
            A :class:`Score`; the sum over batches is exact, so that it does not depend on the number of workers.

        Raises:
            ValueError: for an empty stretch or a stride out of range.
        """
        stride = self.seq_len if stride is None else stride
        if stop <= start or not 1 <= stride <= self.seq_len:
            expected = f"expected start < stop and a stride of 1 … {self.seq_len}"
            raise ValueError(f"{expected}, got {start}, {stop} and {stride}")
        before = data[start - 1 : start] if start else np.frombuffer(b"\n", np.uint8)
        span = np.concatenate([before, data[start:stop]]).astype(np.int32)
        todo = list(windows(0, stop - start, self.seq_len, stride))
        batches = [todo[i : i + self.batch_size] for i in range(0, len(todo), self.batch_size)]
        rank, count = self.workers.rank, self.workers.count
        sums = np.zeros((math.ceil(len(batches) / count), 2))  # nats and bytes of the batches of this worker
        was_training = self.model.training
        self.model.set_train(False)
        for i, batch in enumerate(progress(batches[rank::count])):
            sums[i] = self.score_batch(span, batch)
        self.model.set_train(was_training)
        nats, scored = (math.fsum(column) for column in self.workers.gather(sums).reshape(-1, 2).T)
        return Score(nats / scored / math.log(2), int(scored))

    def score_batch(self, span, batch):
        """Sum of nats and number of bytes; windows that are short or missing are filled up and left out of both."""
        inputs = np.zeros((self.batch_size, self.seq_len), np.int32)
        labels, counted = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        for row, (start, first, stop) in enumerate(batch):
            inputs[row, : stop - start] = span[start:stop]
            labels[row, : stop - start] = span[start + 1 : stop + 1]
            counted[row, first - start : stop - start] = True
        losses = self.token_losses(ms.Tensor(inputs), ms.Tensor(labels)).asnumpy()
        return losses[counted].astype(np.float64).sum(), int(counted.sum())
