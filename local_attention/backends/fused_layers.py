"""What a layer computes beside attention, by fused operators in C++ for whole sequences; see kernels/README.md."""

from mindspore import nn, ops

from local_attention.kernels import operator, training_kernels_run


class FusedNormLinear(nn.Cell):
    """LayerNorm and then each of several linear layers: :class:`LayerNorm` in one operator.

    Args:
        outputs: number of linear layers.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.forward = operator("norm_linear_forward", norm_linear_shapes, outputs)
        self.backward = operator("norm_linear_backward", inputs_as_shapes(3 + outputs), 3 + outputs)

    def construct(self, x, gamma, beta, weights):
        """``x: (rows, dim)``, ``weights``: each ``(d, dim)``; returns ``(rows, d)``, of several weights as a tuple.

        (In eager mode, the gradient of a tuple of one is no tuple.)
        """
        return self.forward(x, gamma, beta, *weights)

    def bprop(self, x, gamma, beta, weights, out, grad):
        grads = (grad,) if self.outputs == 1 else grad
        gradients = self.backward(x, gamma, beta, *weights, *grads)
        return gradients[0], gradients[1], gradients[2], gradients[3:]


def norm_linear_shapes(x, gamma, beta, *weights):
    for dim in [gamma[1], *[weight[1] for weight in weights]]:
        check(x[1:] == [dim], f"x: (rows, {dim})", x)
    shapes = tuple([x[0], weight[0]] for weight in weights)
    return shapes if len(shapes) > 1 else shapes[0]


def inputs_as_shapes(count):
    """The shapes of gradients of the first ``count`` inputs."""
    return lambda *shapes: shapes[:count]


class FusedFeedForward(nn.Cell):
    """:class:`FeedForward` in one operator. For the backward pass it keeps the two halves of the widest activations."""

    computes = frozenset({"dim", "mult"})
    is_available = staticmethod(training_kernels_run)

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("feed_forward_forward", feed_forward_shapes, 3)
        self.backward = operator("feed_forward_backward", inputs_as_shapes(6), 6)

    def construct(self, x, gamma, beta, to_value, to_gate, to_out):
        """``x: (rows, dim)``; returns ``(rows, dim)`` and twice ``(rows, inner)``, which only ``bprop`` needs."""
        return self.forward(x, gamma, beta, to_value, to_gate, to_out)

    def bprop(self, x, gamma, beta, to_value, to_gate, to_out, out, grad):
        return self.backward(x, gamma, beta, to_value, to_gate, to_out, out[1], out[2], grad[0])


def feed_forward_shapes(x, gamma, beta, to_value, *others):
    check(x[1:] == gamma[1:], f"x: (rows, {gamma[1]})", x)
    inner = [x[0], to_value[0]]
    return x, inner, inner


class FusedCrossEntropy(nn.Cell):
    """:class:`CrossEntropy` in one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = operator("cross_entropy_forward", cross_entropy_shapes)
        self.backward = operator("cross_entropy_backward")

    def construct(self, logits, labels):
        """``logits: (rows, classes)``, ``labels: (rows,)`` int32, returns ``(rows,)``."""
        return self.forward(logits, labels)

    def bprop(self, logits, labels, out, grad):
        return self.backward(logits, labels, grad), ops.zeros_like(labels)


def cross_entropy_shapes(logits, labels):
    check(labels == logits[:1], f"labels: ({logits[0]},)", labels)
    return labels


def check(fits, expected, got):
    """Refuse shapes that do not fit, as the operators themselves do not look."""
    if not fits:
        raise ValueError(f"expected {expected}, got {tuple(got)}")
