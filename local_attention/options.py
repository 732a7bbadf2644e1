"""The options of the library, each declared once: name, type, range, default and one line of help.

The arguments of the constructors and their checks (:func:`accepts`), the keys of the application's configs with their
messages and ``--help``, the tables of the documentation (:func:`markdown_table`), and what can be exported to PyTorch
come from here. Imports nothing slow: command lines are checked before MindSpore is loaded.
"""

import dataclasses
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from functools import wraps
from numbers import Integral, Real
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar

from annotated_types import Ge, Gt, Le, Lt

P = ParamSpec("P")
Self = TypeVar("Self")
Options = TypeVar("Options")

MAX_NGRAM_BUCKETS = 2**18


@dataclass(frozen=True)
class Help:
    """One line that says what an option means, with its unit; and what None stands for, where None is allowed."""

    text: str = ""
    none: str = ""


@dataclass(frozen=True)
class InOriginal:
    """Whether the ``LocalTransformer`` of the PyTorch package ``local-attention`` 1.11.2 takes an option, as most.

    Args:
        problem: why a model with another value than the default cannot be exported; empty: it can.
    """

    has_it: bool = True
    problem: str = ""


# What options mean, by type, range and help. Several constructors share most of them.

WindowSize = Annotated[int, Ge(1), Help("tokens per window")]
LookBackward = Annotated[int, Ge(0), Help("windows seen before a token's own")]
LookForward = Annotated[
    int | None, Ge(0), Help("windows seen after a token's own; with causal only 0", none="0 with causal, else 1")
]
Causal = Annotated[bool, Help("a token sees no later one")]
ExactWindowSize = Annotated[
    bool, Help("every token sees window_size * look_backward tokens back, wherever in its window it is", none="true")
]
AttentionDropout = Annotated[float, Ge(0), Lt(1), Help("fraction of the attention weights that training drops")]
FeedForwardDropout = Annotated[
    float, Ge(0), Lt(1), Help("fraction of the feed-forward's inner layer that training drops")
]
SharedQK = Annotated[
    bool, Help("keys are l2-normalised; a token attends to itself only if it can attend to nothing else")
]
UseRotary = Annotated[bool, InOriginal(False), Help("rotary embeddings of queries and keys")]
UseXpos = Annotated[bool, Help("xPos: scores of rotary embeddings decay with the distance")]
XposScaleBase = Annotated[
    float | None, Gt(0), Help("tokens over which the decay reaches its rate", none="half a window")
]
Scale = Annotated[
    float | None,
    Gt(0),
    InOriginal(False, "the original has no model with another scale than the default"),
    Help("factor of the scores", none="channels per head ** -0.5"),
]
QKNorm = Annotated[bool, Help("queries and keys are l2-normalised, times a learned scale per channel")]
QKScale = Annotated[float, Gt(0), Help("factor of the scores with qk_rmsnorm")]
GateValues = Annotated[bool, Help("a sigmoid gate for the output of each head and token")]
Dim = Annotated[int, Ge(1), Help("channels of the residual stream")]
DimHead = Annotated[int, Ge(1), Help("channels per head")]
Heads = Annotated[int, Ge(1), Help("attention heads per layer")]
Depth = Annotated[int, Ge(1), Help("layers")]
MaxSeqLen = Annotated[int, Ge(1), Help("longest sequence that learned absolute positions allow")]


@dataclass
class LocalAttentionOptions:
    """Arguments of ``LocalAttention``, in their order."""

    window_size: WindowSize
    causal: Causal = False
    look_backward: LookBackward = 1
    look_forward: LookForward = None
    dropout: AttentionDropout = 0.0
    shared_qk: SharedQK = False
    rel_pos_emb_config: Annotated[Sequence[int] | None, Help("older form of dim: begins with it")] = None
    dim: Annotated[int | None, Ge(1), Help("channels per head, for rotary embeddings", none="no rotary embeddings")] = (
        None
    )
    autopad: Annotated[bool, Help("take any length: pad to whole windows, and cut the padding off again")] = False
    exact_windowsize: ExactWindowSize = False
    scale: Scale = None
    use_rotary_pos_emb: UseRotary = True
    use_xpos: UseXpos = False
    xpos_scale_base: XposScaleBase = None

    def __post_init__(self) -> None:
        check(self)
        if self.causal and self.look_forward:
            raise ValueError(
                f"causal attention cannot look forward: expected look_forward = 0, got {self.look_forward}"
            )


