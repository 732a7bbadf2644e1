"""Attention of a sequence to all of itself, one block of queries after another, by MindSpore's own operators."""

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops import constexpr

from local_attention.constants import shared_cell, shared_constant
from local_attention.dropout import dropout_cell
from local_attention.masks import MASK_VALUE, to_additive_mask
from local_attention.mindspore_quirks import GradientByHand, TypedCell
from local_attention.options import WHOLE_SEQUENCE
from local_attention.precision import cast, wide_type, widen

# Scores of (1 / MAX_BLOCKS) of all pairs of a query and a key are in memory at once. Each block is a part of the graph
# of its own, so their number is bounded; and products of fewer than MIN_BLOCK queries are slow.
MIN_BLOCK, MAX_BLOCKS = 128, 16


class TiledAttention(TypedCell):
    """``softmax(q kᵀ + mask) v`` of a window that is the whole sequence, without ever holding all scores.

    Queries are taken block by block, each with all keys that it may see, also in the backward pass, which computes the
    scores again. (Rabe & Staats 2021, arXiv 2112.05682.)

    Args:
        attention: the :class:`LocalAttention`.
    """

    # fmt: off
    computes = frozenset({
        "window_size", "causal", "look_backward", "look_forward", "dropout", "shared_qk", "dim", "autopad", "scale",
        "use_rotary_pos_emb",
    })
    # fmt: on
    takes_projections = False

    def __init__(self, attention: nn.Cell) -> None:
        super().__init__()
        self.causal, self.self_value = attention.causal, attention.self_value
        self.dropout = dropout_cell(attention.options.dropout)
        if self.dropout is None:
            self.attend = shared_cell(TiledAttend, self.causal, self.self_value)
        else:
            self.attend = TiledAttend(self.causal, self.self_value, self.dropout)

    @staticmethod
    def is_available(attention: nn.Cell) -> bool:
        """Only for the whole sequence."""
        return attention.window_size == WHOLE_SEQUENCE

    def construct(self, q, k, v, spec, mask=None, attn_bias=None, attn_mask=None):
        """As :class:`BlockedAttention`; there is no ``attn_bias`` and no ``attn_mask``."""
        _check_absent(attn_bias, attn_mask)
        groups, length, e = v.shape
        seen = None
        if mask is not None:
            q, k = widen(q), widen(k)  # the mask value leaves float16's range
            mask = ops.stop_gradient(mask).astype(q.dtype)
            copies = groups // mask.shape[0]
            # one more channel of the keys, and a one in the queries, add the mask value to the scores of a hidden key
            hidden = ops.tile((1 - mask).reshape((-1, 1, length)), (1, copies, 1)).reshape((groups, length, 1))
            q = ops.cat((q, ops.ones_like(hidden)), -1)
            k = ops.cat((k, hidden * MASK_VALUE), -1)
            seen = ops.cumsum(mask, 1) if self.causal else mask.sum(1, keepdims=True) * ops.ones_like(mask)
            seen = ops.tile((seen > 0).astype(v.dtype).reshape((-1, 1, length)), (1, copies, 1))
        dropping = self.dropout is not None and self.training
        call = self.dropout.next_call() if dropping else ms.Tensor(0, ms.int32)
        out = self.attend(q, k, v, call, dropping)
        if seen is not None:  # else every query sees a key
            out = out * ops.tile(seen.reshape((groups, length, 1)), (1, 1, e))
        return out


class TiledAttendForward(TypedCell):
    """:class:`TiledAttention` of queries, keys and values, ``(g, n, d)`` each.

    Args:
        causal: whether a query sees no later key.
        self_value: added to the score of a token for itself.
        dropout: the :class:`Dropout` of the weights, or None.
    """

    def __init__(self, causal, self_value, dropout=None):
        super().__init__()
        self.causal, self.self_value, self.dropout = causal, self_value, dropout
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.BatchMatMul()
        self.matmul_nt = ops.BatchMatMul(transpose_b=True)
        self.matmul_tn = ops.BatchMatMul(transpose_a=True)

    def keys_of(self, x, end):
        """The rows of keys or values that queries before ``end`` may see."""
        return x[:, :end] if self.causal and end < x.shape[1] else x

    def weights(self, q, k, start, end):
        """The weights of the queries from ``start`` to before ``end``, given as ``q: (g, end - start, d)``.

        In at least float32; they are rounded to the type of the values.
        """
        if not self.causal and self.self_value == 0:
            return self.softmax(widen(self.matmul_nt(q, k)))
        own = cast(own_mask(q.shape[0], end - start, self.causal, self.self_value), wide_type(q.dtype))
        scores = (widen(self.matmul_nt(q, k[:, start:end])) + own,)
        if start > 0:
            scores = (widen(self.matmul_nt(q, k[:, :start])), *scores)
        if not self.causal and end < k.shape[1]:
            scores = (*scores, widen(self.matmul_nt(q, k[:, end:])))
        return self.softmax(ops.cat(scores, -1) if len(scores) > 1 else scores[0])

    def keep(self, weights, call, start):
        """The factors of dropout for the weights of the block from ``start`` on, the same ones for the same call."""
        return self.dropout.mask_of(call + block_offset(start), weights.shape, weights.dtype)

    def construct(self, q, k, v, call, dropping):
        """``q, k: (g, n, d)``, ``v: (g, n, e)``, ``call``: of dropout, if ``dropping``. Returns ``(g, n, e)``."""
        parts, done = (), q
        for start, end in query_blocks(q.shape[1]):
            # when the block before is done, as else the scores of several would be in memory at once
            weights = self.weights(ops.depend(q[:, start:end], done), k, start, end)
            if dropping:
                weights = weights * self.keep(weights, call, start)
            done = self.matmul(cast(weights, v.dtype), self.keys_of(v, end))
            parts = (*parts, done)
        return ops.cat(parts, 1)


class TiledAttend(GradientByHand, TiledAttendForward):
    """The same with its gradient written by hand, see :class:`backends.blocked.Attend`."""

    def bprop(self, q, k, v, call, dropping, out, do):
        # Other nodes of the graph than in the forward pass: else its weights would be kept, not computed again.
        q, k = ops.depend(q, do), ops.depend(k, do)
        delta = (out * do).sum(-1, keepdims=True)
        dq, dk_tail, dv_tail, done = (), (), (), (do,)
        dk = dv = None
        for start, end in query_blocks(q.shape[1])[::-1]:
            q_block, do_block = ops.depend(q[:, start:end], done), ops.depend(do[:, start:end], done)
            delta_block, keys, values = delta[:, start:end], self.keys_of(k, end), self.keys_of(v, end)
            p = self.weights(q_block, k, start, end)
            if dropping or v.dtype != p.dtype:
                dp, kept = cast(self.matmul_nt(do_block, values), p.dtype), p
                if dropping:
                    keep = self.keep(p, call, start)
                    dp, kept = dp * keep, p * keep
                # of rounded products the row sum has their errors, too, see backends.blocked.AttendForward
                row_sum = delta_block if v.dtype == p.dtype else (p * dp).sum(-1, keepdims=True)
                ds = p * (dp - self.matmul(row_sum, ops.ones_like(p[:, :1])))
                p = kept
            else:
                ones = ops.ones_like(values[:, :, :1])
                ds = p * self.matmul_nt(ops.cat((do_block, -delta_block), -1), ops.cat((values, ones), -1))
            ds, p = cast(ds, q.dtype), cast(p, v.dtype)
            done = self.matmul(ds, keys), self.matmul_tn(ds, q_block), self.matmul_tn(p, do_block)
            dq = (done[0], *dq)
            new_dk, new_dv = widen(done[1]), widen(done[2])
            if dk is None:
                dk, dv = new_dk, new_dv
            elif self.causal:  # the gradient of the keys behind this block is complete
                dk_tail, dv_tail = (dk[:, end:], *dk_tail), (dv[:, end:], *dv_tail)
                dk, dv = dk[:, :end] + new_dk, dv[:, :end] + new_dv
            else:
                dk, dv = dk + new_dk, dv + new_dv
        dk, dv = cast(ops.cat((dk, *dk_tail), 1), k.dtype), cast(ops.cat((dv, *dv_tail), 1), v.dtype)
        return ops.cat(dq, 1), dk, dv, ops.zeros_like(call), False


@constexpr
def query_blocks(length):
    """``((start, end), …)``: of each block of queries the first one, and the one after the last."""
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return tuple((start, min(start + block, length)) for start in range(0, length, block))


@shared_constant
def block_offset(start):
    """What is added to the number of a call for the block from ``start`` on, so that it meets no later call, int32."""
    return np.array(start * 0x61C88647 % 2**32, np.uint32).astype(np.int32)


@shared_constant
def own_mask(groups, block, causal, self_value):
    """``(groups, block, block)`` additive: of the queries of a block and the keys at the same positions."""
    query, key = np.arange(block)[:, None], np.arange(block)
    mask = to_additive_mask((key <= query) | (not causal)) + np.float32(self_value) * (query == key)
    return np.tile(mask.astype(np.float32), (groups, 1, 1))


@constexpr
def _check_absent(attn_bias, attn_mask):
    if attn_bias is not None or attn_mask is not None:
        raise ValueError("expected no attn_bias and no attn_mask with attention to the whole sequence")
