"""The options of the library, each declared once: name, type, range, default and one line of help.

From here come the arguments of the constructors and their checks (:func:`accepts`), the keys of the application's
configs with their messages and ``--help``, the tables of docs/api.md, and what can be exported to PyTorch. Pydantic
does the checking. Imports nothing slow: command lines are checked before MindSpore is loaded.
"""

import dataclasses
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

P = ParamSpec("P")
Self = TypeVar("Self")
Options = TypeVar("Options")

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)
MAX_NGRAM_BUCKETS = 2**18
WHOLE_SEQUENCE = 2**30  # tokens of a window that is longer than any sequence


def Help(text: str) -> Any:
    """The line of help of an option, with its unit."""
    return Field(description=text)


class NotInOriginal(typing.NamedTuple):
    """Marks an option that ``LocalTransformer`` of the PyTorch package ``local-attention`` 1.11.2 does not have.

    ``problem`` says why a model with another value than the default cannot be exported; empty: it can.
    """

    problem: str = ""


# Where Pydantic found a problem in an option that takes a number, or a list of one per layer.
NUMBER, LIST = "a number", "a list"
NUMBER_OR_LIST = Discriminator(lambda value: LIST if isinstance(value, (list, tuple)) else NUMBER)

# What options mean, by type, range and help. Several constructors share most of them.

WindowSize = Annotated[StrictInt, Ge(1), Help("tokens per window")]
LookBackward = Annotated[StrictInt, Ge(0), Help("windows seen before a token's own")]
WindowSizes = Annotated[
    Annotated[WindowSize, Tag(NUMBER)] | Annotated[list[WindowSize], Tag(LIST)],
    NUMBER_OR_LIST,
    Help("tokens per window"),
]
LookBackwards = Annotated[
    Annotated[LookBackward, Tag(NUMBER)] | Annotated[list[LookBackward], Tag(LIST)],
    NUMBER_OR_LIST,
    Help("windows seen before a token's own"),
]
LookForward = Annotated[
    StrictInt | None,
    Ge(0),
    Help("windows seen after a token's own; with causal only 0; None: 0 with causal, else 1"),
]
Causal = Annotated[StrictBool, Help("a token sees no later one")]
ExactWindowSize = Annotated[
    StrictBool,
    Help("every token sees window_size * look_backward tokens back, wherever in its window it is"),
]
AttentionDropout = Annotated[StrictFloat, Ge(0), Lt(1), Help("fraction of the attention weights that training drops")]
FeedForwardDropout = Annotated[
    StrictFloat, Ge(0), Lt(1), Help("fraction of the feed-forward's inner layer that training drops")
]
FeedForwardMult = Annotated[
    StrictFloat,
    Ge(1),
    Help("int(dim * this * 2 / 3) is the inner size of the feed-forward, which is gated"),
]
SharedQK = Annotated[
    StrictBool,
    Help("keys are l2-normalised; a token attends to itself only if it can attend to nothing else"),
]
UseRotary = Annotated[StrictBool, NotInOriginal(), Help("rotary embeddings of queries and keys")]
UseXpos = Annotated[StrictBool, Help("xPos: scores of rotary embeddings decay with the distance")]
XposScaleBase = Annotated[
    StrictFloat | None, Gt(0), Help("distance over which the decay applies once; None: half a window")
]
Scale = Annotated[
    StrictFloat | None,
    Gt(0),
    NotInOriginal("the original has no model with another scale than the default"),
    Help("factor of the scores; None: channels per head ** -0.5"),
]
QKNorm = Annotated[StrictBool, Help("queries and keys are l2-normalised, times a learned scale per channel")]
QKScale = Annotated[StrictFloat, Gt(0), Help("factor of the scores with qk_rmsnorm")]
GateValues = Annotated[StrictBool, Help("a sigmoid gate for the output of each head and token")]
Dim = Annotated[StrictInt, Ge(1), Help("channels of the residual stream")]
DimHead = Annotated[StrictInt, Ge(1), Help("channels per head")]
Heads = Annotated[StrictInt, Ge(1), Help("attention heads per layer")]
Depth = Annotated[StrictInt, Ge(1), Help("layers")]
MaxSeqLen = Annotated[StrictInt, Ge(1), Help("longest sequence that learned absolute positions allow")]


