"""The KV cache: of each layer the keys and values that later tokens can still see."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from local_attention.decoding.interface import DecodableModel
from local_attention.local_attention import LocalAttention
from local_attention.masks import MaskSpec, to_additive_mask, visible
from local_attention.mindspore_quirks import assign_in_place
from local_attention.options import WHOLE_SEQUENCE
from local_attention.precision import numpy_type
from local_attention.rotary import rotary_angles, xpos_decay


def cache_length(attention: LocalAttention) -> int:
    """How many of the newest keys, its own included, a causal query may see."""
    window, back = attention.window_size, attention.look_backward
    return window * back + 1 if attention.exact_windowsize else window * (back + 1)


class StepInputs(NamedTuple):
    """What the attention of decode steps needs of positions: arrays with an axis of steps in front.

    Those without a type here are float64 for a model that computes in it, else float32.
    """

    slots: np.ndarray  # (b * heads * count,) int32, the rows of the cache that take the new keys and values
    mask: np.ndarray  # (1, count, span) additive, for the cache's keys; and for a count > 1 the new ones
    rotation: np.ndarray  # (4, b * heads * count, d): cosines and sines for queries (scaled) and for keys
    distances: np.ndarray  # (count * span,) int32, tokens from each key to each query, for the dynamic bias
    decay: np.ndarray  # (1, span, d), the xPos decay of the keys


class KVCache:
    """Keys and values of layers that see alike, each in Parameters ``keys[i]`` and ``values[i]``.

    In the type that the model computes in, of the shape ``(b * heads * (length + 1), d)``: a circular buffer of
    ``length`` slots per head, in which a token's slot is its position modulo ``length``. One more slot, which no query
    sees, takes what need not be kept. Keys are stored rotated, by their absolute positions (scores depend on the
    difference), but without the decay of xPos, which would leave float32's range.

    A cache of global attention has as many slots as the context may have tokens, see :meth:`grow`.

    Args:
        mhas: the attention of the layers, all of one :func:`kind_of`.
        batch: number of sequences.
        capacity: slots for global attention.
        name: what the names of the Parameters end with.
        dtype: the type that the model computes in.
    """

    def __init__(
        self, mhas: Sequence[Any], batch: int, capacity: int = 0, name: str = "", dtype: Any = ms.float32
    ) -> None:
        self.mhas, self.batch, self.attention, self.name = mhas, batch, mhas[0].attention, name
        self.dtype, self.number = dtype, numpy_type(dtype)  # the latter of what is computed for each step
        self.is_global = self.attention.window_size == WHOLE_SEQUENCE
        self.rows, self.d = batch * mhas[0].heads, mhas[0].dim_head
        self.length = capacity if self.is_global else cache_length(self.attention)
        self.keys, self.values = self.parameters("keys"), self.parameters("values")

    def parameters(self, what: str) -> ms.ParameterTuple:
        zeros = np.zeros((self.rows * (self.length + 1), self.d), np.float32)
        return ms.ParameterTuple(
            Parameter(Tensor(zeros, self.dtype), name=f"cached_{what}{self.name}.{i}", requires_grad=False)
            for i in range(len(self.mhas))
        )

    def grow(self, capacity: int) -> None:
        """Take new Parameters, with slots for ``capacity`` tokens, if this is a cache of global attention."""
        if self.is_global:
            held = [parameter.asnumpy() for parameter in (*self.keys, *self.values)]
            self.length = capacity
            self.keys, self.values = self.parameters("keys"), self.parameters("values")
            self.load(held)

    def load(self, held: Sequence[np.ndarray]) -> None:
        """Hold what another cache of the same layers held in its ``(*keys, *values)``, with at least as many slots."""
        for parameter, array in zip((*self.keys, *self.values), held):
            slots = np.zeros((self.rows, self.length + 1, self.d), array.dtype)
            array = array.reshape((self.rows, -1, self.d))[:, : self.length]
            slots[:, : array.shape[1]] = array
            assign_in_place(parameter, slots.reshape(parameter.shape))

    def step_inputs(self, position: int, steps: int, count: int, kept: int) -> StepInputs:
        """What ``steps`` steps of ``count`` tokens need, the first of which stands at ``position``.

        The first ``kept`` tokens of each step are kept in the cache; the others are padding. Computed in float64, so
        exact at any position.
        """
        attention, length, d = self.attention, self.length, self.d
        positions = position + np.arange(steps * count).reshape((steps, count))
        # one token is written before it is read, several are read beside the cache
        last = positions[:, -1:] if count == 1 else positions[:, :1] - 1
        cached = last - (last - np.arange(length)) % length  # the position that each slot holds
        spare = np.full((steps, 1), -1)
        keys = np.concatenate([cached, spare] if count == 1 else [cached, spare, positions], 1)
        distances = positions[:, :, None] - keys[:, None]
        spec = MaskSpec(*attention.mask_spec(attention.window_size))
        seen = visible(positions[:, :, None], keys[:, None], length=positions.max() + 1, **spec._asdict())
        mask = to_additive_mask(seen) + np.float32(attention.self_value) * (distances == 0)
        is_kept = (np.arange(count) < kept) & (np.arange(count) >= kept - length)
        slots = np.where(is_kept, positions % length, length)
        slots = np.arange(self.rows)[:, None] * (length + 1) + slots[:, None]

        angles, q_factor = np.zeros((steps, count, d)), np.full((count, d), attention.score_scale(d))
        decay = np.zeros((steps, 1, 1))
        if attention.rotary is not None:
            angles = rotary_angles(positions.reshape(-1), d, attention.rotary.theta).reshape(angles.shape)
            if attention.has_decay:
                base = attention.rotary.scale_base
                q_factor = q_factor * xpos_decay(np.arange(count), d, base)
                decay = xpos_decay((positions[:, :1] - keys).reshape(-1), d, base).reshape((steps, -1, d))
        cos, sin = np.cos(angles), np.sin(angles)
        rotation = np.stack([cos * q_factor, sin * q_factor, cos, sin], 1)[:, :, None]
        rotation = np.broadcast_to(rotation, (steps, 4, self.rows, count, d))
        return StepInputs(
            slots.reshape((steps, -1)).astype(np.int32),
            mask[:, None].astype(self.number),
            rotation.reshape((steps, 4, -1, d)).astype(self.number),
            np.clip(distances, 0, length).reshape((steps, -1)).astype(np.int32),
            decay[:, None].astype(self.number),
        )

    def max_chunk(self) -> int:
        """The most tokens per step that the decay of xPos, ``3.5 ** (chunk / base)``, allows in float32."""
        return max(1, int(55 * self.attention.rotary.scale_base)) if self.attention.has_decay else 2**31


def kind_of(mha: Any) -> Hashable:
    """What the :class:`StepInputs` of a layer depend on: layers of one kind share them, and a :class:`KVCache`."""
    attention = mha.attention
    rotary = attention.rotary and (attention.rotary.theta, attention.rotary.scale_base)
    spec, scale = attention.mask_spec(attention.window_size), attention.score_scale(mha.dim_head)
    return mha.heads, mha.dim_head, spec, attention.self_value, scale, rotary


def caches_of(model: DecodableModel, batch: int, capacity: int = 0) -> list[KVCache]:
    """The caches of a model, one for each :func:`kind_of` attention; those of global attention have ``capacity``."""
    kinds: dict[Hashable, list[Any]] = {}
    for layer in model.layers:
        for mha in layer.attentions():
            kinds.setdefault(kind_of(mha), []).append(mha)
    return [KVCache(mhas, batch, capacity, f"_{i}", model.dtype) for i, mhas in enumerate(kinds.values())]
