"""What works on this machine, as text for a report: ``python scripts/diagnose.py``; see docs/accelerators.md."""

import ctypes
import math
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic.dataclasses import dataclass

import local_attention
from local_attention.options import CHECKED, LocalMHAOptions, LocalTransformerOptions
from local_attention.training.command import command
from local_attention.training.config import DeviceConfig
from local_attention.training.schema import parse, register_schema

TYPES = ("float32", "float16", "bfloat16", "float64")
NOT_TRAINED = "float64"  # by train.precision
USES = ("forward", "gradient", "training step", "generation")
CELLS: dict[str, type] = {"LocalMHA": LocalMHAOptions, "LocalTransformer": LocalTransformerOptions}
SIZES: dict[str, Any] = dict(dim=8, heads=1, dim_head=4)
BASE: dict[str, dict[str, Any]] = {
    "LocalMHA": dict(**SIZES, window_size=3),
    "LocalTransformer": dict(**SIZES, num_tokens=3, max_seq_len=12, depth=1, local_attn_window_size=3),
}
VALUES = (True, False, 2, 0.5, 0, [1])  # an option gets the first that is allowed and not its default
NEEDED: dict[str, dict[str, Any]] = {  # what an option has no effect without
    "xpos_scale_base": dict(use_xpos=True),
    "qk_scale": dict(qk_rmsnorm=True),
    "ngram_buckets": dict(max_ngram=2),
    "ngram_dim": dict(max_ngram=2),
    "layers_insert_global_attn": dict(global_attn_layer=True),
}
LIMIT_S = 120.0  # for one check: a graph may take a minute to compile on an accelerator

Result = tuple[bool, str]  # whether it worked; what it gave, or the first line of the error


Check = Callable[[], str]  # says in a few words what it has found, or fails


@register_schema("diagnose")
@dataclass(config=CHECKED)
class DiagnoseConfig:
    """Where to try."""

    device: DeviceConfig = field(default_factory=DeviceConfig)


def diagnose_config(config: DictConfig | dict[str, Any]) -> DiagnoseConfig:
    """Check a config that Hydra has composed; raises :class:`UsageError`."""
    return parse(DiagnoseConfig, config)


# Checks in a process of their own


def isolated(checks: Sequence[Check], prepare: Check, limit_s: float = LIMIT_S) -> Iterator[Result]:
    """The result of each check. One that ends its process, or takes too long, does not end the others.

    ``prepare`` is called first, in each process.
    """
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        while checks:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=answer, args=(theirs, folder, prepare, checks), daemon=True)
            process.start()
            theirs.close()
            try:
                lives = True
                while checks and lives:
                    try:
                        lives = ours.poll(limit_s)
                        result = ours.recv() if lives else (False, f"no result after {limit_s:g} s")
                    except EOFError:
                        lives = False
                        process.join()
                        status = process.exitcode or 0
                        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
                        result = False, f"the process ended: {how}"
                    yield result
                    checks = checks[1:]
            finally:
                process.kill()  # SIGTERM is blocked, see deliver_to_python
                process.join()


