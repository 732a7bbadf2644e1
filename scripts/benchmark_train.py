"""How fast a training step is: this project, PyTorch's ``local-attention``, and the floor that its products set.

    python scripts/benchmark_train.py                                                        # small model
    python scripts/benchmark_train.py --dim 512 --depth 6 --heads 8 --length 2048 --batch 2  # base model
    python scripts/benchmark_train.py --attention --heads 8 --length 8192 --batch 1          # LocalAttention alone
    python scripts/benchmark_train.py --profile                                              # by operator
    python scripts/benchmark_train.py --set use_xpos=true --set num_residual_streams=4       # another option

A step is forward, backward, clipping and Adam; of ``LocalAttention`` alone forward and backward. Each thing measured
has a process of its own, whose peak memory is told, and the steps of all of them alternate. The figures are medians.
The floor is the time of the matrix products, those of scores that no query sees left out, at the rate of a large
product in MindSpore. PyTorch is measured, eagerly, where the parity extra is installed: ``pip install -e '.[parity]'``;
with ``--bfloat16`` under autocast, too.
"""

import argparse
import csv
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarking import Worker, elapsed, work

NAMES = {
    "floor": "floor: the products alone",
    "ours": "this project",
    "original": "PyTorch local-attention",
    "bfloat16": "the same, autocast to bfloat16",
}
SIDE = 2048  # of the floor's product


def model_options(arguments):
    """Keyword arguments of both ``LocalTransformer``."""
    sizes = dict(
        num_tokens=256,
        max_seq_len=arguments.length,
        dim=arguments.dim,
        depth=arguments.depth,
        heads=arguments.heads,
        dim_head=arguments.dim_head,
        local_attn_window_size=arguments.window,
        num_residual_streams=1,
    )
    return sizes | set_options(arguments)


def set_options(arguments):
    """What ``--set`` gives, numbers and booleans as in JSON."""
    return {key: json.loads(value) for key, _, value in (text.partition("=") for text in arguments.set)}


def attention_options(arguments):
    """Keyword arguments of both ``LocalAttention``."""
    sizes = dict(window_size=arguments.window, causal=True, dim=arguments.dim_head, exact_windowsize=True, autopad=True)
    return sizes | set_options(arguments)


def product_flops(arguments):
    """Floating-point operations of the step's matrix products; each is followed by two in the backward pass."""
    inner, tokens = arguments.heads * arguments.dim_head, arguments.batch * arguments.length
    attention = 2 * (arguments.window + 1) * inner  # scores and weighted sum, for each key that a query sees
    if arguments.attention:
        return 3 * 2 * tokens * attention
    layer = 4 * arguments.dim * inner + 3 * arguments.dim * int(arguments.dim * 4 * 2 / 3)
    return 3 * 2 * tokens * (arguments.depth * (layer + attention) + arguments.dim * 256)


def crops(arguments):
    return np.random.default_rng(0).integers(0, 256, (arguments.batch, arguments.length + 1)).astype(np.int32)


def heads(arguments):
    """Queries, keys, values and the gradient of the output, each ``(b, h, n, d)``."""
    shape = (4, arguments.batch, arguments.heads, arguments.length, arguments.dim_head)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def ours(arguments):
    """Steps of this project; the first one compiles."""
    import mindspore as ms
    from mindspore import Tensor, ops

    ms.set_context(mode=ms.GRAPH_MODE)
    if arguments.attention:
        from local_attention import LocalAttention

        *inputs, gradient = map(Tensor, heads(arguments))
        attend = ops.GradOperation(get_all=True, sens_param=True)(LocalAttention(**attention_options(arguments)))

        def step():
            for found in attend(*inputs, gradient):
                found.asnumpy()
    else:
        from local_attention import LocalTransformer
        from local_attention.training.config import OptimizerConfig
        from local_attention.training.optimizer import build_optimizer
        from local_attention.training.step import TrainStep

        model = LocalTransformer(**model_options(arguments))
        train = TrainStep(model, build_optimizer(OptimizerConfig("adam"), model.trainable_params()), 1, clip_norm=0.5)
        train.set_train()
        batch = Tensor(crops(arguments)[None])

        def step():
            train(batch)[0].asnumpy()

    while True:
        yield elapsed(step)


