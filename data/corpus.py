"""A corpus: one array of bytes and its three splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.errors import DataError

# The customary split of enwik8 in per cent, in order: of its 100,000,000 bytes, 90, 5 and 5 million.
CUTS = {"train": (0, 90), "val": (90, 95), "test": (95, 100)}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Named bytes, split 90/5/5 in order. The splits are views: nothing is copied.

    Args:
        name: what logs and errors call it.
        bytes: (n,) uint8; kept as a read-only view.

    Raises:
        DataError: there are no bytes, or they are not a flat uint8 array.
    """

    name: str
    bytes: np.ndarray

    def __post_init__(self) -> None:
        if self.bytes.dtype != np.uint8 or self.bytes.ndim != 1:
            raise DataError(f"a corpus is a flat uint8 array, got {self.bytes.dtype} of shape {self.bytes.shape}")
        if not self.bytes.size:
            raise DataError(f"{self.name} is empty: give a file with some bytes to learn from")
        view = self.bytes.view()
        view.flags.writeable = False
        object.__setattr__(self, "bytes", view)  # the way to set a field of a frozen dataclass

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
        """The bytes of one split, as a read-only view.

        Raises:
            DataError: `name` is not "train", "val" or "test".
        """
        start, stop = self.bounds(name)
        return self.bytes[start:stop]

    def bounds(self, split: str) -> tuple[int, int]:
        """Where a split starts and stops in the corpus, in bytes.

        Raises:
            DataError: `split` is not "train", "val" or "test".
        """
        if split not in CUTS:
            raise DataError(f"a split is one of {', '.join(CUTS)}, got {split!r}")
        start, stop = (self.bytes.size * per_cent // 100 for per_cent in CUTS[split])
        return start, stop

    def require(self, *splits: str, sequence_bytes: int) -> None:
        """Refuse a corpus whose named splits do not hold a single crop.

        Args:
            splits: names of splits.
            sequence_bytes: the bytes of a crop, `seq_len + 1`.

        Raises:
            DataError: a split is shorter than that.
        """
        for split in splits:
            start, stop = self.bounds(split)
            if stop - start < sequence_bytes:
                raise DataError(
                    f"the {split} split of {self.name} has {stop - start} bytes, but a crop needs "
                    f"train.seq_len + 1 = {sequence_bytes}: use a larger file or a smaller train.seq_len"
                )

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of the bytes: equal for equal corpora."""
        return hashlib.sha256(self.bytes).hexdigest()[:16]
