"""What data parallelism costs on paper: the time to average gradients beside the time to compute them, a step.

    python scripts/communication.py                                     # the recipes of configs/
    python scripts/communication.py experiment=enwik8_base train.batch_size=16

Each worker has the batch of the config. The machines and their rates are those of ``PLACES`` below, most of them
assumptions. docs/distributed.md reads the table.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GLOG_v", "3")

from hydra import compose, initialize_config_dir

from local_attention.training.build import build_model
from local_attention.training.command import CONFIGS
from local_attention.training.config import run_config

RECIPES = (
    ["experiment=quickstart"],
    ["experiment=cpu_10min"],
    ["model=small"],
    ["model=base"],
    ["experiment=enwik8_base"],
)
WORKERS = (1, 8, 64, 512)
PER_SERVER = 8


@dataclass(frozen=True)
class RunPaths:
    """Where workers run.

    Args:
        flops: floating-point operations a second that a worker reaches over a whole step.
        inside: bytes a second from worker to worker of one server, or None where each is a machine of its own.
        network: bytes a second into and out of a machine.
        latency: seconds a message.
        fused: whether all gradients travel as one array; on CPUs, MindSpore sends each parameter's by itself.
    """

    name: str
    flops: float
    inside: float | None
    network: float
    latency: float
    fused: bool


PLACES = (
    RunPaths("machines of two cores, 1 Gbit/s", 270e9, None, 125e6, 0.3e-3, False),
    RunPaths("servers of 8 devices, 100 Gbit/s", 20e12, 200e9, 12.5e9, 20e-6, True),
)


@dataclass(frozen=True)
class Step:
    """Of one worker and one step: operations, bytes of gradients to average, their number, bytes of rows to collect."""

    flops: float
    gradients: int
    parameters: int
    rows: int


def step_of(config):
    """The :class:`Step` of a ``RunConfig``.

    A backward pass takes twice the operations of the forward pass; a query meets the keys of one and a half windows, as
    it is computed in blocks of half a window.
    """
    model, train = config.model, config.train
    network = build_model(model)
    sizes = {parameter.name: parameter.size for parameter in network.trainable_params()}
    tables = sum(size for name, size in sizes.items() if name.endswith("ngram_emb.embedding_table"))
    embeddings = sum(size for name, size in sizes.items() if name.endswith("embedding_table"))
    tokens = train.seq_len * train.batch_size * train.grad_accum_every
    keys = model.local_attn_window_size * (model.look_backward + 0.5)
    scores = 2 * 2 * keys * model.heads * model.dim_head * model.depth
    flops = 3 * tokens * (2 * (sum(sizes.values()) - embeddings) + scores)
    rows = tokens * (model.max_ngram - 1) * 4 * (model.ngram_dim + 1) if tables else 0  # and the number of each
    return Step(flops, 4 * (sum(sizes.values()) - tables), len(sizes), rows)


def seconds(step, place, workers):
    """``(computing, communicating)`` of one step: ring all-reduce (Patarasuk & Yuan 2009) and ring all-gather.

    Within servers of several workers first, then between them, each worker with its share of the network.
    """
    inside = min(workers, PER_SERVER) if place.inside else 1
    outside = workers // inside
    gradients = rows = latencies = 0.0
    if inside > 1:
        gradients += 2 * (inside - 1) / inside * step.gradients / place.inside
        rows += (workers - 1) * step.rows / place.inside
        latencies += 2 * (inside - 1)
    if outside > 1:
        gradients += 2 * (outside - 1) / outside * step.gradients / place.network
        rows += (workers - inside) * step.rows / place.network
        latencies += 2 * (outside - 1)
    latencies *= place.latency * (1 if place.fused else step.parameters)
    return step.flops / place.flops, gradients + rows + latencies


def table(steps):
    """Lines of a Markdown table for name to :class:`Step`: milliseconds of computing and communicating."""
    lines = [
        "| recipe | sent | on | " + " | ".join(f"{n:,} worker{'s' * (n > 1)}" for n in WORKERS) + " |",
        "| --- | --- | --- |" + " --- |" * len(WORKERS),
    ]
    for name, step in steps.items():
        for place in PLACES:
            cells = []
            for workers in WORKERS:
                computing, communicating = seconds(step, place, workers)
                cells.append(f"{milliseconds(computing)} + {milliseconds(communicating)}")
            sent = f"{step.gradients / 1e6:.1f} MB" + (f", {step.rows / 1e6:.1f} MB" if step.rows else "")
            lines.append(f"| `{name}` | {sent} | {place.name} | " + " | ".join(cells) + " |")
    return lines


def milliseconds(number):
    return f"{1000 * number:,.1f}" if number < 0.1 else f"{1000 * number:,.0f}"


def main(overrides):
    steps = {}
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for recipe in [overrides] if overrides else RECIPES:
            steps[" ".join(recipe)] = step_of(run_config(compose("train", overrides=recipe)))
    print("Milliseconds of a step, computing + communicating:\n")
    print("\n".join(table(steps)))


if __name__ == "__main__":
    main(sys.argv[1:])