@dataclass(kw_only=True)
class HeadsOptions:
    """Arguments that ``LocalMHA`` and ``LocalTransformer`` share."""

    dim: Dim
    heads: Heads = 8
    dim_head: DimHead = 64
    look_backward: LookBackward = LocalAttentionOptions.look_backward
    exact_windowsize: ExactWindowSize | None = None
    use_rotary_pos_emb: UseRotary = LocalAttentionOptions.use_rotary_pos_emb
    use_xpos: UseXpos = LocalAttentionOptions.use_xpos
    xpos_scale_base: XposScaleBase = LocalAttentionOptions.xpos_scale_base
    scale: Scale = LocalAttentionOptions.scale
    qk_rmsnorm: QKNorm = False
    qk_scale: QKScale = 8.0
    shared_qk: SharedQK = LocalAttentionOptions.shared_qk
    gate_values_per_head: GateValues = False


@dataclass(kw_only=True)
class LocalMHAOptions(HeadsOptions):
    """Arguments of ``LocalMHA``, all by name."""

    window_size: WindowSize
    causal: Causal = False
    look_forward: LookForward = LocalAttentionOptions.look_forward
    dropout: AttentionDropout = LocalAttentionOptions.dropout
    prenorm: Annotated[bool, Help("LayerNorm before the projections")] = False

    def __post_init__(self) -> None:
        check(self)
        if self.qk_rmsnorm and self.scale is not None:
            raise ValueError(f"expected qk_scale instead of scale with qk_rmsnorm, got scale = {self.scale}")
        if self.use_rotary_pos_emb and self.dim_head % 2:
            raise ValueError(
                f"rotary embeddings need an even head size, got dim_head = {self.dim_head}: use an even one, or "
                "use_rotary_pos_emb = False"
            )
        self.attention()

    def attention(self) -> LocalAttentionOptions:
        """Those of its ``LocalAttention``."""
        return LocalAttentionOptions(
            **shared(self, LocalAttentionOptions)
            | dict(
                dim=self.dim_head,
                autopad=True,
                exact_windowsize=True if self.exact_windowsize is None else self.exact_windowsize,
                scale=self.qk_scale if self.qk_rmsnorm else self.scale,
            )
        )


@dataclass(kw_only=True)
class SizeOptions:
    """The sizes of a ``LocalTransformer`` that must be given."""

    num_tokens: Annotated[int | None, Ge(1), Help("size of the vocabulary", none="no embedding and no logits")]
    max_seq_len: MaxSeqLen
    dim: Dim
    depth: Depth


@dataclass(kw_only=True)
class LanguageModelOptions(HeadsOptions, SizeOptions):  # in the other order, as dataclasses have it
    """Arguments of ``LocalTransformer`` for a causal language model without inserted cells: what a config can hold."""

    ff_mult: Annotated[
        float, Ge(1), Help("inner size of the feed-forward relative to dim; two thirds of it, as it is gated")
    ] = 4.0
    num_residual_streams: Annotated[
        int, Ge(1), Help("above 1: hyper-connections between that many residual streams")
    ] = 1
    attn_dropout: AttentionDropout = 0.0
    ff_dropout: FeedForwardDropout = 0.0
    local_attn_window_size: WindowSize = 512
    use_abs_pos_emb: Annotated[
        bool, InOriginal(False), Help("learned absolute positions; without them sequences can have any length")
    ] = True
    use_dynamic_pos_bias: Annotated[
        bool, Help("a bias that a small network computes from the distance, in place of rotary embeddings")
    ] = False
    max_ngram: Annotated[
        int,
        Ge(1),
        InOriginal(False, "the original has no embeddings of n-grams"),
        Help("above 1: embeddings of the n-grams of 2 to that many tokens are added to the token's"),
    ] = 1
    ngram_buckets: Annotated[
        int,
        Ge(2),
        Le(MAX_NGRAM_BUCKETS),
        InOriginal(False),
        Help("hash buckets, each an embedding, per n-gram order; at best a prime"),
    ] = 65521
    ngram_dim: Annotated[int, Ge(1), InOriginal(False), Help("channels of an n-gram's embedding")] = 48

    def original_arguments(self) -> dict[str, Any]:
        """The arguments with which the original's ``LocalTransformer`` is this model.

        Raises:
            ValueError: for what the original cannot be.
        """
        declared = options_of(type(self))
        for name, option in declared.items():
            if option.in_original.problem and getattr(self, name) != option.default:
                raise ValueError(f"{name}={getattr(self, name)}: {option.in_original.problem}")
        if not self.use_rotary_pos_emb and not self.use_dynamic_pos_bias:
            raise ValueError(
                "use_rotary_pos_emb=False: the original has no model without rotary embeddings but one with "
                "use_dynamic_pos_bias=True"
            )
        if self.use_dynamic_pos_bias and self.look_backward != 1:
            raise ValueError(
                f"look_backward={self.look_backward} with use_dynamic_pos_bias=True: the original's bias is for one "
                "window back and no other number"
            )
        return {name: getattr(self, name) for name, option in declared.items() if option.in_original.has_it}


