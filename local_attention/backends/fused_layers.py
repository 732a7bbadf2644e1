"""What a layer computes beside attention, by fused operators in C++ for whole sequences; see kernels/README.md."""

from mindspore import ops

from local_attention.kernels import OperatorCell, operator, training_kernels_run
from local_attention.mindspore_quirks import GradientByHand


class NormLinearForward(OperatorCell):
    def construct(self, x, gamma, beta, weights):
        return self.operator(x, gamma, beta, *weights)


class FusedNormLinear(GradientByHand):
    """LayerNorm and then each of several linear layers: :class:`LayerNorm` in one operator.

    Called with ``x: (rows, dim)``, gamma, beta and weights, each ``(d, dim)``; returns ``(rows, d)``, of several
    weights as a tuple. (In eager mode, the gradient of a tuple of one is no tuple.)

    Args:
        outputs: number of linear layers.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__(forward=NormLinearForward("norm_linear_forward", norm_linear_shapes, outputs))
        self.outputs = outputs
        self.backward = operator("norm_linear_backward", inputs_as_shapes(3 + outputs), 3 + outputs)

    def bprop(self, x, gamma, beta, weights, out, grad):
        w, g = weights, grad  # written out: a call with * is not in the scope of GradientByHand
        if self.outputs == 1:
            gradients = self.backward(x, gamma, beta, w[0], g)
        elif self.outputs == 2:
            gradients = self.backward(x, gamma, beta, w[0], w[1], g[0], g[1])
        elif self.outputs == 3:
            gradients = self.backward(x, gamma, beta, w[0], w[1], w[2], g[0], g[1], g[2])
        else:
            gradients = self.backward(x, gamma, beta, w[0], w[1], w[2], w[3], g[0], g[1], g[2], g[3])
        return gradients[0], gradients[1], gradients[2], gradients[3:]


def norm_linear_shapes(x, gamma, beta, *weights):
    for dim in [gamma[1], *[weight[1] for weight in weights]]:
        check(x[1:] == [dim], f"x: (rows, {dim})", x)
    shapes = tuple([x[0], weight[0]] for weight in weights)
    return shapes if len(shapes) > 1 else shapes[0]


def inputs_as_shapes(count):
    """The shapes of gradients of the first ``count`` inputs."""
    return lambda *shapes: shapes[:count]


class FusedFeedForward(GradientByHand):
    """:class:`FeedForward` in one operator. For the backward pass it keeps the two halves of the widest activations.

    Called with ``x: (rows, dim)``, gamma, beta and the three weights; returns ``(rows, dim)`` and twice
    ``(rows, inner)``, which only ``bprop`` needs.
    """

    computes = frozenset({"dim", "mult"})
    is_available = staticmethod(training_kernels_run)

    def __init__(self) -> None:
        super().__init__(forward=OperatorCell("feed_forward_forward", feed_forward_shapes, 3))
        self.backward = operator("feed_forward_backward", inputs_as_shapes(6), 6)

    def bprop(self, x, gamma, beta, to_value, to_gate, to_out, out, grad):
        grad = ops.depend(grad[0], gamma)  # in the scope of GradientByHand
        return self.backward(x, gamma, beta, to_value, to_gate, to_out, out[1], out[2], grad)


def feed_forward_shapes(x, gamma, beta, to_value, *others):
    check(x[1:] == gamma[1:], f"x: (rows, {gamma[1]})", x)
    inner = [x[0], to_value[0]]
    return x, inner, inner


class FusedL2Norm(GradientByHand):
    """Rows ``x: (rows, d)`` of unit length, see :class:`L2Norm`, times a scale ``(d,)``."""

    def __init__(self) -> None:
        super().__init__(forward=OperatorCell("l2_norm_forward"))
        self.backward = operator("l2_norm_backward", inputs_as_shapes(2), 2)

    def bprop(self, x, scale, out, grad):
        return self.backward(x, scale, grad)


class FusedCrossEntropy(GradientByHand):
    """:class:`CrossEntropy` in one operator: ``logits: (rows, classes)``, ``labels: (rows,)`` int32 to ``(rows,)``."""

    def __init__(self) -> None:
        super().__init__(forward=OperatorCell("cross_entropy_forward", cross_entropy_shapes))
        self.backward = operator("cross_entropy_backward")

    def bprop(self, logits, labels, out, grad):
        return self.backward(logits, labels, grad), ops.zeros_like(labels)


def cross_entropy_shapes(logits, labels):
    check(labels == logits[:1], f"labels: ({logits[0]},)", labels)
    return labels


def check(fits, expected, got):
    """Refuse shapes that do not fit, as the operators themselves do not look."""
    if not fits:
        raise ValueError(f"expected {expected}, got {tuple(got)}")