@dataclass(config=CHECKED)
class LocalAttentionOptions:
    """Arguments of ``LocalAttention``, in their order."""

    window_size: WindowSize
    causal: Causal = False
    look_backward: LookBackward = 1
    look_forward: LookForward = None
    dropout: AttentionDropout = 0.0
    shared_qk: SharedQK = False
    rel_pos_emb_config: Annotated[Sequence[int] | None, Help("older form of dim: begins with it")] = None
    dim: Annotated[
        StrictInt | None,
        Ge(1),
        Help("channels per head, for rotary embeddings; None: no rotary embeddings"),
    ] = None
    autopad: Annotated[StrictBool, Help("take any length: pad to whole windows, and cut the padding off again")] = False
    exact_windowsize: ExactWindowSize = False
    scale: Scale = None
    use_rotary_pos_emb: UseRotary = True
    use_xpos: UseXpos = False
    xpos_scale_base: XposScaleBase = None

    def __post_init__(self) -> None:
        if self.causal and self.look_forward:
            raise ValueError(
                f"causal attention cannot look forward: expected look_forward = 0, got {self.look_forward}"
            )


@dataclass(kw_only=True, config=CHECKED)
class HeadsOptions:
    """Arguments that all cells with heads share."""

    dim: Dim
    heads: Heads = 8
    dim_head: DimHead = 64
    use_rotary_pos_emb: UseRotary = LocalAttentionOptions.use_rotary_pos_emb
    scale: Scale = LocalAttentionOptions.scale
    qk_rmsnorm: QKNorm = False
    qk_scale: QKScale = 8.0
    shared_qk: SharedQK = LocalAttentionOptions.shared_qk
    gate_values_per_head: GateValues = False


@dataclass(kw_only=True, config=CHECKED)
class WindowOptions:
    """Arguments about windows that ``LocalMHA`` and ``LocalTransformer`` share."""

    exact_windowsize: ExactWindowSize | None = None
    use_xpos: UseXpos = LocalAttentionOptions.use_xpos
    xpos_scale_base: XposScaleBase = LocalAttentionOptions.xpos_scale_base


@dataclass(kw_only=True, config=CHECKED)
class AttentionLayerOptions(HeadsOptions, ABC):
    """Arguments that ``LocalMHA`` and ``GlobalAttention`` share."""

    causal: Causal = False
    dropout: AttentionDropout = LocalAttentionOptions.dropout
    prenorm: Annotated[StrictBool, Help("LayerNorm before the projections")] = False

    def __post_init__(self) -> None:
        if self.qk_rmsnorm and self.scale is not None:
            raise ValueError(f"expected qk_scale instead of scale with qk_rmsnorm, got scale = {self.scale}")
        if self.use_rotary_pos_emb and self.dim_head % 2:
            raise ValueError(
                f"rotary embeddings need an even head size, got dim_head = {self.dim_head}: use an even one, or "
                "use_rotary_pos_emb = False"
            )
        self.attention()

    @abstractmethod
    def attention(self) -> LocalAttentionOptions:
        """Those of its ``LocalAttention``."""

    def attention_with(self, **options: Any) -> LocalAttentionOptions:
        """Those of its ``LocalAttention``, with some that are not its own."""
        scale = self.qk_scale if self.qk_rmsnorm else self.scale
        own = shared(self, LocalAttentionOptions) | dict(dim=self.dim_head, autopad=True, scale=scale)
        return LocalAttentionOptions(**own | options)


@dataclass(kw_only=True, config=CHECKED)
class LocalMHAOptions(WindowOptions, AttentionLayerOptions):  # dataclasses list the fields of the last base first
    """Arguments of ``LocalMHA``, all by name."""

    window_size: WindowSize
    look_backward: LookBackward = LocalAttentionOptions.look_backward
    look_forward: LookForward = LocalAttentionOptions.look_forward

    def attention(self) -> LocalAttentionOptions:
        exact_windowsize = True if self.exact_windowsize is None else self.exact_windowsize
        return self.attention_with(exact_windowsize=exact_windowsize)


@dataclass(kw_only=True, config=CHECKED)
class GlobalAttentionOptions(AttentionLayerOptions):
    """Arguments of ``GlobalAttention``, all by name."""

    def attention(self) -> LocalAttentionOptions:
        return self.attention_with(window_size=WHOLE_SEQUENCE, look_backward=0, look_forward=0)


@dataclass(config=CHECKED)
class FeedForwardOptions:
    """Arguments of ``FeedForward``."""

    dim: Dim
    mult: FeedForwardMult = 4.0
    dropout: FeedForwardDropout = 0.0


@dataclass(kw_only=True, config=CHECKED)
class SizeOptions:
    """The sizes of a ``LocalTransformer`` that must be given."""

    num_tokens: Annotated[StrictInt | None, Ge(1), Help("size of the vocabulary; None: no embedding and no logits")]
    max_seq_len: MaxSeqLen
    dim: Dim
    depth: Depth


