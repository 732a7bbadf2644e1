"""From the crop sampler to ``Model.train``."""

import sys
from itertools import count, islice

import numpy as np
from mindspore.dataset import GeneratorDataset

from local_attention.training.distributed import SINGLE_PROCESS


class BatchIterator:
    """The crops of each step, from ``first_step`` steps done on: ``(grad_accum_every, b, seq_len + 1)`` int32.

    Iterated, not indexed: for something with ``__getitem__`` MindSpore keeps a list of all indices, and a run without
    ``max_steps`` has no last one.

    Crop ``i`` of micro-batch ``a`` of worker ``r`` in step ``s`` is sample ``((s * A + a) * N + r) * B + i`` of the
    sampler, where ``A`` is ``grad_accum_every``, ``N`` the number of workers and ``B`` their ``batch_size``: together
    they see what one with a batch of ``N * B`` does.
    """

    def __init__(self, sampler, train, first_step, workers=SINGLE_PROCESS):
        self.sampler, self.train, self.first_step, self.workers = sampler, train, first_step, workers

    def __len__(self):
        return self.train.max_steps - self.first_step if self.train.max_steps else sys.maxsize

    def __iter__(self):
        for step in islice(count(self.first_step), len(self)):
            yield (self.of_step(step),)

    def of_step(self, step):
        """What the worker sees in the step after ``step`` others."""
        batches = np.arange(self.train.grad_accum_every) + step * self.train.grad_accum_every
        batches = batches * self.workers.count + self.workers.rank
        crops = [self.sampler.crops(batch * self.train.batch_size, self.train.batch_size) for batch in batches]
        return np.stack(crops).astype(np.int32)


def batch_dataset(sampler, train, first_step, workers=SINGLE_PROCESS):
    """A worker's dataset, ``first_step`` steps of the run being done; in order, as the sampler has shuffled already."""
    crops = BatchIterator(sampler, train, first_step, workers)
    return GeneratorDataset(crops, ["crops"], num_parallel_workers=1, python_multiprocessing=False)
