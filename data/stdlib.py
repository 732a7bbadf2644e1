"""The source code of the running Python's standard library: data that is available on every machine, offline."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

from data.errors import DataError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SKIPPED_FILES = "_sysconfigdata"  # generated when Python is built, from the compiler and paths of that machine
MIN_BYTES = 1_000_000


def source_text(root: Path | None = None, min_bytes: int = MIN_BYTES) -> np.ndarray:
    """Return the `.py` files of the standard library except its tests, joined by newlines.

    The result is the same on all machines with the same version of Python.

    Args:
        root: folder of the library; by default that of the running Python.
        min_bytes: minimum size of the result, in bytes.

    Returns:
        (n,) uint8.

    Raises:
        DataError: the result is shorter than `min_bytes`, for example if Python was installed without sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    # Sorting by the hash of the name is deterministic and mixes the packages. In alphabetical order, the validation and
    # test splits would consist of a few modules from t to z, unlike the training split.
    names = sorted(_sources(root), key=lambda name: hashlib.sha256(name.encode()).digest())
    text = b"\n".join(filter(None, (_content(root / name) for name in names)))
    if len(text) < min_bytes:
        raise DataError(
            f"{root} contains {len(text):,} bytes of Python sources, but at least {min_bytes:,} are needed: this "
            "Python was installed without its sources; use data=enwik8, or data=file data.path=FILE"
        )
    return np.frombuffer(text, dtype=np.uint8)


def _sources(root: Path) -> list[str]:
    """Return the paths of the source files relative to the root, with forward slashes."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]  # limits where os.walk goes
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_FILES):
                paths.append((Path(folder) / name).relative_to(root).as_posix())
    return paths


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # unreadable, or a dangling link
        return b""