@dataclass(kw_only=True)
class LocalTransformerOptions(LanguageModelOptions):
    """Arguments of ``LocalTransformer``, all by name."""

    causal: Causal = True
    look_forward: LookForward = LocalAttentionOptions.look_forward
    ignore_index: Annotated[int, Help("labels of this value do not count in the loss")] = -1
    global_attn_layer: Annotated[Any, Help("a cell of which a copy goes before the local attention of layers")] = None
    layers_insert_global_attn: Annotated[
        Sequence[int] | None, Help("the numbers of these layers, from 1", none="all of them")
    ] = None

    def __post_init__(self) -> None:
        check(self)
        if self.num_tokens is None and self.max_ngram > 1:
            raise ValueError(f"expected num_tokens with max_ngram = {self.max_ngram}, got None")
        if self.layers_insert_global_attn is not None:
            layers = tuple(self.layers_insert_global_attn)
            if layers and self.global_attn_layer is None:
                raise ValueError(f"expected a global_attn_layer to insert before the layers {layers}, got none")
            if not all(1 <= layer <= self.depth for layer in layers):
                raise ValueError(f"expected layers_insert_global_attn from 1 to depth = {self.depth}, got {layers}")
        self.mha()

    def mha(self) -> LocalMHAOptions:
        """Those of the ``LocalMHA`` of each layer."""
        return LocalMHAOptions(
            **shared(self, LocalMHAOptions)
            | dict(
                window_size=self.local_attn_window_size,
                dropout=self.attn_dropout,
                prenorm=True,
                use_rotary_pos_emb=self.use_rotary_pos_emb and not self.use_dynamic_pos_bias,
            )
        )


def shared(options: Any, schema: type) -> dict[str, Any]:
    """The values of those ``options`` that the dataclass ``schema`` has, too."""
    return {
        field.name: getattr(options, field.name) for field in dataclasses.fields(schema) if hasattr(options, field.name)
    }


def accepts(
    options: Callable[P, Options],
) -> Callable[[Callable[[Self, Options], None]], Callable[Concatenate[Self, P], None]]:
    """Decorate ``__init__(self, options)`` so that it takes the fields of the dataclass ``options`` as arguments.

    The constructor raises ``TypeError`` for an unknown or missing argument, ``ValueError`` for one that is not allowed.
    """
    hints = typing.get_type_hints(options)
    arguments = [p.replace(annotation=hints[p.name]) for p in inspect.signature(options).parameters.values()]
    if all(argument.kind is argument.KEYWORD_ONLY for argument in arguments):
        arguments.sort(key=lambda argument: argument.default is not argument.empty)  # those that must be given first

    def decorate(init: Callable[[Self, Options], None]) -> Callable[Concatenate[Self, P], None]:
        @wraps(init)
        def __init__(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, options(*args, **kwargs))

        own, *_ = inspect.signature(init).parameters.values()
        signature = inspect.Signature([own.replace(annotation=own.empty), *arguments], return_annotation=None)
        __init__.__signature__ = signature  # type: ignore[attr-defined]
        return __init__

    return decorate


# Reading the declarations.

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {Ge: (">=", "ge", operator.ge), Gt: (">", "gt", operator.gt), Le: ("<=", "le", operator.le)}
BOUNDS |= {Lt: ("<", "lt", operator.lt)}


