"""The law of the backends: an option is computed, or the backend is not chosen; it is never ignored."""

import dataclasses
import inspect
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import pytest

from local_attention import LocalAttention, LocalMHA, kernels
from local_attention.backends import choose_backend, options_in_use
from local_attention.backends.blocked import BlockedAttention
from local_attention.backends.cached import CachedMHA
from local_attention.backends.cached_cpu import CachedMHAOperator, FeedForwardOperator, PrefillMHAOperator
from local_attention.backends.fused import FusedAttention
from local_attention.backends.fused_layers import FusedFeedForward
from local_attention.decoding import DecodingSession
from local_attention.layers import FeedForward
from local_attention.local_attention import SEQUENCE_BACKENDS
from local_attention.options import LocalAttentionOptions, LocalMHAOptions
from tests.local_attention import reference
from tests.local_attention.backends.decode import decode
from tests.local_attention.cells import needs_fused, randomise, run, tensor
from tests.local_attention.golden import attention_definition
from tests.local_attention.models import needs_kernels, sequences, transformer

# Of each option a value that is not the default, with what else it needs to matter.

BASE = {
    LocalAttentionOptions: dict(window_size=3, autopad=True),
    LocalMHAOptions: dict(dim=6, window_size=3, dim_head=4, heads=2, causal=True, prenorm=True),
}
EXAMPLES = {
    LocalAttentionOptions: {
        "window_size": dict(window_size=2),
        "causal": dict(causal=True),
        "look_backward": dict(look_backward=2),
        "look_forward": dict(look_forward=2),
        "dropout": dict(dropout=0.5),
        "shared_qk": dict(shared_qk=True),
        "rel_pos_emb_config": dict(rel_pos_emb_config=(4,)),
        "dim": dict(dim=4),
        "autopad": dict(autopad=True),
        "exact_windowsize": dict(exact_windowsize=True),
        "scale": dict(scale=0.2),
        "use_rotary_pos_emb": dict(use_rotary_pos_emb=False, dim=4),
        "use_xpos": dict(use_xpos=True, dim=4),
        "xpos_scale_base": dict(xpos_scale_base=3.0, use_xpos=True, dim=4),
    },
    LocalMHAOptions: {
        "dim": dict(dim=5),
        "window_size": dict(window_size=2),
        "heads": dict(heads=4, dim_head=2),
        "dim_head": dict(dim_head=2, heads=4),
        "look_backward": dict(look_backward=2),
        "exact_windowsize": dict(exact_windowsize=False),
        "use_rotary_pos_emb": dict(use_rotary_pos_emb=False),
        "use_xpos": dict(use_xpos=True),
        "xpos_scale_base": dict(xpos_scale_base=3.0, use_xpos=True),
        "scale": dict(scale=0.2),
        "qk_rmsnorm": dict(qk_rmsnorm=True),
        "qk_scale": dict(qk_scale=2.0, qk_rmsnorm=True),
        "shared_qk": dict(shared_qk=True),
        "gate_values_per_head": dict(gate_values_per_head=True),
        "causal": dict(causal=True),
        "look_forward": dict(look_forward=0),
        "dropout": dict(dropout=0.5),
        "prenorm": dict(prenorm=True),
    },
}
# What the definition finds in the shapes of its arrays; and what cannot change the output of a decode step.
NOT_IN_THE_NUMBERS = {"dim": "an axis of the inputs", "dim_head": "an axis of the parameters"}
WITHOUT_EFFECT_ON_DECODING = {"look_forward": "0 is what causal attention has anyway", "dropout": "training only"}

# By name: the backend, the options of the cells that it is for, and how it computes ``x``.
BACKENDS = {
    "fused": (FusedAttention, LocalAttentionOptions, None),
    "blocked": (BlockedAttention, LocalAttentionOptions, None),
    "cached, decoding": (CachedMHA, LocalMHAOptions, partial(decode, CachedMHA)),
    "cached, prefill": (CachedMHA, LocalMHAOptions, partial(decode, CachedMHA, count=4)),
    "cached_cpu, decoding": (CachedMHAOperator, LocalMHAOptions, partial(decode, CachedMHAOperator)),
    "cached_cpu, prefill": (PrefillMHAOperator, LocalMHAOptions, partial(decode, PrefillMHAOperator, count=4)),
}
CELLS = {LocalAttentionOptions: LocalAttention, LocalMHAOptions: LocalMHA}
PORTABLE = {LocalAttentionOptions: BlockedAttention, LocalMHAOptions: CachedMHA}
IN_CPP = {"fused": needs_fused, "cached_cpu, decoding": needs_kernels, "cached_cpu, prefill": needs_fused}
LENGTH = 8


