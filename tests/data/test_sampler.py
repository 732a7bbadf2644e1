"""data.sampler: a sequence is a pure function of (seed, index), and an epoch contains each sequence once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, SequenceSampler
from data.sampler import _epoch

SEEDS = st.integers(0, 2**64 - 1)
INDICES = st.integers(0, 2**62)


@st.composite
def samplers(draw: st.DrawFn) -> SequenceSampler:
    size = draw(st.integers(2, 400))
    split = (np.arange(size) * 7 % 251).astype(np.uint8)
    return SequenceSampler(split, sequence_bytes=draw(st.integers(2, size)), seed=draw(SEEDS))


@given(samplers(), st.lists(INDICES, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_access_changes_no_sequence(sampler, indices, random):
    together = dict(zip(indices, sampler.starts(indices), strict=True))
    random.shuffle(indices)
    _epoch.cache_clear()
    assert all(sampler.starts(index) == together[index] for index in indices)


@given(samplers(), st.lists(INDICES, min_size=1, max_size=20))
def test_every_sequence_is_inside_the_split(sampler, indices):
    starts = sampler.starts(indices)
    assert starts.dtype == np.int64
    assert starts.min() >= 0
    assert starts.max() + sampler.sequence_bytes <= sampler.split.size


@given(samplers(), st.integers(0, 2**20))
def test_an_epoch_contains_each_sequence_once_and_neighbours_share_one_byte(sampler, epoch):
    sequences = sampler.sequences_per_epoch
    starts = np.sort(sampler.starts(epoch * sequences + np.arange(sequences)))
    assert np.all(np.diff(starts) == sampler.sequence_bytes - 1)
    fit = (sampler.split.size - 1) // (sampler.sequence_bytes - 1)
    assert sequences >= max(1, fit - 1), "at most one sequence is left out to make room for the phase"


@given(samplers(), st.integers(0, 10**9), st.integers(0, 20))
def test_a_sequence_is_the_slice_of_the_split_at_its_start(sampler, first_index, count):
    sequences = sampler.sequences(first_index, count)
    assert sequences.shape == (count, sampler.sequence_bytes) and sequences.dtype == np.uint8
    starts = sampler.starts(range(first_index, first_index + count))
    for sequence, start in zip(sequences, starts, strict=True):
        np.testing.assert_array_equal(sequence, sampler.split[start : start + sampler.sequence_bytes])


@given(samplers(), st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6))
def test_processes_that_divide_the_indices_see_the_sequences_of_one_process(sampler, first_index, world_size, each):
    single = sampler.starts(range(first_index, first_index + world_size * each))
    blocks = [sampler.starts(first_index + rank * each + np.arange(each)) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(blocks), single)
    interleaved = [sampler.starts(first_index + rank + world_size * np.arange(each)) for rank in range(world_size)]
    np.testing.assert_array_equal(np.stack(interleaved, axis=1).ravel(), single)


@given(SEEDS, SEEDS)
@settings(max_examples=30)
def test_other_seeds_give_other_sequences(one, other):
    split = np.zeros(50_000, np.uint8)
    first, second = (SequenceSampler(split, 11, seed).starts(range(50)) for seed in (one, other))
    assert np.array_equal(first, second) == (one == other)


def test_seeds_that_differ_only_above_32_bits_give_other_sequences():
    split = np.zeros(50_000, np.uint8)
    starts = [SequenceSampler(split, 11, seed).starts(range(50)).tolist() for seed in (1, 1 + 2**32, 1 + 2**63)]
    assert starts[0] != starts[1] != starts[2] != starts[0]


def test_epochs_differ_in_order_and_in_phase():
    sampler = SequenceSampler(np.zeros(50_000, np.uint8), 101, seed=0)
    sequences = sampler.sequences_per_epoch
    epochs = [sampler.starts(epoch * sequences + np.arange(sequences)) for epoch in range(10)]
    assert len({tuple((starts - starts.min()).tolist()) for starts in epochs}) == 10
    assert len({int(starts.min()) for starts in epochs}) > 5


def test_after_enough_epochs_every_byte_was_seen():
    sampler = SequenceSampler(np.zeros(57, np.uint8), 11, seed=0)
    starts = np.unique(sampler.starts(range(200 * sampler.sequences_per_epoch)))
    assert set((starts[:, None] + np.arange(11)).ravel()) == set(range(57))


def test_a_split_of_one_sequence_always_gives_that_sequence():
    split = np.arange(33, dtype=np.uint8)
    sampler = SequenceSampler(split, 33, seed=5)
    assert sampler.sequences_per_epoch == 1
    np.testing.assert_array_equal(sampler.sequences(10**12, 3), np.stack([split] * 3))


def test_the_sequences_of_a_seed_never_change():
    sampler = SequenceSampler(np.zeros(1000, np.uint8), 33, seed=2**63)
    assert sampler.starts([0, 1, 2, 29, 30, 10**12]).tolist() == [739, 67, 483, 195, 611, 257]


@pytest.mark.parametrize(
    "size, sequence_bytes, seed, complaint",
    [
        (10, 11, 0, "split of 10 bytes is shorter than a sequence of 11"),
        (10, 1, 0, "at least 2 bytes, .* got 1"),
        (10, 5, -1, r"from 0 to 2\*\*64 - 1, got -1"),
        (10, 5, 2**64, "got 18446744073709551616"),
    ],
)
def test_invalid_arguments_are_refused(size, sequence_bytes, seed, complaint):
    with pytest.raises(DataError, match=complaint):
        SequenceSampler(np.zeros(size, np.uint8), sequence_bytes, seed)


def test_a_negative_index_is_refused():
    with pytest.raises(DataError, match="indices from 0, got -1"):
        SequenceSampler(np.zeros(10, np.uint8), 5, 0).starts([3, -1])
