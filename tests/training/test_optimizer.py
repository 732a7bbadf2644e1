from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor

from local_attention.training.config import OptimizerConfig
from local_attention.training.optimizer import RowAdagrad, build_optimizer, is_decayed, is_hidden_matrix
from tests.local_attention.cells import both_paths
from tests.training.toys import tiny_transformer

CONFIG = OptimizerConfig(name="adamw", lr=0.05, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.3)
SHAPES = {
    "layers.0.attention.to_q.weight": (3, 4),
    "layers.0.feed_forward.to_out.weight": (5, 2),
    "layers.1.attention.to_q.weight": (3, 4),
    "token_emb.embedding_table": (5, 4),
    "norm.gamma": (1, 4),
    "some.bias": (4,),
}
DECAYED = {name for name in SHAPES if name.startswith("layers.")}
RATES = [0.05, 0.05, 0.02, 0.1, 0.01]
RNG = np.random.default_rng(0)
START = {name: RNG.uniform(0.5, 1, shape) for name, shape in SHAPES.items()}
GRADIENTS = [{name: RNG.standard_normal(shape) * 0.01 for name, shape in SHAPES.items()} for _ in RATES]


def definition(config, rates):
    """Return the weights after a step with each of ``rates``, by the formulas of the papers, in float64."""
    weights = {name: value.copy() for name, value in START.items()}
    means, squares, buffers, rows = ({name: 0.0 for name in SHAPES} for _ in range(4))
    for step, (rate, gradients) in enumerate(zip(rates, GRADIENTS), 1):
        for name, gradient in gradients.items():
            means[name] = config.beta1 * means[name] + (1 - config.beta1) * gradient
            squares[name] = config.beta2 * squares[name] + (1 - config.beta2) * gradient**2
            if config.name != "adam" and name in DECAYED:
                weights[name] *= 1 - rate * config.weight_decay
            if config.name == "muon" and name in DECAYED:
                buffers[name] = config.momentum * buffers[name] + gradient
                direction = newton_schulz(gradient + config.momentum * buffers[name])
                if config.muon_beta2 > 0:
                    squares_of_rows = (direction**2).mean(1, keepdims=True)
                    rows[name] = config.muon_beta2 * rows[name] + (1 - config.muon_beta2) * squares_of_rows
                    divided = direction / np.sqrt(rows[name])
                    direction = divided * np.linalg.norm(direction) / np.linalg.norm(divided)
                aspect_ratio = max(1, gradient.shape[0] / gradient.shape[1]) ** 0.5
                weights[name] -= rate * config.muon_lr / config.lr * aspect_ratio * direction
                continue
            mean, square = means[name] / (1 - config.beta1**step), squares[name] / (1 - config.beta2**step)
            weights[name] -= rate * mean / (np.sqrt(square) + config.eps)
    return weights


