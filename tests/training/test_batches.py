import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from data import SequenceSampler
from local_attention.training.batches import BatchIterator, batch_dataset
from local_attention.training.config import TrainConfig
from local_attention.training.distributed import Distributed
from tests.training.toys import ROOT

TRAIN = TrainConfig(seq_len=5, batch_size=3, grad_accum_every=2, max_steps=20)


@pytest.fixture
def sampler():
    return SequenceSampler(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8), TRAIN.seq_len + 1, seed=7)


def steps_of(sampler, first_step, count):
    """Return the batches of the first ``count`` steps after ``first_step``."""
    return [batch for (batch,) in islice(BatchIterator(sampler, TRAIN, first_step), count)]


def test_a_batch_contains_all_sequences_of_one_step(sampler):
    item = steps_of(sampler, 0, 5)[4]
    assert item.shape == (2, 3, 6)
    assert item.dtype == np.int32
    np.testing.assert_array_equal(item.reshape(6, 6), sampler.sequences(4 * 6, 6))


def test_a_resumed_run_sees_the_sequences_of_an_uninterrupted_one(sampler):
    uninterrupted, resumed = steps_of(sampler, 0, 20), steps_of(sampler, 8, 12)
    assert len(uninterrupted) * 6 > sampler.sequences_per_epoch  # into the second epoch
    np.testing.assert_array_equal(resumed, uninterrupted[8:])


@pytest.mark.parametrize("batch_size, grad_accum_every, world_size", [(1, 6, 1), (6, 1, 1), (1, 3, 2), (1, 2, 3)])
def test_the_sequences_of_a_step_do_not_depend_on_how_it_is_divided(sampler, batch_size, grad_accum_every, world_size):
    train = replace(TRAIN, batch_size=batch_size, grad_accum_every=grad_accum_every)
    workers = [Distributed(rank, world_size) for rank in range(world_size)]
    batches = [BatchIterator(sampler, train, 0, worker).batch(4) for worker in workers]  # (workers, micro-batches, …)
    np.testing.assert_array_equal(np.swapaxes(batches, 0, 1).reshape(6, -1), steps_of(sampler, 4, 1)[0].reshape(6, -1))


def test_no_sequence_occurs_twice_within_an_epoch(sampler):
    steps = sampler.sequences_per_epoch // 6
    sequences = np.reshape(steps_of(sampler, 0, steps), (6 * steps, -1))
    assert len({sequence.tobytes() for sequence in sequences}) == 6 * steps


@pytest.mark.parametrize("first_step, steps", [(0, 20), (8, 12), (20, 0)])
def test_there_are_as_many_batches_as_remaining_steps(sampler, first_step, steps):
    assert len(BatchIterator(sampler, TRAIN, first_step)) == steps
    assert len(steps_of(sampler, first_step, 99)) == steps


def test_without_max_steps_it_is_endless(sampler):
    assert len(BatchIterator(sampler, replace(TRAIN, max_steps=None), 8)) > 10**9


@pytest.mark.parametrize("first_step", [0, 15])
def test_the_dataset_yields_the_batches_in_order(sampler, first_step):
    items = steps_of(sampler, first_step, 99)
    dataset = batch_dataset(sampler, TRAIN, first_step)
    assert dataset.get_dataset_size() == len(items)
    batches = [batch for (batch,) in dataset.create_tuple_iterator(num_epochs=1, output_numpy=True)]
    np.testing.assert_array_equal(batches, items)
    assert batches[0].dtype == np.int32


ENDLESS_RUN = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
import numpy as np
from data import SequenceSampler
from local_attention.training.config import TrainConfig
from local_attention.training.batches import batch_dataset
train = TrainConfig(seq_len=5, grad_accum_every=1, max_steps=None)
dataset = batch_dataset(SequenceSampler(np.zeros(400, np.uint8), 6, 0), train, 0)
print(next(dataset.create_tuple_iterator(num_epochs=1, output_numpy=True))[0].shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces this memory limit")
def test_a_run_without_max_steps_makes_no_list_of_its_steps():
    done = subprocess.run([sys.executable, "-c", ENDLESS_RUN], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(1, 4, 6)\n", done.stderr[-300:]
