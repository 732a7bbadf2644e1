"""From the crop sampler to ``Model.train``."""

import numpy as np
from mindspore.dataset import GeneratorDataset

ENDLESS = 2**31 - 1


class StepCrops:
    """Item ``i`` is what the step after ``first_step + i`` steps sees: ``(grad_accum_every, b, seq_len + 1)`` int32."""

    def __init__(self, sampler, train, first_step):
        self.sampler, self.train, self.first_step = sampler, train, first_step
        self.crops_a_step = train.grad_accum_every * train.batch_size

    def __len__(self):
        return (self.train.max_steps or ENDLESS) - self.first_step

    def __getitem__(self, i):
        crops = self.sampler.crops((self.first_step + i) * self.crops_a_step, self.crops_a_step)
        return crops.astype(np.int32).reshape(self.train.grad_accum_every, self.train.batch_size, -1)


def crop_dataset(sampler, train, first_step):
    """The dataset of a run that has done ``first_step`` steps; in order, as the sampler has shuffled already."""
    return GeneratorDataset(
        StepCrops(sampler, train, first_step),
        ["crops"],
        shuffle=False,
        num_parallel_workers=1,
        python_multiprocessing=False,
    )
