"""From the crop sampler to ``Model.train``."""

import sys
from itertools import count, islice

import numpy as np
from mindspore.dataset import GeneratorDataset


class StepCrops:
    """The crops of each step, from ``first_step`` steps done on: ``(grad_accum_every, b, seq_len + 1)`` int32.

    Iterated, not indexed: for something with ``__getitem__`` MindSpore keeps a list of all indices, and a run without
    ``max_steps`` has no last one.
    """

    def __init__(self, sampler, train, first_step):
        self.sampler, self.train, self.first_step = sampler, train, first_step
        self.crops_a_step = train.grad_accum_every * train.batch_size

    def __len__(self):
        return self.train.max_steps - self.first_step if self.train.max_steps else sys.maxsize

    def __iter__(self):
        for step in islice(count(self.first_step), len(self)):
            yield (self.of_step(step),)

    def of_step(self, step):
        """What the step after ``step`` others sees."""
        crops = self.sampler.crops(step * self.crops_a_step, self.crops_a_step)
        return crops.astype(np.int32).reshape(self.train.grad_accum_every, self.train.batch_size, -1)


def crop_dataset(sampler, train, first_step):
    """The dataset of a run that has done ``first_step`` steps; in order, as the sampler has shuffled already."""
    crops = StepCrops(sampler, train, first_step)
    return GeneratorDataset(crops, ["crops"], num_parallel_workers=1, python_multiprocessing=False)
