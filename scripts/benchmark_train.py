"""Time of a train step: this project, PyTorch, and a lower bound from the matrix products.

    python scripts/benchmark_train.py                                                        # small model
    python scripts/benchmark_train.py --dim 512 --depth 6 --heads 8 --length 2048 --batch 2  # base model
    python scripts/benchmark_train.py --attention --heads 8 --length 8192 --batch 1          # only LocalAttention
    python scripts/benchmark_train.py --attention --whole --heads 8 --length 8192 --batch 1  # of GlobalAttention
    python scripts/benchmark_train.py --profile                                              # times of operators
    python scripts/benchmark_train.py --set use_xpos=true --set num_residual_streams=4       # other options

A step is forward, backward, clipping and Adam; with ``--attention`` only forward and backward. Each implementation runs
in its own process, and their steps alternate. The results are medians over steps, and the peak memory of each process.
The floor is the time that the matrix products would take at the rate of a large product in MindSpore, the best of
eight, without scores that are masked. If ``make parity`` has set up its environment, PyTorch is measured there in eager
mode, twice: as the package ``local-attention``, and as the same model with windows in the batch and PyTorch's fused
``scaled_dot_product_attention``, see ``scripts/pytorch_sdpa.py``. With ``--bfloat16`` the latter is also measured under
autocast, and this project with ``device.matmul_precision=bfloat16``.
Attention to the whole sequence (``--whole``) is measured beside that function alone.
All begin with the same weights, and their first losses must agree to 1e-4 nats (in bfloat16 to 1e-2).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from local_attention.training.terminal import accept_any_output
from scripts.benchmarking import Worker, elapsed, work, workers_of_original
from scripts.pytorch_original import import_original

NAMES = {
    "floor": "floor: matrix products",
    "ours": "this project",
    "ours_bfloat16": "this project, matmul in bfloat16",
    "original": "PyTorch local-attention",
    "sdpa": "PyTorch, windows + SDPA",
    "bfloat16": "the same, autocast to bfloat16",
    "whole": "PyTorch, SDPA with is_causal",
}
LR = 2e-4
SIDE = 2048  # size of the matrices whose product is measured for the floor


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of both ``LocalTransformer`` classes."""
    sizes: dict[str, Any] = dict(
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


def set_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of ``--set``, with values in JSON."""
    return {key: json.loads(value) for key, _, value in (text.partition("=") for text in arguments.set)}


def attention_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of both ``LocalAttention`` classes."""
    sizes: dict[str, Any] = dict(
        window_size=arguments.window, causal=True, dim=arguments.dim_head, exact_windowsize=True, autopad=True
    )
    return sizes | set_options(arguments)


def product_flops(arguments: argparse.Namespace) -> int:
    """Floating-point operations of the matrix products of a step; backward takes twice those of forward."""
    inner, tokens = arguments.heads * arguments.dim_head, arguments.batch * arguments.length
    keys = (arguments.length + 1) / 2 if arguments.whole else arguments.window + 1  # that a query attends to
    attention = int(2 * keys * inner)  # scores and weighted sum
    if arguments.attention:
        return 3 * 2 * tokens * attention
    layer = 4 * arguments.dim * inner + 3 * arguments.dim * int(arguments.dim * 4 * 2 / 3)
    return 3 * 2 * tokens * (arguments.depth * (layer + attention) + arguments.dim * 256)


def sequences(arguments: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (arguments.batch, arguments.length + 1)).astype(np.int32)


def heads(arguments: argparse.Namespace) -> np.ndarray:
    """Queries, keys, values and the gradient of the output, each ``(b, h, n, d)``."""
    shape = (4, arguments.batch, arguments.heads, arguments.length, arguments.dim_head)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class Step(NamedTuple):
    """A measured step: its duration, and the loss in nats or, of attention alone, the mean square of the output."""

    seconds: float
    loss: float


def ours(arguments: argparse.Namespace, bfloat16: bool = False) -> Iterator[Step]:
    """Measure steps of this project; the first includes compilation."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from local_attention import kernels

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)  # so that both have the same weights
    kernels.multiply_in_bfloat16(bfloat16)
    if arguments.attention:
        from local_attention import LocalAttention

        *inputs, gradient = map(Tensor, heads(arguments))
        attend = whole_attention(arguments) if arguments.whole else LocalAttention(**attention_options(arguments))
        gradients = ops.GradOperation(get_all=True, sens_param=True)(attend)
        loss = float((attend(*inputs).asnumpy() ** 2).mean())

        def step() -> float:
            for output in gradients(*inputs, gradient):
                output.asnumpy()
            return loss
    else:
        from local_attention import LocalTransformer
        from local_attention.torch_state import torch_state
        from local_attention.training.config import OptimizerConfig
        from local_attention.training.optimizer import build_optimizer
        from local_attention.training.step import TrainStep

        model = LocalTransformer(**model_options(arguments))
        if arguments.weights:
            np.savez(arguments.weights, **torch_state(model))
        train = TrainStep(model, build_optimizer(OptimizerConfig("adam", lr=LR), model.trainable_params()), 1, 0.5)
        train.set_train()
        batch = Tensor(sequences(arguments)[None])

        def step() -> float:
            return float(train(batch)[0].asnumpy())

    return measure(step)


def whole_attention(arguments: argparse.Namespace) -> Any:
    """The attention of the heads of a causal ``GlobalAttention``."""
    from local_attention import GlobalAttention

    sizes: dict[str, Any] = dict(dim=1, heads=arguments.heads, dim_head=arguments.dim_head)
    return GlobalAttention(**sizes, causal=True, use_rotary_pos_emb=False).attention


def pytorch(arguments: argparse.Namespace, sdpa: bool = False, bfloat16: bool = False) -> Iterator[Step]:
    """Measure steps of the PyTorch package, or of the same model with windows in the batch and SDPA."""
    module = import_original()

    import torch

    from scripts.pytorch_sdpa import WindowedSdpa, use_sdpa

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    if arguments.attention:
        *inputs, gradient = (torch.from_numpy(array).requires_grad_() for array in heads(arguments))
        attend = module.LocalAttention(**attention_options(arguments))
        if arguments.whole:
            attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        elif sdpa:
            attend = WindowedSdpa(attend.window_size, attend.exact_windowsize, arguments.dim_head)
        with torch.no_grad():
            loss = attend(*inputs).square().mean().item()

        def step() -> float:
            for tensor in inputs:
                tensor.grad = None
            with autocast:
                out = attend(*inputs)
            out.backward(gradient.detach().to(out.dtype))
            return loss
    else:
        model = module.LocalTransformer(**model_options(arguments)).train()
        if arguments.weights:
            model.load_state_dict({name: torch.from_numpy(array) for name, array in np.load(arguments.weights).items()})
        if sdpa:
            use_sdpa(model, module)
        optimizer = torch.optim.Adam(model.parameters(), LR)
        batch = torch.from_numpy(sequences(arguments)).long()

        def step() -> float:
            with autocast:
                loss = model(batch, return_loss=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

    return measure(step)


def floor(arguments: argparse.Namespace) -> Iterator[Step]:
    """Measure a large product, the best of several, scaled to the number of operations of a step.

    The best, as the first ones of a round wait for threads that sleep, and run at half the rate.
    """
    import mindspore as ms
    from mindspore import Tensor, ops

    ms.set_context(mode=ms.GRAPH_MODE)
    one, other = (Tensor(array) for array in np.random.default_rng(0).standard_normal((2, SIDE, SIDE), np.float32))
    product = ops.MatMul()
    while True:
        seconds = min(elapsed(lambda: product(one, other).asnumpy()) for _ in range(8))
        yield Step(seconds * product_flops(arguments) / (2 * SIDE**3), 0)


def measure(step: Callable[[], float]) -> Iterator[Step]:
    while True:
        begin = time.perf_counter()
        loss = step()
        yield Step(time.perf_counter() - begin, loss)


def can_multiply_in_bfloat16() -> bool:
    from local_attention import kernels

    try:
        kernels.multiply_in_bfloat16(True)
    except ValueError as error:
        print(f"without {NAMES['ours_bfloat16']}: {error}")
        return False
    return True


def require_same_losses(first: dict[str, Step]) -> None:
    """Exit unless the implementations compute the same: all begin with the same weights."""
    for name, step in first.items():
        difference, tolerance = abs(step.loss - first["ours"].loss), 1e-2 if "bfloat16" in name else 1e-4
        if name != "floor" and difference > tolerance:
            sys.exit(f"error: {NAMES[name]} differs from this project by {difference:.2g} in its first loss")


def print_profile(arguments: argparse.Namespace, steps: int = 3) -> None:
    """Print a table of the operators of this project's step."""
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
    print(f"operators per step, {sum(row.ms_per_step for row in rows):.1f} ms in total:")
    writer = csv.writer(sys.stdout)
    for name, calls, ms, fraction in rows:
        writer.writerow((name, f"{calls:g}", f"{ms:.2f}", f"{fraction:.1%}"))


def main() -> int:
    accept_any_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("dim", 256, "channels"),
        ("depth", 4, "layers"),
        ("heads", 4, "heads"),
        ("dim-head", 64, "channels per head"),
        ("window", 256, "window size"),
        ("length", 1024, "bytes per sequence"),
        ("batch", 4, "sequences per batch"),
        ("rounds", 9, "measured steps of each implementation, after three warm-up steps"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--attention", action="store_true", help="measure LocalAttention instead of a model")
    parser.add_argument("--whole", action="store_true", help="with --attention: that of GlobalAttention")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="option of both implementations"
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="also measure products in bfloat16, and PyTorch with SDPA under autocast",
    )
    parser.add_argument("--profile", action="store_true", help="print a table of this project's operators instead")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    implementations: dict[str, Callable[[argparse.Namespace], Iterator[Step]]] = {
        "floor": floor,
        "ours": ours,
        "ours_bfloat16": partial(ours, bfloat16=True),
        "original": pytorch,
        "sdpa": partial(pytorch, sdpa=True),
        "bfloat16": partial(pytorch, sdpa=True, bfloat16=True),
        "whole": pytorch,
    }
    if arguments.whole and (not arguments.attention or arguments.set):
        parser.error("--whole needs --attention, and takes no --set")
    if arguments.worker:
        work(implementations[arguments.worker](arguments))
        return 0
    if arguments.profile:
        print_profile(arguments)
        return 0

    peers = ["whole"] if arguments.whole else ["original"]
    if peers == ["original"] and not set_options(arguments).keys() - {"exact_windowsize"}:  # which the others compute
        peers += ["sdpa", "bfloat16"] if arguments.bfloat16 else ["sdpa"]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--weights", f"{folder}/weights.npz"]
        own = ["floor", "ours"]
        if arguments.bfloat16 and not arguments.attention and can_multiply_in_bfloat16():
            own.append("ours_bfloat16")
        workers = {name: Worker(name, options) for name in own}
        workers |= workers_of_original(*peers, options=options)
        first = {name: worker.round() for name, worker in workers.items()}
    require_same_losses({name: Step(*measured["result"]) for name, measured in first.items()})
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for i in range(2 + arguments.rounds):
        for name, worker in workers.items():
            measured = worker.round()
            if i >= 2:
                rounds[name].append(measured)
    for worker in workers.values():
        worker.close()

    seconds = {
        name: np.array([Step(*measured["result"]).seconds for measured in results]) for name, results in rounds.items()
    }
    tokens, lower_bound = arguments.batch * arguments.length, np.median(seconds["floor"])
    figures: dict[str, Any] = {
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("worker", "weights", "json")}
    }
    figures["gflop"] = product_flops(arguments) / 1e9
    print(f"{'':32}s per step (min … max)   bytes/s   of the floor   peak memory")
    for name, times in seconds.items():
        median, memory = np.median(times), rounds[name][-1]["memory"]
        figures[name] = dict(
            s=median, min_s=times.min(), max_s=times.max(), bytes_per_s=tokens / median, memory_bytes=memory
        )
        print(f"{NAMES[name]:32}{median:6.3f} ({times.min():.3f} … {times.max():.3f})", end="")
        print(f"{tokens / median:10,.0f}{lower_bound / median:14.0%}{memory / 1e9:12.2f} GB")
    figures["compile_s"] = Step(*first["ours"]["result"]).seconds - figures["ours"]["s"]
    print(f"the floor: {figures['gflop']:.1f} GFLOP at {figures['gflop'] / lower_bound:.0f} GFLOP/s; ", end="")
    print(f"this project compiled its step in {figures['compile_s']:.1f} s")
    if in_float32 := [name for name in ("original", "sdpa", "whole") if name in seconds]:
        strongest = min(in_float32, key=lambda name: figures[name]["s"])
        figures["strongest"], figures["ratio"] = strongest, figures[strongest]["s"] / figures["ours"]["s"]
        memory_ratio = figures["ours"]["memory_bytes"] / figures[strongest]["memory_bytes"]
        print(
            f"this project is {figures['ratio']:.2f} times as fast as {NAMES[strongest]}, "
            f"with {memory_ratio:.2f} times the memory"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
