"""LayerNorm, gated feed-forward and cross-entropy in forms that are fast and small on a CPU, gradients by hand.

All of them avoid broadcasting: a broadcasting operator keeps 16 bytes of index table per output element for as long as
the graph lives (3.3 GB for a row times 67 MB), and so does its derived gradient. Rows and columns are repeated by a
product with a vector of ones instead.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import HeUniform, initializer

from local_attention.backends import can_compute
from local_attention.backends.fused_layers import FusedCrossEntropy, FusedFeedForward, FusedNormLinear
from local_attention.constants import shared_cell, shared_constant
from local_attention.dropout import Recomputable, dropout_cell
from local_attention.kernels import training_kernels_run
from local_attention.mindspore_quirks import GradientByHand, TypedCell
from local_attention.options import FeedForwardOptions, accepts
from local_attention.precision import cast, constant, widen

# Applies a function to each of many tensors. A loop over them nests the graph one level deeper per tensor, and a list
# comprehension becomes dozens of functions: with this map instead, 12 layers compile in 9 s and not in 20.
tree_map = ops.Map()


matmul_nt = ops.MatMul(transpose_b=True)


def dot(x, y):
    """The sum of ``x * y``, ``()``. For 2,048 rows of 192, ``(x * y).sum()`` takes 1.5 ms more."""
    return matmul_nt(x.reshape((1, -1)), y.reshape((1, -1))).reshape(())


def dense(dim_in: int, dim_out: int) -> nn.Dense:
    """A linear layer without bias, its weight ``(dim_out, dim_in)`` uniform in ``±dim_in ** -0.5`` as in PyTorch."""
    return nn.Dense(dim_in, dim_out, weight_init=HeUniform(math.sqrt(5)), has_bias=False)


class Product(TypedCell):
    """A linear layer without bias: the weight is cast to the type of the rows."""

    def __init__(self):
        super().__init__()
        self.matmul_nt = ops.MatMul(transpose_b=True)

    def construct(self, x, weight):
        """``x: (rows, dim_in)``, ``weight: (dim_out, dim_in)``, returns ``(rows, dim_out)``."""
        return self.matmul_nt(x, cast(weight, x.dtype))


class AddBiasForward(TypedCell):
    """``x + bias`` over rows, in their type."""

    def __init__(self):
        super().__init__()
        self.bias_add, self.matmul = ops.BiasAdd(), ops.MatMul()

    def construct(self, x, bias):
        """``x: (rows, d)``, ``bias: (d,)``."""
        return self.bias_add(x, cast(bias, x.dtype))


class AddBias(GradientByHand, AddBiasForward):
    """The same; the bias' gradient is a product with ones (0.1 ms), not BiasAddGrad (1.2 ms)."""

    def bprop(self, x, bias, out, grad):
        rows = widen(grad)
        sums = self.matmul(ops.ones((1, rows.shape[0]), rows.dtype), rows).reshape(-1)
        return grad, cast(sums, bias.dtype)


@shared_constant
def mean_column(dim, dtype):
    return constant(np.full((dim, 1), 1 / dim), dtype)


@shared_constant
def ones_row(dim, dtype):
    return constant(np.ones((1, dim)), dtype)


class StandardiseForward(TypedCell):
    """``(x - mean) / sqrt(variance + 1e-5)`` of rows: LayerNorm (Ba et al. 2016, arXiv 1607.06450), no affine map."""

    def __init__(self):
        super().__init__()
        self.matmul, self.rsqrt = ops.MatMul(), ops.Rsqrt()

    def mean(self, x):
        dim = x.shape[1]
        return self.matmul(self.matmul(x, mean_column(dim, x.dtype)), ones_row(dim, x.dtype))

    def centre_and_scale(self, x):
        dim, centred = x.shape[1], x - self.mean(x)
        variance = self.matmul(centred * centred, mean_column(dim, x.dtype))
        return centred, self.matmul(self.rsqrt(variance + 1e-5), ones_row(dim, x.dtype))

    def construct(self, x):
        """``x: (rows, dim)`` float32 or float64."""
        centred, scale = self.centre_and_scale(x)
        return centred * scale


class Standardise(GradientByHand, StandardiseForward):
    def bprop(self, x, out, grad):
        _, scale = self.centre_and_scale(x)
        return (scale * (grad - self.mean(grad) - out * self.mean(grad * out)),)


# Up to this many rows, as in decoding, MindSpore's own LayerNorm is faster: 3 µs for one row of 512 instead of 33. For
# 256 rows it takes 0.46 ms instead of 0.28.
FEW_ROWS = 64