@dataclass(frozen=True)
class Option:
    """The declaration of an option.

    Args:
        kinds: of the values that are allowed: ``int``, ``float``, ``bool``, ``str``, ``NoneType``; a text that is
            allowed itself. A value of any other kind is not checked.
        metadata: what else the ``Annotated`` type holds: bounds, :class:`Help`, :class:`InOriginal`.
        default: ``dataclasses.MISSING`` where a value must be given.
    """

    name: str
    kinds: tuple[Any, ...]
    metadata: tuple[Any, ...]
    default: Any

    @property
    def optional(self) -> bool:
        return type(None) in self.kinds

    @property
    def bounds(self) -> str:
        """Such as ``">= 0 and < 1"``; empty where there are none."""
        return " and ".join(f"{sign} {limit}" for sign, limit, _ in self._bounds())

    @property
    def names(self) -> str:
        """The texts that are allowed, such as ``"adam, adamw, muon"``; empty where there are no particular ones."""
        return ", ".join(kind for kind in self.kinds if isinstance(kind, str))

    @property
    def in_original(self) -> InOriginal:
        return next((mark for mark in self.metadata if isinstance(mark, InOriginal)), InOriginal())

    def help(self, none: str = "None") -> str:
        """The line of help; ``none`` is how None is written there."""
        marks = [mark for mark in self.metadata if isinstance(mark, Help)]
        text, meaning = "; ".join(filter(None, (mark.text for mark in marks))), "".join(mark.none for mark in marks)
        return f"{text}; {none}: {meaning}" if meaning and self.optional else text

    def expected(self, none: str = "None") -> str:
        """What a value may be, such as ``"a number >= 0 and < 1, or None"``; empty for what is not checked."""
        kinds = [KINDS[kind] for kind in self.kinds if kind in KINDS] + [f"one of {self.names}"] * bool(self.names)
        what = " or ".join(kinds) + f" {self.bounds}" * bool(self.bounds)
        return f"{what}, or {none}" if what and self.optional else what

    def problem(self, value: Any) -> str:
        """What is wrong with a value: "type", "range" or nothing, "".

        NumPy's numbers are numbers; NaN and the infinities are in no range.
        """
        if not any(is_of_kind(value, kind) for kind in self.kinds):
            return "type"
        if not is_of_kind(value, float):
            return ""
        within = math.isfinite(value) and all(compare(value, limit) for _, limit, compare in self._bounds())
        return "" if within else "range"

    def _bounds(self) -> list[tuple[str, Any, Callable[[Any, Any], bool]]]:
        found = [(bound, *BOUNDS[type(bound)]) for bound in self.metadata if type(bound) in BOUNDS]
        return [(sign, getattr(bound, name), compare) for bound, sign, name, compare in found]


def is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of one of the kinds of an :class:`Option`."""
    if isinstance(kind, str):
        return isinstance(value, str) and value == kind
    a_bool = type(value).__name__ in ("bool", "bool_")  # the latter is NumPy's, which is not imported here
    if kind is bool or a_bool:
        return a_bool and kind in (bool, Any)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real)
    return isinstance(value, kind) if kind in (str, type(None)) else True


def options_of(schema: type) -> dict[str, Option]:
    """The declarations in a dataclass, by name; those without a default first."""
    hints = typing.get_type_hints(schema, include_extras=True)
    found = {}
    for field in dataclasses.fields(schema):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[field.name] = Option(field.name, *_unpack(hints[field.name]), default)
    return dict(sorted(found.items(), key=lambda item: item[1].default is not MISSING))


def _unpack(annotation: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The kinds and the metadata of an annotation."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        kinds, metadata = _unpack(parts[0])
        return kinds, metadata + parts[1:]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        unpacked = [_unpack(part) for part in parts]
        return sum((kinds for kinds, _ in unpacked), ()), sum((metadata for _, metadata in unpacked), ())
    return (parts if typing.get_origin(annotation) is Literal else (annotation,)), ()


def check(options: Any) -> None:
    """Raise ``ValueError`` for the first option of a dataclass with a value of another type or outside its range."""
    for name, option in options_of(type(options)).items():
        value = getattr(options, name)
        problem = option.problem(value)
        if problem == "type":
            raise ValueError(f"expected {name} to be {option.expected()}, got {value!r}")
        if problem == "range":
            raise ValueError(f"expected {name} {option.bounds or 'to be finite'}, got {value}")


def markdown_table(schema: type) -> str:
    """The options of a dataclass as a table for the documentation: name, default, range and meaning."""
    rows = ["| option | default | value | meaning |", "| --- | --- | --- | --- |"]
    for name, option in options_of(schema).items():
        default = "" if option.default is MISSING else f"`{option.default!r}`"
        rows.append(f"| `{name}` | {default} | {option.expected()} | {option.help()} |")
    return "\n".join(rows) + "\n"
