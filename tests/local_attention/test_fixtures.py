"""Outputs and gradients are those of the PyTorch package ``local-attention`` and, where that is wrong, of NumPy.

See :mod:`tests.local_attention.golden`; ``scripts/make_fixtures.py`` makes the files.
"""

import json
from inspect import signature
from itertools import chain, combinations

import mindspore as ms
import numpy as np
import pytest

from tests.local_attention.cells import ValueAndAllGradients, in_a_graph, needs_fused, parameters, tensor
from tests.local_attention.golden import FOLDER, KINDS, load

LOADED = {kind: load(kind) for kind in KINDS}


def parameters_of_tests(loaded, marks=()):
    return [pytest.param(*entry, id=f"{entry[0].public.__name__}-{entry[0].seed}", marks=marks) for entry in loaded]


def on(path, cases, marks=()):
    """Cases to be computed by fused operators in C++ or by MindSpore's own."""
    marks = [*marks, needs_fused] if path == "fused" else marks
    return [pytest.param(path, *case.values, id=f"{path}-{case.id}", marks=[*case.marks, *marks]) for case in cases]


def values(case):
    """``{(option or argument, its value)}`` of a case."""
    named = chain([("source", case.source)], case.options.items(), case.call.items())
    return {(name, json.dumps(value)) for name, value in named}


def varied(loaded, fraction=0.9):
    """The cases, the most varied first, that have this fraction of all pairs of values that any case has together."""
    pairs = [set(combinations(sorted(values(case)), 2)) for case, _ in loaded]
    left = set().union(*pairs)
    most, chosen = (1 - fraction) * len(left), []
    while len(left) > most:
        chosen.append(max(range(len(loaded)), key=lambda i: len(left & pairs[i])))
        left -= pairs[chosen[-1]]
    return [loaded[i] for i in chosen]


def few(loaded):
    """Two, of one layer, as each takes seconds to compile."""
    shallow = [entry for entry in loaded if entry[0].options.get("depth", 1) == 1]
    return [shallow[len(shallow) // 3], shallow[-1]]


def slow_but_for(fast, loaded):
    """All of ``loaded``, of which only those in ``fast`` are not slow."""
    others = [entry for entry in loaded if all(entry is not other for other in fast)]
    return parameters_of_tests(fast) + parameters_of_tests(others, marks=[pytest.mark.slow])


FAST = {kind: varied(loaded) for kind, loaded in LOADED.items()}
ALL = {kind: slow_but_for(FAST[kind], LOADED[kind]) for kind in KINDS}
FEW = {kind: slow_but_for(few(LOADED[kind])[1:], few(LOADED[kind])) for kind in KINDS}
IN_CPP = ("LocalAttention", "LocalMHA", "LocalTransformer")
NOT_IN_CPP = ("DynamicPositionBias", "SinusoidalEmbeddings")
LESS_VARIED = {kind: slow_but_for(varied(LOADED[kind], 0.6), LOADED[kind]) for kind in IN_CPP}


def as_input(x, dtype):
    """Masks and numbers as they are, other arrays in a floating type, or as int32."""
    if not isinstance(x, np.ndarray):
        return x
    return ms.Tensor(x) if x.dtype == bool else tensor(x, dtype)


def outputs_and_gradients(case, shape, dtype=ms.float32):
    """What the cell of a case computes in a type, by name, as ``expected``; ``shape`` is that of the output."""
    cell, arguments = case.cell(), case.arguments()
    if dtype != ms.float32:
        cell.to_float(dtype)
    cotangent = tensor(case.cotangent(shape), dtype if shape else ms.float32)  # a loss is in float32
    inputs = [as_input(x, dtype) for x in arguments.values()]
    value, (of_inputs, of_parameters) = ValueAndAllGradients(cell)(cotangent, *inputs)
    by_parameter = {name: g.asnumpy() for (name, _), g in zip(cell.parameters_and_names(), of_parameters, strict=True)}
    found, arrays = {"out": value.asnumpy()}, [name for name, x in arguments.items() if isinstance(x, np.ndarray)]
    for name, gradient in zip(arrays, of_inputs, strict=True):
        if arguments[name].dtype == np.float32:
            found[name] = gradient.asnumpy()
    return found | case.under_their_names(cell, by_parameter)


def check(case, expected):
    found = outputs_and_gradients(case, expected["out"].shape)
    assert set(found) == set(expected)
    np.testing.assert_allclose(found.pop("out"), expected["out"], rtol=0, atol=1e-5)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("path", "case", "expected"),
    on("fused", chain(*(ALL[kind] for kind in IN_CPP)))
    + on("portable", chain(*(LESS_VARIED[kind] for kind in IN_CPP), *(ALL[kind] for kind in NOT_IN_CPP))),
    indirect=["path"],
)
def test_outputs_and_gradients_are_as_expected(path, case, expected):
    check(case, expected)


@in_a_graph
@pytest.mark.parametrize(
    ("path", "case", "expected"),
    on("fused", chain(*(FEW[kind] for kind in IN_CPP))) + on("portable", chain(*FEW.values()), [pytest.mark.slow]),
    indirect=["path"],
)
def test_outputs_and_gradients_are_as_expected_in_a_graph(mode, path, case, expected):
    check(case, expected)


@pytest.mark.parametrize(("case", "expected"), [*chain(*ALL.values())])
def test_the_reference_gives_what_is_expected(case, expected):
    out = case.by_reference(parameters(case.cell()))
    if out is not None:
        np.testing.assert_allclose(out, expected["out"], rtol=0, atol=1e-5)


# Arrays, which differ from case to case, and caches, which the original gets wrong: see decoding.
NO_OPTIONS = {"self", "q", "k", "v", "x", "freqs", "cache", "return_cache"}
NO_OPTIONS |= {"attn_mask"}  # which the original does not have
# What no model of the original has.
NO_OPTIONS_OF_MODELS = {"scale", "global_attn_layers", "embedding_skip"}
NO_OPTIONS_OF_MODELS |= {"max_ngram", "ngram_buckets", "ngram_dim", "ngram_rows"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_and_argument_has_at_least_two_values(kind):
    cases = [case for case, _ in FAST[kind]]
    excluded = NO_OPTIONS | (NO_OPTIONS_OF_MODELS if kind == "LocalTransformer" else set())
    for function, given in ((KINDS[kind].public.__init__, "options"), (KINDS[kind].called, "call")):
        for name, parameter in signature(function).parameters.items():
            if name not in excluded and parameter.kind is not parameter.VAR_KEYWORD:
                values = {json.dumps(getattr(case, given).get(name)) for case in cases}
                assert len(values) >= 2, f"{kind}: {name}"


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.npz")) < 5e6


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_cases_have_every_value_that_any_case_has(kind):
    of_fast, of_all = (set().union(*(values(case) for case, _ in loaded[kind])) for loaded in (FAST, LOADED))
    assert of_fast == of_all
