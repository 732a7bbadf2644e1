"""What fused operators in C++ compute for whole sequences on a CPU: the attention of training and evaluation."""

import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from local_attention.constants import shared_cell, shared_constant
from local_attention.kernels import OperatorCell, operator, training_kernels_run
from local_attention.masks import MaskSpec
from local_attention.mindspore_quirks import GradientByHand, TypedCell
from local_attention.rotary import rotary_angles, xpos_decay

# Of xPos, in units of its base: over half the span the decay is 3.5 ** 55, or 8e29.
MAX_DECAY_SPAN = 110
TILE = 64  # queries that the operator computes at once, see kernels/attention.cpp
ABSENT = np.zeros(1, np.float32)  # a single axis means absent


class FusedAttention(TypedCell):
    """:class:`BlockedAttention` as one operator: tile by tile, scores and masks in no memory but the cache.

    Only the log-sum-exp of each row of scores is kept for the backward pass. (FlashAttention-2, Dao 2023, arXiv
    2307.08691.) It scales and rotates queries and keys itself.

    Args:
        attention: the :class:`LocalAttention`.
    """

    # fmt: off
    computes = frozenset({
        "window_size", "causal", "look_backward", "look_forward", "shared_qk", "rel_pos_emb_config", "dim", "autopad",
        "exact_windowsize", "scale", "use_rotary_pos_emb", "use_xpos", "xpos_scale_base",
    })
    # fmt: on
    takes_projections = True

    def __init__(self, attention: nn.Cell) -> None:
        super().__init__()
        rotary = attention.rotary
        self.table_options = (
            attention.scale,
            attention.self_value,
            None if rotary is None else rotary.theta,
            rotary.scale_base if attention.has_decay else None,
        )
        self.max_window = max_window(attention)
        self.attend = shared_cell(FusedAttend)
        self.absent = ms.Tensor(ABSENT)

    @staticmethod
    def is_available(attention: nn.Cell) -> bool:
        """Where the operators run, up to :func:`max_window`."""
        return training_kernels_run(attention) and attention.window_size <= max_window(attention)

    def construct(self, q, k, v, heads, spec, mask=None, attn_bias=None):
        """``q, k: (b, n, h d)``, ``v: (b, n, h e)``, returns ``(b, n, h e)``; the rest as :class:`BlockedAttention`."""
        sizes, factors, rotation, decay = tables(heads, q.shape[1], q.shape[2] // heads, spec, self.table_options)
        keep = self.absent if mask is None else ops.stop_gradient(mask).astype(ms.float32)
        bias = self.absent if attn_bias is None else attn_bias
        return self.attend(q, k, v, sizes, factors, rotation, decay, keep, bias)[0]


def max_window(attention):
    """The largest window for which the decay of xPos, over the keys that a tile sees, is within float32."""
    if not attention.has_decay:
        return math.inf
    windows = attention.look_backward + attention.look_forward + 2
    return (MAX_DECAY_SPAN * attention.rotary.scale_base - TILE) // windows


class FusedAttend(GradientByHand):
    """The operator and its gradient. Arguments and results: ``kernels/attention.cpp``."""

    def __init__(self) -> None:
        super().__init__(forward=OperatorCell("local_attention_forward", forward_shapes, 2))
        self.backward = operator("local_attention_backward", backward_shapes, 4)

    def bprop(self, q, k, v, sizes, factors, rotation, decay, keep, bias, out, grad):
        dq, dk, dv, dbias = self.backward(q, k, v, sizes, factors, rotation, decay, keep, bias, out[0], out[1], grad[0])
        if bias.ndim > 1:
            dbias = dbias.reshape((-1, *bias.shape)).sum(0)
        # Nothing uses the gradients of constants, nor that of keep, behind a stop_gradient; zeros in their place would
        # take a quarter of the time to compile a layer.
        return dq, dk, dv, sizes, factors, rotation, decay, keep, dbias


def forward_shapes(q, k, v, sizes, factors, *others):
    return v, [q[0] * factors[0], q[1]]


def backward_shapes(q, k, v, sizes, factors, rotation, decay, keep, bias, *others):
    return q, k, v, ([q[0] * factors[0], *bias[1:]] if len(bias) > 1 else bias)


@shared_constant
def tables(heads, length, d, spec, options):
    """The operator's constants, for the ``table_options`` of :class:`FusedAttention`.

    Sizes ``(5,)``, factors ``(heads, 2)``, rotation ``(2, n, d)`` and decay ``(2, offsets, d)``; or ``ABSENT``.
    """
    scale, self_value, theta, scale_base = options
    # the rotation is a shared constant of its own, as layers with other windows have the same
    return (
        size_table(spec),
        factor_table(heads, d**-0.5 if scale is None else scale, self_value),
        ABSENT if theta is None else rotation_table(length, d, theta),
        ABSENT if scale_base is None else decay_table(spec, d, scale_base),
    )


def size_table(spec):
    """A :class:`MaskSpec` as the operator reads it."""
    spec = MaskSpec(*spec)
    sizes = (spec.window_size, spec.look_backward, spec.look_forward, spec.causal, spec.exact_windowsize)
    return np.array(sizes, np.int32)


def factor_table(heads, scale, self_value):
    """``(heads, 2)``: the scale of the scores, and what is added to that of a token for itself."""
    return np.full((heads, 2), (scale, self_value), np.float32)


@shared_constant
def rotation_table(length, dim, theta):
    """``(2, length, dim)``: cosines and sines of the angles at all positions."""
    angles = rotary_angles(np.arange(length), dim, theta)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def decay_table(spec, dim, scale_base):
    """``(2, offsets, dim)``: the decay of queries and of keys at offsets from the first query of a tile.

    The first offset is ``-(look_backward + 1) * window_size``. The decay is 1 in the middle of those that occur.
    """
    spec = MaskSpec(*spec)
    window, back, ahead = spec.window_size, spec.look_backward, spec.look_forward
    offsets = np.arange(-(back + 1) * window, (ahead + 1) * window + TILE)
    first = -back * window if spec.exact_windowsize else offsets[0] + 1
    last = TILE - 1 if spec.causal else offsets[-1]
    decay = xpos_decay(np.clip(offsets, first, last) - (first + last) / 2, dim, scale_base)
    return np.stack([decay, 1 / decay]).astype(np.float32)
