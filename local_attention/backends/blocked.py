"""Attention of a sequence to itself, block by block, by MindSpore's own operators: training and evaluation."""

from mindspore import nn, ops

from local_attention.blocks import block_layout, look_around, split_into_blocks
from local_attention.constants import shared_cell
from local_attention.dropout import dropout_cell
from local_attention.masks import MASK_VALUE, key_mask, query_key_mask, sees_a_key, window_bias, window_mask
from local_attention.mindspore_quirks import GradientByHand, TypedCell
from local_attention.precision import cast, wide_type, widen


class BlockedAttention(TypedCell):
    """``softmax(q kᵀ + mask) v`` of each block of queries and the blocks of keys around it.

    Time and memory grow with the length times the window. Blocked as in Roy et al. 2020, arXiv 2003.05997.

    Args:
        attention: the :class:`LocalAttention`.
    """

    # fmt: off
    computes = frozenset({
        "window_size", "causal", "look_backward", "look_forward", "dropout", "shared_qk", "rel_pos_emb_config",
        "dim", "autopad", "exact_windowsize", "scale", "use_rotary_pos_emb", "use_xpos", "xpos_scale_base",
    })
    # fmt: on
    takes_projections = False

    def __init__(self, attention: nn.Cell) -> None:
        super().__init__()
        self.rotary, self.self_value = attention.rotary, attention.self_value
        self.has_decay = attention.has_decay
        self.attend = shared_cell(Attend)
        self.dropout = dropout_cell(attention.options.dropout)
        self.attend_with_dropout = shared_cell(AttendWithDropout) if self.dropout is not None else None

    @staticmethod
    def is_available(attention: nn.Cell) -> bool:
        return True

    def construct(self, q, k, v, spec, mask=None, attn_bias=None, attn_mask=None):
        """Attend.

        Args:
            q, k: ``(g, n, d)``, scaled, normalised and rotated.
            v: ``(g, n, e)``.
            spec: a :class:`MaskSpec`, as a tuple.
            mask: ``(b, n)`` booleans, ``b`` a divisor of ``g``, or None.
            attn_bias: ``(heads, window, window span)``, ``heads`` a divisor of ``g``, or None.
            attn_mask: ``(b, n, n)`` booleans, ``b`` a divisor of ``g``, or None.

        Returns:
            ``(g, n, e)``; zeros for a query that sees no key.
        """
        groups, length, d = q.shape
        e = v.shape[-1]
        window_size, _, exact_windowsize, look_backward, look_forward = spec
        dtype = wide_type(q.dtype)  # of scores and weights
        block, back, ahead = block_layout(window_size, exact_windowsize, look_backward, look_forward)
        additive_mask = window_mask(groups, length, block, back, ahead, spec, self.self_value, dtype)
        if mask is not None:
            mask = ops.stop_gradient(mask).astype(dtype)
            additive_mask = additive_mask + key_mask(mask, groups, block, back, ahead)
        if attn_mask is not None:
            additive_mask = ops.minimum(additive_mask, query_key_mask(attn_mask, groups, block, back, ahead, dtype))
        if attn_bias is not None:
            # minus infinity would win over MASK_VALUE, and a row of them gives NaN
            attn_bias = ops.maximum(attn_bias, MASK_VALUE)
            blocks = additive_mask.shape[0] // groups
            additive_mask = additive_mask + window_bias(attn_bias, groups, blocks, block, back, ahead)

        span = (back + 1 + ahead) * block
        q = split_into_blocks(q, block).reshape((-1, block, d))
        k = look_around(split_into_blocks(k, block), back, ahead).reshape((-1, span, d))
        v = look_around(split_into_blocks(v, block), back, ahead).reshape((-1, span, e))
        if self.has_decay:
            middle = block * (ahead + 1 - back) / 2  # of the span, so that the decay there stays within float32
            # widened, as the decay may leave float16's range
            q, k = self.rotary.decay_queries(widen(q), middle), self.rotary.decay_keys(widen(k), -back * block, middle)
        if self.dropout is not None and self.training:
            out = self.attend_with_dropout(q, k, v, additive_mask, self.dropout.mask(additive_mask.shape, dtype))
        else:
            out = self.attend(q, k, v, additive_mask)
        if not (mask is None and attn_bias is None and attn_mask is None):  # else every query sees itself
            sees = cast(sees_a_key(ops.stop_gradient(additive_mask)), out.dtype)
            out = out * ops.tile(sees, (1, 1, e))
        out = out.reshape((groups, -1, e))
        if length % block:
            out = out[:, :length]
        return out


