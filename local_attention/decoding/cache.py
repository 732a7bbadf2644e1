"""The KV cache: of each layer the keys and values that later tokens can still see."""

from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from local_attention.decoding.interface import DecodableModel
from local_attention.local_attention import LocalAttention
from local_attention.masks import MaskSpec, to_additive_mask, visible
from local_attention.precision import numpy_type
from local_attention.rotary import rotary_angles, xpos_decay


def cache_length(attention: LocalAttention) -> int:
    """How many of the newest keys, its own included, a causal query may see."""
    window, back = attention.window_size, attention.look_backward
    return window * back + 1 if attention.exact_windowsize else window * (back + 1)


class StepInputs(NamedTuple):
    """What decode steps need of positions: arrays with an axis of steps in front.

    Those without a type here are float64 for a model that computes in it, else float32.
    """

    positions: np.ndarray  # (count,) int32, for learned positions
    slots: np.ndarray  # (b * heads * count,) int32, the rows of the cache that take the new keys and values
    mask: np.ndarray  # (1, count, span) additive, for the cache's keys; and for a count > 1 the new ones
    rotation: np.ndarray  # (4, b * heads * count, d): cosines and sines for queries (scaled) and for keys
    distances: np.ndarray  # (count * span,) int32, tokens from each key to each query, for the dynamic bias
    decay: np.ndarray  # (1, span, d), the xPos decay of the keys


class KVCache:
    """Keys and values of all layers: ``keys[i]`` and ``values[i]`` are Parameters ``(b * heads * (length + 1), d)``.

    They have the type that the model computes in.

    A circular buffer of ``length`` slots per head: a token's slot is its position modulo ``length``. One more slot,
    which no query sees, takes what need not be kept. Keys are stored rotated, by their absolute positions (scores
    depend on the difference), but without the decay of xPos, which would leave float32's range.

    Args:
        model: the model.
        batch: number of sequences.
    """

    def __init__(self, model: DecodableModel, batch: int) -> None:
        mha = model.layers[0].attention
        self.attention, self.batch, self.max_position = mha.attention, batch, model.max_seq_len - 1
        self.rows, self.d = batch * mha.heads, mha.dim_head
        self.length = cache_length(self.attention)
        self.dtype, self.number = model.dtype, numpy_type(model.dtype)  # the latter of what is computed for each step
        zeros = np.zeros((self.rows * (self.length + 1), self.d), np.float32)

        def parameters(name: str) -> ms.ParameterTuple:
            return ms.ParameterTuple(
                Parameter(Tensor(zeros, self.dtype), name=f"{name}.{i}", requires_grad=False)
                for i in range(len(model.layers))
            )

        self.keys, self.values = parameters("cached_keys"), parameters("cached_values")

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
            # padding may lie beyond the learned positions
            np.minimum(positions, self.max_position).astype(np.int32),
            slots.reshape((steps, -1)).astype(np.int32),
            mask[:, None].astype(self.number),
            rotation.reshape((steps, 4, -1, d)).astype(self.number),
            np.clip(distances, 0, length).reshape((steps, -1)).astype(np.int32),
            decay[:, None].astype(self.number),
        )

    def max_chunk(self) -> int:
        """The most tokens per step that the decay of xPos, ``3.5 ** (chunk / base)``, allows in float32."""
        return max(1, int(55 * self.attention.rotary.scale_base)) if self.attention.has_decay else 2**31
