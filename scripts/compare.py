"""A table of runs, the best first: size, bytes seen, bits per byte, speed, and the settings in which they differ.

    python scripts/compare.py runs/quickstart               # all runs below a folder
    python scripts/compare.py RUN_DIR RUN_DIR

A run that has not ended yet shows its newest scores of the validation split, marked with "…".
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.checkpoint import Checkpoints, shapes_of
from local_attention.training.keys import flat

HEADER = ("run", "params", "steps", "bytes", "val bpb", "test bpb", "bytes/s", "settings")
OF_NO_INTEREST = ("run_dir", "resume")


def runs_below(folders):
    """The run directories among ``folders`` and below them, each once."""
    return sorted({path.parent for folder in folders for path in Path(folder).rglob("config.yaml")})


def describe(run_dir):
    """What the table says of a run: a dictionary; numbers that are not known are None."""
    summary = run_dir / "summary.json"
    figures = json.loads(summary.read_text()) if summary.exists() else figures_of_lines(run_dir / "metrics.jsonl")
    checkpoint = Checkpoints(run_dir / "checkpoints").find("last")
    shapes = shapes_of(checkpoint) if checkpoint else {}
    figures["params"] = sum(size for name, size in shapes.items() if name.startswith("model.")) or None
    figures["settings"] = flat(yaml.safe_load((run_dir / "config.yaml").read_text()))
    return {"run": str(run_dir) + ("" if summary.exists() else " …"), **figures}


def figures_of_lines(path):
    """The figures of a run without a summary."""
    figures = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        figures |= dict(steps=record["step"], bytes_seen=record["bytes_seen"])
        if record["kind"] == "train":
            figures["bytes_per_s"] = record["bytes_per_s"]
        elif record["kind"] == "eval":
            figures[f"{record['split']}_bpb"] = record["bpb"]
    return figures


def table(runs):
    """Lines of text for what :func:`describe` says of ``runs``."""

    def score(run):
        return next((run[key] for key in ("test_bpb", "val_bpb") if run.get(key) is not None), float("inf"))

    settings = [run["settings"] for run in runs]
    keys = sorted({key for each in settings for key in each} - set(OF_NO_INTEREST))
    differing = [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]

    def number(run, key, form):
        return "-" if run.get(key) is None else format(run[key], form)

    rows = [HEADER]
    for run in sorted(runs, key=score):
        changes = " ".join(f"{key}={run['settings'].get(key)}" for key in differing)
        numbers = [("params", ","), ("steps", ","), ("bytes_seen", ","), ("val_bpb", ".4f"), ("test_bpb", ".4f")]
        cells = [number(run, key, form) for key, form in [*numbers, ("bytes_per_s", ",.0f")]]
        rows.append((run["run"], *cells, changes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    for row in rows:
        first, *numbers = [
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        yield "  ".join([first, *numbers, row[-1]]).rstrip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories, or folders that hold some")
    folders = parser.parse_args().runs
    runs = runs_below(folders)
    if not runs:
        print(f"error: no run in {', '.join(folders)}: expected a directory with a config.yaml", file=sys.stderr)
        return 2
    print("\n".join(table([describe(run) for run in runs])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