class AttendForward(TypedCell):
    """``softmax(q kᵀ + mask) v``; all operands full size, nothing is broadcast."""

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.BatchMatMul()
        self.matmul_nt = ops.BatchMatMul(transpose_b=True)
        self.matmul_tn = ops.BatchMatMul(transpose_a=True)

    def weights(self, q, k, mask):
        return self.softmax(cast(self.matmul_nt(q, k), mask.dtype) + mask)

    def score_gradient(self, p, dp):
        """``p * (dp - rowsum(p * dp))`` for products ``dp = do vᵀ`` that were rounded to a half type.

        The row sum has their errors, too, so that these cancel where a weight is near 1. They would not in
        ``rowsum(do * o)``.
        """
        return p * (dp - self.matmul((p * dp).sum(-1, keepdims=True), ops.ones_like(p[:, :1])))

    def construct(self, q, k, v, mask):
        """``q: (g, i, d)``, ``k: (g, j, d)``, ``v: (g, j, e)``, ``mask: (g, i, j)`` additive. Returns ``(g, i, e)``.

        The weights have the type of the mask; they are rounded to that of the values.
        """
        return self.matmul(cast(self.weights(q, k, mask), v.dtype), v)


class Attend(GradientByHand, AttendForward):
    """The same with its gradient written by hand.

    The backward pass names the weights ``p`` as the forward pass does, and a static graph computes them once. With
    ``do`` the gradient of the output, ``ds = p * (do vᵀ - rowsum(do * o))``: the row sum over channels equals that over
    keys, ``rowsum(p * (do vᵀ))``, and is subtracted inside the product, ``[do, -delta] [v, 1]ᵀ``. (The framework's
    softmax gradient takes 37 ms, this one a third of that.)
    """

    def bprop(self, q, k, v, mask, out, do):
        p = self.weights(q, k, mask)
        if v.dtype == p.dtype:
            delta = (out * do).sum(-1, keepdims=True)
            ds = p * self.matmul_nt(ops.cat((do, -delta), -1), ops.cat((v, ops.ones_like(v[:, :, :1])), -1))
        else:
            ds = self.score_gradient(p, cast(self.matmul_nt(do, v), p.dtype))
        dq, dk = self.matmul(cast(ds, k.dtype), k), self.matmul_tn(cast(ds, q.dtype), q)
        return dq, dk, self.matmul_tn(cast(p, do.dtype), do), ds


class AttendWithDropoutForward(AttendForward):
    """``(softmax(q kᵀ + mask) * keep) v``; ``keep: (g, i, j)`` is 0 where a weight is dropped, else ``1 / (1 - p)``."""

    def construct(self, q, k, v, mask, keep):
        return self.matmul(cast(self.weights(q, k, mask) * keep, v.dtype), v)


class AttendWithDropout(GradientByHand, AttendWithDropoutForward):
    def bprop(self, q, k, v, mask, keep, out, do):
        p = self.weights(q, k, mask)
        dp = cast(self.matmul_nt(do, v), p.dtype) * keep
        if v.dtype == p.dtype:
            # keep stands between the product and the row sum, so the latter is subtracted by itself
            ds = p * (dp - self.matmul((out * do).sum(-1, keepdims=True), ops.ones_like(mask[:, :1])))
        else:
            ds = self.score_gradient(p, dp)
        dq, dk = self.matmul(cast(ds, k.dtype), k), self.matmul_tn(cast(ds, q.dtype), q)
        return dq, dk, self.matmul_tn(cast(p * keep, do.dtype), do), ds, ops.zeros_like(keep)
