"""Read raw and compressed files. The compression is detected from the content, not from the file name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import DataError

CHUNK = 1 << 20  # bytes read at a time

# First bytes of each file type. As bzip2's magic ("BZh9") may begin a text, its first block's magic is checked, too.
_MAGIC = {
    "zip": re.compile(rb"PK(\x03\x04|\x05\x06)"),
    "gz": re.compile(rb"\x1f\x8b\x08"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
}


def kind(path: Path) -> str | None:
    """Detect how a file is compressed: "zip", "gz", "xz", "bz2", or None for a raw file.

    Raises:
        DataError: the file does not exist, cannot be read, or is empty.
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
    """Return the decompressed bytes of a file.

    A raw file is memory-mapped: pages are loaded on access and shared by all processes on the machine.

    Args:
        path: a raw or compressed file.
        limit: return at most this many bytes; None for all.

    Returns:
        (n,) uint8.

    Raises:
        DataError: the file is missing, unreadable, empty or corrupt.
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
    """Yield the decompressed bytes of a file in chunks of at most `CHUNK` bytes.

    Raises:
        DataError: the file is missing, unreadable, empty or corrupt, or a zip that does not contain exactly one file.
    """
    opener: dict[str | None, Callable[[Path], AbstractContextManager[Any]]] = {
        "zip": _open_zip,
        "gz": gzip.open,
        "xz": lzma.open,
        "bz2": bz2.open,
        None: partial(open, mode="rb"),
    }
    compression = kind(path)
    try:
        with opener[compression](path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except DataError:
        raise
    except Exception as error:  # on a corrupt archive the standard library may raise any exception, even IndexError
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be decompressed as {compression}: {reason}; replace it with an intact file"
        ) from error


@contextmanager
def _open_zip(path: Path) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        files = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(files) != 1:
            raise DataError(f"{path} must contain exactly one file, but contains {len(files)}: extract one of them")
        with archive.open(files[0]) as file:
            yield file
