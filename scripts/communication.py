"""Estimate the cost of data parallelism: the time per step to compute gradients, and to average them.

    python scripts/communication.py                                     # the recipes of configs/
    python scripts/communication.py experiment=enwik8_base train.batch_size=16

Each worker has the batch size of the config. The rates of the machines are in ``CLUSTERS`` below; most of them are
assumptions. docs/distributed.md discusses the table.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GLOG_v", "3")

from hydra import compose, initialize_config_dir

from local_attention.training.arguments import CONFIGS
from local_attention.training.build import build_model
from local_attention.training.config import RunConfig, run_config

RECIPES = (
    ["experiment=cpu_10min"],
    ["model=small"],
    ["model=base"],
    ["experiment=enwik8_base"],
    ["experiment=enwik8_12l"],
)
WORKERS = (1, 8, 64, 512)
PER_SERVER = 8


@dataclass(frozen=True)
class Cluster:
    """The machines on which workers run.

    Args:
        flops: floating-point operations per second that a worker reaches, averaged over a step.
        inside: bytes/s between workers of one server, or None if each machine has one worker.
        network: bytes/s between machines.
        latency: seconds per message.
        fused: whether all gradients are sent as one array; on CPUs, MindSpore sends one array per parameter.
    """

    name: str
    flops: float
    inside: float | None
    network: float
    latency: float
    fused: bool


CLUSTERS = (
    Cluster("machines of two cores, 1 Gbit/s", 270e9, None, 125e6, 0.3e-3, False),
    Cluster("servers of 8 devices, 100 Gbit/s", 20e12, 200e9, 12.5e9, 20e-6, True),
)


@dataclass(frozen=True)
class Step:
    """The operations of one worker, the bytes and number of its gradients, and the bytes of n-gram rows to gather."""

    flops: float
    gradients: int
    parameters: int
    rows: int


class StepTime(NamedTuple):
    """Seconds per step."""

    computing: float
    communicating: float


def step_of(config: RunConfig) -> Step:
    """Return the :class:`Step` of a config.

    The backward pass takes twice the operations of the forward pass. Scores are computed for the keys of one and a half
    windows, as queries are divided into blocks of half a window; for those of half the sequence in global attention.
    """
    model, train = config.model, config.train
    network = build_model(model)
    sizes = {parameter.name: parameter.size for parameter in network.trainable_params()}
    tables = sum(size for name, size in sizes.items() if name.endswith("ngram_emb.embedding_table"))
    embeddings = sum(size for name, size in sizes.items() if name.endswith("embedding_table"))
    tokens = train.seq_len * train.batch_size * train.grad_accum_every
    windows = zip(model.per_layer("local_attn_window_size"), model.per_layer("look_backward"))
    keys = sum(
        train.seq_len / 2 if model.is_global(number) else window * (look_backward + 0.5)
        for number, (window, look_backward) in enumerate(windows, 1)
    )
    scores = 2 * 2 * keys * model.heads * model.dim_head
    flops = 3 * tokens * (2 * (sum(sizes.values()) - embeddings) + scores)
    rows = tokens * (model.max_ngram - 1) * 4 * (model.ngram_dim + 1) if tables else 0  # with their indices
    return Step(flops, 4 * (sum(sizes.values()) - tables), len(sizes), rows)


def seconds(step: Step, cluster: Cluster, workers: int) -> StepTime:
    """Return the time of a step with ring all-reduce (Patarasuk & Yuan 2009) and ring all-gather.

    The workers of a server communicate first, then the servers. The workers of a server divide its network.
    """
    inside = min(workers, PER_SERVER) if cluster.inside else 1
    outside = workers // inside
    gradients = rows = latencies = 0.0
    if cluster.inside and inside > 1:
        gradients += 2 * (inside - 1) / inside * step.gradients / cluster.inside
        rows += (workers - 1) * step.rows / cluster.inside
        latencies += 2 * (inside - 1)
    if outside > 1:
        gradients += 2 * (outside - 1) / outside * step.gradients / cluster.network
        rows += (workers - inside) * step.rows / cluster.network
        latencies += 2 * (outside - 1)
    latencies *= cluster.latency * (1 if cluster.fused else step.parameters)
    return StepTime(step.flops / cluster.flops, gradients + rows + latencies)


def table(steps: dict[str, Step]) -> list[str]:
    """Return the lines of a Markdown table with the milliseconds of the steps of each recipe."""
    lines = [
        "| recipe | sent | on | " + " | ".join(f"{n:,} worker{'s' * (n > 1)}" for n in WORKERS) + " |",
        "| --- | --- | --- |" + " --- |" * len(WORKERS),
    ]
    for name, step in steps.items():
        for cluster in CLUSTERS:
            cells = []
            for workers in WORKERS:
                computing, communicating = seconds(step, cluster, workers)
                cells.append(f"{milliseconds(computing)} + {milliseconds(communicating)}")
            sent = f"{step.gradients / 1e6:.1f} MB" + (f", {step.rows / 1e6:.1f} MB" if step.rows else "")
            lines.append(f"| `{name}` | {sent} | {cluster.name} | " + " | ".join(cells) + " |")
    return lines


def milliseconds(number: float) -> str:
    return f"{1000 * number:,.1f}" if number < 0.1 else f"{1000 * number:,.0f}"


def main(overrides: list[str]) -> None:
    steps = {}
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for recipe in [overrides] if overrides else RECIPES:
            steps[" ".join(recipe)] = step_of(run_config(compose("train", overrides=recipe)))
    print("Milliseconds of a step, computing + communicating:\n")
    print("\n".join(table(steps)))


if __name__ == "__main__":
    main(sys.argv[1:])