def original(arguments, bfloat16=False):
    """Steps of the PyTorch package."""
    import torch

    from scripts.pytorch_original import import_original

    module = import_original()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    if arguments.attention:
        *inputs, gradient = (torch.from_numpy(array).requires_grad_() for array in heads(arguments))
        attend = module.LocalAttention(**attention_options(arguments))

        def step():
            for tensor in inputs:
                tensor.grad = None
            with autocast:
                out = attend(*inputs)
            out.backward(gradient.detach().to(out.dtype))
    else:
        model = module.LocalTransformer(**model_options(arguments)).train()
        optimizer = torch.optim.Adam(model.parameters(), 2e-4)
        batch = torch.from_numpy(crops(arguments)).long()

        def step():
            with autocast:
                loss = model(batch, return_loss=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    while True:
        yield elapsed(step)


def floor(arguments):
    """Large products, in seconds for as many operations as the step has."""
    import mindspore as ms
    from mindspore import Tensor, ops

    ms.set_context(mode=ms.GRAPH_MODE)
    one, other = (Tensor(array) for array in np.random.default_rng(0).standard_normal((2, SIDE, SIDE), np.float32))
    product = ops.MatMul()
    while True:
        yield elapsed(lambda: product(one, other).asnumpy()) * product_flops(arguments) / (2 * SIDE**3)


def print_profile(arguments, steps=3):
    """Where our step's time goes, by operator."""
    from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

    from local_attention.training.profile import operator_times

    rounds = ours(arguments)
    for _ in range(3):
        next(rounds)
    with tempfile.TemporaryDirectory() as folder:
        profiler = profile(activities=[ProfilerActivity.CPU], on_trace_ready=tensorboard_trace_handler(folder))
        profiler.start()
        for _ in range(steps):
            next(rounds)
        profiler.stop()
        (table,) = Path(folder).rglob("cpu_op_type_info_*.csv")
        rows = operator_times(table.read_text(), steps)
    print(f"operators of a step, {sum(row[2] for row in rows):.1f} ms in all:")
    writer = csv.writer(sys.stdout)
    for name, calls, ms, share in rows:
        writer.writerow((name, f"{calls:g}", f"{ms:.2f}", f"{share:.1%}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("dim", 256, "channels"),
        ("depth", 4, "layers"),
        ("heads", 4, "heads"),
        ("dim-head", 64, "channels of a head"),
        ("window", 256, "window size"),
        ("length", 1024, "bytes a crop"),
        ("batch", 4, "crops"),
        ("rounds", 9, "steps of each that count, after three that do not"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--attention", action="store_true", help="LocalAttention alone instead of a model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of both sides")
    parser.add_argument("--bfloat16", action="store_true", help="measure PyTorch under autocast, too")
    parser.add_argument("--profile", action="store_true", help="a table of our operators instead")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sides = {
        "floor": floor,
        "ours": ours,
        "original": original,
        "bfloat16": lambda arguments: original(arguments, bfloat16=True),
    }
    if arguments.worker:
        return work(sides[arguments.worker](arguments))
    if arguments.profile:
        return print_profile(arguments)

    names = ["floor", "ours"]
    if find_spec("torch"):
        names += ["original", "bfloat16"] if arguments.bfloat16 else ["original"]
    workers = {name: Worker(name) for name in names}
    first = {name: worker.round() for name, worker in workers.items()}
    rounds = {name: [] for name in names}
    for i in range(2 + arguments.rounds):
        for name, worker in workers.items():
            found = worker.round()
            if i >= 2:
                rounds[name].append(found)
    for worker in workers.values():
        worker.close()

    seconds = {name: np.array([found["result"] for found in of_name]) for name, of_name in rounds.items()}
    tokens, least = arguments.batch * arguments.length, np.median(seconds["floor"])
    figures = {"arguments": {key: value for key, value in vars(arguments).items() if key not in ("worker", "json")}}
    figures["gflop"] = product_flops(arguments) / 1e9
    print(f"{'':32}s a step (least … most)   bytes/s   of the floor   peak memory")
    for name, times in seconds.items():
        middle, memory = np.median(times), rounds[name][-1]["memory"]
        figures[name] = dict(
            s=middle, least_s=times.min(), most_s=times.max(), bytes_per_s=tokens / middle, memory_bytes=memory
        )
        print(f"{NAMES[name]:32}{middle:6.3f} ({times.min():.3f} … {times.max():.3f})", end="")
        print(f"{tokens / middle:10,.0f}{least / middle:14.0%}{memory / 1e9:12.2f} GB")
    figures["compile_s"] = first["ours"]["result"] - figures["ours"]["s"]
    print(f"the floor: {figures['gflop']:.1f} GFLOP at {figures['gflop'] / least:.0f} GFLOP/s; ", end="")
    print(f"this project's step was compiled in {figures['compile_s']:.1f} s")
    if "original" in seconds:
        figures["ratio"] = figures["original"]["s"] / figures["ours"]["s"]
        share = figures["ours"]["memory_bytes"] / figures["original"]["memory_bytes"]
        print(f"this project is {figures['ratio']:.2f} times as fast as PyTorch in {share:.2f} times the memory")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
