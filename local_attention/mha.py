"""Multi-head local attention."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops
from mindspore.ops import constexpr

from local_attention.backends.fused_layers import FusedL2Norm
from local_attention.constants import shared_cell, shared_constant
from local_attention.dropout import Recomputable
from local_attention.einops_mindspore import Rearrange
from local_attention.kernels import training_kernels_run
from local_attention.layers import AddBias, L2Norm, LayerNorm, Product, dense, tree_map
from local_attention.local_attention import LocalAttention
from local_attention.options import GlobalAttentionOptions, LocalMHAOptions, accepts
from local_attention.precision import cast, constant, require_computable, widen


class MultiHeadAttention(Recomputable):
    """What :class:`LocalMHA` and :class:`GlobalAttention` share: all but what a query sees.

    Args:
        options: of either.
    """

    attention_cell = LocalAttention  # the attention of the heads

    def __init__(self, options: LocalMHAOptions | GlobalAttentionOptions) -> None:
        super().__init__()
        self.options = options
        dim, heads, dim_head = options.dim, options.heads, options.dim_head
        self.dim, self.heads, self.dim_head = dim, heads, dim_head
        inner = heads * dim_head
        self.norm = LayerNorm(dim, 4 if options.gate_values_per_head else 3) if options.prenorm else None
        self.to_q, self.to_k, self.to_v = dense(dim, inner), dense(dim, inner), dense(dim, inner)
        self.to_out = dense(inner, dim)
        self.qk_rmsnorm = options.qk_rmsnorm
        if options.qk_rmsnorm:
            self.l2_norm, self.matmul = shared_cell(L2Norm), ops.MatMul()
            self.fused_l2_norm = shared_cell(FusedL2Norm) if training_kernels_run(self) else None
            self.q_scale, self.k_scale = (
                Parameter(ms.Tensor(np.ones(dim_head, np.float32)), name=name) for name in ("q_scale", "k_scale")
            )
        self.to_v_gate = nn.Dense(dim, heads) if options.gate_values_per_head else None
        self.product, self.add_bias = shared_cell(Product), shared_cell(AddBias)
        self.split_heads = shared_cell(Rearrange, "b n (h d) -> (b h) n d", h=heads)
        self.merge_heads = shared_cell(Rearrange, "(b h) n d -> (b n) (h d)", h=heads)
        self.attention = self.attention_cell(**vars(options.attention()))

    def attend_to_itself(self, x, mask, attn_bias):
        """Attention of the sequence ``x: (b, n, dim)`` to itself."""
        x = self.typed(x)
        x = x.reshape(_checked_shape(x.shape, x.dtype, self.dim))
        q, k, v, gates = self.project(x)
        return self.merge(self.attend(q, k, v, mask, attn_bias), gates)

    def attend(self, q, k, v, mask, attn_bias):
        """Attention of a sequence to itself: ``q, k, v: (b, n, h d)``, returns the same shape."""
        window = self.attention.window_size
        if self.attention.takes_projections(q.dtype, window):
            return self.attention.attend_projections(q, k, v, self.heads, window, mask, attn_bias)
        out = self.attention(self.split_heads(q), self.split_heads(k), self.split_heads(v), mask, None, attn_bias)
        return self.merge_heads(out).reshape(q.shape)

    def project(self, x):
        """Queries, keys and values of all heads, each ``(b, n, h d)``, of ``x: (b, n, dim)``; and gates, or None.

        The gates ``(b n, h)`` are logits.
        """
        b, _, dim = x.shape
        rows = x.reshape((-1, dim))
        weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight)
        if self.to_v_gate is not None:
            weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight, self.to_v_gate.weight)
        products = tree_map(ops.partial(self.product, rows), weights) if self.norm is None else self.norm(rows, weights)
        q, k, v = products[0], products[1], products[2]
        if self.qk_rmsnorm:
            q, k = self.normalise(q, self.q_scale), self.normalise(k, self.k_scale)
        shape, gates = (b, -1, q.shape[1]), None
        if self.to_v_gate is not None:
            gates = self.add_bias(widen(products[3]), self.to_v_gate.bias)
        return q.reshape(shape), k.reshape(shape), v.reshape(shape), gates

    def normalise(self, x, scale):
        """The heads of ``x: (rows, h d)`` with unit length, times ``scale: (d,)``."""
        heads = x.reshape((-1, self.dim_head))
        if self.fused_l2_norm is not None and x.dtype == scale.dtype == ms.float32:
            return self.fused_l2_norm(heads, scale).reshape(x.shape)
        heads = self.l2_norm(heads)
        scales = self.matmul(ops.ones((heads.shape[0], 1), x.dtype), cast(scale, x.dtype).reshape((1, -1)))
        return (heads * scales).reshape(x.shape)

    def merge(self, out, gates):
        """The heads' outputs ``(b, n, h d)``, gated, to ``(b, n, dim)``."""
        b, _, inner = out.shape
        out = out.reshape((-1, inner))
        if gates is not None:
            gates = ops.matmul(ops.sigmoid(gates), channels_of_heads(self.heads, self.dim_head, gates.dtype))
            out = cast(widen(out) * gates, out.dtype)
        return self.product(out, self.to_out.weight).reshape((b, -1, self.dim))


class LocalMHA(MultiHeadAttention):
    """Multi-head attention within windows, of any length: ``x: (b, n, dim) -> (b, n, dim)``.

    ``exact_windowsize`` is True unless given. With ``qk_rmsnorm``, queries and keys are l2-normalised and multiplied by
    learned scales, one per channel (Dehghani et al. 2023, arXiv 2302.05442, section 2, there with LayerNorm).

    The arguments are those of :class:`LocalMHAOptions`.

    Raises:
        ValueError: for an option outside its range; for ``scale`` with ``qk_rmsnorm``; and as :class:`LocalAttention`.
    """

    @accepts(LocalMHAOptions)
    def __init__(self, options: LocalMHAOptions) -> None:
        super().__init__(options)

    def construct(self, x, mask=None, attn_bias=None):
        """Attend.

        Args:
            x: ``(b, n, dim)`` of any floating type.
            mask: ``(b, n)`` booleans, True where a token may be seen.
            attn_bias: ``(heads, window, span)``, see :class:`LocalAttention`.

        Returns:
            ``(b, n, dim)``.

        Raises:
            ValueError: for another shape or type.
        """
        return self.attend_to_itself(x, mask, attn_bias)


@constexpr
def _checked_shape(shape, dtype, dim):
    if len(shape) != 3 or shape[2] != dim:
        raise ValueError(f"expected x: (b, n, {dim}), got {shape}")
    require_computable(dtype)
    return shape


@shared_constant
def channels_of_heads(heads, dim_head, dtype):
    """``(h, h d)``: a product with it repeats the number of each head for all its channels."""
    return constant(np.kron(np.eye(heads), np.ones((1, dim_head))), dtype)
