"""Print a table of runs, the best first: size, bytes seen, bits per byte, speed, and the settings that differ.

    python scripts/compare.py runs/quickstart               # all runs below a folder
    python scripts/compare.py RUN_DIR RUN_DIR

Settings that are the same in all runs are left out, and those that only say where and when something is written. What
most runs have in common is printed once, below the table.

A run marked with "…" has no final scores, as it has not ended, or has been continued since. It shows the latest score
of an evaluation, on the first bytes of the validation split. Scores of ``scripts/evaluate.py dynamic=true`` have
columns of their own.
"""

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.checkpoint import Checkpoints, tensor_sizes
from local_attention.training.errors import CheckpointError
from local_attention.training.metrics import read_records
from local_attention.training.schema import flatten, format_value
from local_attention.training.terminal import accept_any_output

NUMBERS = {  # of a run: the head of their column, and their format
    "params": ("params", ","),
    "steps": ("steps", ","),
    "bytes_seen": ("bytes", ","),
    "val_bpb": ("val bpb", ".4f"),
    "test_bpb": ("test bpb", ".4f"),
    "val_bpb_dynamic": ("val dynamic", ".4f"),
    "test_bpb_dynamic": ("test dynamic", ".4f"),
    "bytes_per_s": ("bytes/s", ",.0f"),
}
DYNAMIC = ("val_bpb_dynamic", "test_bpb_dynamic")  # shown if any run has them
NOT_COMPARED = (
    *("run_dir", "resume", "data.dir", "train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("train.keep_last", "train.generate_every", "train.generate_length", "train.profile"),
)
MIN_SETTINGS = 40  # characters of the last column, however narrow the terminal is


def runs_below(folders: Iterable[str | Path]) -> list[Path]:
    """Return all run directories in ``folders``, also behind links, each once."""
    found: dict[Path, Path] = {}
    seen = set()
    for folder in folders:
        for path, subfolders, files in os.walk(folder, followlinks=True):
            real = Path(path).resolve()
            if real in seen:
                subfolders.clear()
            elif "config.yaml" in files:
                found[real] = Path(path)
            seen.add(real)
    return sorted(found.values())


def describe(run_dir: Path) -> dict[str, Any]:
    """Return the figures of a run; unknown ones are missing or None."""
    figures = read_metrics(run_dir)
    summary = run_dir / "summary.json"
    final = json.loads(summary.read_text()) if summary.exists() else {}
    is_of_newest_step = final.get("steps", -1) >= figures.get("steps", 0)
    if is_of_newest_step:
        figures |= {key: value for key, value in final.items() if value is not None}
    figures["is_final"] = is_of_newest_step and final.get("val_bpb") is not None
    figures["params"] = number_of_weights(run_dir)
    figures["settings"] = flatten(yaml.safe_load((run_dir / "config.yaml").read_text()) or {})
    return {"run": str(run_dir), **figures}


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Return the latest figures that a run has recorded while it trained."""
    figures: dict[str, Any] = {}
    for record in read_records(run_dir):
        figures |= dict(steps=record["step"], bytes_seen=record["bytes_seen"])
        if record["kind"] == "train":
            figures["bytes_per_s"] = record["bytes_per_s"]
        elif record["kind"] == "eval" and "whole_split" not in record:  # that is of an earlier end of the run
            figures[f"{record['split']}_bpb"] = record["bpb"]
    return figures


def number_of_weights(run_dir: Path) -> int | None:
    try:
        checkpoint = Checkpoints(run_dir / "checkpoints").find("last")
    except CheckpointError:  # all are corrupt
        return None
    sizes = tensor_sizes(checkpoint) if checkpoint else {}
    return sum(size for name, size in sizes.items() if name.startswith("model.")) or None


def differences(settings: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The settings of each run that not all runs share, without those of most runs; and the latter."""
    keys = sorted({key for each in settings for key in each} - set(NOT_COMPARED))
    own: list[list[str]] = [[] for _ in settings]
    common = []
    for key in keys:
        values = [f"{key}={format_value(each.get(key))}" for each in settings]
        most_common, count = Counter(values).most_common(1)[0]
        if len(settings) / 2 < count < len(settings):
            common.append(most_common)
        for value, of_run in zip(values, own, strict=True):
            if count <= len(settings) / 2 or value != most_common:
                of_run.append(value)
    return [" ".join(of_run) for of_run in own], common


def table(runs: list[dict[str, Any]], width: int = 160) -> Iterator[str]:
    """Yield the lines of the table for the results of :func:`describe`, with settings wrapped at ``width``."""

    def score(run: dict[str, Any]) -> float:
        return next((run[key] for key in ("test_bpb", "val_bpb") if run.get(key) is not None), float("inf"))

    shown = {key: column for key, column in NUMBERS.items() if key not in DYNAMIC or any(run.get(key) for run in runs)}

    def cells(run: dict[str, Any]) -> list[str]:
        numbers = ["-" if run.get(key) is None else format(run[key], form) for key, (_, form) in shown.items()]
        return [run["run"] + ("" if run["is_final"] else " …"), *numbers]

    runs = sorted(runs, key=score)
    own, common = differences([run["settings"] for run in runs])
    rows = [["run", *(head for head, _ in shown.values())], *map(cells, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = sum(widths) + 2 * len(widths)
    for row, settings in zip(rows, ["settings", *own], strict=True):
        aligned = [cell.rjust(size) if i else cell.ljust(size) for i, (cell, size) in enumerate(zip(row, widths))]
        first, *rest = wrapped(settings, max(MIN_SETTINGS, width - indent)) or [""]
        yield "  ".join([*aligned, first]).rstrip()
        yield from (" " * indent + line for line in rest)
    if common:
        yield from wrapped(f"Unless given, as in most runs: {' '.join(common)}", width)
    if not all(run["is_final"] for run in runs):
        yield "… no final scores, as the run has not ended or was continued: the latest evaluation while it trained"


def wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories, or folders that contain some")
    folders = parser.parse_args().runs
    runs = runs_below(folders)
    if not runs:
        print(f"error: no run in {', '.join(folders)}: expected a directory with a config.yaml", file=sys.stderr)
        return 2
    print("\n".join(table([describe(run) for run in runs], shutil.get_terminal_size((160, 24)).columns)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
