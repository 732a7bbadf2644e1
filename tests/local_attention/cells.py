"""Handling of cells that the library's tests share."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from mindspore import nn, ops

from local_attention import kernels
from tests.local_attention import reference

both_modes = pytest.mark.parametrize("mode", ["graph", "eager"], indirect=True)
in_a_graph = pytest.mark.parametrize("mode", ["graph"], indirect=True)
slowly_in_a_graph = pytest.mark.parametrize(
    "mode", ["eager", pytest.param("graph", marks=pytest.mark.slow)], indirect=True
)
# The fused operators in C++ for whole sequences are optional.
needs_fused = pytest.mark.skipif(
    not (kernels.library() and kernels.has_gemm()), reason="the operators in C++ do not run here"
)
# For assert_gradients: along random directions; in the slow set each entry by itself.
directions_or_entries = pytest.mark.parametrize(
    "every_entry", [pytest.param(False, id="directions"), pytest.param(True, marks=pytest.mark.slow, id="entries")]
)


def both_paths(test):
    """Let cells that the test builds compute by fused operators in C++, and again by MindSpore's own."""
    paths = [pytest.param("fused", marks=needs_fused), "portable"]
    return pytest.mark.usefixtures("path")(pytest.mark.parametrize("path", paths, indirect=True)(test))


def portable(build):
    """What ``build()`` gives without the operators in C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        return build()


def examples(count):
    """Hypothesis settings for tests in which an example costs milliseconds to seconds."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def for_all(few, many, *strategies, **named):
    """Decorate a property, to be tested with ``few`` examples of hypothesis, and with ``many`` in the slow set."""

    def decorate(holds):
        def test(count):
            examples(count)(given(*strategies, **named)(holds))()

        test.__name__, test.__doc__, test.__module__ = holds.__name__, holds.__doc__, holds.__module__
        return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])(test)

    return decorate


def tensor(x, dtype=ms.float32):
    """Floating numbers as float32, or another type, whole numbers as int32."""
    x = np.asarray(x)
    return ms.Tensor(x, dtype if x.dtype.kind == "f" else ms.int32)


def run(cell, *inputs):
    """The array that a cell gives for arrays."""
    return cell(*map(tensor, inputs)).asnumpy()


class ValueAndGradients(nn.Cell):
    """``(net(*inputs), gradients for inputs)`` of ``(cotangent, *inputs)``, compiled as one graph."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net
        self.grad = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, cotangent, *inputs):
        return self.net(*inputs), self.grad(self.net)(*inputs, cotangent)


def value_and_gradients(net, inputs, cotangent):
    """The output of ``net`` and the gradients of ``sum(output * cotangent)`` for its inputs, as arrays."""
    value, gradients = ValueAndGradients(net)(tensor(cotangent), *map(tensor, inputs))
    return value.asnumpy(), [gradient.asnumpy() for gradient in gradients]


def assert_gradients(function, inputs, cotangent, gradients, every_entry=False, err_msg="", rtol=1e-7, atol=1e-4):
    """``gradients`` are those of ``sum(function(*inputs) * cotangent)``.

    Unless ``every_entry``, only the derivatives along some random directions are compared. They are made of ones and
    minus ones, so that a wrong entry changes them by all of its error.
    """
    rng = np.random.default_rng(0)
    for i, gradient in enumerate(gradients):
        x = np.asarray(inputs[i], np.float64)
        assert gradient.shape == x.shape, err_msg

        def along(step, direction, i=i, x=x):
            moved = np.asarray(x + step[0] * direction)
            return (function(*inputs[:i], moved, *inputs[i + 1 :]) * cotangent).sum()

        if every_entry:
            (wanted,) = reference.numerical_gradients(
                lambda x, i=i: function(*inputs[:i], x, *inputs[i + 1 :]), [x], cotangent
            )
            np.testing.assert_allclose(gradient, wanted, rtol, atol, err_msg=f"{err_msg} input {i}")
            continue
        for _ in range(3):
            direction = rng.choice([-1.0, 1.0], x.shape)
            wanted = reference.numerical_gradient(lambda step, d=direction, f=along: f(step, d), [0.0])[0]
            found = (gradient.astype(np.float64) * direction).sum()
            np.testing.assert_allclose(found, wanted, rtol, atol, err_msg=f"{err_msg} input {i}")


class ValueAndParameterGradients(nn.Cell):
    """``(net(*inputs), gradients for the trainable parameters)`` of a scalar ``net``."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net
        self.parameters = ms.ParameterTuple(net.trainable_params())
        self.grad = ops.GradOperation(get_by_list=True)

    def construct(self, *inputs):
        return self.net(*inputs), self.grad(self.net, self.parameters)(*inputs)


def value_and_parameter_gradients(net, *inputs):
    """The scalar that ``net`` gives and, by parameter, its gradients."""
    cell = ValueAndParameterGradients(net)
    value, gradients = cell(*map(tensor, inputs))
    return float(value.asnumpy()), {p.name: g.asnumpy() for p, g in zip(cell.parameters, gradients, strict=True)}


class ValueAndAllGradients(nn.Cell):
    """``(net(*inputs), (gradients for inputs, gradients for parameters))`` of ``(cotangent, *inputs)``."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net
        self.parameters = ms.ParameterTuple(net.trainable_params())
        self.grad = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, cotangent, *inputs):
        return self.net(*inputs), self.grad(self.net, self.parameters)(*inputs, cotangent)


class Loss(nn.Cell):
    """The loss of a LocalTransformer as a network of one input, as a train step needs it."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x):
        return self.model(x, return_loss=True)


def randomise(cell, seed=0):
    """Give a cell parameters that make every part of it matter; returns them by name, in float64."""
    rng = np.random.default_rng(seed)
    for name, parameter in cell.parameters_and_names():
        value = rng.standard_normal(parameter.shape)
        if name.endswith("gamma"):
            value = 1 + 0.5 * value
        elif name.endswith("static_alpha"):
            value *= 0.5  # a mixing matrix of a large norm would let the streams grow
        elif name.endswith("weight"):
            value *= parameter.shape[1] ** -0.5
        parameter.set_data(tensor(value))
    return parameters(cell)


def parameters(cell):
    """A cell's parameters by name, in float64."""
    return {name: parameter.asnumpy().astype(np.float64) for name, parameter in cell.parameters_and_names()}