def name_of(value):
    return value.__name__ if inspect.isclass(value) else None


def law(of_backends):
    """Every option of the cells of each of these backends."""
    cases = [
        pytest.param(backend, field.name, marks=IN_CPP.get(backend, ()))
        for backend in of_backends
        for field in fields(BACKENDS[backend][1])
    ]
    return pytest.mark.parametrize(("backend", "name"), cases)


def example(schema, name):
    """Options with a value for ``name`` other than the default, and the same without it."""
    if name not in EXAMPLES[schema]:
        pytest.fail(
            f"{schema.__name__} has a new option, {name}. Add it to `computes` of the backends that compute it "
            f"(one that does not is not chosen where the option is used), and here, to EXAMPLES, a value that changes "
            f"the output; tests/local_attention/reference.py says what the output should be."
        )
    used = BASE[schema] | EXAMPLES[schema][name]
    default = {field.name: field.default for field in fields(schema)}[name]
    assert used[name] != default, f"{name} = {default} is the default: expected another value in the example"
    without = {key: value for key, value in used.items() if key != name}
    if name in BASE[schema] and BASE[schema][name] != used[name]:
        without[name] = BASE[schema][name]
    return used, without


def defined(schema, options, *inputs, p=None):
    """What the definition gives in float64."""
    options = schema(**options)
    if schema is LocalAttentionOptions:
        return reference.attention(*inputs, **attention_definition(vars(options)))
    own = {name: getattr(options, name) for name in ("heads", "prenorm", "qk_rmsnorm", "gate_values_per_head")}
    rule = attention_definition(vars(options.attention()))
    return reference.mha(*inputs, p, **own, qk_scale=options.qk_scale, **rule)


def arrays(schema, options, rng):
    """Random inputs of a cell, in the order of its arguments."""
    if schema is LocalAttentionOptions:
        return rng.standard_normal((3, 2, LENGTH, 4))
    return rng.standard_normal((1, 2, LENGTH, options["dim"]))


@law(BACKENDS)
def test_a_backend_computes_every_option_that_it_declares(backend, name, monkeypatch, rng):
    kind, schema, compute = BACKENDS[backend]
    if backend not in IN_CPP:
        monkeypatch.setattr(kernels, "library", lambda: None)
    used, _ = example(schema, name)
    cell = CELLS[schema](**used).set_train(False)
    p, inputs = randomise(cell), arrays(schema, used, rng)
    if name not in kind.computes:
        assert choose_backend([kind, PORTABLE[schema]], cell) is PORTABLE[schema] is not kind
        return
    assert options_in_use(cell.options) <= kind.computes and kind.is_available(cell)
    if compute is None:
        assert isinstance(cell.attend, kind)
    out = run(cell, *inputs) if compute is None else compute(cell, *inputs)
    np.testing.assert_allclose(out, defined(schema, used, *inputs, p=p), atol=1e-5)


@pytest.mark.parametrize(("schema", "name"), [(s, f.name) for s in EXAMPLES for f in fields(s)], ids=name_of)
def test_each_example_differs_from_the_output_without_the_option(schema, name, rng):
    """So that a backend that ignores the option fails the test above."""
    used, without = example(schema, name)
    cell = CELLS[schema](**used)
    p, inputs = randomise(cell), arrays(schema, used, rng)
    if name == "autopad":
        with pytest.raises(ValueError, match="set autopad"):
            run(CELLS[schema](**without), *inputs)
    elif name == "dropout" and schema is LocalAttentionOptions:
        in_training, in_evaluation = (run(cell.set_train(mode), *inputs) for mode in (True, False))
        assert abs(in_training - in_evaluation).max() > 1e-3
    elif schema is LocalMHAOptions and name in NOT_IN_THE_NUMBERS:
        shapes = [{p.name: p.shape for p in LocalMHA(**options).get_parameters()} for options in (used, without)]
        assert shapes[0] != shapes[1]
    elif not (schema is LocalMHAOptions and name in WITHOUT_EFFECT_ON_DECODING):
        difference = defined(schema, used, *inputs, p=p) - defined(schema, without, *inputs, p=p)
        assert abs(difference).max() > 1e-3


