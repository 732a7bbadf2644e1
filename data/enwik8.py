"""Find enwik8 in a folder, or download it there: verified before use, whatever way it came.

enwik8 is the first 100,000,000 bytes of the English Wikipedia dump of 3 March 2006, the customary benchmark for
byte-level language models (http://mattmahoney.net/dc/textdata.html).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data import compression
from data.download import RetryPolicy, fetch
from data.errors import DataError, DownloadError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # no locks: two first starts at once may both download

# Archives of the same content, not the same archive: only what they unpack to is compared. Set the environment
# variable ENWIK8_MIRRORS to other addresses, separated by blanks, to go elsewhere.
MIRRORS = (
    "http://mattmahoney.net/dc/enwik8.zip",
    "https://data.deepai.org/enwik8.zip",
    "http://cs.fit.edu/~mmahoney/compression/enwik8.zip",
    "https://github.com/lucidrains/minGRU-pytorch/raw/main/data/enwik8.gz",
)

log = logging.getLogger("data")


@dataclass(frozen=True)
class Expected:
    """What the unpacked file must be: its name, its size in bytes and its sha256 in hexadecimal."""

    name: str
    size: int
    sha256: str

    def check(self, size: int, sha256: str) -> None:
        """Raise DataError, saying the difference, unless size and sha256 are the expected ones."""
        if size != self.size:
            raise DataError(f"it holds {size:,} bytes instead of {self.size:,}")
        if sha256 != self.sha256:
            raise DataError(f"its sha256 is {sha256} instead of {self.sha256}")


ENWIK8 = Expected("enwik8", 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8")


def find_or_download(
    folder: Path,
    expected: Expected = ENWIK8,
    mirrors: Sequence[str] | None = None,
    patience: RetryPolicy | None = None,
) -> np.ndarray:
    """The bytes of enwik8.

    Looked for in `folder` as `enwik8`, `enwik8.zip`, `.gz`, `.xz` or `.bz2`, whatever these really contain. An
    archive is unpacked once, to `enwik8` beside it, or into memory where the folder cannot be written. A file that is
    found is a person's own: wrong ones are reported and never touched. Only where there is none is one downloaded.

    Processes that start at once in the same folder wait for each other, so that one of them downloads.

    Args:
        folder: where the file lies or will lie; made if need be.
        expected: what it must be.
        mirrors: addresses to download from, in order; ENWIK8_MIRRORS or MIRRORS by default.
        patience: time limits of the download.

    Returns:
        (size,) uint8.

    Raises:
        DownloadError: there is no file and none could be downloaded.
        DataError: there is a file and it is not enwik8.
    """
    mirrors = mirrors or os.environ.get("ENWIK8_MIRRORS", "").split() or MIRRORS
    raw = folder / expected.name
    with _exclusive(folder, expected.name) as writable:
        found = next(filter(os.path.exists, _candidates(raw)), None)
        if found is None:
            if not writable:
                raise DownloadError(_ways_out(raw, ["the folder cannot be written"]))
            _download(raw, expected, mirrors, patience or RetryPolicy())
            found = raw
        elif found != raw and writable:
            found = _unpack_beside(found, raw, expected)
    return _verified(found, expected)


def _candidates(raw: Path) -> list[Path]:
    return [raw, *(raw.with_name(raw.name + suffix) for suffix in (".zip", ".gz", ".xz", ".bz2"))]


@contextmanager
def _exclusive(folder: Path, name: str) -> Iterator[bool]:
    """Let one process at a time into the folder; yields whether it can be written. A killed process frees it, too."""
    with ExitStack() as stack:
        lock = None
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / f".{name}.lock", "a"))
        if lock and fcntl:
            _wait_for(lock)
        yield lock is not None


def _wait_for(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that holds %s", lock.name)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks, either
        log.info("%s cannot be locked: %s", lock.name, error.strerror)


def _verified(path: Path, expected: Expected) -> np.ndarray:
    try:
        content = compression.read(path)
        expected.check(content.size, hashlib.sha256(content).hexdigest())
    except DataError as error:
        raise _wrong(path, expected, error) from error
    return content


def _unpack_beside(archive: Path, raw: Path, expected: Expected) -> Path:
    """Unpack a person's archive to `raw`, so that later starts are fast; returns the file to read from now on."""
    try:
        if compression.kind(archive) is None:
            return archive
        _unpack(archive, raw, expected)
    except OSError as error:
        log.info("%s is unpacked into memory, as %s cannot be written: %s", archive, raw, error.strerror)
        return archive
    except DataError as error:
        raise _wrong(archive, expected, error) from error
    return raw


def _unpack(archive: Path, raw: Path, expected: Expected) -> None:
    """Unpack to a partial name and move that to `raw` if it is right.

    Raises:
        OSError: the file cannot be written.
        DataError: the archive is damaged, or holds something else.
    """
    partial = raw.with_name(f"{raw.name}.unpacking.part")
    size, sha256 = 0, hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for chunk in compression.chunks(archive):
                size += len(chunk)
                if size > expected.size:
                    raise DataError(f"it holds more than {expected.size:,} bytes")
                sha256.update(chunk)
                file.write(chunk)
        expected.check(size, sha256.hexdigest())
        os.replace(partial, raw)
    finally:
        partial.unlink(missing_ok=True)


def _download(raw: Path, expected: Expected, mirrors: Sequence[str], patience: RetryPolicy) -> None:
    """Leave verified bytes at `raw`, or else nothing but partial downloads that a later start continues."""
    failures = []
    for url in mirrors:
        # Named after its mirror, so that the bytes of two different archives never end up in one file.
        archive = raw.with_name(f"{raw.name}.zip.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
        try:
            fetch(url, archive, patience)
            _unpack(archive, raw, expected)
        except DataError as error:
            host = url.split("://")[-1].split("/")[0]
            failures.append(f"{host}: {error}")
            log.warning("download of %s failed: %s", url, error)
            if not isinstance(error, DownloadError):  # complete and wrong: nothing to continue from
                archive.unlink()
        except OSError as error:
            raise DownloadError(_ways_out(raw, [f"{raw} cannot be written: {error.strerror}"])) from error
        else:
            for leftover in raw.parent.glob(f"{raw.name}.zip.*.part"):
                leftover.unlink()
            return
    raise DownloadError(_ways_out(raw, failures))


def _ways_out(raw: Path, failures: Sequence[str]) -> str:
    return (
        f"{raw.name} is not in {raw.parent} and cannot be downloaded ({'; '.join(failures)}): put {raw.name} or "
        f"{raw.name}.zip there, or use data=stdlib, or data=file data.path=FILE"
    )


def _wrong(path: Path, expected: Expected, error: DataError) -> DataError:
    return DataError(
        f"{path} is not {expected.name}: {error}; delete it to have {expected.name} downloaded, "
        f"or use data=file data.path={path} to train on it as it is"
    )