def newton_schulz(x):
    """Five Newton-Schulz iterations with the coefficients of Jordan et al."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def trained(config, rates):
    parameters = [Parameter(Tensor(value, ms.float32), name=name) for name, value in START.items()]
    optimizer = build_optimizer(config, ParameterTuple(parameters))
    for rate, gradients in zip(rates, GRADIENTS):
        if rate is not None:
            optimizer.learning_rate.set_data(Tensor(rate, ms.float32))
        ordered = tuple(Tensor(gradients[parameter.name], ms.float32) for parameter in optimizer.parameters)
        optimizer(ordered, Tensor(1.0, ms.float32))
    return {parameter.name: parameter.asnumpy() for parameter in parameters}


def assert_same(weights, wanted):
    for name in SHAPES:
        np.testing.assert_allclose(weights[name], wanted[name], atol=1e-6, err_msg=name)


@both_paths
@pytest.mark.parametrize(
    "change",
    [{}, {"muon_lr": 0.04}, {"momentum": 0.5}, {"weight_decay": 0.9}, {"beta2": 0.8}, {"muon_beta2": 0.9}],
)
def test_muon_orthogonalises_momentum_of_hidden_matrices_and_leaves_the_rest_to_adamw(change):
    config = replace(CONFIG, name="muon", **change)
    assert_same(trained(config, RATES), definition(config, RATES))


@both_paths
def test_a_skipped_step_of_muon_and_matrices_without_a_gradient_change_nothing():
    config = replace(CONFIG, name="muon", weight_decay=0.0, muon_beta2=0.9)
    parameters = ParameterTuple([Parameter(Tensor(value, ms.float32), name=name) for name, value in START.items()])
    optimizer = build_optimizer(config, parameters)

    def step(gradients, is_finite):
        optimizer(tuple(Tensor(gradients[p.name], ms.float32) for p in optimizer.parameters), Tensor(is_finite))
        return {p.name: p.asnumpy().copy() for p in optimizer.get_parameters()}

    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    first = step(zeros, 1.0)
    np.testing.assert_array_equal(first["some.bias"], START["some.bias"].astype(np.float32))
    assert all(np.isfinite(value).all() for value in first.values())
    before, after = step(GRADIENTS[0], 1.0), step(zeros, 0.0)
    assert before.keys() == after.keys() and any("row_squares" in name for name in before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
def test_the_directions_of_muon_have_singular_values_near_one_whatever_the_gradient(shape):
    optimizer = build_optimizer(replace(CONFIG, name="muon"), ParameterTuple([Parameter(Tensor([1.0]), name="bias")]))
    gradients = np.random.default_rng(1).standard_normal((2, *shape)) * np.logspace(0, -1, shape[1])
    gradients /= np.linalg.norm(gradients, axis=(1, 2), keepdims=True)
    singular = np.linalg.svd(optimizer.orthogonalise(Tensor(gradients, ms.float32)).asnumpy(), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_is_used_for_the_matrices_within_layers_only():
    model = tiny_transformer(
        num_residual_streams=2, gate_values_per_head=True, use_dynamic_pos_bias=True, qk_rmsnorm=True
    )
    hidden = {p.name.removeprefix("layers.0.") for p in model.trainable_params() if is_hidden_matrix(p)}
    attention = {f"attention.to_{name}.weight" for name in ("q", "k", "v", "out", "v_gate")}
    assert hidden == attention | {f"feed_forward.to_{name}.weight" for name in ("value", "gate", "out")}


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("change", [{}, {"beta1": 0.5}, {"beta2": 0.8}, {"eps": 0.03}, {"weight_decay": 0.9}])
def test_steps_follow_the_papers_with_each_option(name, change):
    config = replace(CONFIG, name=name, **change)
    assert_same(trained(config, RATES), definition(config, RATES))


@pytest.mark.parametrize("change", [{"beta1": 0.5}, {"beta2": 0.8}, {"eps": 0.03}, {"weight_decay": 0.9}])
def test_the_options_make_a_difference(change):
    changed, unchanged = definition(replace(CONFIG, **change), RATES), definition(CONFIG, RATES)
    assert max(abs(changed[name] - unchanged[name]).max() for name in SHAPES) > 1e-3


def test_lr_is_the_rate_until_another_is_set():
    rates = [CONFIG.lr] * 2
    assert_same(trained(CONFIG, [None] * 2), definition(CONFIG, rates))


def test_adam_ignores_weight_decay():
    adam = replace(CONFIG, name="adam")
    assert_same(trained(adam, RATES), trained(replace(adam, weight_decay=0.0), RATES))


def test_an_optimizer_that_was_declared_but_not_written_is_no_other_one():
    config = replace(CONFIG)
    config.name = "sgd"  # as if its name alone had been added
    with pytest.raises(ValueError, match="no optimizer is called sgd"):
        build_optimizer(config, tiny_transformer().trainable_params())


def test_only_matrices_of_linear_layers_decay():
    names = {parameter.name for parameter in tiny_transformer().trainable_params() if is_decayed(parameter)}
    layer = {"attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out"}
    layer |= {"feed_forward.to_value", "feed_forward.to_gate", "feed_forward.to_out"}
    assert names == {f"layers.0.{name}.weight" for name in layer} | {"to_logits.weight"}


def test_row_adagrad_follows_its_definition_even_for_rows_that_occur_several_times():
    rng = np.random.default_rng(2)
    table = Parameter(Tensor(rng.standard_normal((9, 4)), ms.float32), name="table")
    weights, squares = table.asnumpy().astype(np.float64), np.zeros(9)
    optimizer = RowAdagrad(table, lr_ratio=3.0)
    for rate in (0.1, 0.2):
        rows, gradients = np.array([2, 7, 2, 0, 2, 7]), rng.standard_normal((6, 4))
        for row, gradient in zip(rows, gradients):
            squares[row] += (gradient**2).mean()
        for row, gradient in zip(rows, gradients):
            weights[row] -= 3 * rate * gradient / np.sqrt(squares[row])
        optimizer(Tensor(rows, ms.int32), Tensor(gradients, ms.float32), Tensor(rate, ms.float32))
        np.testing.assert_allclose(table.asnumpy(), weights, atol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_only_the_ngram_table_is_updated_by_adagrad(name):
    params = tiny_transformer(max_ngram=3, ngram_buckets=11).trainable_params()
    optimizer = build_optimizer(replace(CONFIG, name=name, ngram_lr=0.2), params)
    left = {p.name for p in params} - {p.name for p in optimizer.parameters}
    assert left == {"ngram_emb.embedding_table"} and optimizer.ngram_optimizer.table.name in left
    assert optimizer.ngram_optimizer.lr_ratio == 0.2 / 0.05
    assert build_optimizer(replace(CONFIG, name=name), tiny_transformer().trainable_params()).ngram_optimizer is None
