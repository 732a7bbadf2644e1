"""Draw the curves of runs: bits per byte against bytes seen and against minutes.

    python scripts/plot_curves.py runs/quickstart/2026-01-31_10-00-00 … -o curves.png

Lines are the training loss, dots the validation score, stars the test score of the best weights. The first steps, which
are far above the others, are cut off: the picture begins a little above the first validation score.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.metrics import read_records
from local_attention.training.terminal import accept_any_output


class Point(NamedTuple):
    """A point of a curve."""

    bytes_seen: int
    minutes: float
    bpb: float


Curves = dict[str, list[Point]]


def read_run(run_dir: Path) -> Curves:
    """Return the curves "train", "val" and "test" of a run."""
    curves: Curves = {"train": [], "val": [], "test": []}
    for record in read_records(run_dir):
        if record["kind"] == "train":
            curve = "train"
        elif record["kind"] == "eval" and (record["split"] == "test" or "whole_split" not in record):
            curve = record["split"]
        else:
            continue
        if record["bpb"] is not None:
            curves[curve].append(Point(record["bytes_seen"], record["wall_s"] / 60, record["bpb"]))
    return curves


def limits(runs: list[Curves]) -> tuple[float, float]:
    """The bits per byte at the bottom and the top of the picture.

    It shows at least nine tenths of the points, and all first validation scores, but nothing far above 8, which needs
    no model.
    """
    points = [point.bpb for curves in runs for curve in curves.values() for point in curve]
    first = [curves["val"][0].bpb for curves in runs if curves["val"]]
    bottom, top = min(points), max([float(np.quantile(points, 0.9)), *first])
    if bottom < 8:
        top = min(top, 8)
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


def draw(runs: dict[Path, Curves], output: Path) -> None:
    """Write a picture of all runs to ``output``, in the format of its suffix."""
    figure, (by_bytes, by_minutes) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for number, (run_dir, curves) in enumerate(runs.items()):
        train, val, test = curves.values()
        for axes, x in ((by_bytes, 0), (by_minutes, 1)):
            colour = f"C{number}"
            label = "/".join(run_dir.resolve().parts[-2:])
            axes.plot([p[x] for p in train], [p[2] for p in train], color=colour, alpha=0.5, linewidth=1)
            axes.plot([p[x] for p in val], [p[2] for p in val], "o-", color=colour, markersize=4, label=label)
            axes.plot([p[x] for p in test], [p[2] for p in test], "*", color=colour, markersize=12)
    by_bytes.set(xlabel="bytes seen", ylabel="bits per byte", ylim=limits([*runs.values()]))
    by_bytes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    by_minutes.set(xlabel="minutes")
    by_minutes.legend()
    for axes in (by_bytes, by_minutes):
        axes.grid(alpha=0.3)
    figure.suptitle("line: training, dots: validation, star: test")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "-o", "--output", default="curves.png", type=Path, help="picture to write (default: curves.png)"
    )
    arguments = parser.parse_args()
    output = arguments.output

    def refuse(message: str, status: int = 2) -> int:
        print(f"error: {message}", file=sys.stderr)
        return status

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if output.suffix[1:].lower() not in formats:
        return refuse(f"{output}: expected a name that ends in one of {', '.join('.' + name for name in formats)}")
    runs = {}
    for run_dir in arguments.runs:
        if not (run_dir / "metrics.jsonl").is_file():
            return refuse(f"{run_dir}: expected a run directory with metrics.jsonl")
        curves = read_run(run_dir)
        if any(curves.values()):
            runs[run_dir] = curves
        else:
            print(f"{run_dir}: nothing to draw yet", file=sys.stderr)
    if not runs:
        return refuse("expected a run that has recorded at least one step")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, output)
    except OSError as error:
        return refuse(f"{error.filename}: {error.strerror}", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
