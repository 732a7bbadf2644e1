"""Read a file whether it is compressed or not, told by its content and never by its name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from data.errors import DataError

CHUNK = 1 << 20  # bytes read at a time

# How a file of each kind begins. bzip2's magic is plain text ("BZh9"), so its first block's magic is checked as well.
_MAGIC = {
    "zip": re.compile(rb"PK(\x03\x04|\x05\x06)"),
    "gz": re.compile(rb"\x1f\x8b\x08"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}


def kind(path: Path) -> str | None:
    """How a file is compressed: "zip", "gz", "xz", "bz2", or None for a raw file.

    Raises:
        DataError: there is no such file, it cannot be read, or it is empty.
    """
    try:
        if not path.exists():
            raise DataError(f"{path} does not exist: check the path")
        if not path.is_file():
            raise DataError(f"{path} is not a file: give the path of one file")
        with open(path, "rb") as file:
            head = file.read(10)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise DataError(f"{path} is empty: give a file with some bytes in it")
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), None)


def read(path: Path, limit: int | None = None) -> np.ndarray:
    """The unpacked bytes of a file.

    A raw file is mapped, not read: its pages come when they are touched, and all processes of a machine share them.

    Args:
        path: a raw or compressed file.
        limit: stop after that many bytes.

    Returns:
        (n,) uint8.

    Raises:
        DataError: the file is missing, unreadable, empty or damaged.
    """
    if kind(path) is None:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        return np.asarray(mapped)[:limit]
    buffer = bytearray()
    for chunk in chunks(path):
        buffer += chunk
        if limit is not None and len(buffer) >= limit:
            break
    return np.frombuffer(buffer, dtype=np.uint8)[:limit]


def chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file, piece by piece.

    Raises:
        DataError: the file is missing, unreadable, empty or damaged, or a zip that does not hold exactly one file.
    """
    opener = {"zip": _open_zip, "gz": gzip.open, "xz": lzma.open, "bz2": bz2.open, None: partial(open, mode="rb")}
    packed = kind(path)
    try:
        with opener[packed](path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except DataError:
        raise
    except Exception as error:  # for a damaged archive the standard library raises anything, even IndexError
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be unpacked as {packed}: {reason}; replace it with an intact file") from error


@contextmanager
def _open_zip(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        files = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(files) != 1:
            raise DataError(f"{path} must hold exactly one file, but holds {len(files)}: unpack it and give one")
        with archive.open(files[0]) as file:
            yield file
