"""Random access to shuffled training sequences: sequence i is a pure function of the seed and i.

The sampler has no state to save. A resumed run continues with the next sequence, and distributed processes share one
stream without communication, as each of them asks for its own indices.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from data.errors import DataError


class SequenceSampler:
    """Sequences of a split in random order, without replacement within an epoch.

    Neighbouring sequences share one byte: the last target of one is the first input of the next. The inputs therefore
    do not overlap, and the stride is `sequence_bytes - 1`. Each epoch starts at another random offset, the phase, so
    that a byte is at different positions of its sequence in different epochs.

    Args:
        split: (n,) uint8; not copied.
        sequence_bytes: length of a sequence: `seq_len` inputs and one more byte for the last target.
        seed: 0 to 2**64 - 1.

    Raises:
        DataError: the split is shorter than a sequence, a sequence has only one byte, or the seed is out of range.
    """

    def __init__(self, split: np.ndarray, sequence_bytes: int, seed: int) -> None:
        if sequence_bytes < 2:
            raise DataError(f"expected sequences of at least 2 bytes, an input and a target, got {sequence_bytes}")
        if split.size < sequence_bytes:
            raise DataError(
                f"a split of {split.size} bytes is shorter than a sequence of {sequence_bytes}: use a longer one"
            )
        if not 0 <= seed < 2**64:
            raise DataError(f"expected a seed from 0 to 2**64 - 1, got {seed}")
        self.split = split
        self.sequence_bytes = sequence_bytes
        self.seed = seed
        self.stride = sequence_bytes - 1
        # If several sequences fit, one is left out per epoch to make room for the phase.
        self.sequences_per_epoch = max(1, (split.size - 1) // self.stride - 1)
        self._max_phase = split.size - 1 - self.sequences_per_epoch * self.stride

    def starts(self, indices: ArrayLike) -> np.ndarray:
        """Return the offsets in the split at which sequences start.

        Args:
            indices: global sequence indices of any shape, from 0, unbounded.

        Returns:
            int64 offsets, of the same shape.

        Raises:
            DataError: an index is negative.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise DataError(f"expected sequence indices from 0, got {indices.min()}")
        epochs, positions = np.divmod(indices, self.sequences_per_epoch)
        starts = np.empty_like(indices)
        for epoch in np.unique(epochs):
            phase, order = _epoch(self.seed, int(epoch), self.sequences_per_epoch, self._max_phase)
            selected = epochs == epoch
            starts[selected] = phase + order[positions[selected]] * self.stride
        return starts

    def sequences(self, first_index: int, count: int) -> np.ndarray:
        """Return the sequences `first_index` to `first_index + count - 1`.

        Args:
            first_index: global index of the first sequence.
            count: number of sequences.

        Returns:
            (count, sequence_bytes) uint8, a new array.

        Raises:
            DataError: `first_index` is negative.
        """
        starts = self.starts(first_index + np.arange(count, dtype=np.int64))
        return np.lib.stride_tricks.sliding_window_view(self.split, self.sequence_bytes)[starts]


@lru_cache(maxsize=4)  # a step needs one epoch, or two at their boundary
def _epoch(seed: int, epoch: int, sequences: int, max_phase: int) -> tuple[int, np.ndarray]:
    """Return the phase of an epoch, 0 to `max_phase`, and the order of its sequences."""
    # NumPy guarantees that the streams of RandomState never change (NEP 19), unlike those of default_rng. A run that is
    # resumed with another version of NumPy therefore sees the same sequences.
    random = np.random.RandomState([*_words(seed), *_words(epoch)])
    phase = int(random.randint(max_phase + 1, dtype=np.int64))
    order = random.permutation(sequences).astype(np.int64, copy=False)
    order.flags.writeable = False  # the cached array is shared by all callers
    return phase, order


def _words(number: int) -> tuple[int, int]:
    """Split a 64-bit number into the two 32-bit words that RandomState takes."""
    return number & 0xFFFFFFFF, number >> 32
