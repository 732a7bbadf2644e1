"""The fused operators beside attention, for sizes around their tiles of 64 rows and chunks of 1024."""

from math import erf, exp, pi

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from local_attention import LocalAttention, LocalMHA, kernels
from local_attention.backends.fused_layers import FusedCrossEntropy, FusedFeedForward, FusedL2Norm, FusedNormLinear
from local_attention.layers import CrossEntropy, FeedForward, LayerNorm
from tests.local_attention import reference
from tests.local_attention.cells import (
    ValueAndAllGradients,
    assert_gradients,
    both_modes,
    both_paths,
    needs_fused,
    portable,
    randomise,
    run,
    tensor,
    value_and_gradients,
)

pytestmark = needs_fused

DIM = 24


class Normed(nn.Cell):
    """LayerNorm and linear layers, whose weights are inputs, with their outputs side by side."""

    def __init__(self, outputs):
        super().__init__()
        self.norm = LayerNorm(DIM, outputs)

    def construct(self, x, *weights):
        return ops.cat(self.norm(x, weights), 1)


def check_both_paths(build, inputs, definition):
    """Output as defined in float64; gradients of inputs and parameters as MindSpore's own operators have them."""
    cell, other = build(), portable(build)
    p, _ = randomise(cell), randomise(other)
    wanted = definition(p, *inputs)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape) * len(wanted) ** -0.5
    results = [ValueAndAllGradients(net)(tensor(cotangent), *map(tensor, inputs)) for net in (cell, other)]
    np.testing.assert_allclose(results[0][0].asnumpy(), wanted, rtol=0, atol=1e-5)
    gradients = [[gradient.asnumpy() for of_kind in result[1] for gradient in of_kind] for result in results]
    for i, (gradient, of_portable) in enumerate(zip(*gradients, strict=True)):
        np.testing.assert_allclose(gradient, of_portable, rtol=0, atol=2e-5, err_msg=f"gradient {i}")


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200, 1023, 1024, 1025, 2100])
def test_the_feed_forward_and_its_gradients_are_the_same_for_any_number_of_rows(rows, rng):
    x = rng.standard_normal((rows, DIM))
    check_both_paths(
        lambda: FeedForward(DIM, 9), [x], lambda p, x: reference.feed_forward(x, p)
    )  # an inner size of 144


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_normalised_queries_and_keys_and_their_gradients_are_the_same_for_any_number_of_rows(rows, rng):
    scale = rng.standard_normal(DIM)
    x = rng.standard_normal((rows, DIM)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    x[rows // 2], x[rows // 3] = 0, 1e-14 * x[0]  # divided by 1e-12
    lengths = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    wanted, cotangent = x / lengths * scale, rng.standard_normal(x.shape) * lengths
    value, (dx, dscale) = value_and_gradients(FusedL2Norm(), [x, scale], cotangent)
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6)
    _, (wanted_dx, wanted_dscale) = value_and_gradients(portable(Normalised), [x, scale], cotangent)
    np.testing.assert_allclose(dx, wanted_dx, rtol=0, atol=2e-6)
    np.testing.assert_allclose(dscale, wanted_dscale, rtol=2e-6, atol=1e-6 * abs(cotangent).sum())


class Normalised(nn.Cell):
    """The same by MindSpore's own operators, as :class:`LocalMHA` has it."""

    def __init__(self):
        super().__init__()
        self.mha = LocalMHA(dim=DIM, window_size=4, dim_head=DIM, heads=1, qk_rmsnorm=True)

    def construct(self, x, scale):
        return self.mha.normalise(x, scale)


@pytest.mark.parametrize("rows", [65, 128, 1023, 1024, 1025, 2100])
@pytest.mark.parametrize("outputs", [[64], [65], [1, 64, 130], [5, 5, 5, 2]], ids=str)
def test_a_norm_with_linear_layers_and_its_gradients_are_the_same_for_any_number_of_rows(rows, outputs, rng):
    inputs = [rng.standard_normal((rows, DIM)), *(rng.standard_normal((size, DIM)) * DIM**-0.5 for size in outputs)]

    def definition(p, x, *weights):
        return np.concatenate([reference.layer_norm(x, p, "norm") @ weight.T for weight in weights], 1)

    check_both_paths(lambda: Normed(len(outputs)), inputs, definition)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 256, 1000])
