"""Make the golden fixtures of the tests: outputs and gradients of PyTorch's ``local-attention``.

Needs the environment of ``make parity``. Takes a few minutes:

    .venv-parity/bin/python scripts/make_fixtures.py

Writes ``tests/local_attention/fixtures/CLASS.npz``, deterministically. The cases cover all valid pairs of values of the
options below. For each defect of the original, further cases cover every value of every option, with the results of the
NumPy reference ``tests/local_attention/reference.py`` as expected values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pytorch_original import import_original

ORIGINAL = import_original()  # or says what is missing

import numpy as np
import torch

from tests.local_attention import reference
from tests.local_attention.cells import parameters
from tests.local_attention.golden import (
    FOLDER,
    KINDS,
    RULE,
    AttentionCase,
    BiasCase,
    MhaCase,
    RotaryCase,
    TransformerCase,
    save,
)

DRAWS = 150_000  # random rows per table; enough for every valid pair to occur several times
BOTH = (False, True)

TABLES: dict[str, dict[str, dict[str, Sequence[Any]]]] = {
    "LocalAttention": dict(
        options=dict(
            window_size=(1, 2, 3, 4, 5),
            causal=BOTH,
            look_backward=(0, 1, 2, 3),
            look_forward=(None, 0, 1, 2),
            dropout=(0.0, 0.2),
            shared_qk=BOTH,
            rel_pos_emb_config=(None, [2, 8], [4, 8]),
            dim=(None, 2, 4),
            autopad=BOTH,
            exact_windowsize=BOTH,
            scale=(None, 0.3),
            use_rotary_pos_emb=BOTH,
            use_xpos=BOTH,
            xpos_scale_base=(None, 6.0),
        ),
        call=dict(mask=(None, 1, 2, 6), input_mask=(None, 2), attn_bias=(None, 1, 3), window_size=(None, 2, 6)),
        data=dict(leading=([], [2], [2, 3], [2, 1, 3]), length=(1, 6, 8, 9, 12), d=(2, 4), e=(3, 4), blind=BOTH),
    ),
    "LocalMHA": dict(
        options=dict(
            dim=(6, 8),
            window_size=(1, 2, 3, 4),
            dim_head=(4, 6),
            heads=(1, 2, 3),
            dropout=(0.0, 0.2),
            causal=BOTH,
            prenorm=BOTH,
            qk_rmsnorm=BOTH,
            qk_scale=(8, 3),
            use_xpos=BOTH,
            xpos_scale_base=(None, 6.0),
            exact_windowsize=(None, False, True),
            gate_values_per_head=BOTH,
            look_backward=(0, 1, 2),
            look_forward=(None, 0, 1),
            shared_qk=BOTH,
            scale=(None, 0.3),
            use_rotary_pos_emb=BOTH,
        ),
        call=dict(mask=(None, 1, 2), attn_bias=(None, 1, 3)),
        data=dict(batch=(1, 2), length=(1, 5, 6, 8), blind=BOTH),
    ),
    "DynamicPositionBias": dict(
        options=dict(dim=(1, 2, 5), heads=(1, 2, 3)),
        call=dict(i=(1, 3, 4), j=(1, 4, 8), first=(None, 0, 2)),
        data={},
    ),
    "SinusoidalEmbeddings": dict(
        options=dict(dim=(2, 4, 8), scale_base=(None, 3.0, 8.0), use_xpos=BOTH, theta=(10000, 50)),
        call=dict(scale=BOTH),
        data=dict(leading=([1], [2], [2, 3]), length_q=(1, 3, 7), length_k=(1, 7, 10)),
    ),
    "LocalTransformer": dict(
        options=dict(
            num_tokens=(None, 7, 11),
            max_seq_len=(8, 10),
            dim=(6, 8),
            depth=(1, 2),
            causal=BOTH,
            local_attn_window_size=(2, 3, 4),
            dim_head=(4, 6),
            heads=(1, 2, 3),
            ff_mult=(2, 4),
            attn_dropout=(0.0, 0.2),
            ff_dropout=(0.0, 0.2),
            ignore_index=(-1, 3),
            use_xpos=BOTH,
            xpos_scale_base=(None, 6.0),
            use_dynamic_pos_bias=BOTH,
            global_attn_layer=BOTH,
            layers_insert_global_attn=(None, [1], [2]),
            num_residual_streams=(1, 2, 4),
            use_abs_pos_emb=BOTH,
            use_rotary_pos_emb=BOTH,
            look_backward=(0, 1, 2),
            look_forward=(None, 0, 1),
            exact_windowsize=(None, False, True),
            qk_rmsnorm=BOTH,
            qk_scale=(8, 3),
            gate_values_per_head=BOTH,
            shared_qk=BOTH,
        ),
        call=dict(mask=(None, 1, 2), return_loss=BOTH),
        data=dict(batch=(1, 2), length=(1, 5, 6, 8), blind=BOTH),
    ),
}

# Windows above 128 are divided into blocks.
LONG: list[dict[str, Any]] = [
    dict(length=300, causal=True, dim=2, mask=2),
    dict(length=300, causal=True, look_backward=2, use_xpos=True, dim=2),
    dict(length=512, exact_windowsize=True, look_forward=0, shared_qk=True, dim=2),
    dict(length=512, look_backward=2, use_rotary_pos_emb=False),
    dict(length=300, causal=True, look_backward=1, attn_bias=1, exact_windowsize=True),
]


class Draw(NamedTuple):
    """A case, and the features that it covers, as numbers."""

    case: Any
    features: Sequence[int]


def draw(kind: str) -> Iterator[Draw]:
    """Yield the valid ones of random rows of a table, with one feature per value."""
    table = [(group, name, values) for group, names in TABLES[kind].items() for name, values in names.items()]
    sizes = [len(values) for _, _, values in table]
    first = np.cumsum([0, *sizes[:-1]])
    for picks in np.random.RandomState(0).randint(0, sizes, (DRAWS, len(sizes))):
        groups: dict[str, dict[str, Any]] = {group: {} for group in TABLES[kind]}
        for (group, name, values), pick in zip(table, picks, strict=True):
            groups[group][name] = values[pick]
        case = KINDS[kind]("pytorch", 0, **groups)
        if possible(case):
            yield Draw(case, first + picks)


def possible(case: Any) -> bool:
    """Whether the class accepts the options together, and scores remain of order one."""
    options, call, data = case.options, case.call, case.data
    if isinstance(case, BiasCase):
        return True
    if isinstance(case, RotaryCase):
        return data["length_q"] <= data["length_k"] and (options["scale_base"] is not None or not options["use_xpos"])
    definition, masks = case.definition(), masks_of(case)
    groups = prod(data["leading"]) if isinstance(case, AttentionCase) else data["batch"] * options["heads"]
    return (
        fits(case, definition["window_size"])
        and not (definition["causal"] and options["look_forward"])
        and all(groups % rows == 0 for rows in [*masks, call.get("attn_bias") or 1])
        and (bool(masks) or not data["blind"])
        and decays(definition)
    )


def masks_of(case: Any) -> list[Any]:
    return [case.call[name] for name in ("mask", "input_mask") if case.call.get(name) is not None]


def fits(case: Any, window: int) -> bool:
    """Check the requirements of a single class."""
    options, call, data = case.options, case.call, case.data
    if isinstance(case, AttentionCase):
        dim = options["dim"] if options["rel_pos_emb_config"] is None else options["rel_pos_emb_config"][0]
        return (
            dim in (None, data["d"])
            and (options["autopad"] or data["length"] % window == 0)
            and (options["use_xpos"] or call["window_size"] is None)
        )
    if isinstance(case, MhaCase):
        return options["scale"] is None or not options["qk_rmsnorm"]
    inserted = options["layers_insert_global_attn"]
    return (inserted is None or (options["global_attn_layer"] and max(inserted) <= options["depth"])) and (
        not call["return_loss"] or (options["num_tokens"] is not None and data["batch"] * data["length"] > 1)
    )


def decays(definition: dict[str, Any]) -> bool:
    """Whether scores with xPos remain small. Its decay becomes growth for keys ahead of a query."""
    base, window = definition["xpos_scale_base"], definition["window_size"]
    return base is None or definition["causal"] or (definition["look_forward"] + 1) * window - 1 <= 2 * base


def defect(case: Any) -> str | None:
    """Name the defect or missing feature of the original that affects a case, or None."""
    options, call, data = case.options, case.call, case.data
    if isinstance(case, BiasCase):
        return "first" if call["first"] is not None or call["j"] < call["i"] else None
    if isinstance(case, RotaryCase):
        return None
    definition = case.definition()
    length, window = data["length"], definition["window_size"]
    if data["blind"]:
        return "queries without keys"
    if definition["rotary"] and definition["look_forward"]:
        return "rotary embeddings ahead"
    if not definition["causal"] and length % window and not masks_of(case):
        return "padding seen"
    if options.get("window_size") == 1 and definition["xpos_scale_base"] and options["xpos_scale_base"] is None:
        return "xPos in windows of one"
    if isinstance(case, AttentionCase):
        first = options["window_size"]
        padded = length % window or (options["autopad"] and length % first)
        return "window in the call" if window != first and (padded or options["exact_windowsize"]) else None
    if isinstance(case, MhaCase):
        return None if options["scale"] is None else "scale"
    if options["use_dynamic_pos_bias"]:
        around = definition["look_backward"], definition["look_forward"]
        return None if around == (1, 0) else "dynamic bias"
    return None if options["use_rotary_pos_emb"] else "no positions"


def is_informative(case: Any) -> bool:
    """Whether queries attend to other tokens, and all options have an effect."""
    options, call, data = case.options, case.call, case.data
    if isinstance(case, BiasCase):
        return True
    if isinstance(case, RotaryCase):
        return (options["use_xpos"] and call["scale"]) == (options["scale_base"] is not None)
    definition = case.definition()
    length, window = data["length"], definition["window_size"]
    return (
        reference.visibility(length, **{name: definition[name] for name in RULE}).sum() > length
        and (definition["xpos_scale_base"] is not None or not options["use_xpos"])
        and (options["use_xpos"] or options["xpos_scale_base"] is None)
        and (options.get("qk_rmsnorm") or options.get("qk_scale", 8) == 8)
        and (call["mask"] is None or call.get("input_mask") is None)
        and (length % window > 0 or not options.get("autopad"))
        and (call.get("return_loss") or options.get("ignore_index", -1) == -1)
        and (options.get("use_abs_pos_emb", True) or options["num_tokens"] is not None)
    )


def cover(found: list[Draw]) -> list[Any]:
    """Greedily choose cases that together cover every feature in ``found``, informative ones where possible."""
    features = np.array([row for _, row in found])
    informative = np.array([is_informative(case) for case, _ in found])
    chosen, missing = [], np.zeros(features.max() + 1, bool)
    missing[features] = True
    while missing.any():
        gains = missing[features].sum(1)
        if (gains * informative).any():
            gains *= informative
        chosen.append(found[gains.argmax()][0])
        missing[features[gains.argmax()]] = False
    return chosen


def choose_cases(kind: str) -> list[Any]:
    """Choose cases that cover all pairs of values for which the original is right, and all values for each defect."""
    right: list[Draw] = []
    wrong: dict[str, list[Draw]] = {}
    for case, chosen in draw(kind):
        error = defect(case)
        if error is None:
            right.append(Draw(case, [a * 1000 + b for a, b in combinations(chosen, 2)]))
        else:
            case.source = "numpy"
            wrong.setdefault(error, []).append(Draw(case, chosen))
    cases = cover(right)
    for found in wrong.values():
        cases += cover(found)
    if kind == "LocalAttention":
        cases += [long_case(kind, changes) for changes in LONG]
    for seed, case in enumerate(cases):
        case.seed = seed
    return cases


def long_case(kind: str, changes: dict[str, Any]) -> Any:
    """Make a case with windows of 256, the given changes, and the first value of every other option."""
    groups: dict[str, dict[str, Any]] = {
        group: {name: values[0] for name, values in names.items()} for group, names in TABLES[kind].items()
    }
    groups["options"] |= dict(window_size=256, autopad=True)
    groups["data"] |= dict(leading=[2], d=2, e=2)
    for name, value in changes.items():
        next(names for names in groups.values() if name in names)[name] = value
    return KINDS[kind]("pytorch", 0, **groups)


def original_module(case: Any) -> torch.nn.Module:
    """Build the original's module with the parameters of the case."""
    options = dict(case.options)
    if isinstance(case, RotaryCase):
        return type(ORIGINAL.LocalAttention(2, dim=2).rel_pos)(**options)
    if isinstance(case, MhaCase):
        del options["scale"]  # LocalMHA would pass it on twice
    if isinstance(case, TransformerCase):
        del options["use_abs_pos_emb"], options["use_rotary_pos_emb"]
        dim = options["dim"]
        inserted = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.Sigmoid())
        options["global_attn_layer"] = inserted if options["global_attn_layer"] else None
    module = getattr(ORIGINAL, case.public.__name__)(**options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "pos_emb.weight" and not case.options["use_abs_pos_emb"]:
                parameter.zero_()
            else:
                parameter.copy_(torch.from_numpy(case.parameter(name, tuple(parameter.shape))))
    return module


def original_call(case: Any, module: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Call the original with the arguments of a case, as tensors."""
    if isinstance(case, RotaryCase):
        freqs, scale = module(arguments["k"])
        scale = scale if case.call["scale"] else torch.ones(1)  # the default, a number, raises an error
        return torch.cat(ORIGINAL.apply_rotary_pos_emb(**arguments, freqs=freqs, scale=scale), -2)
    if isinstance(case, BiasCase):
        return module(arguments["i"], arguments["j"])
    if isinstance(case, TransformerCase):
        if arguments["x"].dtype == torch.int32:
            arguments["x"] = arguments["x"].long()
        if arguments["return_loss"] and arguments["mask"] is not None:
            arguments["mask"] = arguments["mask"][:, :-1]  # the original uses the mask of the whole sequence
    return module(**arguments)


def from_pytorch(case: Any, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Compute output and gradients of inputs and parameters with PyTorch, in a floating type."""
    module = original_module(case).to(dtype)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(dtype) if array.dtype == np.float32 else torch.from_numpy(array)

    arguments = {
        name: tensor(value) if isinstance(value, np.ndarray) else value for name, value in case.arguments().items()
    }
    inputs = {name: value for name, value in arguments.items() if torch.is_tensor(value) and value.is_floating_point()}
    for value in inputs.values():
        value.requires_grad_()
    out = original_call(case, module, arguments)
    out.backward(torch.as_tensor(case.cotangent(out.shape)).to(out.dtype))
    names = [theirs for theirs, _, _ in case.correspondence(case.build())]
    gradients = inputs | {name: module.get_parameter(name) for name in names}
    return {"out": out.detach().numpy()} | {name: value.grad.numpy() for name, value in gradients.items()}


def from_numpy(case: Any) -> dict[str, np.ndarray]:
    """Compute output and gradients of inputs and parameters with the NumPy reference."""
    cell = case.cell()
    p = parameters(cell)
    inputs = {name: x for name, x in case.arguments().items() if isinstance(x, np.ndarray) and x.dtype == np.float32}
    out = case.by_reference(p)
    cotangent = case.cotangent(out.shape)

    def of_input(name: str, x: np.ndarray) -> np.ndarray:
        return reference.numerical_gradient(lambda x: (case.by_reference(p, **{name: x}) * cotangent).sum(), x)

    def of_parameter(name: str, x: np.ndarray) -> np.ndarray:
        return reference.numerical_gradient(lambda x: (case.by_reference(p | {name: x}) * cotangent).sum(), x)

    of_inputs = {name: of_input(name, x) for name, x in inputs.items()}
    of_parameters = {name: of_parameter(name, x) for name, x in p.items()}
    return {"out": out} | of_inputs | case.under_their_names(cell, of_parameters)


def main() -> None:
    torch.set_num_threads(1)  # makes sums deterministic
    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        cases = choose_cases(kind)
        expected = [from_pytorch(case) if case.source == "pytorch" else from_numpy(case) for case in cases]
        path = FOLDER / f"{kind}.npz"
        save(path, cases, expected)
        by_numpy = sum(case.source == "numpy" for case in cases)
        print(f"{path.name}: {len(cases)} cases, {by_numpy} by NumPy, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
