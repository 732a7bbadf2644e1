"""How fast text is generated: this project with and without kernels.cpp, PyTorch's ``local-attention``, the floor.

    python scripts/benchmark_generate.py                    # batch 1, the base model with random weights
    python scripts/benchmark_generate.py --batch 8
    python scripts/benchmark_generate.py --tokens 10000 --rounds 1

Each has a process of its own, as the threads of two frameworks in one process get into each other's way; their rounds
alternate. The figures are medians over groups of 16 tokens of the time that a token takes, sampling
included. The floor is the time that the bytes of the weights take at the bandwidth that a large matrix-vector product
reaches: each token needs every weight once. PyTorch is measured where the parity extra is installed:
``pip install -e '.[parity]'``.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarking import Worker, elapsed, work

PROMPT = 300  # more than a window
GROUP = 16  # tokens timed together: this project draws as many in one call of its graph
NAMES = {
    "floor": "floor: reading the weights",
    "ours": "this project",
    "operators": "without kernels.cpp",
    "original": "PyTorch local-attention",
}


def model_options(arguments):
    """Keyword arguments of both ``LocalTransformer``: those of ``configs/model/base.yaml`` unless others are given."""
    return dict(
        num_tokens=256,
        max_seq_len=PROMPT + arguments.tokens + 2 * GROUP,
        dim=arguments.dim,
        depth=arguments.depth,
        heads=arguments.heads,
        dim_head=arguments.dim_head,
        local_attn_window_size=arguments.window,
    )


def weight_bytes(arguments):
    """What a token reads: all weights but the embeddings, of which it needs a row."""
    inner = arguments.heads * arguments.dim_head
    attention, feed_forward = 4 * inner, 3 * int(arguments.dim * 4 * 2 / 3)
    return 4 * arguments.dim * (arguments.depth * (attention + feed_forward) + 256)


def prompt():
    return np.random.default_rng(0).integers(0, 256, PROMPT)


def token_times(token, count):
    """Seconds a token of ``count`` calls of ``token``, one figure for each group of them."""

    def group():
        for _ in range(GROUP):
            token()

    return [elapsed(group) / GROUP for _ in range(count // GROUP)]


def ours(arguments, use_kernels=None):
    """Rounds of this project."""
    import mindspore as ms

    from local_attention import LocalTransformer
    from local_attention.decoding import DecodingSession, generate_tokens

    ms.set_context(mode=ms.GRAPH_MODE)
    model = LocalTransformer(**model_options(arguments)).set_train(False)
    decoder = DecodingSession(model, arguments.batch, use_kernels=use_kernels)
    while True:
        drawn = generate_tokens(decoder, prompt(), None)
        for _ in range(2 * GROUP - 1):  # after the prompt and the first, smaller bursts
            next(drawn)
        yield token_times(lambda drawn=drawn: next(drawn), arguments.tokens)


def operators(arguments):
    """Rounds of this project where no compiler was found, or on other devices."""
    return ours(arguments, use_kernels=False)


def original(arguments):
    """Rounds of the PyTorch package, which computes as its ``generate`` does."""
    import torch

    from scripts.pytorch_original import import_original

    model = import_original().LocalTransformer(**model_options(arguments), num_residual_streams=1).eval()
    begin = torch.tensor(np.tile(prompt(), (arguments.batch, 1)), dtype=torch.long)
    with torch.inference_mode():
        while True:
            text, cache = begin, None

            def step():
                nonlocal text, cache
                logits, cache = model(text, cache=cache, return_cache=True)
                text = torch.cat((text, torch.multinomial(logits[:, -1].softmax(-1), 1)), 1)

            step()  # the prompt
            yield token_times(step, arguments.tokens)


def floor(arguments):
    """Rounds of a matrix-vector product over as many bytes as the weights have."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((weight_bytes(arguments) // 4096, 1024), np.float32)
    vector = rng.standard_normal(1024, np.float32)
    while True:
        yield token_times(lambda: matrix @ vector, min(arguments.tokens, 512))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("batch", 1, "texts side by side"),
        ("tokens", 128, "tokens a round"),
        ("rounds", 7, "rounds of each, after one that does not count"),
        ("dim", 512, "channels"),
        ("depth", 6, "layers"),
        ("heads", 8, "heads"),
        ("dim-head", 64, "channels of a head"),
        ("window", 256, "window size"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        workers = {"floor": floor, "ours": ours, "operators": operators, "original": original}
        return work(workers[arguments.worker](arguments))

    there = {"operators": find_spec("local_attention._kernels"), "original": find_spec("torch")}
    names = [name for name in NAMES if there.get(name, True)]
    workers = {name: Worker(name) for name in names}
    begin = {name: worker.round() for name, worker in workers.items()}
    rounds = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            rounds[name].append(worker.round())

    seconds = {name: np.array([r["result"] for r in found]) for name, found in rounds.items()}
    least = np.median(seconds["floor"])
    figures = {"batch": arguments.batch, "weight_bytes": weight_bytes(arguments)}
    print(f"{'':28}ms a token (10% … 90%)   bytes/s   times the floor")
    for name, times in seconds.items():
        low, middle, high = np.percentile(times, [10, 50, 90]) * 1e3
        rate = arguments.batch * 1e3 / middle
        figures[name] = dict(ms=middle, low_ms=low, high_ms=high, bytes_per_s=rate, times_floor=middle / least / 1e3)
        print(f"{NAMES[name]:28}{middle:6.2f} ({low:.2f} … {high:.2f}){rate:12,.0f}{middle / least / 1e3:12.2f}")
    grown = rounds["ours"][-1]["memory"] - begin["ours"]["memory"]
    print(f"bandwidth of the floor {weight_bytes(arguments) / least / 1e9:.1f} GB/s; ", end="")
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
