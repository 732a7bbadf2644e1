"""A corpus: one array of bytes with a training, a validation and a test split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.errors import DataError

# Start and stop of each split in per cent. For enwik8 this is the standard split: 90, 5 and 5 million bytes.
SPLITS = {"train": (0, 90), "val": (90, 95), "test": (95, 100)}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A named byte array whose first 90% are for training, the next 5% for validation, the last 5% for testing.

    The splits are views of the array; nothing is copied.

    Args:
        name: used in log messages and errors.
        bytes: (n,) uint8; stored as a read-only view.

    Raises:
        DataError: the array is empty, or not one-dimensional uint8.
    """

    name: str
    bytes: np.ndarray

    def __post_init__(self) -> None:
        if self.bytes.dtype != np.uint8 or self.bytes.ndim != 1:
            raise DataError(
                f"expected a one-dimensional uint8 array, got {self.bytes.dtype} of shape {self.bytes.shape}"
            )
        if not self.bytes.size:
            raise DataError(f"{self.name} is empty: give a file that contains some bytes")
        view = self.bytes.view()
        view.flags.writeable = False
        object.__setattr__(self, "bytes", view)  # the dataclass is frozen

    @property
    def train(self) -> np.ndarray:
        return self.split("train")

    @property
    def val(self) -> np.ndarray:
        return self.split("val")

    @property
    def test(self) -> np.ndarray:
        return self.split("test")

    def split(self, name: str) -> np.ndarray:
        """Return the bytes of one split as a read-only view, `(n,)` uint8.

        Raises:
            DataError: `name` is not "train", "val" or "test".
        """
        start, stop = self.bounds(name)
        return self.bytes[start:stop]

    def bounds(self, split: str) -> tuple[int, int]:
        """Return the start and stop offset of a split, in bytes.

        Raises:
            DataError: `split` is not "train", "val" or "test".
        """
        if split not in SPLITS:
            raise DataError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
        start, stop = (self.bytes.size * per_cent // 100 for per_cent in SPLITS[split])
        return start, stop

    def require(self, *splits: str, sequence_bytes: int) -> None:
        """Check that each of the given splits contains at least one sequence.

        Args:
            splits: names of splits.
            sequence_bytes: length of a sequence in bytes, `seq_len + 1`.

        Raises:
            DataError: a split is shorter than `sequence_bytes`.
        """
        for split in splits:
            start, stop = self.bounds(split)
            if stop - start < sequence_bytes:
                raise DataError(
                    f"the {split} split of {self.name} has {stop - start} bytes, but a sequence needs "
                    f"train.seq_len + 1 = {sequence_bytes}: use a larger file or a smaller train.seq_len"
                )

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the bytes; identifies the content."""
        return hashlib.sha256(self.bytes.data).hexdigest()[:16]