@dataclass(kw_only=True, config=CHECKED)
class LanguageModelOptions(WindowOptions, HeadsOptions, SizeOptions):
    """Arguments of ``LocalTransformer`` for a causal language model without inserted cells: what a config can hold."""

    ff_mult: FeedForwardMult = FeedForwardOptions.mult
    num_residual_streams: Annotated[
        StrictInt, Ge(1), Help("above 1: hyper-connections between that many residual streams")
    ] = 1
    attn_dropout: AttentionDropout = LocalAttentionOptions.dropout
    ff_dropout: FeedForwardDropout = FeedForwardOptions.dropout
    local_attn_window_size: WindowSizes = 512
    look_backward: LookBackwards = LocalAttentionOptions.look_backward
    global_attn_layers: Annotated[
        list[Annotated[StrictInt, Ge(1)]] | None,
        NotInOriginal("the original has no global attention"),
        Help("the numbers of the layers, from 1, whose attention is global instead of local; None: none"),
    ] = None
    use_abs_pos_emb: Annotated[
        StrictBool,
        NotInOriginal(),
        Help("learned absolute positions; without them sequences can have any length"),
    ] = True
    use_dynamic_pos_bias: Annotated[
        StrictBool,
        Help("a bias that a small network computes from the distance, in place of rotary embeddings"),
    ] = False
    embedding_skip: Annotated[
        StrictBool,
        NotInOriginal("the original adds the embeddings before the first layer only"),
        Help("a layer begins with a·x + b·e instead of x: e are the embeddings, a and b learned numbers of the layer"),
    ] = False
    max_ngram: Annotated[
        StrictInt,
        Ge(1),
        NotInOriginal("the original has no embeddings of n-grams"),
        Help("above 1: embeddings of the n-grams of 2 to that many tokens are added to the token's"),
    ] = 1
    ngram_buckets: Annotated[
        StrictInt,
        Ge(2),
        Le(MAX_NGRAM_BUCKETS),
        NotInOriginal(),
        Help("hash buckets, each an embedding, per n-gram order; ideally a prime"),
    ] = 65521
    ngram_dim: Annotated[StrictInt, Ge(1), NotInOriginal(), Help("channels of an n-gram's embedding")] = 48

    def original_arguments(self) -> dict[str, Any]:
        """The arguments with which the original's ``LocalTransformer`` is this model.

        Raises:
            ValueError: for what the original cannot be.
        """
        marks = {f.name: mark_of(type(self), f.name) for f in dataclasses.fields(self)}
        for field in dataclasses.fields(self):
            mark, value = marks[field.name], getattr(self, field.name)
            if mark is not None and mark.problem and value != field.default:
                raise ValueError(f"{field.name}={value}: {mark.problem}")
        if not self.use_rotary_pos_emb and not self.use_dynamic_pos_bias:
            raise ValueError(
                "use_rotary_pos_emb=False: the original has no model without rotary embeddings but one with "
                "use_dynamic_pos_bias=True"
            )
        numbers = {}
        for name in ("local_attn_window_size", "look_backward"):
            numbers[name], *others = self.per_layer(name)
            if others != [numbers[name]] * len(others):
                raise ValueError(f"{name}={getattr(self, name)}: in the original, it is the same in all layers")
        if self.use_dynamic_pos_bias and numbers["look_backward"] != 1:
            raise ValueError(
                f"look_backward={self.look_backward} with use_dynamic_pos_bias=True: the original's bias is for one "
                "window back and no other number"
            )
        return {name: getattr(self, name) for name, mark in marks.items() if mark is None} | numbers

    def is_global(self, number: int) -> bool:
        """Whether the attention of a layer, by its number from 1, is global."""
        return number in (self.global_attn_layers or [])

    def per_layer(self, name: str) -> list[int]:
        """The values that an option has in each layer, of one that takes a number or a list of them.

        Raises:
            ValueError: for a list of another length than ``depth``.
        """
        value = getattr(self, name)
        if not isinstance(value, list):
            return [value] * self.depth
        if len(value) != self.depth:
            raise ValueError(
                f"expected {name} to be a number, or a list of depth = {self.depth} numbers, got {len(value)}: {value}"
            )
        return value


