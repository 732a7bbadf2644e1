"""Bytes that every machine has: the source text of the running Python's standard library. No network."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

from data.errors import DataError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SKIPPED_FILES = "_sysconfigdata"  # written when Python is built: it names that machine's compiler and folders
MIN_BYTES = 1_000_000


def source_text(root: Path | None = None, min_bytes: int = MIN_BYTES) -> np.ndarray:
    """The library's own `.py` files, tests left out, joined by newlines; always the same for one Python version.

    Args:
        root: the library's folder; the running Python's by default.
        min_bytes: how much there has to be.

    Returns:
        (n,) uint8.

    Raises:
        DataError: there is less than `min_bytes`, as in a Python that was stripped of its sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    # The order of the hashes of the names is as fixed as the alphabet's, but mixes the packages: alphabetically, the
    # validation and test splits would be the few modules from t to z, and unlike all that was trained on.
    names = sorted(_sources(root), key=lambda name: hashlib.sha256(name.encode()).digest())
    text = b"\n".join(filter(None, (_content(root / name) for name in names)))
    if len(text) < min_bytes:
        raise DataError(
            f"{root} holds {len(text):,} bytes of Python sources, but at least {min_bytes:,} are needed: this Python "
            "comes without the sources of its standard library; use data=enwik8, or data=file data.path=FILE"
        )
    return np.frombuffer(text, dtype=np.uint8)


def _sources(root: Path) -> list[str]:
    """Paths relative to the root, with forward slashes."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # not entered
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_FILES):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # unreadable, or a dangling link: the rest is enough
        return b""
