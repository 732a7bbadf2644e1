"""Which crop is sample number i: a pure function of the seed and i.

There is no state to save, so a resumed run continues with the very next crop, and any number of workers share one
stream without talking: each asks for the indices that are its own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from data.errors import DataError


class SequenceSampler:
    """Crops of a split in random order, without replacement within an epoch.

    Neighbouring crops share one byte: the last target of one is the first input of the next. So the inputs of the
    crops do not overlap, and their stride is `sequence_bytes - 1`. Each epoch cuts the split anew, from a random phase,
    so that a byte does not stand at the same place of its crop in every epoch.

    Args:
        split: (n,) uint8; never copied.
        sequence_bytes: the bytes of a crop: `seq_len` inputs and one more for the last target.
        seed: 0 to 2**64 - 1.

    Raises:
        DataError: the split is shorter than one crop, a crop is shorter than two bytes, or the seed is out of range.
    """

    def __init__(self, split: np.ndarray, sequence_bytes: int, seed: int) -> None:
        if sequence_bytes < 2:
            raise DataError(f"a crop needs an input byte and a target byte, so at least 2 bytes, got {sequence_bytes}")
        if split.size < sequence_bytes:
            raise DataError(f"a split of {split.size} bytes holds no crop of {sequence_bytes}: use a longer one")
        if not 0 <= seed < 2**64:
            raise DataError(f"a seed is between 0 and 2**64 - 1, got {seed}")
        self.split = split
        self.sequence_bytes = sequence_bytes
        self.seed = seed
        self.stride = sequence_bytes - 1
        # One crop fewer than would fit, if more than one does: what it leaves free is the room for the phase.
        self.sequences_per_epoch = max(1, (split.size - 1) // self.stride - 1)
        self._room = split.size - 1 - self.sequences_per_epoch * self.stride

    def starts(self, indices: ArrayLike) -> np.ndarray:
        """Where the crops of these samples start in the split.

        Args:
            indices: global sample indices, any shape, from 0 and without end.

        Returns:
            int64 offsets, of the same shape.

        Raises:
            DataError: an index is negative.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise DataError(f"sample indices count from 0, got {indices.min()}")
        epochs, places = np.divmod(indices, self.sequences_per_epoch)
        starts = np.empty_like(indices)
        for epoch in np.unique(epochs):
            phase, order = _epoch(self.seed, int(epoch), self.sequences_per_epoch, self._room)
            here = epochs == epoch
            starts[here] = phase + order[places[here]] * self.stride
        return starts

    def crops(self, first_index: int, count: int) -> np.ndarray:
        """The crops of the samples `first_index` to `first_index + count - 1`.

        Returns:
            (count, sequence_bytes) uint8, a fresh array.

        Raises:
            DataError: `first_index` is negative.
        """
        starts = self.starts(first_index + np.arange(count, dtype=np.int64))
        return np.lib.stride_tricks.sliding_window_view(self.split, self.sequence_bytes)[starts]


@lru_cache(maxsize=4)  # a step touches one epoch, or two where they meet; evaluation may read beside training
def _epoch(seed: int, epoch: int, crops: int, room: int) -> tuple[int, np.ndarray]:
    """The phase of an epoch, 0 to `room`, and the order in which its crops are visited."""
    # RandomState and not default_rng: NumPy promises never to change its streams (NEP 19), so that a run resumed
    # under another NumPy still sees the crops that it would have seen.
    random = np.random.RandomState([*_words(seed), *_words(epoch)])
    phase = int(random.randint(room + 1, dtype=np.int64))
    order = random.permutation(crops).astype(np.int64, copy=False)
    order.flags.writeable = False  # the cache hands the same array to everybody
    return phase, order


def _words(number: int) -> tuple[int, int]:
    """A 64-bit number as the two 32-bit words that RandomState takes."""
    return number & 0xFFFFFFFF, number >> 32
