"""Hyper-connections: several residual streams, and learned weights between them and a branch."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn, ops

from local_attention.constants import shared_cell
from local_attention.layers import AddBias
from local_attention.mindspore_quirks import TypedCell, tanh
from local_attention.precision import cast, widen


class HyperConnection(TypedCell):
    """The connection of a branch to ``streams`` residual streams, by learned weights that depend on them.

    Dynamic hyper-connections with RMSNorm (Zhu et al. 2024, arXiv 2409.19606, section 2.3 and appendix J, algorithm 2).
    Before training the branch reads stream ``index % streams`` and writes to all.

    Args:
        dim: channels.
        streams: number of streams.
        index: the branch's number in the model.
    """

    def __init__(self, dim: int, streams: int, index: int) -> None:
        super().__init__()
        self.dim, self.streams = dim, streams
        branch_input = np.zeros((streams, 1), np.float32)
        branch_input[index % streams] = 1

        def parameter(array, name):
            return Parameter(ms.Tensor(array, ms.float32), name=name)

        self.gamma = parameter(np.zeros(dim), "gamma")
        self.static_alpha = parameter(np.concatenate([branch_input, np.eye(streams)], 1), "static_alpha")
        self.dynamic_alpha_fn = parameter(np.zeros((dim, streams + 1)), "dynamic_alpha_fn")
        self.dynamic_alpha_scale = parameter(0.01, "dynamic_alpha_scale")
        self.static_beta = parameter(np.ones(streams), "static_beta")
        self.dynamic_beta_fn = parameter(np.zeros(dim), "dynamic_beta_fn")
        self.dynamic_beta_scale = parameter(0.01, "dynamic_beta_scale")
        self.matmul, self.add_bias = ops.MatMul(), shared_cell(AddBias)
        self.mix, self.mix_tn = ops.BatchMatMul(), ops.BatchMatMul(transpose_a=True)

    def weights(self, x):
        """``x: (rows, s, d)`` to alpha ``(rows, s, 1 + s)``, from stream to branch and streams, and beta ``(rows, s)``.

        The norm's scale is folded into the small matrix, its division into the products, which are narrow. Computed in
        at least float32.
        """
        rows, s, d = x.shape
        x = widen(x).reshape((rows * s, d))
        matrix = ops.cat((self.dynamic_alpha_fn, self.dynamic_beta_fn.reshape((d, 1))), 1)
        matrix = matrix * ((self.gamma + 1) * d**0.5).reshape((d, 1))
        length = ops.rsqrt(ops.maximum(self.matmul(x * x, ops.ones((d, 1), x.dtype)), 1e-24))
        dynamic = tanh(self.matmul(x, cast(matrix, x.dtype)) * length)
        alpha = (dynamic[:, : s + 1] * self.dynamic_alpha_scale).reshape((rows, s * (s + 1)))
        alpha = self.add_bias(alpha, self.static_alpha.reshape(-1)).reshape((rows, s, s + 1))
        beta = (dynamic[:, s + 1] * self.dynamic_beta_scale).reshape((rows, s))
        return alpha, self.add_bias(beta, self.static_beta)

    def pre(self, x):
        """The input of a branch, ``(rows, d)``, the mixed streams and beta, from the streams ``x: (rows, s, d)``."""
        alpha, beta = self.weights(x)
        dtype, x = x.dtype, widen(x)
        branch_input = self.mix_tn(alpha[:, :, :1], x).reshape((-1, self.dim))
        return cast(branch_input, dtype), cast(self.mix_tn(alpha[:, :, 1:], x), dtype), beta

    def post(self, out, mixed, beta):
        """Add a branch's output ``(rows, d)`` to the mixed streams: ``(rows, s, d)``."""
        added = self.mix(beta.reshape((-1, self.streams, 1)), widen(out).reshape((-1, 1, self.dim)))
        return cast(widen(mixed) + added, mixed.dtype)


class Residual(TypedCell):
    """The plain residual connection, in the same two steps: ``x: (rows, d)``."""

    def pre(self, x):
        return x, x, None

    def post(self, out, mixed, beta):
        return mixed + out


def connection(dim: int, streams: int, index: int) -> nn.Cell:
    """A :class:`HyperConnection` for several streams, a :class:`Residual` for one."""
    return HyperConnection(dim, streams, index) if streams > 1 else shared_cell(Residual)


def expand_streams(x, streams):
    """``(rows, d) -> (rows, streams, d)``: every stream begins as ``x``."""
    if streams == 1:
        return x
    return ops.stack((x,) * streams, 1)


def reduce_streams(x, streams):
    """The sum of the streams, ``(rows, streams, d) -> (rows, d)``."""
    if streams == 1:
        return x
    return x.sum(1)
