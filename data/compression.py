"""Read raw and packed files. How a file is packed is detected from the content, not from the file name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import DataError

CHUNK = 1 << 20  # bytes read at a time
HEAD = 512  # bytes that show how a file is packed: the first header of a tar
MAX_LAYERS = 4  # such as a tar in a gz in a zip; there are files that unpack to themselves

# First bytes of each file type. As bzip2's magic ("BZh9") may begin a text, its first block's magic is checked, too.
_MAGIC = {
    "zip": re.compile(rb"PK(\x03\x04|\x05\x06)"),
    "gz": re.compile(rb"\x1f\x8b\x08"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "lzma": re.compile(rb"\x5d\x00\x00..(\xff{8}|.{5}\x00{3})", re.DOTALL),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
# What Python cannot unpack, and a command that can.
_REFUSED = {
    "7z": (re.compile(rb"7z\xbc\xaf\x27\x1c"), "7z x"),
    "rar": (re.compile(rb"Rar!\x1a\x07"), "unrar x"),
    "lz4": (re.compile(rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18"), "lz4 -d"),
    "compress (.Z)": (re.compile(rb"\x1f\x9d[\x09-\x10\x89-\x90]"), "uncompress"),
    "lzip": (re.compile(rb"LZIP[\x00\x01]"), "lzip -d"),
    "lzop": (re.compile(rb"\x89LZO\x00\r\n\x1a\n"), "lzop -d"),
    "zpaq": (re.compile(rb"7kSt|zPQ[\x01\x02]"), "zpaq x"),
    "cab": (re.compile(rb"MSCF\x00{4}"), "cabextract"),
    "cpio": (re.compile(rb"07070[12][0-9A-Fa-f]{104}"), "cpio -i"),
    "ar": (re.compile(rb"!<arch>\n"), "ar x"),
}
# What operating systems add to an archive.
_LITTER = re.compile(r"(^|/)(__MACOSX/|\._[^/]*$|\.DS_Store$|Thumbs\.db$|desktop\.ini$)")


def kind(path: Path) -> str | None:
    """Detect how a file is packed: "zip", "tar", "gz", "xz", "lzma", "bz2", "zst", or None for a raw file.

    Raises:
        DataError: the file does not exist, cannot be read, is empty, or is packed in a way that cannot be read.
    """
    try:
        if not path.exists():
            raise DataError(f"{path} does not exist: check the path")
        if not path.is_file():
            raise DataError(f"{path} is not a file: give the path of one file")
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise DataError(f"{path} is empty: give a file with some bytes in it")
    try:
        return _kind(head)
    except _CannotUnpackError as error:
        raise DataError(f"{path} {error}") from None


class _CannotUnpackError(Exception):
    """What is wrong with a file; follows its name."""


def _kind(head: bytes) -> str | None:
    for name, (magic, command) in _REFUSED.items():
        if magic.match(head):
            raise _CannotUnpackError(
                f"is packed with {name}, which cannot be read: unpack it first, for example with {command}, and give "
                "the file in it"
            )
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), "tar" if _is_tar(head) else None)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")  # checks its checksum
    except tarfile.HeaderError:
        return False
    return True


def read(path: Path, limit: int | None = None) -> np.ndarray:
    """Return the unpacked bytes of a file.

    A raw file is memory-mapped: pages are loaded on access and shared by all processes on the machine.

    Args:
        path: a raw or packed file.
        limit: return at most this many bytes; None for all.

    Returns:
        (n,) uint8.

    Raises:
        DataError: the file is missing, unreadable, empty or corrupt, or packed in a way that cannot be read.
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


def chunks(path: str | Path, size: int = CHUNK) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in chunks of at most `size` bytes.

    What was unpacked is unpacked again if necessary, as with a tar in a gz.

    Args:
        path: a raw or packed file; "-" for standard input.
        size: bytes per chunk.

    Raises:
        OSError: the file is missing or unreadable.
        DataError: it is corrupt or packed in a way that cannot be read, or an archive that does not contain exactly
            one file.
    """
    name, layers = "standard input" if path == "-" else str(path), list[str]()
    with ExitStack() as stack:
        file: IO[bytes] = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        try:
            head, file = _peek(file)
            while layer := _kind(head):
                layers.append(layer)
                if len(layers) > MAX_LAYERS:
                    raise _CannotUnpackError(f"is packed more than {MAX_LAYERS} times: unpack it first")
                head, file = _peek(stack.enter_context(_OPEN[layer](file)))
            while chunk := file.read(size):
                yield chunk
        except _CannotUnpackError as error:
            raise DataError(f"{name} {error}") from None
        except Exception as error:  # on a corrupt archive the standard library may raise any exception, even IndexError
            if not layers:
                raise
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{name} cannot be decompressed as {'.'.join(reversed(layers))}: {reason}; replace it with an "
                "intact file"
            ) from error


class _Rejoined(io.RawIOBase):
    """The first bytes of a file, which were read, followed by the others."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self.head, self.file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk, self.head = self.head[: len(buffer)] or self.file.read(len(buffer)), self.head[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _peek(file: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a file, and a file that still begins with them."""
    head = file.read(HEAD)
    if isinstance(file, io.BufferedReader) and file.seekable():  # others may say that they are, but go back slowly
        file.seek(-len(head), os.SEEK_CUR)
        return head, file
    return head, io.BufferedReader(_Rejoined(head, file))


def _seekable(file: IO[bytes]) -> IO[bytes]:
    return file if file.seekable() else io.BytesIO(file.read())


@contextmanager
def _open_zip(file: IO[bytes]) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(_seekable(file)) as archive:
        only = _only_file(entry.filename for entry in archive.infolist() if not entry.is_dir())
        with archive.open(only) as content:
            yield content


@contextmanager
def _open_tar(file: IO[bytes]) -> Iterator[IO[bytes]]:
    with tarfile.open(fileobj=_seekable(file), mode="r:") as archive:
        content = archive.extractfile(_only_file(entry.name for entry in archive if entry.isfile()))
        assert content  # as it is a file
        with content:
            yield content


def _only_file(names: Iterable[str]) -> str:
    files = [name for name in names if not _LITTER.search(name)]
    if len(files) != 1:
        raise _CannotUnpackError(f"must contain exactly one file, but contains {len(files)}: extract one of them")
    return files[0]


def _open_zst(file: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    try:
        from backports import zstd
    except ImportError:
        raise _CannotUnpackError(
            "is packed with zstd: pip install backports.zstd, or unpack it first, for example with zstd -d"
        ) from None
    any_window = {int(zstd.DecompressionParameter.window_log_max): 31}  # as zstd --ultra --long=31 writes
    opened: Any = zstd.ZstdFile(file, options=any_window)
    return opened


_OPEN: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "zip": _open_zip,
    "tar": _open_tar,
    "gz": gzip.open,
    "xz": lzma.open,
    "lzma": lzma.open,
    "bz2": bz2.open,
    "zst": _open_zst,
}
