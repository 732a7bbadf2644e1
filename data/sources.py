"""Load the corpus that a config describes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from data import compression
from data.corpus import Corpus
from data.enwik8 import find_or_download
from data.errors import DataError, DownloadError
from data.stdlib import source_text

log = logging.getLogger("data")


def load(config: Any) -> Corpus:
    """Load the corpus that a config describes.

    Args:
        config: any object with these attributes, of which only `source` is required:
            source: "enwik8", "stdlib" or "file".
            path: the file, for source "file": raw or packed, detected from the content; see `data.compression`.
            val_path, test_path: own files for validation and testing, raw or packed, with any source.
            dir: the folder that contains enwik8, or to download it to; by default the folder of this package.
            fallback: "stdlib" to use that if enwik8 is absent and cannot be downloaded; None to raise an error.
            max_bytes: use only the first `max_bytes` bytes of the source; None for all.

    Returns:
        The :class:`Corpus`, split 90/5/5 unless there are own files.

    Raises:
        DataError: a setting is invalid, or the data is not available. The message says what to do.
    """
    source, limit = config.source, getattr(config, "max_bytes", None)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise DataError(f"data.max_bytes: expected null or a number of bytes, at least 1, got {limit!r}")
    if source == "enwik8":
        name, content = _enwik8(config)
    elif source == "stdlib":
        name, content = "stdlib", source_text()
    elif source == "file":
        name, content = _file(config, limit)
    else:
        raise DataError(f"data.source: expected enwik8, stdlib or file, got {source!r}")
    paths = {split: getattr(config, f"{split}_path", None) for split in ("val", "test")}
    own = {split: compression.read(_absolute(path)) for split, path in paths.items() if path}
    corpus = Corpus(name, content[:limit], own)
    log.info("%s: %s bytes, fingerprint %s", corpus.name, f"{corpus.bytes.size:,}", corpus.fingerprint)
    for split, array in own.items():
        log.info("%s: %s, %s bytes", split, paths[split], f"{array.size:,}")
    return corpus


def _enwik8(config: Any) -> tuple[str, np.ndarray]:
    fallback = getattr(config, "fallback", None)
    if fallback not in (None, "stdlib"):
        raise DataError(f"data.fallback: expected null or stdlib, got {fallback!r}")
    folder = _absolute(getattr(config, "dir", None) or Path(__file__).parent)
    try:
        return "enwik8", find_or_download(folder)
    except DownloadError as error:
        if fallback is None:
            raise
        log.warning(
            "NOT ENWIK8: this run uses the source code of Python's standard library instead, because of "
            "data.fallback=stdlib; its bits per byte cannot be compared with those of enwik8. Reason: %s",
            error,
        )
        return "stdlib", source_text()


def _file(config: Any, limit: int | None) -> tuple[str, np.ndarray]:
    path = getattr(config, "path", None)
    if not path:
        raise DataError("data=file needs a path: give data.path=FILE (raw, .gz, .xz, .bz2, .zst, .zip or .tar)")
    path = _absolute(path)
    return path.name, compression.read(path, limit)


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()
