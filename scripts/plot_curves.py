"""Draw the curves of runs: bits per byte against bytes seen and against minutes.

    python scripts/plot_curves.py runs/quickstart/2026-01-31_10-00-00 … -o curves.png

Lines are the training loss, dots the validation score, stars the test score of the best weights.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from local_attention.training.terminal import accept_any_output


class Point(NamedTuple):
    """A point of a curve."""

    bytes_seen: int
    minutes: float
    bpb: float


def read_run(run_dir: Path) -> dict[str, list[Point]]:
    """Return the curves "train", "val" and "test" of a run."""
    curves: dict[str, list[Point]] = {"train": [], "val": [], "test": []}
    for line in (run_dir / "metrics.jsonl").read_text().split("\n"):
        record: dict[str, Any] = json.loads(line) if line else {"kind": "none"}
        if record["kind"] == "train":
            curve = "train"
        elif record["kind"] == "eval" and (record["split"] == "test" or "whole_split" not in record):
            curve = record["split"]
        else:
            continue
        curves[curve].append(Point(record["bytes_seen"], record["wall_s"] / 60, record["bpb"]))
    return curves


def draw(run_dirs: list[Path], output: str) -> None:
    """Write a picture of all runs to ``output``, in the format of its suffix."""
    figure, (by_bytes, by_minutes) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, run_dir in enumerate(run_dirs):
        train, val, test = read_run(run_dir).values()
        for axes, x in ((by_bytes, 0), (by_minutes, 1)):
            colour = f"C{number}"
            label = "/".join(run_dir.resolve().parts[-2:])
            axes.plot([p[x] for p in train], [p[2] for p in train], color=colour, alpha=0.5, linewidth=1)
            axes.plot([p[x] for p in val], [p[2] for p in val], "o-", color=colour, markersize=4, label=label)
            axes.plot([p[x] for p in test], [p[2] for p in test], "*", color=colour, markersize=12)
    by_bytes.set(xlabel="bytes seen", ylabel="bits per byte")
    by_bytes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    by_minutes.set(xlabel="minutes")
    by_minutes.legend()
    for axes in (by_bytes, by_minutes):
        axes.grid(alpha=0.3)
    figure.suptitle("line: training, dots: validation, star: test")
    figure.savefig(output, dpi=110)


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("-o", "--output", default="curves.png", help="picture to write (default: curves.png)")
    arguments = parser.parse_args()
    for run_dir in arguments.runs:
        if not (run_dir / "metrics.jsonl").is_file():
            print(f"error: {run_dir}: expected a run directory with metrics.jsonl", file=sys.stderr)
            return 2
    draw(arguments.runs, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