def test_cross_entropy_and_its_gradient_are_the_same_for_any_number_of_rows_and_classes(rows, classes, rng):
    logits, labels, cotangent = (
        rng.standard_normal((rows, classes)) * 3,
        rng.integers(0, classes, rows),
        rng.random(rows),
    )
    value, (gradient, _) = value_and_gradients(CrossEntropy(), [logits, labels], cotangent)
    np.testing.assert_allclose(value, reference.cross_entropy(logits, labels), atol=1e-5)
    wanted = cotangent[:, None] * (reference.softmax(logits) - np.eye(classes)[labels])
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


# The operators themselves, all of their inputs against the definition


class OneAfterAnother(nn.Cell):
    """The results of FusedNormLinear side by side."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.norm_linear = outputs, FusedNormLinear(outputs)

    def construct(self, x, gamma, beta, *weights):
        products = self.norm_linear(x, gamma, beta, weights)
        return products if self.outputs == 1 else ops.cat(products, 1)


class Branch(nn.Cell):
    """The result of FusedFeedForward alone."""

    def __init__(self):
        super().__init__()
        self.feed_forward = FusedFeedForward()

    def construct(self, *inputs):
        return self.feed_forward(*inputs)[0]


def normed(x, gamma, beta, *weights):
    return np.concatenate([(reference.standardise(x) * gamma + beta) @ weight.T for weight in weights], 1)


def branch(x, gamma, beta, to_value, to_gate, to_out):
    x = reference.standardise(x) * gamma + beta
    return x @ to_value.T * reference.gelu(x @ to_gate.T) @ to_out.T


OPERATORS = {
    "norm and a linear layer": (lambda: OneAfterAnother(1), normed, [(70, DIM)]),
    "norm and linear layers": (lambda: OneAfterAnother(3), normed, [(3, DIM), (70, DIM), (2, DIM)]),
    "feed-forward": (Branch, branch, [(70, DIM), (70, DIM), (DIM, 70)]),
}


@both_modes
@pytest.mark.parametrize("rows", [1, 64, 1100])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_the_gradients_of_all_inputs_are_those_of_the_definition(mode, name, rows, rng):
    build, definition, weights = OPERATORS[name]
    inputs = [rng.standard_normal((rows, DIM)), 1 + 0.5 * rng.standard_normal((1, DIM)), rng.standard_normal((1, DIM))]
    inputs += [rng.standard_normal(shape) * shape[1] ** -0.5 for shape in weights]
    wanted = definition(*inputs)
    cotangent = rng.standard_normal(wanted.shape) * rows**-0.5
    value, gradients = value_and_gradients(build(), inputs, cotangent)
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5)
    assert_gradients(definition, inputs, cotangent, gradients)


def test_the_gelu_and_its_derivative_are_the_exact_ones(rng):
    """With values of 1 and gates that the weights are, the gradients of the weights are GELU and its derivative."""
    gates = np.linspace(-12, 12, 2401)
    inputs = [rng.standard_normal((1, 2)), np.zeros((1, 2)), np.array([[1.0, 0.0]])]  # so that the norm gives (1, 0)
    inputs += [np.array([[1.0, 0.0]] * len(gates)), np.stack([gates, gates], 1), np.ones((2, len(gates)))]
    _, (*_, of_values, of_gates, _) = value_and_gradients(Branch(), inputs, np.array([[1.0, 0.0]]))
    derivative = [(1 + erf(x / 2**0.5)) / 2 + x * exp(-(x**2) / 2) / (2 * pi) ** 0.5 for x in gates]
    np.testing.assert_allclose(of_values[:, 0], reference.gelu(gates), rtol=0, atol=2e-6)
    np.testing.assert_allclose(of_gates[:, 0], derivative, rtol=0, atol=2e-6)


def test_a_norm_does_not_suffer_from_a_large_mean_or_a_small_variance(rng):
    cell = Normed(1)
    p = randomise(cell)
    x, weight = rng.standard_normal((100, DIM)), rng.standard_normal((5, DIM)) * DIM**-0.5
    for changed, atol in ((x + 100, 1e-4), (x * 1e-3, 1e-5), (np.full_like(x, 0.5), 1e-5)):
        wanted = reference.layer_norm(changed, p, "norm") @ weight.T
        value, gradients = value_and_gradients(cell, [changed, weight], np.ones((100, 5)))
        np.testing.assert_allclose(value, wanted, rtol=0, atol=atol)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


# What is not a number is not hidden


@both_paths
@pytest.mark.parametrize("build", [lambda: FeedForward(DIM, 4), lambda: Normed(2)], ids=["feed-forward", "norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_row_and_reaches_the_gradients_of_weights(build, bad, rng):
    cell = build()
    p = randomise(cell)
    x = rng.standard_normal((100, DIM))
    x[70, 3] = bad
    inputs = [x] if "to_out.weight" in p else [x, *rng.standard_normal((2, 5, DIM))]
    out = run(cell, *inputs)
    value, (of_inputs, of_parameters) = ValueAndAllGradients(cell)(tensor(np.ones(out.shape)), *map(tensor, inputs))
    for rows in (value.asnumpy(), of_inputs[0].asnumpy()):
        np.testing.assert_array_equal(np.isnan(rows).any(-1), np.arange(100) == 70)
    for gradient, parameter in zip(of_parameters, cell.trainable_params()):
        if parameter.name != "norm.beta":
            assert np.isnan(gradient.asnumpy()).any(), parameter.name
    for gradient in of_inputs[1:]:
        assert np.isnan(gradient.asnumpy()).any()


@both_paths
def test_logits_that_are_not_numbers_give_such_losses_in_their_rows_alone(rng):
    logits, labels = rng.standard_normal((100, 20)), rng.integers(0, 20, 100)
    logits[70, 3], logits[80] = np.nan, np.nan
    value, (gradient, _) = value_and_gradients(CrossEntropy(), [logits, labels], np.ones(100))
    bad = np.isin(np.arange(100), [70, 80])
    np.testing.assert_array_equal(~np.isfinite(value), bad)
    np.testing.assert_array_equal((~np.isfinite(gradient)).any(-1), bad)


@both_paths
def test_logits_of_any_size_overflow_nothing(rng):
    logits = rng.standard_normal((100, 20)) * 1e4
    logits[:, 5], logits[:, 6] = -np.inf, -3e38
    labels = logits.argmax(-1)
    value, (gradient, _) = value_and_gradients(CrossEntropy(), [logits, labels], np.ones(100))
    np.testing.assert_allclose(value, reference.cross_entropy(np.maximum(logits, -1e300), labels), atol=1e-2)
    assert np.isfinite(gradient).all()


# What does not fit


@pytest.mark.parametrize(
    ("mode", "label"),
    [*(("eager", label) for label in (20, -1, 10**9, -(2**31))), pytest.param("graph", 20, marks=pytest.mark.slow)],
    indirect=["mode"],
)
def test_a_label_that_is_no_class_is_refused(mode, label, rng):
    logits, labels = rng.standard_normal((100, 20)), rng.integers(0, 20, 100)
    labels[70] = label
    with pytest.raises(RuntimeError, match="cross_entropy_forward"):
        run(CrossEntropy(), logits, labels)
    with pytest.raises(RuntimeError, match="cross_entropy_backward"):
        FusedCrossEntropy().backward(tensor(logits), tensor(labels), tensor(np.ones(100)))


@both_modes
def test_shapes_that_do_not_fit_are_refused(mode, rng):
    x, weight = rng.standard_normal((80, DIM + 1)), rng.standard_normal((5, DIM))
    with pytest.raises(ValueError, match=rf"expected x: \(rows, {DIM}\), got \(80, {DIM + 1}\)"):
        run(FeedForward(DIM, 4), x)
    with pytest.raises(ValueError, match=rf"expected x: \(rows, {DIM}\), got \(80, {DIM + 1}\)"):
        run(Normed(1), x, weight)
    with pytest.raises(ValueError, match=rf"expected x: \(rows, {DIM - 1}\), got \(80, {DIM}\)"):
        run(Normed(1), x[:, 1:], weight[:, 1:])
    for labels in (3, 8):
        with pytest.raises(ValueError, match=rf"expected labels: \(5,\), got \({labels},\)"):
            run(CrossEntropy(), np.zeros((5, 7)), np.zeros(labels, int))


# Other types


def test_logits_of_another_type_take_the_portable_path(rng):
    logits, labels = rng.standard_normal((4, 5)), np.array([0, 4, 2, 2])
    losses = CrossEntropy()(ms.Tensor(logits, ms.float64), tensor(labels))
    assert losses.dtype == ms.float64
    np.testing.assert_allclose(losses.asnumpy(), reference.cross_entropy(logits, labels), atol=1e-5)


# Products in bfloat16


@pytest.fixture
def in_bfloat16():
    """Switch products in bfloat16 on, where the processor has them, and off again."""
    try:
        kernels.multiply_in_bfloat16(True)
    except ValueError as error:
        pytest.skip(str(error))
    yield
    kernels.multiply_in_bfloat16(False)


@pytest.fixture
def results(rng):
    """A function that computes outputs and gradients of attention and feed-forward."""
    cells = [LocalMHA(dim=DIM, window_size=32, dim_head=64, heads=2, causal=True, prenorm=True), FeedForward(DIM, 9)]
    for cell in cells:
        randomise(cell)
    inputs = [rng.standard_normal((2, 100, DIM)), rng.standard_normal((200, DIM))]

    def compute():
        found = [ValueAndAllGradients(cell)(tensor(x / 20), tensor(x)) for cell, x in zip(cells, inputs, strict=True)]
        return [x.asnumpy() for value, gradients in found for x in (value, *gradients[0], *gradients[1])]

    return compute


def test_products_in_bfloat16_are_close_to_those_in_float32_which_come_back(results, in_bfloat16):
    rounded = results()
    kernels.multiply_in_bfloat16(False)
    exact = results()
    errors = [abs(a - b).max() / abs(b).max() for a, b in zip(rounded, exact, strict=True)]
    assert max(errors) < 2**-6 and np.median(errors) > 2**-12  # a rounding is of 2**-9 at most
    kernels.multiply_in_bfloat16(True)
    for a, b in zip(results(), rounded, strict=True):
        np.testing.assert_array_equal(a, b)


def test_attention_of_heads_is_not_rounded(in_bfloat16, rng):
    q, k, v = map(tensor, rng.standard_normal((3, 2, 96, 16)))
    cell = LocalAttention(window_size=32, causal=True)
    with_option = cell(q, k, v).asnumpy()
    kernels.multiply_in_bfloat16(False)
    np.testing.assert_array_equal(with_option, cell(q, k, v).asnumpy())


def test_nan_stays_nan_in_bfloat16(in_bfloat16, rng):
    x = rng.standard_normal((70, DIM))
    x[3, 5] = np.nan
    out = FeedForward(DIM, 9)(tensor(x)).asnumpy()
    assert np.isnan(out[3]).all() and np.isfinite(np.delete(out, 3, 0)).all()
