"""Find enwik8 in a folder or download it there. The content is always verified before use.

enwik8 is the first 100,000,000 bytes of the English Wikipedia dump of 3 March 2006, the standard benchmark for
byte-level language models (http://mattmahoney.net/dc/textdata.html).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from data import compression
from data.download import RetryPolicy, fetch
from data.errors import DataError, DownloadError

# Windows has no fcntl. Without locks, two processes started at once may both download.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None

# The archives differ; only their decompressed content is compared. The environment variable ENWIK8_MIRRORS replaces
# this list by other addresses, separated by spaces.
MIRRORS = (
    "http://mattmahoney.net/dc/enwik8.zip",
    "https://data.deepai.org/enwik8.zip",
    "http://cs.fit.edu/~mmahoney/compression/enwik8.zip",
    "https://github.com/lucidrains/minGRU-pytorch/raw/main/data/enwik8.gz",
)

log = logging.getLogger("data")


@dataclass(frozen=True)
class Expected:
    """Name, size in bytes and hexadecimal SHA-256 of the decompressed file."""

    name: str
    size: int
    sha256: str

    def check(self, size: int, sha256: str) -> None:
        """Raise DataError with both values unless size and SHA-256 are as expected."""
        if size != self.size:
            raise DataError(f"it has {size:,} bytes instead of {self.size:,}")
        if sha256 != self.sha256:
            raise DataError(f"its sha256 is {sha256} instead of {self.sha256}")


ENWIK8 = Expected("enwik8", 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8")


def find_or_download(
    folder: Path,
    expected: Expected = ENWIK8,
    mirrors: Sequence[str] | None = None,
    policy: RetryPolicy | None = None,
) -> np.ndarray:
    """Return the bytes of enwik8, downloading it if necessary.

    `folder` is searched for `enwik8`, `enwik8.zip`, `.gz`, `.xz`, `.bz2` and `.zst`; the compression is detected from
    the content. An archive is decompressed once, to `enwik8` in the same folder, or into memory if the folder is not
    writable. Existing files are never changed: if one has the wrong content, that is reported. A download only starts
    if there is no file at all.

    Processes that start at the same time wait for each other, so that only one of them downloads.

    Args:
        folder: where the file is or will be; created if necessary.
        expected: size and checksum to verify.
        mirrors: addresses to try, in order; ENWIK8_MIRRORS or MIRRORS by default.
        policy: time limits and retries of the download.

    Returns:
        (size,) uint8.

    Raises:
        DownloadError: there is no file, and downloading it failed.
        DataError: there is a file, but it is not enwik8.
    """
    mirrors = mirrors or os.environ.get("ENWIK8_MIRRORS", "").split() or MIRRORS
    raw = folder / expected.name
    with _exclusive(folder, expected.name) as writable:
        found = next(filter(os.path.exists, _candidates(raw)), None)
        if found is None:
            if not writable:
                raise DownloadError(_alternatives(raw, ["the folder is not writable"]))
            _download(raw, expected, mirrors, policy or RetryPolicy())
            found = raw
        elif found != raw and writable:
            found = _decompress_in_folder(found, raw, expected)
    return _verified(found, expected)


def _candidates(raw: Path) -> list[Path]:
    return [raw, *(raw.with_name(raw.name + suffix) for suffix in (".zip", ".gz", ".xz", ".bz2", ".zst"))]


@contextmanager
def _exclusive(folder: Path, name: str) -> Iterator[bool]:
    """Lock the folder; yields whether it is writable. The lock is also released if the process is killed."""
    with ExitStack() as stack:
        lock: IO[str] | None = None
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / f".{name}.lock", "a"))
        if lock and fcntl:
            _acquire(lock)
        yield lock is not None


def _acquire(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process to release %s", lock.name)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems do not support locks
        log.info("%s cannot be locked: %s", lock.name, error.strerror)


def _verified(path: Path, expected: Expected) -> np.ndarray:
    try:
        content = compression.read(path)
        expected.check(content.size, hashlib.sha256(content.data).hexdigest())
    except DataError as error:
        raise _mismatch(path, expected, error) from error
    return content


def _decompress_in_folder(archive: Path, raw: Path, expected: Expected) -> Path:
    """Decompress an archive to `raw`, so that later starts are fast; returns the file to read."""
    try:
        if compression.kind(archive) is None:
            return archive
        _decompress(archive, raw, expected)
    except OSError as error:
        log.info("decompressing %s into memory, as %s cannot be written: %s", archive, raw, error.strerror)
        return archive
    except DataError as error:
        raise _mismatch(archive, expected, error) from error
    return raw


def _decompress(archive: Path, raw: Path, expected: Expected) -> None:
    """Decompress to a temporary file, verify it, and rename it to `raw`.

    Raises:
        OSError: the file cannot be written.
        DataError: the archive is corrupt, or has other content.
    """
    partial = raw.with_name(f"{raw.name}.unpacking.part")
    size, sha256 = 0, hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for chunk in compression.chunks(archive):
                size += len(chunk)
                if size > expected.size:
                    raise DataError(f"it has more than {expected.size:,} bytes")
                sha256.update(chunk)
                file.write(chunk)
        expected.check(size, sha256.hexdigest())
        os.replace(partial, raw)
    finally:
        partial.unlink(missing_ok=True)


def _download(raw: Path, expected: Expected, mirrors: Sequence[str], policy: RetryPolicy) -> None:
    """Download and verify `raw`. On failure only partial downloads are left, which a later start resumes."""
    failures = []
    for url in mirrors:
        # One file per mirror, so that the bytes of two different archives are never mixed.
        archive = raw.with_name(f"{raw.name}.zip.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
        try:
            fetch(url, archive, policy)
            _decompress(archive, raw, expected)
        except DataError as error:
            host = url.split("://")[-1].split("/")[0]
            failures.append(f"{host}: {error}")
            log.warning("download of %s failed: %s", url, error)
            if not isinstance(error, DownloadError):  # complete, but wrong: cannot be resumed
                archive.unlink()
        except OSError as error:
            raise DownloadError(_alternatives(raw, [f"{raw} cannot be written: {error.strerror}"])) from error
        else:
            for leftover in raw.parent.glob(f"{raw.name}.zip.*.part"):
                leftover.unlink()
            return
    raise DownloadError(_alternatives(raw, failures))


def _alternatives(raw: Path, failures: Sequence[str]) -> str:
    return (
        f"{raw.name} is not in {raw.parent} and cannot be downloaded ({'; '.join(failures)}): put {raw.name} or "
        f"{raw.name}.zip there, or use data=stdlib, or data=file data.path=FILE"
    )


def _mismatch(path: Path, expected: Expected, error: DataError) -> DataError:
    return DataError(
        f"{path} is not {expected.name}: {error}; delete it to download {expected.name}, "
        f"or use data=file data.path={path} to train on it as it is"
    )
