"""The training batches: from the sequence sampler to ``Model.train``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from mindspore.dataset import GeneratorDataset

from local_attention.training.config import TrainConfig
from local_attention.training.distributed import SINGLE_PROCESS, Distributed

if TYPE_CHECKING:
    from data import SequenceSampler


class BatchIterator:
    """Iterates over the batches of the steps after ``first_step``: ``(grad_accum_every, b, seq_len + 1)`` int32.

    It has no ``__getitem__``: for a dataset with one, MindSpore makes a list of all indices, which is endless for a run
    without ``max_steps``.

    Sequence ``i`` of micro-batch ``a`` of the process of rank ``r`` in step ``s`` is number ``((s * A + a) * N + r) * B
    + i`` of the sampler, where ``A`` is ``grad_accum_every``, ``N`` the world size and ``B`` the ``batch_size``. ``N``
    processes with a batch of ``B`` therefore see the same sequences as one process with a batch of ``N * B``.

    Args:
        sampler: where the sequences come from.
        train: sizes and number of steps.
        first_step: number of steps that are already done.
        distributed: the processes that divide the sequences.
    """

    def __init__(
        self, sampler: SequenceSampler, train: TrainConfig, first_step: int, distributed: Distributed = SINGLE_PROCESS
    ) -> None:
        self.sampler, self.train, self.first_step, self.distributed = sampler, train, first_step, distributed

    def __len__(self) -> int:
        return self.train.max_steps - self.first_step if self.train.max_steps else sys.maxsize

    def __iter__(self) -> Iterator[tuple[np.ndarray]]:
        for step in islice(count(self.first_step), len(self)):
            yield (self.batch(step),)

    def batch(self, step: int) -> np.ndarray:
        """Return the batch of this process for a step, counted from 0."""
        micro_batches = np.arange(self.train.grad_accum_every) + step * self.train.grad_accum_every
        micro_batches = micro_batches * self.distributed.world_size + self.distributed.rank
        size = self.train.batch_size
        return np.stack([self.sampler.sequences(i * size, size) for i in micro_batches]).astype(np.int32)


def batch_dataset(
    sampler: SequenceSampler, train: TrainConfig, first_step: int, distributed: Distributed = SINGLE_PROCESS
) -> GeneratorDataset:
    """Return the dataset of a :class:`BatchIterator`. It is not shuffled, as the sampler has shuffled the sequences."""
    batches = BatchIterator(sampler, train, first_step, distributed)
    return GeneratorDataset(batches, ["sequences"], num_parallel_workers=1, python_multiprocessing=False)