class LayerNorm(TypedCell):
    """LayerNorm whose affine map is folded into the weights of the linear layers after it.

    ``(x_hat * gamma + beta) Wᵀ = x_hat (W * gamma)ᵀ + beta Wᵀ``, with ``x_hat`` the standardised rows.

    Args:
        dim: channels.
        outputs: number of linear layers.
    """

    def __init__(self, dim, outputs):
        super().__init__()
        self.gamma = Parameter(initializer("ones", (1, dim), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (1, dim), ms.float32), name="beta")
        self.standardise, self.layer_norm = shared_cell(Standardise), ops.LayerNorm(2, 1, 1e-5)
        self.matmul, self.product = ops.MatMul(), shared_cell(Product)
        self.add_bias = shared_cell(AddBias)
        self.fused = shared_cell(FusedNormLinear, outputs) if training_kernels_run(self) else None

    def construct(self, x, weights):
        """Normalise ``x: (rows, dim)`` and multiply by each of ``weights``, all ``(d, dim)``, to ``(rows, d)``."""
        if x.shape[0] <= FEW_ROWS:
            rows = widen(x).reshape((-1, 1, x.shape[1]))
            rows = self.layer_norm(rows, cast(self.gamma, rows.dtype), cast(self.beta, rows.dtype))[0]
            return tree_map(ops.partial(self.product, cast(rows.reshape(x.shape), x.dtype)), weights)
        if self.fused is not None and x.dtype == self.gamma.dtype == ms.float32:
            products = self.fused(x, self.gamma, self.beta, weights)
            return (products,) if len(weights) == 1 else products
        return tree_map(ops.partial(self.multiply, cast(self.standardise(widen(x)), x.dtype)), weights)

    def multiply(self, x, weight):
        """Standardised rows, after the affine map, times a weight."""
        if x.shape[0] < weight.shape[0]:  # few rows, as in decoding: the map of the rows is cheaper
            return self.product(x * cast(self.gamma, x.dtype) + cast(self.beta, x.dtype), weight)
        gamma = self.matmul(ops.ones((weight.shape[0], 1), weight.dtype), self.gamma)
        bias = self.product(self.beta, weight).reshape(-1)
        return self.add_bias(self.product(x, weight * gamma), bias)


class L2NormForward(TypedCell):
    """Rows divided by their length, or by 1e-12 where they are shorter, as PyTorch's ``normalize``.

    Computed in at least float32, where the squares of short rows are not 0.
    """

    def __init__(self):
        super().__init__()
        self.matmul, self.rsqrt = ops.MatMul(), ops.Rsqrt()

    def construct(self, x):
        """``x: (rows, d)``."""
        rows = widen(x)
        return cast(rows * self.inverse_length(rows), x.dtype)

    def inverse_length(self, x):
        return self.repeat(self.rsqrt(ops.maximum((x * x).sum(-1, keepdims=True), 1e-24)), x)

    def repeat(self, column, x):
        return self.matmul(column, ops.ones((1, x.shape[1]), x.dtype))


class L2Norm(GradientByHand, L2NormForward):
    def bprop(self, x, out, grad):
        rows, out, grad = widen(x), widen(out), widen(grad)
        # a row of zeros is divided by a constant
        longer = ((rows * rows).sum(-1, keepdims=True) > 1e-24).astype(rows.dtype)
        along = self.repeat((out * grad).sum(-1, keepdims=True) * longer, rows)
        return (cast(self.inverse_length(rows) * (grad - out * along), x.dtype),)


class WeightedSumForward(TypedCell):
    """``x * a + y * b`` of two tensors of one shape and two factors, ``()``."""

    def construct(self, x, y, a, b):
        return x * cast(a, x.dtype) + y * cast(b, x.dtype)


class WeightedSum(GradientByHand, WeightedSumForward):
    """The same; the gradients of the factors are computed by :func:`dot`, in at least float32."""

    def bprop(self, x, y, a, b, out, grad):
        dx, dy, wide = grad * cast(a, grad.dtype), grad * cast(b, grad.dtype), widen(grad)
        return dx, dy, cast(dot(wide, widen(x)), a.dtype), cast(dot(wide, widen(y)), b.dtype)


