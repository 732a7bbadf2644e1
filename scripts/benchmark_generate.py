"""Time per generated token: this project with and without operators in C++, PyTorch's package, a lower bound.

    python scripts/benchmark_generate.py                    # batch 1, the base model with random weights
    python scripts/benchmark_generate.py --batch 8
    python scripts/benchmark_generate.py --tokens 10000 --rounds 1

Each implementation runs in its own process, and their rounds alternate. The results are medians over groups of 16
tokens, including sampling. The floor is the time to read all weights once, as each token needs, at the bandwidth of a
large matrix-vector product. PyTorch is measured if ``make parity`` has set up its environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.terminal import accept_any_output
from scripts.benchmarking import Worker, elapsed, work, workers_of_original
from scripts.pytorch_original import import_original

PROMPT = 300  # bytes; longer than a window
GROUP = 16  # tokens that are timed together, as this project generates 16 per call of its graph
NAMES = {
    "floor": "floor: reading the weights",
    "ours": "this project",
    "operators": "without operators in C++",
    "original": "PyTorch local-attention",
}


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of both ``LocalTransformer`` classes; by default those of ``configs/model/base.yaml``."""
    return dict(
        num_tokens=256,
        max_seq_len=PROMPT + arguments.tokens + 2 * GROUP,
        dim=arguments.dim,
        depth=arguments.depth,
        heads=arguments.heads,
        dim_head=arguments.dim_head,
        local_attn_window_size=arguments.window,
    )


def weight_bytes(arguments: argparse.Namespace) -> int:
    """The bytes that a token reads: all weights except the embeddings, of which it needs one row."""
    inner = arguments.heads * arguments.dim_head
    attention, feed_forward = 4 * inner, 3 * int(arguments.dim * 4 * 2 / 3)
    return 4 * arguments.dim * (arguments.depth * (attention + feed_forward) + 256)


def prompt() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, PROMPT)


def token_times(token: Callable[[], object], count: int) -> list[float]:
    """Call ``token`` ``count`` times; returns the seconds per call for each group of calls."""

    def group() -> None:
        for _ in range(GROUP):
            token()

    return [elapsed(group) / GROUP for _ in range(count // GROUP)]


def ours(arguments: argparse.Namespace, use_kernels: bool | None = None) -> Iterator[list[float]]:
    """Time rounds of this project."""
    import mindspore as ms

    from local_attention import LocalTransformer
    from local_attention.decoding import DecodingSession, generate_tokens

    ms.set_context(mode=ms.GRAPH_MODE)
    model = LocalTransformer(**model_options(arguments)).set_train(False)
    session = DecodingSession(model, arguments.batch, use_kernels=use_kernels)
    while True:
        tokens = generate_tokens(session, prompt(), None)
        for _ in range(2 * GROUP - 1):  # prefill, and the first, smaller calls
            next(tokens)
        yield token_times(partial(next, tokens), arguments.tokens)


def operators(arguments: argparse.Namespace) -> Iterator[list[float]]:
    """Time rounds of this project without operators in C++, as without a compiler or on other devices."""
    return ours(arguments, use_kernels=False)


def original(arguments: argparse.Namespace) -> Iterator[list[float]]:
    """Time rounds of the PyTorch package, with the same steps as in its ``generate``."""
    import torch

    model = import_original().LocalTransformer(**model_options(arguments), num_residual_streams=1).eval()
    begin = torch.tensor(np.tile(prompt(), (arguments.batch, 1)), dtype=torch.long)
    with torch.inference_mode():
        while True:
            text, cache = begin, None

            def step() -> None:
                nonlocal text, cache
                logits, cache = model(text, cache=cache, return_cache=True)
                text = torch.cat((text, torch.multinomial(logits[:, -1].softmax(-1), 1)), 1)

            step()  # prefill
            yield token_times(step, arguments.tokens)


def floor(arguments: argparse.Namespace) -> Iterator[list[float]]:
    """Time rounds of a matrix-vector product with as many bytes as the weights."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((weight_bytes(arguments) // 4096, 1024), np.float32)
    vector = rng.standard_normal(1024, np.float32)
    while True:
        yield token_times(lambda: matrix @ vector, min(arguments.tokens, 512))


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("batch", 1, "sequences per batch"),
        ("tokens", 128, "tokens per round"),
        ("rounds", 7, "rounds of each implementation, after one warm-up round"),
        ("dim", 512, "channels"),
        ("depth", 6, "layers"),
        ("heads", 8, "heads"),
        ("dim-head", 64, "channels per head"),
        ("window", 256, "window size"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        implementations = {"floor": floor, "ours": ours, "operators": operators, "original": original}
        work(implementations[arguments.worker](arguments))
        return 0

    names = ["floor", "ours", "operators"] if find_spec("local_attention._kernels") else ["floor", "ours"]
    workers = {name: Worker(name) for name in names} | workers_of_original("original")
    warm_up = {name: worker.round() for name, worker in workers.items()}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            rounds[name].append(worker.round())

    seconds = {name: np.array([r["result"] for r in results]) for name, results in rounds.items()}
    lower_bound = np.median(seconds["floor"])
    figures: dict[str, Any] = {"batch": arguments.batch, "weight_bytes": weight_bytes(arguments)}
    print(f"{'':28}ms per token (10% … 90%)   bytes/s   times the floor")
    for name, times in seconds.items():
        low, median, high = np.percentile(times, [10, 50, 90]) * 1e3
        rate = arguments.batch * 1e3 / median
        figures[name] = dict(
            ms=median, low_ms=low, high_ms=high, bytes_per_s=rate, times_floor=median / lower_bound / 1e3
        )
        print(f"{NAMES[name]:28}{median:6.2f} ({low:.2f} … {high:.2f}){rate:12,.0f}{median / lower_bound / 1e3:12.2f}")
    grown = rounds["ours"][-1]["memory"] - warm_up["ours"]["memory"]
    print(f"bandwidth of the floor {weight_bytes(arguments) / lower_bound / 1e9:.1f} GB/s; ", end="")
    print(f"this project's memory grew by {grown / 1e6:.0f} MB after the first round")
    if arguments.tokens >= 2000:
        groups = 1000 // GROUP
        first, last = np.median(seconds["ours"][:, :groups]) * 1e3, np.median(seconds["ours"][:, -groups:]) * 1e3
        figures["ours"] |= dict(first_thousand_ms=first, last_thousand_ms=last)
        print(f"first thousand tokens {first:.2f} ms each, last thousand {last:.2f} ms each")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
