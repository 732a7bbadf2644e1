import numpy as np
import pytest
from mindspore import nn, ops

from local_attention.layers import (
    GEGLU,
    AddBias,
    CrossEntropy,
    FeedForward,
    L2Norm,
    LayerNorm,
    Standardise,
    dense,
)
from tests.local_attention import reference
from tests.local_attention.cells import (
    assert_gradients,
    both_modes,
    both_paths,
    parameters,
    randomise,
    run,
    tensor,
    value_and_gradients,
)

LABELS = np.array([0, 4, 2, 2])
GAMMA, BETA = "gamma", "beta"

# name: cell, the same in NumPy, shapes of the inputs
JOBS = {
    "Standardise": (Standardise(), reference.standardise, [(4, 6)]),
    "L2Norm": (L2Norm(), reference.unit, [(4, 6)]),
    "AddBias": (AddBias(), lambda x, bias: x + bias, [(4, 6), (6,)]),
    "GEGLU": (GEGLU(), lambda value, gate: value * reference.gelu(gate), [(4, 6), (4, 6)]),
}


@both_modes
@pytest.mark.parametrize("job", JOBS)
def test_output_and_gradients_are_those_of_the_definition(mode, job, rng):
    cell, definition, shapes = JOBS[job]
    inputs = [rng.standard_normal(shape) for shape in shapes]
    cotangent = rng.standard_normal(shapes[0])
    value, gradients = value_and_gradients(cell, inputs, cotangent)
    np.testing.assert_allclose(value, definition(*inputs), atol=1e-5)
    for gradient, wanted in zip(gradients, reference.numerical_gradients(definition, inputs, cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-4)


def test_standardise_does_not_suffer_from_a_large_mean_or_a_small_variance(rng):
    x = rng.standard_normal((3, 8))
    np.testing.assert_allclose(run(Standardise(), x + 100), reference.standardise(x), atol=1e-4)
    np.testing.assert_allclose(run(Standardise(), x * 1e-3), reference.standardise(x * 1e-3), atol=1e-5)
    np.testing.assert_array_equal(run(Standardise(), np.full((1, 8), 0.5)), 0)  # no variance at all


@both_modes
def test_l2_norm_of_a_row_of_zeros_is_zeros_and_its_gradient_finite(mode):
    value, (gradient,) = value_and_gradients(L2Norm(), [np.zeros((2, 3))], np.ones((2, 3)))
    assert (value == 0).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(run(L2Norm(), np.full((1, 4), 1e-8)), 0.5)  # not as small as to count as zeros


class NormedProducts(nn.Cell):
    """A LayerNorm before two linear layers, whose weights are inputs, and their outputs side by side."""

    def __init__(self, dim):
        super().__init__()
        self.norm = LayerNorm(dim, 2)

    def construct(self, x, weight, other):
        return ops.cat(self.norm(x, (weight, other)), 1)


@both_paths
@both_modes
@pytest.mark.parametrize(("rows", "outputs"), [(3, 5), (70, 5), (70, 80)])  # each is computed in another way
def test_layer_norm_gives_the_products_with_the_normalised_rows(mode, rows, outputs, rng):
    cell = NormedProducts(6)
    p = randomise(cell)
    inputs = [rng.standard_normal((size, 6)) for size in (rows, 3, outputs)]
    cotangent = rng.standard_normal((rows, 3 + outputs))

    def definition(x, *weights):
        return np.concatenate([reference.layer_norm(x, p, "norm") @ weight.T for weight in weights], 1)

    value, gradients = value_and_gradients(cell, inputs, cotangent)
    np.testing.assert_allclose(value, definition(*inputs), atol=1e-5)
    assert_gradients(definition, inputs, cotangent, gradients)


@both_paths
@pytest.mark.parametrize("rows", [6, 70])
def test_layer_norm_gives_a_product_for_each_weight(rows, rng):
    norm = LayerNorm(4, 3)
    p = {f"norm.{name}": value for name, value in randomise(norm).items()}
    x, weights = rng.standard_normal((rows, 4)), [rng.standard_normal((size, 4)) for size in (2, 6, 9)]
    products = norm(tensor(x), tuple(map(tensor, weights)))
    assert len(products) == 3
    for product, weight in zip(products, weights, strict=True):
        np.testing.assert_allclose(product.asnumpy(), reference.layer_norm(x, p, "norm") @ weight.T, atol=1e-5)


def test_layer_norm_begins_as_the_identity_of_standardised_rows():
    p = parameters(LayerNorm(5, 1))
    assert (p[GAMMA] == 1).all() and (p[BETA] == 0).all()


@both_paths
@both_modes
def test_feed_forward_is_normed_gated_and_without_biases(mode, rng):
    cell = FeedForward(6, 3)
    p = randomise(cell)
    assert {name: value.shape for name, value in p.items()} == {
        "norm.gamma": (1, 6),
        "norm.beta": (1, 6),
        "to_value.weight": (12, 6),
        "to_gate.weight": (12, 6),
        "to_out.weight": (6, 12),
    }
    x, cotangent = rng.standard_normal((5, 6)), rng.standard_normal((5, 6))
    value, (gradient,) = value_and_gradients(cell, [x], cotangent)
    np.testing.assert_allclose(value, reference.feed_forward(x, p), atol=1e-5)
    (wanted,) = reference.numerical_gradients(lambda x: reference.feed_forward(x, p), [x], cotangent)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)


