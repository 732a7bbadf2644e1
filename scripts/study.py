"""Compare recipes: train each with several seeds, and print a table of their scores with confidence intervals.

    python scripts/study.py STUDY.yaml FOLDER [-o PLOT.png] [override ...]

``STUDY.yaml`` has three keys: ``overrides`` of ``train.py`` that all runs share, a list of ``seeds``, and ``recipes``,
each a name and a list of further overrides. The first recipe is the one that the others are compared with. Overrides on
the command line come last, as in ``data=file data.path=FILE``. See ``scripts/studies``.

Each run is one call of ``train.py`` with ``run_dir=FOLDER/RECIPE/seed=N``. The same command continues a study that was
interrupted, and trains only what is missing after recipes or seeds were added.

A score is the mean over seeds, followed by half of its 95% confidence interval (Student's t; none for one seed). A
difference is taken between runs of the same seed.
"""

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from local_attention.training.terminal import accept_any_output

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles of Student's t, 1 to 9 degrees
HEADER = ("recipe", "seeds", "bytes", "val bpb", "test bpb", "difference", "bytes/s", "memory")

Summary = dict[str, Any]  # what is in summary.json


class Study(NamedTuple):
    """What ``STUDY.yaml`` contains."""

    overrides: list[str]
    seeds: list[int]
    recipes: dict[str, list[str]]


def read_study(path: Path) -> Study:
    """Read ``STUDY.yaml``; raises ``ValueError`` for what it should not contain."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, but {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or set(content) != set(Study._fields):
        raise ValueError(f"{path}: expected the keys {', '.join(Study._fields)}")
    study = Study(**content)
    lists = [study.overrides, *(study.recipes.values() if isinstance(study.recipes, dict) else [None])]
    if not all(isinstance(each, list) and all(isinstance(one, str) for one in each) for each in lists):
        raise ValueError(f"{path}: expected a list of overrides, and recipes that are lists of overrides")
    if not study.recipes or not study.seeds or not all(isinstance(seed, int) for seed in study.seeds):
        raise ValueError(f"{path}: expected at least one recipe, and a list of whole numbers as seeds")
    return study


def run_dir_of(folder: Path, recipe: str, seed: int) -> Path:
    return folder / recipe / f"seed={seed}"


def train(study: Study, folder: Path, overrides: Sequence[str]) -> int:
    """Train what is missing, all recipes with one seed after the other; return the status of an interruption, or 0."""
    for seed in study.seeds:
        for recipe, changes in study.recipes.items():
            run_dir = run_dir_of(folder, recipe, seed)
            settings = [*study.overrides, *changes, f"seed={seed}", f"run_dir={run_dir}", *overrides]
            command = [sys.executable, str(ROOT / "train.py"), *settings]
            print(f"{recipe}, seed {seed}:  python train.py {shlex.join(settings)}", flush=True)
            status = run(command)
            if status >= 128 or status < 0:
                return status
    return 0


def run(command: Sequence[str]) -> int:
    """Run a command, and let it end by itself after a signal, so that it saves its work; return its status."""
    with subprocess.Popen(command) as process:
        handlers = {
            signal.SIGINT: lambda *_: None,  # a terminal sends it to the command, too
            signal.SIGTERM: lambda number, _: process.send_signal(number),
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def results(study: Study, folder: Path) -> dict[str, dict[int, Summary]]:
    """The summaries of the runs of each recipe that have ended and were scored, by seed."""
    found: dict[str, dict[int, Summary]] = {recipe: {} for recipe in study.recipes}
    for recipe, seed in ((recipe, seed) for recipe in study.recipes for seed in study.seeds):
        path = run_dir_of(folder, recipe, seed) / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
        if summary.get("test_bpb") is not None:
            found[recipe][seed] = summary
    return found


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean of the values, and half of its 95% confidence interval if there are several."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), f"{sign}.4f")
    if len(values) == 1:
        return mean
    t = T_95[min(len(values) - 1, len(T_95)) - 1]
    return f"{mean} ± {t * statistics.stdev(values) / len(values) ** 0.5:.4f}"


def table(found: Mapping[str, Mapping[int, Summary]]) -> Iterator[str]:
    """Yield the lines of the table for :func:`results`."""
    first = next(iter(found.values()))
    rows = [HEADER]
    for number, (recipe, runs) in enumerate(found.items()):
        differences = [runs[seed]["test_bpb"] - first[seed]["test_bpb"] for seed in runs if seed in first]
        seen = sorted({run["bytes_seen"] for run in runs.values()})
        rows.append(
            (
                recipe,
                str(len(runs)),
                " to ".join(f"{count:,}" for count in (seen if len(seen) < 2 else (seen[0], seen[-1]))) or "-",
                with_interval([run["val_bpb"] for run in runs.values()]),
                with_interval([run["test_bpb"] for run in runs.values()]),
                with_interval(differences, "+") if number else "",
                f"{statistics.fmean(run['bytes_per_s'] for run in runs.values()):,.0f}" if runs else "-",
                f"{max(run['peak_memory_bytes'] for run in runs.values()) / 1e9:.2f} GB" if runs else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
    if len({run["bytes_seen"] for runs in found.values() for run in runs.values()}) > 1:
        yield "warning: not all runs have seen the same number of bytes; let train.max_steps end them, not minutes"


def plot(found: Mapping[str, Mapping[int, Summary]], output: Path) -> None:
    """Draw the test score of each run, one line of points for each recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1 + 0.35 * len(found)), layout="constrained")
    for row, runs in enumerate(found.values()):
        scores = [run["test_bpb"] for run in runs.values()]
        axes.plot(scores, [row] * len(scores), "o", color="tab:blue")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("test bits per byte")
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="STUDY.yaml")
    parser.add_argument("folder", type=Path, help="folder of the runs, such as runs/study")
    parser.add_argument("overrides", nargs="*", help="of train.py, for all runs")
    parser.add_argument("-o", "--output", type=Path, metavar="PLOT.png", help="draw the scores of all runs")
    arguments = parser.parse_intermixed_args()
    try:
        study = read_study(arguments.study)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = train(study, arguments.folder, arguments.overrides)
    found = results(study, arguments.folder)
    print("\n".join(table(found)))
    if arguments.output:
        plot(found, arguments.output)
    if status:
        print(f"interrupted; continue:  {shlex.join(['python', *sys.argv])}", file=sys.stderr)
    return abs(status)


if __name__ == "__main__":
    sys.exit(main())
