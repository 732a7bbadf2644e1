"""A corpus: bytes with a training, a validation and a test split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.errors import DataError

SPLITS = ("train", "val", "test")
PER_CENT = 5  # of the bytes, for each of validation and test


@dataclass(frozen=True, eq=False)
class Corpus:
    """A named byte array whose first 90% are for training, the next 5% for validation, the last 5% for testing.

    A validation or test split that has bytes of its own leaves its 5% to the training split: with `own={"val": …}`, the
    first 95% are for training, the last 5% for testing. The splits are views of the arrays; nothing is copied.

    Args:
        name: used in log messages and errors.
        bytes: (n,) uint8; stored as a read-only view.
        own: the bytes of "val" and "test" that are not in `bytes`, (n,) uint8 each.

    Raises:
        DataError: an array is empty, or not one-dimensional uint8.
    """

    name: str
    bytes: np.ndarray
    own: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", _read_only(self.name, self.bytes))  # the dataclass is frozen
        own = {split: _read_only(f"data.{split}_path", array) for split, array in self.own.items()}
        object.__setattr__(self, "own", own)

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
        return self.array(name)[start:stop]

    def array(self, split: str) -> np.ndarray:
        """Return the array that contains a split, at its :meth:`bounds`: its own one, or all bytes of the corpus."""
        return self.own.get(split, self.bytes)

    def bounds(self, split: str) -> tuple[int, int]:
        """Return the start and stop offset of a split in its :meth:`array`.

        Raises:
            DataError: `split` is not "train", "val" or "test".
        """
        if split not in SPLITS:
            raise DataError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
        if split in self.own:
            return 0, self.own[split].size
        later = sum(name not in self.own for name in SPLITS[SPLITS.index(split) + 1 :])
        start, stop = (self.bytes.size * (100 - PER_CENT * (later + more)) // 100 for more in (1, 0))
        return 0 if split == "train" else start, stop

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
                where = f"data.{split}_path" if split in self.own else f"the {split} split of {self.name}"
                raise DataError(
                    f"{where} has {stop - start} bytes, but a sequence needs "
                    f"train.seq_len + 1 = {sequence_bytes}: use a larger file or a smaller train.seq_len"
                )

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the bytes; identifies the content."""
        digest = hashlib.sha256(self.bytes.data)
        for split, array in sorted(self.own.items()):
            digest.update(f"{split} {array.size}".encode())
            digest.update(array.data)
        return digest.hexdigest()[:16]


def _read_only(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 1:
        raise DataError(f"expected a one-dimensional uint8 array, got {array.dtype} of shape {array.shape}")
    if not array.size:
        raise DataError(f"{name} is empty: give a file that contains some bytes")
    view = array.view()
    view.flags.writeable = False
    return view