def test_there_are_no_examples_of_options_that_do_not_exist():
    for schema, examples in EXAMPLES.items():
        assert examples.keys() <= {field.name for field in fields(schema)}
    assert NOT_IN_THE_NUMBERS.keys() | WITHOUT_EFFECT_ON_DECODING.keys() <= EXAMPLES[LocalMHAOptions].keys()


def test_backends_declare_no_options_that_do_not_exist():
    for kind, schema, _ in BACKENDS.values():
        assert kind.computes <= {field.name for field in fields(schema)}, kind


# Options to come: what a kernel does not know is never decoded by it.


@dataclass(kw_only=True)
class WithSinks(LocalMHAOptions):
    """The options of LocalMHA, and one more."""

    sinks: int = 0


@dataclass(kw_only=True)
class AttentionWithSinks(LocalAttentionOptions):
    sinks: int = 0


def model_with_sinks(sinks):
    """A model whose attention has an option that no backend knows."""
    model = transformer()
    attention = model.layers[0].attention
    attention.options = WithSinks(**vars(attention.options), sinks=sinks)
    return model


def test_an_option_that_no_backend_computes_is_refused_by_name():
    assert DecodingSession(model_with_sinks(0)).feed(sequences(1, 2)).shape == (1, 2, 11)
    with pytest.raises(ValueError, match=r"LocalMHA: none of .*CachedMHA computes sinks"):
        DecodingSession(model_with_sinks(3)).feed(sequences(1, 2))
    cell = LocalAttention(3)
    cell.options = AttentionWithSinks(**vars(cell.options), sinks=2)
    with pytest.raises(ValueError, match="LocalAttention: none of FusedAttention, BlockedAttention computes sinks"):
        choose_backend(SEQUENCE_BACKENDS, cell)


def test_a_new_option_without_an_example_fails_the_law_with_a_message(monkeypatch, rng):
    monkeypatch.setitem(BASE, WithSinks, BASE[LocalMHAOptions])
    monkeypatch.setitem(EXAMPLES, WithSinks, EXAMPLES[LocalMHAOptions])
    monkeypatch.setitem(BACKENDS, "cached, decoding", (CachedMHA, WithSinks, partial(decode, CachedMHA)))
    with pytest.raises(pytest.fail.Exception, match=r"WithSinks has a new option, sinks\. Add it to `computes`"):
        test_a_backend_computes_every_option_that_it_declares("cached, decoding", "sinks", monkeypatch, rng)


@needs_kernels
def test_an_option_that_only_the_portable_backend_computes_is_decoded_by_it(monkeypatch):
    monkeypatch.setattr(CachedMHA, "computes", CachedMHA.computes | {"sinks"})
    for sinks, chosen in [(0, CachedMHAOperator), (3, CachedMHA)]:
        session = DecodingSession(model_with_sinks(sinks))
        session.feed(sequences(1, 2))
        assert type(session.graphs[1].step.layers[0].attention) is chosen


@needs_kernels
@pytest.mark.parametrize("name", sorted(CachedMHAOperator.computes - {"look_forward"}))
def test_the_kernels_are_not_chosen_for_an_option_that_they_stop_declaring(name, monkeypatch):
    options = BASE[LocalMHAOptions] | EXAMPLES[LocalMHAOptions][name]
    backends, mha = [CachedMHAOperator, CachedMHA], LocalMHA(**options)
    assert choose_backend(backends, mha) is CachedMHAOperator
    monkeypatch.setattr(CachedMHAOperator, "computes", CachedMHAOperator.computes - {name})
    assert choose_backend(backends, mha) is CachedMHA


@needs_fused
@pytest.mark.parametrize("name", sorted(FusedAttention.computes))
def test_fused_attention_is_not_chosen_for_an_option_that_it_stops_declaring(name, monkeypatch):
    options = BASE[LocalAttentionOptions] | EXAMPLES[LocalAttentionOptions][name]
    assert isinstance(LocalAttention(**options).attend, FusedAttention)
    monkeypatch.setattr(FusedAttention, "computes", FusedAttention.computes - {name})
    assert isinstance(LocalAttention(**options).attend, BlockedAttention)


