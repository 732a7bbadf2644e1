"""Attention within windows: the core of the library."""

import mindspore as ms
from mindspore.ops import constexpr

from local_attention.backends import choose_backend
from local_attention.backends.blocked import BlockedAttention
from local_attention.backends.fused import FusedAttention
from local_attention.constants import shared_cell
from local_attention.dropout import Recomputable
from local_attention.layers import L2Norm
from local_attention.options import LocalAttentionOptions, accepts
from local_attention.precision import cast, require_computable, wide_type
from local_attention.rotary import SinusoidalEmbeddings, apply_rotary

# Added to the score of a token for itself with shared queries and keys, so that it attends to itself only if it can
# attend to nothing else (Kitaev et al. 2020, arXiv 2001.04451, section 2).
TOKEN_SELF_ATTN_VALUE = -5e4

# Backends that compute attention of a sequence to itself, the fastest first.
SEQUENCE_BACKENDS = (FusedAttention, BlockedAttention)


class LocalAttention(Recomputable):
    """Scaled dot-product attention in which a query sees only the keys of the windows around it.

    The query at position ``i`` lies in window ``w = i // window_size`` and looks at windows ``w - look_backward`` to
    ``w + look_forward``. Time and memory grow with ``n * window_size`` instead of ``n ** 2``. (Beltagy et al. 2020,
    arXiv 2004.05150, section 3.1.)

    Arguments and results are those of the PyTorch package ``local-attention`` 1.11.2, except where that is wrong:
    padding is never attended to; a query that sees no key gets zeros; also with ``look_forward``, rotary scores depend
    on the distance alone; a window given in the call holds for padding and exact masks as well.

    The arguments are those of :class:`LocalAttentionOptions`.

    Raises:
        ValueError: for an option outside its range; for ``causal`` with ``look_forward > 0``; for an odd ``dim`` with
            rotary embeddings.
    """

    backends = SEQUENCE_BACKENDS

    @accepts(LocalAttentionOptions)
    def __init__(self, options: LocalAttentionOptions) -> None:
        super().__init__()
        self.options = options
        dim = options.dim if options.rel_pos_emb_config is None else options.rel_pos_emb_config[0]
        look_forward = options.look_forward
        if look_forward is None:
            look_forward = 0 if options.causal else 1
        self.window_size, self.causal, self.dim = options.window_size, options.causal, dim
        self.autopad, self.use_xpos, self.scale = options.autopad, options.use_xpos, options.scale
        self.look_backward, self.look_forward = options.look_backward, look_forward
        self.exact_windowsize = options.exact_windowsize
        self.rotary = None
        if dim is not None and options.use_rotary_pos_emb:
            scale_base = options.xpos_scale_base
            if scale_base is None:
                scale_base = max(options.window_size // 2, 1)
            self.rotary = shared_cell(SinusoidalEmbeddings, dim, scale_base, options.use_xpos)
        self.has_decay = options.use_xpos and self.rotary is not None  # that of xPos
        self.l2_norm = shared_cell(L2Norm) if options.shared_qk else None
        self.self_value = TOKEN_SELF_ATTN_VALUE if options.shared_qk else 0
        self.attend = choose_backend(self.backends, self)(self)
        self.attend_to_other_types = self.backends[-1](self) if self.attend.takes_projections else self.attend

    def construct(self, q, k, v, mask=None, input_mask=None, attn_bias=None, window_size=None, attn_mask=None):
        """Attend.

        Args:
            q, k: ``(..., n, d)`` of any floating type, any leading axes.
            v: ``(..., n, e)``, of the same type, unless ``to_float`` has given one.
            mask: ``(b, n)`` booleans, True where a key may be seen; with the leading axes of ``q`` merged to ``g``, row
                ``r // (g / b)`` holds for row ``r``. A query that sees no key gets zeros.
            input_mask: older name of ``mask``.
            attn_bias: ``(heads, window, span)``, added to the scores of every window, where ``span`` is
                ``window * (look_backward + 1 + look_forward)``; merged row ``r`` has head ``r % heads``.
            window_size: another window than the one given at first, with ``use_xpos`` only.
            attn_mask: ``(n, n)`` or ``(b, n, n)`` booleans, True where a query (row) may see a key (column), of those
                that it sees anyway; rows of ``q`` as for ``mask``. Takes memory for ``n ** 2`` booleans.

        Returns:
            ``(..., n, e)``.

        Raises:
            ValueError: for shapes or types that do not fit, a head size other than ``dim``, a length that is no
                multiple of the window without ``autopad``, or a ``window_size`` without ``use_xpos``.
        """
        _check_window(window_size, self.use_xpos)
        window = self.window_size if window_size is None else window_size
        _check_shapes(q.shape, k.shape, v.shape, window, self.autopad, self.dim)
        q, k, v = self.typed(q), self.typed(k), self.typed(v)
        dtype, shape = _common_type(q.dtype, k.dtype, v.dtype), q.shape
        length, d, e = shape[-2], shape[-1], v.shape[-1]
        q, k, v = q.reshape((-1, length, d)), k.reshape((-1, length, d)), v.reshape((-1, length, e))
        mask = input_mask if mask is None else mask
        if attn_mask is None and self.takes_projections(dtype, window):
            out = self.attend_projections(q, k, v, 1, window, mask, attn_bias)
        else:
            out = self.attend_heads(q, k, v, dtype, window, mask, attn_bias, attn_mask)
        return out.reshape((*shape[:-1], e))

    def attend_projections(self, q, k, v, heads, window_size, mask, attn_bias):
        """Attend with heads side by side, ``q, k: (b, n, h d)``, ``v: (b, n, h e)``; returns ``(b, n, h e)``.

        Only where the backend takes them, see :meth:`takes_projections`.
        """
        b, length, channels = q.shape
        mask, attn_bias = self.checked_mask_and_bias(mask, attn_bias, b * heads, length, window_size, q.dtype)
        if self.l2_norm is not None:
            k = self.l2_norm(k.reshape((-1, channels // heads))).reshape(k.shape)
        return self.attend(q, k, v, heads, self.mask_spec(window_size), mask, attn_bias)

    def attend_heads(self, q, k, v, dtype, window_size, mask, attn_bias, attn_mask):
        """Scale and rotate ``q, k: (g, n, d)``, and attend to ``v: (g, n, e)``; returns ``(g, n, e)``."""
        groups, length, d = q.shape
        mask, attn_bias = self.checked_mask_and_bias(mask, attn_bias, groups, length, window_size, dtype)
        if attn_mask is not None:
            attn_mask = attn_mask.reshape(_checked_attn_mask(attn_mask.shape, attn_mask.dtype, groups, length))
        if self.rotary is None:
            q, k = self.scale_and_rotate(q, k)
        else:
            q_cos, q_sin = self.rotary.tables(groups, length, self.score_scale(d), dtype)
            k_cos, k_sin = self.rotary.tables(groups, length, 1.0, dtype)
            q, k = self.scale_and_rotate(q, k, q_cos, q_sin, k_cos, k_sin)
        return self.attend_to_other_types(q, k, v, self.mask_spec(window_size), mask, attn_bias, attn_mask)

    def checked_mask_and_bias(self, mask, attn_bias, groups, length, window_size, dtype):
        """Both, if given, with shapes that fit ``groups`` rows, else ``ValueError``; the bias in the scores' type."""
        if mask is not None:
            mask = mask.reshape(_checked_mask(mask.shape, mask.dtype, groups, length))
        if attn_bias is not None:
            windows = self.look_backward + 1 + self.look_forward
            attn_bias = attn_bias.reshape(_checked_bias(attn_bias.shape, groups, window_size, windows))
            attn_bias = cast(attn_bias, wide_type(dtype))
        return mask, attn_bias

    def takes_projections(self, dtype, window_size):
        """Whether the backend takes queries and keys as they are projected: heads side by side, neither scaled nor
        rotated. Backends in C++ do so, for float32 and up to a window."""
        if self.compute_type is not None and self.compute_type != dtype:  # another than that of the cell around it
            return False
        return self.attend.takes_projections and dtype == ms.float32 and window_size <= self.attend.max_window

    def scale_and_rotate(self, q, k, q_cos=None, q_sin=None, k_cos=None, k_sin=None):
        """Scale and rotate queries and keys, after normalising keys that are the queries: ``(..., n, d)`` each.

        The cosines and sines of the positions of all rows, ``(rows, d)`` each, are not used without rotary embeddings.
        Those of queries contain the scale of the scores as a factor.
        """
        if self.l2_norm is not None:
            k = self.l2_norm(k.reshape((-1, k.shape[-1]))).reshape(k.shape)
        if self.rotary is None:
            return q * self.score_scale(q.shape[-1]), k
        return apply_rotary(q, q_cos, q_sin), apply_rotary(k, k_cos, k_sin)

    def score_scale(self, d: int) -> float:
        """The factor of the scores, for a head size of ``d``."""
        return d**-0.5 if self.scale is None else self.scale

    def mask_spec(self, window_size):
        """The :class:`MaskSpec` for a window, as a plain tuple, as graphs need it."""
        return (window_size, self.causal, self.exact_windowsize, self.look_backward, self.look_forward)


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
def _common_type(q, k, v):
    if not q == k == v:
        raise ValueError(f"expected q, k and v of one floating type, got {q}, {k} and {v}")
    return require_computable(q)


@constexpr
def _checked_mask(mask, dtype, groups, length):
    """The shape ``mask``. (In graph mode, a check whose result is not used may run after what it should prevent.)"""
    if dtype != ms.bool_ or len(mask) != 2 or mask[1] != length or mask[0] < 1 or groups % mask[0]:
        raise ValueError(
            f"expected mask: (b, {length}) booleans, where b divides the {groups} rows of q, got {mask} {dtype}"
        )
    return mask


@constexpr
def _checked_attn_mask(attn_mask, dtype, groups, length):
    """The shape ``attn_mask``, with its first axis."""
    shape = attn_mask if len(attn_mask) == 3 else (1, *attn_mask)
    if dtype != ms.bool_ or shape[1:] != (length, length) or shape[0] < 1 or groups % shape[0]:
        raise ValueError(
            f"expected attn_mask: ({length}, {length}) or (b, {length}, {length}) booleans, where b divides the "
            f"{groups} rows of q, got {attn_mask} {dtype}"
        )
    return shape


@constexpr
def _checked_bias(attn_bias, groups, window, windows):
    """The shape ``attn_bias``."""
    if len(attn_bias) != 3 or attn_bias[0] < 1 or groups % attn_bias[0] or attn_bias[1:] != (window, window * windows):
        raise ValueError(
            f"expected attn_bias: (heads, {window}, {window * windows}), where heads divides the {groups} rows of q, "
            f"got {attn_bias}"
        )
    return attn_bias