class GEGLUForward(TypedCell):
    """``value * gelu(gate)``, exact GELU (Shazeer 2020, arXiv 2002.05202); ``ops.gelu`` takes three times as long.

    Computed in at least float32: the normal distribution's tail is the difference of two numbers near 0.5.
    """

    def __init__(self):
        super().__init__()
        self.erf, self.exp, self.mul = ops.Erf(), ops.Exp(), ops.Mul()

    def normal_cdf(self, x):  # by ops.Mul, as a graph takes x * number in a bprop for a part of the forward pass
        return 0.5 + self.mul(self.erf(self.mul(x, math.sqrt(0.5))), 0.5)

    def construct(self, value, gate):
        wide_gate = widen(gate)
        return cast(widen(value) * (wide_gate * self.normal_cdf(wide_gate)), value.dtype)


class GEGLU(GradientByHand, GEGLUForward):
    def bprop(self, value, gate, out, grad):
        dtype, value, gate, grad = value.dtype, widen(value), widen(gate), widen(grad)
        cdf = self.normal_cdf(gate)
        density = self.mul(self.exp(self.mul(gate * gate, -0.5)), 1 / math.sqrt(2 * math.pi))
        return cast(grad * (gate * cdf), dtype), cast(grad * value * (cdf + gate * density), dtype)


class FeedForward(Recomputable):
    """LayerNorm, GEGLU of inner size ``int(dim * mult * 2 / 3)``, linear layer; no biases.

    The arguments are those of :class:`FeedForwardOptions`.
    """

    @accepts(FeedForwardOptions)
    def __init__(self, options: FeedForwardOptions) -> None:
        super().__init__()
        self.options = options
        dim, inner = options.dim, int(options.dim * options.mult * 2 / 3)
        self.norm = LayerNorm(dim, 2)
        self.to_value, self.to_gate, self.to_out = dense(dim, inner), dense(dim, inner), dense(inner, dim)
        self.geglu, self.product = shared_cell(GEGLU), shared_cell(Product)
        self.dropout = dropout_cell(options.dropout)
        self.fused = shared_cell(FusedFeedForward) if can_compute(FusedFeedForward, self) else None

    def construct(self, x):
        """``x: (..., dim)`` of any floating type, returns the same shape."""
        x = self.typed(x)
        rows, gamma, beta = x.reshape((-1, x.shape[-1])), self.norm.gamma, self.norm.beta
        if self.fused is not None and x.dtype == gamma.dtype == ms.float32:
            out = self.fused(rows, gamma, beta, self.to_value.weight, self.to_gate.weight, self.to_out.weight)
            return out[0].reshape(x.shape)
        value, gate = self.norm(rows, (self.to_value.weight, self.to_gate.weight))
        inner = self.geglu(value, gate)
        if self.dropout is not None:
            inner = self.dropout(inner)
        return self.product(inner, self.to_out.weight).reshape(x.shape)


class SoftmaxCrossEntropyForward(TypedCell):
    """:class:`CrossEntropy` by MindSpore's own operators."""

    def __init__(self):
        super().__init__()
        self.log_softmax, self.exp, self.gather = ops.LogSoftmax(-1), ops.Exp(), ops.GatherD()
        self.one_hot, self.matmul = ops.OneHot(), ops.MatMul()

    def construct(self, logits, labels):
        return -self.gather(self.log_softmax(logits), 1, labels.reshape((-1, 1))).reshape(-1)


class SoftmaxCrossEntropy(GradientByHand, SoftmaxCrossEntropyForward):
    """The same with its gradient written by hand."""

    def bprop(self, logits, labels, out, grad):
        classes = logits.shape[1]
        # OneHot knows no float64
        targets = cast(self.one_hot(labels, classes, ops.ones((), ms.float32), ops.zeros((), ms.float32)), logits.dtype)
        error = self.exp(self.log_softmax(logits)) - targets
        return error * self.matmul(grad.reshape((-1, 1)), ops.ones((1, classes), grad.dtype)), ops.zeros_like(labels)


class CrossEntropy(TypedCell):
    """Cross-entropy in nats: ``logits: (rows, classes)``, ``labels: (rows,)`` int32, returns ``(rows,)``.

    Computed and returned in at least float32.
    """

    def __init__(self):
        super().__init__()
        self.softmax_cross_entropy = shared_cell(SoftmaxCrossEntropy)
        self.fused = shared_cell(FusedCrossEntropy) if training_kernels_run(self) else None

    def construct(self, logits, labels):
        logits = widen(logits)
        if self.fused is not None and logits.dtype == ms.float32:
            return self.fused(logits, labels.astype(ms.int32))
        return self.softmax_cross_entropy(logits, labels)
