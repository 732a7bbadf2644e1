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
from local_attention.constants import shared_cell
from local_attention.dropout import Recomputable, dropout_cell
from local_attention.kernels import training_kernels_run
from local_attention.mindspore_quirks import GradientByHand
from local_attention.options import FeedForwardOptions, accepts

# Applies a function to each of many tensors. A loop over them nests the graph one level deeper per tensor, and a list
# comprehension becomes dozens of functions: with this map instead, 12 layers compile in 9 s and not in 20.
tree_map = ops.Map()


def dense(dim_in: int, dim_out: int) -> nn.Dense:
    """A linear layer without bias, its weight ``(dim_out, dim_in)`` uniform in ``±dim_in ** -0.5`` as in PyTorch."""
    return nn.Dense(dim_in, dim_out, weight_init=HeUniform(math.sqrt(5)), has_bias=False)


class AddBiasForward(nn.Cell):
    """``x + bias`` over rows."""

    def __init__(self):
        super().__init__()
        self.bias_add, self.matmul = ops.BiasAdd(), ops.MatMul()

    def construct(self, x, bias):
        """``x: (rows, d)``, ``bias: (d,)``."""
        return self.bias_add(x, bias)


class AddBias(GradientByHand, AddBiasForward):
    """The same; the bias' gradient is a product with ones (0.1 ms), not BiasAddGrad (1.2 ms)."""

    def __init__(self):
        super().__init__(AddBiasForward())

    def bprop(self, x, bias, out, grad):
        return grad, self.matmul(ops.ones((1, grad.shape[0]), grad.dtype), grad).reshape(-1)


class StandardiseForward(nn.Cell):
    """``(x - mean) / sqrt(variance + 1e-5)`` of rows: LayerNorm (Ba et al. 2016, arXiv 1607.06450), no affine map."""

    def __init__(self, dim):
        super().__init__()
        self.mean_column = ms.Tensor(np.full((dim, 1), 1 / dim, np.float32))
        self.ones_row = ms.Tensor(np.ones((1, dim), np.float32))
        self.matmul, self.rsqrt = ops.MatMul(), ops.Rsqrt()

    def mean(self, x):
        return self.matmul(self.matmul(x, self.mean_column), self.ones_row)

    def centre_and_scale(self, x):
        centred = x - self.mean(x)
        variance = self.matmul(centred * centred, self.mean_column)
        return centred, self.matmul(self.rsqrt(variance + 1e-5), self.ones_row)

    def construct(self, x):
        """``x: (rows, dim)``."""
        centred, scale = self.centre_and_scale(x)
        return centred * scale


class Standardise(GradientByHand, StandardiseForward):
    def __init__(self, dim):
        super().__init__(StandardiseForward(dim), dim)

    def bprop(self, x, out, grad):
        _, scale = self.centre_and_scale(x)
        return (scale * (grad - self.mean(grad) - out * self.mean(grad * out)),)


# Up to this many rows, as in decoding, MindSpore's own LayerNorm is faster: 3 µs for one row of 512 instead of 33. For
# 256 rows it takes 0.46 ms instead of 0.28.
FEW_ROWS = 64


class LayerNorm(nn.Cell):
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
        self.standardise, self.layer_norm = shared_cell(Standardise, dim), ops.LayerNorm(2, 1, 1e-5)
        self.matmul, self.matmul_nt = ops.MatMul(), ops.MatMul(transpose_b=True)
        self.add_bias = shared_cell(AddBias)
        self.fused = shared_cell(FusedNormLinear, outputs) if training_kernels_run(self) else None

    def construct(self, x, weights):
        """Normalise ``x: (rows, dim)`` and multiply by each of ``weights``, all ``(d, dim)``, to ``(rows, d)``."""
        if x.shape[0] <= FEW_ROWS:
            x = self.layer_norm(x.reshape((-1, 1, x.shape[1])), self.gamma, self.beta)[0].reshape(x.shape)
            return tree_map(ops.partial(self.matmul_nt, x), weights)
        if self.fused is not None and x.dtype == ms.float32:
            products = self.fused(x, self.gamma, self.beta, weights)
            return (products,) if len(weights) == 1 else products
        return tree_map(ops.partial(self.multiply, self.standardise(x)), weights)

    def multiply(self, x, weight):
        """Standardised rows, after the affine map, times a weight."""
        if x.shape[0] < weight.shape[0]:  # few rows, as in decoding: the map of the rows is cheaper
            return self.matmul_nt(x * self.gamma + self.beta, weight)
        gamma = self.matmul(ops.ones((weight.shape[0], 1), weight.dtype), self.gamma)
        bias = self.matmul_nt(self.beta, weight).reshape(-1)
        return self.add_bias(self.matmul_nt(x, weight * gamma), bias)


