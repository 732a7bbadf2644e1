"""From a config to a corpus."""

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
    """The corpus that a config asks for.

    Args:
        config: any object with these attributes, of which only `source` must be there:
            source: "enwik8", "stdlib" or "file".
            path: of the file, for "file": raw, .gz, .xz, .bz2 or .zip, told by content.
            dir: the folder where enwik8 is looked for or downloaded to; the folder of this package by default.
            fallback: "stdlib" to use that where enwik8 is absent and cannot be downloaded; None for an error.
            max_bytes: use only the first that many bytes; None for all.

    Returns:
        the corpus, split 90/5/5.

    Raises:
        DataError: a setting is wrong, or the bytes are not there, in one line that says what to do.
    """
    source, limit = config.source, getattr(config, "max_bytes", None)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise DataError(f"data.max_bytes is null or a number of bytes from 1 on, got {limit!r}")
    if source == "enwik8":
        name, content = _enwik8(config)
    elif source == "stdlib":
        name, content = "stdlib", source_text()
    elif source == "file":
        name, content = _file(config, limit)
    else:
        raise DataError(f"data.source is enwik8, stdlib or file, got {source!r}")
    corpus = Corpus(name, content[:limit])
    log.info("%s: %s bytes, fingerprint %s", corpus.name, f"{corpus.bytes.size:,}", corpus.fingerprint)
    return corpus


def _enwik8(config: Any) -> tuple[str, np.ndarray]:
    fallback = getattr(config, "fallback", None)
    if fallback not in (None, "stdlib"):
        raise DataError(f"data.fallback is null or stdlib, got {fallback!r}")
    folder = Path(getattr(config, "dir", None) or Path(__file__).parent).expanduser().absolute()
    try:
        return "enwik8", find_or_download(folder)
    except DownloadError as error:
        if fallback is None:
            raise
        log.warning(
            "NOT ENWIK8: this run uses Python's standard library instead, as data.fallback=stdlib allows; its bits "
            "per byte do not compare with those of enwik8. Reason: %s",
            error,
        )
        return "stdlib", source_text()


def _file(config: Any, limit: int | None) -> tuple[str, np.ndarray]:
    path = getattr(config, "path", None)
    if not path:
        raise DataError("data=file needs a path: give data.path=FILE (raw, .gz, .xz, .bz2 or .zip)")
    path = Path(path).expanduser().absolute()
    return path.name, compression.read(path, limit)
