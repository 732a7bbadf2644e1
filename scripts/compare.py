"""Print a table of runs, the best first: size, bytes seen, bits per byte, speed, and the settings that differ.

    python scripts/compare.py runs/quickstart               # all runs below a folder
    python scripts/compare.py RUN_DIR RUN_DIR

A run that has not ended is marked with "…" and shows its latest validation score.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.checkpoint import Checkpoints, tensor_sizes
from local_attention.training.schema import flatten
from local_attention.training.terminal import accept_any_output

HEADER = ("run", "params", "steps", "bytes", "val bpb", "test bpb", "bytes/s", "settings")
NOT_COMPARED = ("run_dir", "resume")


def runs_below(folders: Iterable[str | Path]) -> list[Path]:
    """Return all run directories in ``folders``, without duplicates."""
    return sorted({path.parent for folder in folders for path in Path(folder).rglob("config.yaml")})


def describe(run_dir: Path) -> dict[str, Any]:
    """Return the figures of a run; unknown ones are missing or None."""
    summary = run_dir / "summary.json"
    figures = json.loads(summary.read_text()) if summary.exists() else read_metrics(run_dir / "metrics.jsonl")
    checkpoint = Checkpoints(run_dir / "checkpoints").find("last")
    sizes = tensor_sizes(checkpoint) if checkpoint else {}
    figures["params"] = sum(size for name, size in sizes.items() if name.startswith("model.")) or None
    figures["settings"] = flatten(yaml.safe_load((run_dir / "config.yaml").read_text()))
    return {"run": str(run_dir) + ("" if summary.exists() else " …"), **figures}


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the latest figures of a run without a summary."""
    figures: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # incomplete, after a crash
            continue
        figures |= dict(steps=record["step"], bytes_seen=record["bytes_seen"])
        if record["kind"] == "train":
            figures["bytes_per_s"] = record["bytes_per_s"]
        elif record["kind"] == "eval" and not record.get("whole_split"):  # that is of an earlier end of the run
            figures[f"{record['split']}_bpb"] = record["bpb"]
    return figures


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table for the results of :func:`describe`."""

    def score(run: dict[str, Any]) -> float:
        return next((run[key] for key in ("test_bpb", "val_bpb") if run.get(key) is not None), float("inf"))

    settings = [run["settings"] for run in runs]
    keys = sorted({key for each in settings for key in each} - set(NOT_COMPARED))
    differing = [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]

    def number(run: dict[str, Any], key: str, form: str) -> str:
        return "-" if run.get(key) is None else format(run[key], form)

    rows: list[tuple[str, ...]] = [HEADER]
    for run in sorted(runs, key=score):
        changes = " ".join(f"{key}={run['settings'].get(key)}" for key in differing)
        numbers = [("params", ","), ("steps", ","), ("bytes_seen", ","), ("val_bpb", ".4f"), ("test_bpb", ".4f")]
        cells = [number(run, key, form) for key, form in [*numbers, ("bytes_per_s", ",.0f")]]
        rows.append((run["run"], *cells, changes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    for row in rows:
        aligned = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        yield "  ".join([*aligned, row[-1]]).rstrip()


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories, or folders that contain some")
    folders = parser.parse_args().runs
    runs = runs_below(folders)
    if not runs:
        print(f"error: no run in {', '.join(folders)}: expected a directory with a config.yaml", file=sys.stderr)
        return 2
    print("\n".join(table([describe(run) for run in runs])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