class L2NormForward(nn.Cell):
    """Rows divided by their length, or by 1e-12 where they are shorter, as PyTorch's ``normalize``."""

    def __init__(self):
        super().__init__()
        self.matmul, self.rsqrt = ops.MatMul(), ops.Rsqrt()

    def construct(self, x):
        """``x: (rows, d)``."""
        return x * self.inverse_length(x)

    def inverse_length(self, x):
        return self.repeat(self.rsqrt(ops.maximum((x * x).sum(-1, keepdims=True), 1e-24)), x)

    def repeat(self, column, x):
        return self.matmul(column, ops.ones((1, x.shape[1]), x.dtype))


class L2Norm(GradientByHand, L2NormForward):
    def __init__(self):
        super().__init__(L2NormForward())

    def bprop(self, x, out, grad):
        longer = ((x * x).sum(-1, keepdims=True) > 1e-24).astype(x.dtype)  # a row of zeros is divided by a constant
        along = self.repeat((out * grad).sum(-1, keepdims=True) * longer, x)
        return (self.inverse_length(x) * (grad - out * along),)


class GEGLUForward(nn.Cell):
    """``value * gelu(gate)``, exact GELU (Shazeer 2020, arXiv 2002.05202); ``ops.gelu`` takes three times as long."""

    def __init__(self):
        super().__init__()
        self.erf, self.exp, self.mul = ops.Erf(), ops.Exp(), ops.Mul()

    def normal_cdf(self, x):  # by ops.Mul, as a graph takes x * number in a bprop for a part of the forward pass
        return 0.5 + self.mul(self.erf(self.mul(x, math.sqrt(0.5))), 0.5)

    def construct(self, value, gate):
        return value * (gate * self.normal_cdf(gate))


class GEGLU(GradientByHand, GEGLUForward):
    def __init__(self):
        super().__init__(GEGLUForward())

    def bprop(self, value, gate, out, grad):
        cdf = self.normal_cdf(gate)
        density = self.mul(self.exp(self.mul(gate * gate, -0.5)), 1 / math.sqrt(2 * math.pi))
        return grad * (gate * cdf), grad * value * (cdf + gate * density)


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
        self.geglu, self.matmul_nt = shared_cell(GEGLU), ops.MatMul(transpose_b=True)
        self.dropout = dropout_cell(options.dropout)
        self.fused = shared_cell(FusedFeedForward) if can_compute(FusedFeedForward, self) else None

    def construct(self, x):
        """``x: (..., dim)``, returns the same shape."""
        rows = x.reshape((-1, x.shape[-1]))
        if self.fused is not None and x.dtype == ms.float32:
            gamma, beta = self.norm.gamma, self.norm.beta
            out = self.fused(rows, gamma, beta, self.to_value.weight, self.to_gate.weight, self.to_out.weight)
            return out[0].reshape(x.shape)
        value, gate = self.norm(rows, (self.to_value.weight, self.to_gate.weight))
        inner = self.geglu(value, gate)
        if self.dropout is not None:
            inner = self.dropout(inner)
        return self.matmul_nt(inner, self.to_out.weight).reshape(x.shape)


class SoftmaxCrossEntropyForward(nn.Cell):
    """:class:`CrossEntropy` by MindSpore's own operators."""

    def __init__(self):
        super().__init__()
        self.log_softmax, self.exp, self.gather = ops.LogSoftmax(-1), ops.Exp(), ops.GatherD()
        self.one_hot, self.matmul = ops.OneHot(), ops.MatMul()

    def construct(self, logits, labels):
        return -self.gather(self.log_softmax(logits), 1, labels.reshape((-1, 1))).reshape(-1)


class SoftmaxCrossEntropy(GradientByHand, SoftmaxCrossEntropyForward):
    """The same with its gradient written by hand."""

    def __init__(self):
        super().__init__(SoftmaxCrossEntropyForward())

    def bprop(self, logits, labels, out, grad):
        classes = logits.shape[1]
        error = self.exp(self.log_softmax(logits)) - self.one_hot(
            labels, classes, ops.ones((), logits.dtype), ops.zeros((), logits.dtype)
        )
        return error * self.matmul(grad.reshape((-1, 1)), ops.ones((1, classes), grad.dtype)), ops.zeros_like(labels)


class CrossEntropy(nn.Cell):
    """Cross-entropy in nats: ``logits: (rows, classes)``, ``labels: (rows,)`` int32, returns ``(rows,)``."""

    def __init__(self):
        super().__init__()
        self.softmax_cross_entropy = shared_cell(SoftmaxCrossEntropy)
        self.fused = shared_cell(FusedCrossEntropy) if training_kernels_run(self) else None

    def construct(self, logits, labels):
        if self.fused is not None and logits.dtype == ms.float32:
            return self.fused(logits, labels.astype(ms.int32))
        return self.softmax_cross_entropy(logits, labels)