@needs_kernels
def test_the_operator_of_the_feed_forward_is_not_chosen_for_what_it_does_not_declare(monkeypatch):
    monkeypatch.setattr(FeedForwardOperator, "computes", FeedForwardOperator.computes - {"mult"})
    model, x = transformer(), sequences(1, 2)
    session = DecodingSession(model)
    np.testing.assert_allclose(session.feed(x), run(model, x), atol=1e-4)
    (layer,) = session.graphs[1].step.layers
    assert (type(layer.attention), type(layer.feed_forward)) == (CachedMHAOperator, FeedForward)


# The choice


class Fast:
    computes = frozenset({"rate"})

    @staticmethod
    def is_available(cell):
        return cell.fits


class Portable:
    computes = frozenset({"rate", "on"})

    @staticmethod
    def is_available(cell):
        return True


@dataclass
class Some:
    rate: float = 0.0
    on: bool = False
    other: int = 0


class Cell:
    def __init__(self, fits=True, **options):
        self.options, self.fits = Some(**options), fits


@pytest.mark.parametrize(
    ("cell", "chosen"),
    [
        (Cell(), Fast),
        (Cell(rate=0.5), Fast),
        (Cell(on=True), Portable),
        (Cell(rate=0.5, on=True), Portable),
        (Cell(fits=False), Portable),
    ],
)
def test_the_first_backend_that_computes_all_options_and_is_available_is_chosen(cell, chosen):
    assert choose_backend([Fast, Portable], cell) is chosen


def test_a_refusal_names_what_no_backend_computes():
    with pytest.raises(ValueError, match=r"Cell: none of Fast, Portable computes other$"):
        choose_backend([Fast, Portable], Cell(on=True, other=1))
    with pytest.raises(ValueError, match=r"Cell: none of Fast computes on, other$"):
        choose_backend([Fast], Cell(on=True, other=1))


def test_options_are_in_use_unless_they_have_their_default_values():
    @dataclass
    class Required(Some):
        size: int = dataclasses.field(kw_only=True)

    assert options_in_use(Required(size=1)) == {"size"}
    assert options_in_use(Required(size=1, rate=0.5, on=False)) == {"size", "rate"}
    assert options_in_use(Required(size=1, on=True, other=3)) == {"size", "on", "other"}


# The feed-forward, whose operators are chosen like those of attention

FEED_FORWARDS = {"dim": dict(dim=5), "mult": dict(mult=3), "dropout": dict(dropout=0.5)}
every_option_of_the_feed_forward = pytest.mark.parametrize("name", list(inspect.signature(FeedForward).parameters))


def feed_forward(name):
    """A FeedForward with a value for an option other than the default, and its parameters."""
    cell = FeedForward(**dict(dim=6, mult=2) | FEED_FORWARDS[name]).set_train(False)
    return cell, randomise(cell)


@needs_kernels
@every_option_of_the_feed_forward
def test_the_operator_of_the_feed_forward_computes_all_its_options(name, rng):
    assert name in FeedForwardOperator.computes, f"FeedForward has a new option, {name}, that kernels.cpp does not know"
    cell, p = feed_forward(name)
    x = rng.standard_normal((3, 1, cell.to_out.weight.shape[0]))
    np.testing.assert_allclose(
        FeedForwardOperator(cell)(tensor(x)).asnumpy()[:, 0], reference.feed_forward(x[:, 0], p), atol=1e-5
    )


@needs_fused
@every_option_of_the_feed_forward
def test_the_fused_feed_forward_computes_the_options_that_it_declares_and_is_not_chosen_for_others(
    name, monkeypatch, rng
):
    cell, p = feed_forward(name)
    assert (cell.fused is not None) == (name in FusedFeedForward.computes)
    x = rng.standard_normal((3, cell.to_out.weight.shape[0]))
    np.testing.assert_allclose(run(cell, x), reference.feed_forward(x, p), atol=1e-5)
    monkeypatch.setattr(FusedFeedForward, "computes", FusedFeedForward.computes - {name})
    assert feed_forward(name)[0].fused is None