def answer(connection: Connection, folder: str, prepare: Check, checks: Sequence[Check]) -> None:
    """Send the result of each check. What MindSpore prints is dropped, what it writes goes to a folder."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.chdir(folder)
    prepared = attempt(prepare)
    for check in checks:
        connection.send(attempt(check) if prepared[0] else prepared)


def attempt(function: Check) -> Result:
    """The result of a function: what it returns, or the first line of its error."""
    try:
        return True, without_paths(function())
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return False, without_paths(f"{type(error).__name__}: {lines[0] if lines else ''}")[:300]


def without_paths(text: str) -> str:
    """A text with the last part of each absolute path only, and without the name of the machine."""
    text = re.sub(r"(?<![\w.…])/(?:[^\s/:'\"]+/)+", "…/", text.replace(str(Path.home()), "/home"))
    return re.sub(rf"\b{re.escape(platform.node() or '/')}\b", "HOST", text)


def start(target: str) -> str:
    """Use a device; returns its name."""
    import mindspore as ms

    from local_attention.training.device import use_device

    use_device(target)
    ms.runtime.launch_blocking()  # an error is raised by the operator that has it
    device = ms.get_context("device_target")
    return device if device == "CPU" else f"{device}, {attempt(partial(ms.hal.get_device_name, 0))[1]}"


def operators() -> str:
    """Whether the operators in C++ are used."""
    import mindspore as ms

    from local_attention import kernels

    spec = find_spec("local_attention._kernels")
    if spec is None or spec.origin is None:
        return "not built: pip found no C++ compiler"
    ctypes.CDLL(spec.origin)  # raises the reason
    if platform.system() != "Linux" or ms.get_context("device_target") != "CPU":
        return "not used: they are for CPUs under Linux"
    return f"loaded, {'all' if kernels.has_gemm() else 'without those for whole sequences, as oneDNN is not found'}"


def tiny(name: str, dtype: str, options: dict[str, Any]) -> Any:
    """A cell of the library in training mode that computes in a type, with the same weights everywhere."""
    import mindspore as ms
    import numpy as np

    from local_attention.training.build import compute_in

    if "global_attn_layer" in options:
        options = options | dict(global_attn_layer=local_attention.GlobalAttention(causal=True, **SIZES))
    cell, rng = getattr(local_attention, name)(**BASE[name] | options), np.random.default_rng(0)
    for parameter in cell.get_parameters():
        parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape) * 0.3, ms.float32))
        if dtype == "float64":
            parameter.set_dtype(ms.float64)
    return (cell if dtype == "float64" else compute_in(cell, dtype)).set_train()


def tokens() -> Any:
    import mindspore as ms
    import numpy as np

    return ms.Tensor(np.random.default_rng(1).integers(0, 2, (2, 12)), ms.int32)


def size(*tensors: Any) -> float:
    """The root of the sum of all squares."""
    import mindspore as ms

    found = math.hypot(*(float((tensor.astype(ms.float32) ** 2).sum().asnumpy()) ** 0.5 for tensor in tensors))
    if not math.isfinite(found):
        raise ValueError(f"expected finite results, got {found}")
    return found


def use(dtype: str, mode: str, kind: str) -> str:
    """Use a model in one of the ways of ``USES``."""
    import mindspore as ms
    from mindspore import ops

    from local_attention.training.config import OptimizerConfig
    from local_attention.training.optimizer import build_optimizer, loss_scaler
    from local_attention.training.step import LanguageModelLoss, TrainStep

    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    model = tiny("LocalTransformer", dtype, {})
    if kind == "generation":
        generated = model.set_train(False).generate(tokens()[:, :3], 6, temperature=0)
        return f"tokens {generated.asnumpy()[0].tolist()}"
    loss = LanguageModelLoss(model)
    if kind == "forward":
        return f"loss {size(loss(tokens())):.6f}"
    if kind == "gradient":
        _, gradients = ops.value_and_grad(loss, None, model.trainable_params())(tokens())
        return f"norm {size(*gradients):.6f}"
    optimizer = build_optimizer(OptimizerConfig(), model.trainable_params(), loss_scaler(dtype, 1024.0))
    step = TrainStep(model, optimizer, grad_accum_every=1, clip_norm=1.0)
    step(tokens()[None])
    return f"then loss {size(step(tokens()[None])[0]):.6f}"


def other_value(name: str, option: str) -> dict[str, Any]:
    """An option with a value that is not its default, and what it needs to have an effect."""
    default, needed = getattr(CELLS[name](**BASE[name]), option), NEEDED.get(option, {})
    for value in VALUES:
        try:
            CELLS[name](**BASE[name] | needed | {option: value})
        except ValueError:
            continue
        if value != default:
            return needed | {option: value}
    raise ValueError(f"expected that one of {VALUES} is allowed for {option}, and not its default {default}")


def use_options(name: str, dtype: str, options: dict[str, Any]) -> str:
    """Compute output and gradients of a cell, eagerly."""
    import mindspore as ms
    from mindspore import ops

    ms.set_context(mode=ms.PYNATIVE_MODE)
    cell = tiny(name, dtype, options)
    x = tokens()[:, : getattr(cell.options, "max_seq_len", None)]
    if name == "LocalMHA":
        x = ops.one_hot(x, cell.dim).astype(getattr(ms, dtype))
    weights = cell.trainable_params()
    total, gradients = ops.value_and_grad(lambda x: cell(x).astype(ms.float32).sum(), None, weights)(x)
    return f"norm {size(total, *gradients):.6f}"


def format_options(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def show(name: str, result: Result) -> None:
    print(f"{name:<32}{'ok, ' if result[0] else 'FAILS, '}{result[1]}", flush=True)


@command("diagnose", DiagnoseConfig, diagnose_config)
def main(config: DiagnoseConfig) -> int:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", path.read_text(), re.MULTILINE) if path.exists() else []
    packages = ", ".join(f"{name} {version(name)}" for name in ("mindspore", "numpy", "einops", "hydra-core"))
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    print(f"local_attention {local_attention.__version__}, {packages}")
    print(f"Python {platform.python_version()}, {system}")
    print(f"{names[0] if names else platform.processor()}, {os.cpu_count()} processors", flush=True)

    prepare = partial(start, config.device.target)
    device, in_cpp = isolated([prepare, operators], prepare)
    show(f"device.target={config.device.target}", device)
    if not device[0]:
        return 1
    show("operators in C++", in_cpp)

    uses = [of for of in product(TYPES, ("eager", "graph"), USES) if (of[0], of[2]) != (NOT_TRAINED, USES[2])]
    computed = []
    for (dtype, mode, kind), result in zip(uses, isolated([partial(use, *of) for of in uses], prepare)):
        show(f"{dtype} {mode} {kind}", result)
        if (mode, kind) == ("eager", USES[0]) and result[0]:
            computed.append(dtype)

    for dtype, name in product([dtype for dtype in computed if dtype != NOT_TRAINED], CELLS):
        tried = [other_value(name, option.name) for option in fields(CELLS[name])]
        results = list(isolated([partial(use_options, name, dtype, options) for options in tried], prepare))
        working = [format_options(options) for options, (works, _) in zip(tried, results) if works]
        show(f"{dtype} {name}", (True, "each of " + "; ".join(working)))
        for options, (works, found) in zip(tried, results):
            if not works:
                show(f"{dtype} {name}", (False, f"{format_options(options)}: {found}"))
    return 0


if __name__ == "__main__":
    main()