@dataclass(kw_only=True, config=CHECKED)
class LocalTransformerOptions(LanguageModelOptions):
    """Arguments of ``LocalTransformer``, all by name."""

    causal: Causal = True
    look_forward: LookForward = LocalAttentionOptions.look_forward
    ignore_index: Annotated[int, Help("labels of this value do not count in the loss")] = -1
    global_attn_layer: Annotated[Any, Help("a cell of which a copy goes before the local attention of layers")] = None
    layers_insert_global_attn: Annotated[
        Sequence[int] | None, Help("the numbers of these layers, from 1; None: all of them")
    ] = None

    def __post_init__(self) -> None:
        if self.num_tokens is None and self.max_ngram > 1:
            raise ValueError(f"expected num_tokens with max_ngram = {self.max_ngram}, got None")
        if self.layers_insert_global_attn is not None:
            layers = tuple(self.layers_insert_global_attn)
            if layers and self.global_attn_layer is None:
                raise ValueError(f"expected a global_attn_layer to insert before the layers {layers}, got none")
            if not all(1 <= layer <= self.depth for layer in layers):
                raise ValueError(f"expected layers_insert_global_attn from 1 to depth = {self.depth}, got {layers}")
        of_global = self.global_attn_layers or []
        if len(set(of_global)) < len(of_global) or not all(layer <= self.depth for layer in of_global):
            raise ValueError(f"expected global_attn_layers from 1 to depth = {self.depth}, each once, got {of_global}")
        for name in ("use_xpos", "use_dynamic_pos_bias"):
            if of_global and getattr(self, name):
                raise ValueError(f"expected {name}=False, which is for windows, with global_attn_layers = {of_global}")
        for number in range(1, self.depth + 1):
            self.mha(number)

    def global_attention(self) -> GlobalAttentionOptions:
        """Those of the ``GlobalAttention`` of the layers whose attention is global."""
        return GlobalAttentionOptions(
            **shared(self, GlobalAttentionOptions) | dict(dropout=self.attn_dropout, prenorm=True)
        )

    def mha(self, number: int) -> LocalMHAOptions:
        """Those of the ``LocalMHA`` of a layer, by its number from 1."""
        return LocalMHAOptions(
            **shared(self, LocalMHAOptions)
            | dict(
                window_size=self.per_layer("local_attn_window_size")[number - 1],
                look_backward=self.per_layer("look_backward")[number - 1],
                dropout=self.attn_dropout,
                prenorm=True,
                use_rotary_pos_emb=self.use_rotary_pos_emb and not self.use_dynamic_pos_bias,
            )
        )


def shared(options: Any, schema: type) -> dict[str, Any]:
    """The values of those ``options`` that the dataclass ``schema`` has, too."""
    names = [field.name for field in dataclasses.fields(schema) if hasattr(options, field.name)]
    return {name: getattr(options, name) for name in names}


def mark_of(schema: type, name: str) -> NotInOriginal | None:
    """The :class:`NotInOriginal` of an option, if it has one."""
    metadata = getattr(typing.get_type_hints(schema, include_extras=True)[name], "__metadata__", ())
    return next((mark for mark in metadata if isinstance(mark, NotInOriginal)), None)


def accepts(
    options: Callable[P, Options],
) -> Callable[[Callable[[Self, Options], None]], Callable[Concatenate[Self, P], None]]:
    """Decorate ``__init__(self, options)`` so that it takes the fields of the dataclass ``options`` as arguments.

    The constructor raises ``TypeError`` for an unknown or missing argument, ``ValueError`` for one that is not allowed.
    """
    adapter = TypeAdapter(typing.cast(type[Options], options))
    hints = typing.get_type_hints(options)
    arguments = [p.replace(annotation=hints[p.name]) for p in inspect.signature(options).parameters.values()]

    def decorate(init: Callable[[Self, Options], None]) -> Callable[Concatenate[Self, P], None]:
        own, *_ = inspect.signature(init).parameters.values()
        signature = inspect.Signature([own.replace(annotation=own.empty), *arguments], return_annotation=None)

        @wraps(init)
        def __init__(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> None:
            given = signature.bind(self, *args, **kwargs).arguments
            values = {name: python_number(value) for name, value in given.items() if name != own.name}
            try:
                checked = adapter.validate_python(values)
            except ValidationError as error:
                name, expected, value = first_problem(error)
                raise ValueError(f"expected {name} {expected}, got {value!r}" if name else expected) from None
            init(self, checked)

        vars(__init__)["__signature__"] = signature  # which inspect.signature and help() show
        return __init__

    return decorate


def python_number(value: Any) -> Any:
    """A NumPy number as Python's; anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


KINDS = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "string_type": "text"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def first_problem(error: ValidationError) -> tuple[str, str, Any]:
    """The dotted name of the first wrong value, what was expected, and the value.

    For values that do not go together, the name is that of their group, and what was expected is the whole message.
    """
    problem = error.errors()[0]
    path = [part for part in problem["loc"] if isinstance(part, str) and part not in (NUMBER, LIST)]
    name, context = ".".join(path), problem.get("ctx", {})
    if isinstance(context.get("error"), ValidationError):  # of options that are derived from these
        return first_problem(context["error"])
    if "error" in context:
        return "", str(context["error"]), problem["input"]
    bounds = [f"{SIGNS[key]} {limit:g}" for key, limit in context.items() if key in SIGNS]
    expected = KINDS.get(problem["type"]) or problem["msg"].removeprefix("Input should be ")
    return name, bounds[0] if bounds else expected, problem["input"]
