"""Read what a run has recorded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The records in ``metrics.jsonl``, if there are any, without lines that a killed process has left incomplete."""
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue
