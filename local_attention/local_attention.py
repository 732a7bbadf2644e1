"""Attention within windows: the core of the library."""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import constexpr

from local_attention.attend import Attend, AttendWithDropout
from local_attention.bias import key_bias, window_bias
from local_attention.dropout import dropout_cell
from local_attention.layers import L2Norm
from local_attention.rotary import SinusoidalEmbeddings
from local_attention.windows import MASK_VALUE, additive_mask, look_around, window_layout

# The score of a token for itself with shared queries and keys: chosen only where nothing else is seen (Kitaev et al.
# 2020, arXiv 2001.04451, section 2).
TOKEN_SELF_ATTN_VALUE = -5e4


class LocalAttention(nn.Cell):
    """Scaled dot-product attention in which a query sees only the keys of the windows around it.

    The query at position ``i`` lies in window ``w = i // window_size`` and looks at windows ``w - look_backward`` to
    ``w + look_forward``. Time and memory grow with ``n * window_size`` instead of ``n ** 2``. (Beltagy et al. 2020,
    arXiv 2004.05150, section 3.1; blocked as in Roy et al. 2020, arXiv 2003.05997.)

    Arguments and results are those of the PyTorch package ``local-attention`` 1.11.2, but where that is wrong: padding
    is never attended to; a query that sees no key gets zeros; with ``look_forward``, too, rotary scores depend on the
    distance alone; a window given in the call holds for padding and exact masks as well.

    Args:
        window_size: tokens in a window.
        causal: a query sees no later key.
        look_backward: windows seen before a query's own.
        look_forward: windows seen after it; 0 with ``causal``, 1 without, unless given.
        dropout: share of the attention weights that training drops.
        shared_qk: for queries that are the keys, too: keys are l2-normalised, and a token sees itself only where it
            sees nothing else.
        rel_pos_emb_config: older form of ``dim``: a sequence that begins with it.
        dim: head size ``d``; with it queries and keys get rotary position embeddings.
        autopad: take any length: pad to whole blocks, never attend to the padding, cut it off again.
        exact_windowsize: a query sees exactly ``window_size * look_backward`` tokens back (and, without ``causal``,
            ``window_size * look_forward`` ahead), wherever in its window it stands.
        scale: factor of the scores, ``d ** -0.5`` unless given.
        use_rotary_pos_emb: False: no rotary embeddings although ``dim`` is given.
        use_xpos: rotary embeddings whose scores decay with the distance (Sun et al. 2022, arXiv 2212.10554).
        xpos_scale_base: see :class:`SinusoidalEmbeddings`; half a window unless given.

    Raises:
        ValueError: for ``causal`` with ``look_forward > 0``; for sizes that are no positive numbers; for a ``dropout``
            outside 0 … 1; for an odd ``dim`` with rotary embeddings.
    """

    def __init__(
        self,
        window_size,
        causal=False,
        look_backward=1,
        look_forward=None,
        dropout=0.0,
        shared_qk=False,
        rel_pos_emb_config=None,
        dim=None,
        autopad=False,
        exact_windowsize=False,
        scale=None,
        use_rotary_pos_emb=True,
        use_xpos=False,
        xpos_scale_base=None,
    ):
        super().__init__()
        look_forward = (0 if causal else 1) if look_forward is None else look_forward
        if window_size < 1 or look_backward < 0 or look_forward < 0:
            raise ValueError(
                "expected window_size >= 1, look_backward >= 0 and look_forward >= 0, "
                f"got {window_size}, {look_backward} and {look_forward}"
            )
        if causal and look_forward:
            raise ValueError(f"causal attention cannot look forward: expected look_forward = 0, got {look_forward}")
        if rel_pos_emb_config is not None:
            dim = rel_pos_emb_config[0]
        self.window_size, self.autopad, self.scale, self.dim = window_size, autopad, scale, dim
        self.causal, self.exact_windowsize = causal, exact_windowsize
        self.look_backward, self.look_forward = look_backward, look_forward
        self.use_xpos, self.shared_qk = use_xpos, shared_qk
        self.rel_pos = None
        if dim is not None and use_rotary_pos_emb:
            scale_base = max(window_size // 2, 1) if xpos_scale_base is None else xpos_scale_base
            self.rel_pos = SinusoidalEmbeddings(dim, scale_base, use_xpos)
        self.l2_norm = L2Norm() if shared_qk else None
        self.attend = Attend()
        self.dropout = dropout_cell(dropout)
        self.attend_with_dropout = AttendWithDropout() if dropout else None

    def construct(self, q, k, v, mask=None, input_mask=None, attn_bias=None, window_size=None):
        """Attend.

        Args:
            q, k: ``(..., n, d)`` float32, any leading axes.
            v: ``(..., n, e)``.
            mask: ``(b, n)`` booleans, True where a key may be seen; with the leading axes of ``q`` merged to ``g``, row
                ``r // (g / b)`` holds for row ``r``. A query that sees no key gets zeros.
            input_mask: older name of ``mask``.
            attn_bias: ``(heads, window, span)`` float32, added to the scores of every window, where ``span`` is
                ``window * (look_backward + 1 + look_forward)``; merged row ``r`` has head ``r % heads``.
            window_size: another window than the one given at first, with ``use_xpos`` only.

        Returns:
            ``(..., n, e)``.

        Raises:
            ValueError: for shapes that do not fit, a head size other than ``dim``, a length that is no multiple of the
                window without ``autopad``, or a ``window_size`` without ``use_xpos``.
        """
        _check_window(window_size, self.use_xpos)
        window = self.window_size if window_size is None else window_size
        _check_shapes(q.shape, k.shape, v.shape, window, self.autopad, self.dim)
        shape = q.shape
        length, d, e = shape[-2], shape[-1], v.shape[-1]
        q, k, v = q.reshape((-1, length, d)), k.reshape((-1, length, d)), v.reshape((-1, length, e))
        groups = q.shape[0]
        block, before, after, _ = self.layout(window)
        bias = self.bias(groups, length, window, input_mask if mask is None else mask, attn_bias)

        q, k = self.encode(q, k, d**-0.5 if self.scale is None else self.scale)
        q = cut(q, block).reshape((-1, block, d))
        span = (before + 1 + after) * block
        k = look_around(cut(k, block), before, after).reshape((-1, span, d))
        v = look_around(cut(v, block), before, after).reshape((-1, span, e))
        if self.rel_pos is not None and self.use_xpos:
            middle = block * (after + 1 - before) / 2
            q, k = self.rel_pos.decay_queries(q, middle), self.rel_pos.decay_keys(k, -before * block, middle)
        if self.dropout is not None and self.training:
            out = self.attend_with_dropout(q, k, v, bias, self.dropout.mask(bias.shape))
        else:
            out = self.attend(q, k, v, bias)
        if not (mask is None and input_mask is None and attn_bias is None):  # else every query sees itself
            out = out * ops.tile(sees_a_key(ops.stop_gradient(bias)), (1, 1, e))
        out = out.reshape((groups, -1, e))
        if length % block:
            out = out[:, :length]
        return out.reshape((*shape[:-1], e))

    def layout(self, window):
        """See :func:`windows.window_layout`."""
        return window_layout(window, self.causal, self.exact_windowsize, self.look_backward, self.look_forward)

    def bias(self, groups, length, window, mask, attn_bias):
        """What is added to the scores, ``(groups * blocks, block, span)``; the arguments as :meth:`construct`'s."""
        block, before, after, rule = self.layout(window)
        bias = additive_mask(groups, length, block, before, after, rule, TOKEN_SELF_ATTN_VALUE * self.shared_qk)
        if mask is not None:
            mask = mask.reshape(_checked_mask(mask.shape, mask.dtype, groups, length))
            bias = bias + key_bias(ops.stop_gradient(mask).astype(ms.float32), groups, block, before, after)
        if attn_bias is not None:
            # an infinity would outdo what hides a key, and a row of them make NaN
            attn_bias = ops.maximum(attn_bias, MASK_VALUE)
            windows = self.look_backward + 1 + self.look_forward
            attn_bias = attn_bias.reshape(_checked_bias(attn_bias.shape, groups, window, windows))
            bias = bias + window_bias(attn_bias, groups, bias.shape[0] // groups, block, before, after)
        return bias

    def encode(self, q, k, scale):
        """Normalise keys where queries are the keys, scale and rotate: what depends on a token and its position."""
        if self.l2_norm is not None:
            k = self.l2_norm(k.reshape((-1, k.shape[-1]))).reshape(k.shape)
        if self.rel_pos is None:
            return q * scale, k
        return self.rel_pos.rotate_all(q, scale), self.rel_pos.rotate_all(k, 1.0)


def cut(x, block):
    """``(g, n, d) -> (g, blocks, block, d)``, padded with zeros on the right."""
    groups, length, d = x.shape
    if length % block:
        x = ops.cat((x, ops.zeros((groups, -length % block, d), x.dtype)), 1)
    return x.reshape((groups, -1, block, d))


def sees_a_key(bias):
    """``(g, i, j) -> (g, i, 1)``: 1.0 for a query with a key that is not hidden, else 0.0."""
    return (bias.max(-1, keepdims=True) > MASK_VALUE / 2).astype(bias.dtype)


@constexpr
def _check_window(window_size, use_xpos):
    if window_size is not None and not use_xpos:
        raise ValueError(f"expected no window_size in the call without use_xpos, got {window_size}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"expected window_size >= 1, got {window_size}")


@constexpr
def _check_shapes(q, k, v, window_size, autopad, dim):
    if not (len(q) >= 2 and q == k and q[:-1] == v[:-1] and min(q + v) > 0):
        raise ValueError(f"expected q, k: (..., n, d) and v: (..., n, e), none of them empty; got {q}, {k} and {v}")
    if dim is not None and q[-1] != dim:
        raise ValueError(f"expected a head size of dim = {dim}, got q of shape {q}")
    if q[-2] % window_size and not autopad:
        raise ValueError(f"expected a length that is a multiple of the window {window_size}, got {q[-2]}: set autopad")


@constexpr
def _checked_mask(mask, dtype, groups, length):
    """The shape ``mask``. (In graph mode what does not use a check's result may fail before it, with another error.)"""
    if dtype != ms.bool_ or len(mask) != 2 or mask[1] != length or mask[0] < 1 or groups % mask[0]:
        raise ValueError(
            f"expected mask: (b, {length}) booleans, where b divides the {groups} rows of q, got {mask} {dtype}"
        )
    return mask


@constexpr
def _checked_bias(attn_bias, groups, window, windows):
    """The shape ``attn_bias``."""
    if len(attn_bias) != 3 or attn_bias[0] < 1 or groups % attn_bias[0] or attn_bias[1:] != (window, window * windows):
        raise ValueError(
            f"expected attn_bias: (heads, {window}, {window * windows}), where heads divides the {groups} rows of q, "
            f"got {attn_bias}"
        )
    return attn_bias