@pytest.mark.parametrize(("dim", "mult", "inner"), [(8, 4, 21), (5, 1, 3), (16, 2.5, 26)])
def test_the_inner_size_of_feed_forward_is_two_thirds_of_mult_rounded_down(dim, mult, inner):
    assert FeedForward(dim, mult).to_out.weight.shape == (dim, inner)


def test_the_gelu_is_the_exact_one():
    gates = np.array([[-3.0, -1.0, 0.5, 2.0]])
    exact = [[-0.00404969, -0.15865525, 0.34573123, 1.95449974]]  # the tanh form differs by 1e-4 here
    np.testing.assert_allclose(run(GEGLU(), np.ones((1, 4)), gates), exact, atol=1e-6)


@both_paths
@both_modes
def test_cross_entropy_and_its_gradient(mode, rng):
    logits, cotangent = rng.standard_normal((4, 5)), rng.standard_normal(4)
    value, (gradient, _) = value_and_gradients(CrossEntropy(), [logits, LABELS], cotangent)
    np.testing.assert_allclose(value, reference.cross_entropy(logits, LABELS), atol=1e-5)
    (wanted,) = reference.numerical_gradients(lambda x: reference.cross_entropy(x, LABELS), [logits], cotangent)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)


@both_paths
def test_cross_entropy_of_equal_logits_is_the_logarithm_of_the_number_of_classes():
    np.testing.assert_allclose(run(CrossEntropy(), np.zeros((1, 256)), [7]), np.log(256), rtol=1e-6)


@both_paths
def test_cross_entropy_of_large_logits_overflows_nothing():
    logits = np.array([[1000.0, 0.0], [1000.0, 0.0]])
    np.testing.assert_allclose(run(CrossEntropy(), logits, [0, 1]), [0, 1000])


def test_a_linear_layer_has_no_bias_and_begins_uniform_within_the_root_of_its_inputs():
    layer = dense(400, 50)
    weight = layer.weight.asnumpy()
    assert [p.name for p in layer.get_parameters()] == ["weight"] and weight.shape == (50, 400)
    assert 0.99 * 400**-0.5 < abs(weight).max() <= 400**-0.5
    assert abs(weight.std() - 400**-0.5 / 3**0.5) < 1e-3
    x = np.random.default_rng(0).standard_normal((3, 400))
    np.testing.assert_allclose(run(layer, x), x @ weight.T, atol=1e-5)


def test_feed_forward_drops_a_share_of_its_inner_layer_in_training_only(rng):
    cell = FeedForward(4, 300, dropout=0.25)
    cell.to_out.weight.set_data(tensor(np.eye(4, 800)))
    x = rng.standard_normal((200, 4))
    cell.set_train(False)
    inner = run(cell, x)
    np.testing.assert_array_equal(run(cell, x), inner)
    cell.set_train()
    dropped = run(cell, x)
    zero = dropped == 0
    assert 0.19 < zero.mean() < 0.31
    np.testing.assert_allclose(dropped[~zero], inner[~zero] / 0.75, rtol=1e-5)
    assert (run(cell, x) != dropped).any()
