"""The study of docs/local_and_global.md: local attention at the bottom, global attention on top?

    python scripts/local_and_global.py train data.path=FILE                # one run after the other, an hour or two
    python scripts/local_and_global.py train data.path=FILE seed=1 lr=best # another seed, at the best learning rates
    python scripts/local_and_global.py report -o docs/local_and_global.png # the table, and the picture

Each kind of model is trained at each learning rate, on the same sequences, in ``runs/local_and_global/KIND/LR/SEED``. A
run that is there is continued, or left alone if it has ended. Arguments after ``train`` go to ``train.py``.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from local_attention.training.terminal import accept_any_output

# All have the same parameters: the attention of a layer has as many, whatever it sees.
KINDS = {
    "local": ["model.local_attn_window_size=128"],
    "growing": ["model.local_attn_window_size=[32,64,128,256]"],
    "global_top": ["model.local_attn_window_size=128", "model.global_attn_layers=[4]"],
    "global": ["model.local_attn_window_size=128", "model.global_attn_layers=[1,2,3,4]"],
}
LABELS = {
    "local": "all local, windows of 128",
    "growing": "all local, windows of 32, 64, 128 and 256",
    "global_top": "three local layers of 128, a global one on top",
    "global": "all global",
}
RATES = ("1e-3", "2e-3", "4e-3")
COMMON = (
    *("model=small", "model.dim=192", "model.heads=3", "data=file"),
    *("train.seq_len=1024", "train.batch_size=2", "train.grad_accum_every=1", "train.max_steps=1500"),
    *("schedule.warmup_steps=50", "schedule.final_fraction=0.05", "train.clip_norm=1.0"),
    *("train.eval_every=500", "train.checkpoint_every=500", "train.generate_every=1500", "train.log_every=20"),
)


def train(runs: Path, rates: str, seed: str, overrides: list[str]) -> int:
    """Train each kind at these learning rates; ``best``: at its best one of the first seed. Returns the exit status."""
    for kind, options in KINDS.items():
        of_kind = [best_rate(runs, kind)] if rates == "best" else rates.split(",")
        for rate in of_kind:
            run_dir = runs / kind / rate / seed
            if (run_dir / "summary.json").exists():
                continue
            settings = [*COMMON, *options, f"optimizer.lr={rate}", f"seed={seed}", f"run_dir={run_dir}", *overrides]
            print(f"{kind}, lr {rate}, seed {seed}", flush=True)
            status = subprocess.run([sys.executable, str(ROOT / "train.py"), *settings]).returncode
            if status:
                return status
    return 0


def results(runs: Path, kind: str, rate: str) -> list[dict[str, Any]]:
    """The summaries of the runs of a kind at a learning rate, of all seeds."""
    return [json.loads(path.read_text()) for path in sorted((runs / kind / rate).glob("*/summary.json"))]


def best_rate(runs: Path, kind: str) -> str:
    """The learning rate with the lowest validation score of the first seed."""
    scores = {
        path.parent.parent.name: json.loads(path.read_text())["val_bpb"]
        for path in (runs / kind).glob("*/0/summary.json")
    }
    if not scores:
        sys.exit(f"error: no run of seed 0 in {runs / kind}: train it first")
    return min(scores, key=lambda rate: scores[rate])


def report(runs: Path, output: Path | None) -> None:
    """Print the table of all runs and of the best ones; draw the test score against bytes per second."""
    print("| layers | learning rate | seeds | val bpb | test bpb | bytes/s | memory, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        best = best_rate(runs, kind)
        for rate in sorted({path.parent.parent.name for path in (runs / kind).glob("*/*/summary.json")}, key=float):
            summaries = results(runs, kind, rate)
            val, test = ([summary[f"{split}_bpb"] for summary in summaries] for split in ("val", "test"))
            speed = statistics.median(summary["bytes_per_s"] for summary in summaries)
            memory = max(summary["peak_memory_bytes"] for summary in summaries) / 1e9
            mark = "**" if rate == best else ""
            print(
                f"| {LABELS[kind]} | {rate} | {len(val)} | {spread(val)} | {mark}{spread(test)}{mark} | {speed:,.0f} "
                f"| {memory:.2f} |"
            )
            if rate == best:
                plt.scatter([summary["bytes_per_s"] for summary in summaries], test, label=LABELS[kind])
    if output:
        plt.xlabel("bytes/s in training")
        plt.ylabel("test bits per byte")
        plt.legend()
        plt.tight_layout()
        plt.savefig(output, dpi=120)


def spread(values: list[float]) -> str:
    """The mean, and the smallest and the largest of several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} … {max(values):.3f})"


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for train.py; or lr=RATE,RATE or best, seed=N"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/local_and_global"), help="where the runs are")
    parser.add_argument("-o", "--output", type=Path, help="picture to write")
    arguments = parser.parse_args()
    if arguments.what == "report":
        report(arguments.runs, arguments.output)
        return 0
    own = {"lr": ",".join(RATES), "seed": "0"}
    own |= dict(text.split("=", 1) for text in arguments.overrides if text.startswith(("lr=", "seed=")))
    overrides = [text for text in arguments.overrides if not text.startswith(("lr=", "seed="))]
    return train(arguments.runs, own["lr"], own["seed"], overrides)


if __name__ == "__main__":
    sys.exit(main())
