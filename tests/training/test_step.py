import logging

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from local_attention.dropout import Dropout
from local_attention.training.checkpoint import restore, tensors_of
from local_attention.training.config import OptimizerConfig, TrainConfig
from local_attention.training.evaluate import Evaluator
from local_attention.training.optimizer import build_optimizer, loss_scaler, sum_of_squares, tree_map
from local_attention.training.step import LanguageModelLoss, TrainStep, compile_step
from tests.training.toys import (
    TOKENS,
    Bigram,
    BigramDefinition,
    global_norm,
    set_weights,
    tiny_transformer,
    weights_of,
)

BATCH = np.random.default_rng(0).integers(0, 256, (4, 2, 17), dtype=np.int32)
TOY_BATCH = np.random.default_rng(1).integers(0, TOKENS, (2, 3, 9), dtype=np.int32)
CLIP = 0.15  # below the first gradient norm of the toy model


def sgd_step(model, grad_accum_every, clip_norm):
    """Return a step of plain SGD, which changes the weights by rate times gradient."""
    return TrainStep(model, nn.SGD(model.trainable_params(), 0.5), grad_accum_every, clip_norm).set_train()


def take(step, sequences, weights=None):
    """Take a step; returns loss, norm, rate, and the weights after it."""
    if weights is not None:
        set_weights(step.network, weights)
    outputs = [float(output.asnumpy()) for output in step(Tensor(sequences))]
    return *outputs, weights_of(step.network)


@pytest.fixture(scope="module")
def transformers():
    """Steps with one and with four micro-batches, each with its own model."""
    ms.set_seed(0)
    return {n: sgd_step(tiny_transformer(), n, clip_norm=0.5) for n in (1, 4)}


@pytest.fixture(scope="module")
def unclipped():
    return sgd_step(Bigram(), 2, clip_norm=1e9)


@pytest.fixture(scope="module")
def clipped():
    return sgd_step(Bigram(), 2, clip_norm=CLIP)


@pytest.fixture(autouse=True)
def fresh_rate(unclipped, clipped):
    for step in (unclipped, clipped):
        step.set_learning_rate(0.5)


def definition(weights):
    return BigramDefinition(weights["table"], weights["bias"])


def assert_weights(weights, wanted):
    for name in wanted:
        np.testing.assert_allclose(weights[name], wanted[name], atol=1e-6, err_msg=name)


def test_four_micro_batches_of_two_equal_one_of_eight(transformers):
    weights = weights_of(transformers[1].network)
    for _ in range(2):  # sums of the first step must not remain
        loss, norm, _, after = take(transformers[1], BATCH.reshape(1, 8, 17), weights)
        loss4, norm4, _, after4 = take(transformers[4], BATCH, weights)
        assert loss4 == pytest.approx(loss, abs=1e-6)
        assert norm4 == pytest.approx(norm, abs=1e-6)
        assert_weights(after4, after)
        assert any(abs(after[name] - weights[name]).max() > 1e-3 for name in after)
        weights = after


def test_every_micro_batch_counts(transformers):
    weights = weights_of(transformers[4].network)
    loss = take(transformers[4], BATCH, weights)[0]
    for i in range(4):
        changed = BATCH.copy()
        changed[i] = 65
        assert take(transformers[4], changed, weights)[0] != pytest.approx(loss, abs=1e-3)


def test_an_evaluation_between_two_steps_recompiles_neither(transformers):
    step = transformers[4]
    take(step, BATCH)
    evaluator = Evaluator(step.network.model, seq_len=16, batch_size=2)
    data = BATCH.reshape(-1).astype(np.uint8)
    first = evaluator(data, 3, 50)
    compiled = set(step.compile_cache), set(evaluator.token_losses.compile_cache)
    take(step, BATCH)
    second = evaluator(data, 3, 50)
    assert (step.compile_cache, evaluator.token_losses.compile_cache) == compiled
    assert second.bpb != first.bpb  # it uses the current weights


def test_the_loss_is_the_mean_cross_entropy_in_nats_before_the_update(unclipped):
    weights = weights_of(unclipped.network)
    loss, *_ = take(unclipped, TOY_BATCH, weights)
    assert loss == pytest.approx(definition(weights).loss_and_gradients(TOY_BATCH)[0], abs=1e-6)


def test_a_step_moves_the_weights_by_rate_times_the_gradient_of_that_loss(unclipped):
    weights = weights_of(unclipped.network)
    for _ in range(2):
        _, gradients = definition(weights).loss_and_gradients(TOY_BATCH)
        _, norm, _, after = take(unclipped, TOY_BATCH, weights)
        assert norm == pytest.approx(global_norm(gradients), rel=1e-5)
        assert_weights(after, {name: weights[name] - 0.5 * gradients[name] for name in weights})
        weights = after


def test_clipping_scales_the_update_to_the_norm_and_reports_the_norm_before(clipped):
    weights = weights_of(Bigram())
    _, gradients = definition(weights).loss_and_gradients(TOY_BATCH)
    norm = global_norm(gradients)
    assert norm > 1.2 * CLIP
    _, reported, _, after = take(clipped, TOY_BATCH, weights)
    assert reported == pytest.approx(norm, rel=1e-5)
    assert_weights(after, {name: weights[name] - 0.5 * gradients[name] * CLIP / norm for name in weights})


def test_gradients_below_clip_norm_are_not_changed(clipped):
    weights = {"table": np.zeros((TOKENS, TOKENS)), "bias": np.zeros((1, TOKENS))}
    sequences = np.arange(2 * 3 * 9, dtype=np.int32).reshape(2, 3, 9) % TOKENS  # uniform tokens
    weights["table"] += 3 * np.eye(TOKENS)[(np.arange(TOKENS) + 1) % TOKENS]  # each followed by the next one
    _, gradients = definition(weights).loss_and_gradients(sequences)
    norm = global_norm(gradients)
    assert 0.5 * CLIP < norm < CLIP
    _, _, _, after = take(clipped, sequences, weights)
    assert_weights(after, {name: weights[name] - 0.5 * gradients[name] for name in weights})


def test_a_first_step_that_is_not_finite_changes_no_weights():
    model = Bigram()
    good, bad = weights_of(model), np.full((1, TOKENS), np.nan)
    step = TrainStep(model, build_optimizer(OptimizerConfig(), model.trainable_params()), 1, 1.0).set_train()
    *_, after = take(step, TOY_BATCH[:1], good | {"bias": bad})
    assert_weights(after, {"table": good["table"], "bias": bad})


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_the_optimizer(optimizer, broken):
    model = Bigram()
    step = TrainStep(model, build_optimizer(OptimizerConfig(optimizer), model.trainable_params()), 1, 1.0).set_train()
    good = weights_of(model)
    take(step, TOY_BATCH[:1])
    bad = np.where(np.arange(TOKENS) == 3, broken, 0)
    set_weights(model, good | {"bias": bad})
    before = tensors_of(model, step.optimizer)
    loss, norm, *_ = take(step, TOY_BATCH[:1])
    assert not np.isfinite(loss + norm)
    for name, value in tensors_of(model, step.optimizer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    set_weights(model, good)
    *_, after = take(step, TOY_BATCH[:1])
    assert abs(after["table"] - good["table"]).max() > 1e-4


@pytest.mark.parametrize("rate", [0.125, 2.0])
def test_a_new_learning_rate_takes_effect_without_recompiling(unclipped, rate):
    weights = weights_of(unclipped.network)
    _, _, _, before = take(unclipped, TOY_BATCH, weights)
    compiled = set(unclipped.compile_cache)
    unclipped.set_learning_rate(rate)
    _, _, returned, after = take(unclipped, TOY_BATCH, weights)
    assert returned == rate
    assert_weights(after, {name: weights[name] + (before[name] - weights[name]) * rate / 0.5 for name in weights})
    assert unclipped.compile_cache == compiled


def test_a_compiled_step_runs_batches_of_its_config_without_recompiling(caplog):
    caplog.set_level(logging.INFO, logger="train")
    step = sgd_step(Bigram(), 2, clip_norm=1.0).set_train(False)
    compile_step(step, TrainConfig(grad_accum_every=2, batch_size=3, seq_len=8))
    assert "compiled the train step in" in caplog.text
    compiled = set(step.compile_cache)
    assert len(compiled) == 1
    step(Tensor(TOY_BATCH, ms.int32))
    assert step.compile_cache == compiled
    assert step.training


def test_dropout_is_called_once_per_micro_batch_as_a_resumed_run_assumes():
    model = tiny_transformer(ff_dropout=0.5, attn_dropout=0.5)
    step = sgd_step(model, 4, clip_norm=0.5)
    for _ in range(3):
        take(step, BATCH)
    calls = [int(cell.calls.asnumpy()) for _, cell in model.cells_and_names() if isinstance(cell, Dropout)]
    assert calls == [12, 12]


NGRAMS = dict(max_ngram=3, ngram_buckets=97, ngram_dim=4)


def ngram_step(grad_accum_every, weights=None, **options):
    """Return a step of a model with n-grams and the given weights."""
    model = tiny_transformer(**NGRAMS)
    if weights is not None:
        set_weights(model, weights)
    config = OptimizerConfig(lr=1e-3, eps=1e-4, **options)  # or Adam amplifies rounding errors
    optimizer = build_optimizer(config, model.trainable_params())
    return TrainStep(model, optimizer, grad_accum_every, 1.0).set_train()


def test_micro_batches_train_ngrams_like_one_larger_batch():
    whole = ngram_step(1, ngram_lr=0.01)
    parts = ngram_step(4, weights_of(whole.network), ngram_lr=0.01)
    for _ in range(2):
        *_, after = take(whole, BATCH.reshape(1, 8, 17))
        *_, after4 = take(parts, BATCH)
    assert_weights(after4, after)
    assert abs(after["ngram_emb.embedding_table"]).max() > 0.01


def test_the_gradients_of_ngram_rows_are_those_of_the_table():
    """The first step of Adagrad changes a row by the rate times its gradient over the root of its mean square."""
    model = tiny_transformer(**NGRAMS | dict(ngram_buckets=65521))
    start, sequence = weights_of(model), BATCH[0, :1]
    gradients = ops.grad(LanguageModelLoss(model), None, [model.ngram_emb.embedding_table])(Tensor(sequence))
    gradient = gradients[0].asnumpy().astype(np.float64)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-3, ngram_lr=0.5), model.trainable_params())
    *_, after = take(TrainStep(model, optimizer, 1, 1.0).set_train(), sequence[None])
    moved = after["ngram_emb.embedding_table"] - start["ngram_emb.embedding_table"]
    rows = np.unique(np.nonzero(gradient)[0])
    assert 25 < len(rows) <= 32
    np.testing.assert_array_equal(np.unique(np.nonzero(moved)[0]), rows)
    wanted = -0.5 * gradient[rows] / np.sqrt((gradient[rows] ** 2).mean(1, keepdims=True))
    np.testing.assert_allclose(moved[rows], wanted, atol=1e-3)


def test_a_step_that_is_not_finite_does_not_change_ngrams():
    step = ngram_step(1)
    weights = weights_of(step.network)
    bad = weights["norm.beta"] + np.nan
    set_weights(step.network, weights | {"norm.beta": bad})
    before = tensors_of(step.network.model, step.optimizer)
    take(step, BATCH[:1])
    for name, value in tensors_of(step.network.model, step.optimizer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_ngrams_have_their_own_rate():
    one, two = ngram_step(1, ngram_lr=0.1), None
    weights = weights_of(one.network)
    two = ngram_step(1, weights, ngram_lr=0.3)
    after, after3 = (take(step, BATCH[:1])[-1]["ngram_emb.embedding_table"] for step in (one, two))
    np.testing.assert_allclose(after3, 3 * after, atol=1e-5)


class Many(nn.Cell):
    """A model with as many parameters as 21 layers."""

    def __init__(self):
        super().__init__()
        names = [f"layers.{i}.weight" for i in range(250)]
        self.weights = ms.ParameterTuple([Parameter(Tensor(np.ones((2, 2)), ms.float32), name=name) for name in names])

    def construct(self, sequences, return_loss=False, ngram_rows=None):
        return ops.addn(tree_map(sum_of_squares, self.weights))


@pytest.mark.slow
def test_a_step_of_many_parameters_compiles():
    """Loops over the parameters in the graph would nest deeper than MindSpore allows."""
    model = Many()
    config = OptimizerConfig("adamw", lr=0.1, weight_decay=0.5)
    step = TrainStep(model, build_optimizer(config, model.trainable_params()), 2, 1e9).set_train()
    loss, _, _, after = take(step, TOY_BATCH)
    assert loss == 1000
    assert len({value.tobytes() for value in after.values()}) == 1
    np.testing.assert_allclose(after["layers.249.weight"], 1 - 0.1 * 0.5 - 0.1, atol=1e-4)


# Half precision

HALF_BATCH = BATCH[:1, :, :17]


def half_step(initial_scale):
    """A step of a model with n-grams in float16, and its optimizer."""
    model = tiny_transformer(max_ngram=2, ngram_buckets=11).to_float(ms.float16)
    optimizer = build_optimizer(OptimizerConfig(), model.trainable_params(), loss_scaler("float16", initial_scale))
    step = TrainStep(model, optimizer, 1, 0.5).set_train()
    step.set_learning_rate(1e-2)
    return step, model, optimizer


def copies(*parts):
    return {name: value.copy() for name, value in tensors_of(*parts).items()}


def test_a_step_that_overflows_in_float16_is_skipped_the_scale_falls_and_a_resumed_run_is_the_same_to_the_bit():
    step, model, optimizer = half_step(2.0**30)
    before, outputs, scales = copies(model, optimizer), [], []
    while not outputs or not np.isfinite(outputs[-1][:2]).all():
        for name, value in tensors_of(model, optimizer).items():
            if not name.startswith("loss_scaler."):
                np.testing.assert_array_equal(value, before[name], err_msg=name)
        outputs.append([float(output.asnumpy()) for output in step(Tensor(HALF_BATCH))])
        scales.append(step.loss_scale)
    *skipped, (loss, norm, _) = outputs
    assert len(skipped) > 3 and all(np.isfinite(skip[0]) and not np.isfinite(skip[1]) for skip in skipped)
    assert scales == [2.0 ** (29 - i) for i in range(len(skipped))] + [2.0 ** (30 - len(skipped))]
    assert abs(tensors_of(model, optimizer)["model.to_logits.weight"] - before["model.to_logits.weight"]).max() > 1e-3

    saved = copies(model, optimizer)
    wanted = [[output.asnumpy() for output in step(Tensor(HALF_BATCH))] for _ in range(2)]
    restore(saved, model, optimizer)
    np.testing.assert_array_equal([[o.asnumpy() for o in step(Tensor(HALF_BATCH))] for _ in range(2)], wanted)

    single = tiny_transformer(max_ngram=2, ngram_buckets=11)
    restore({name: value for name, value in before.items() if name.startswith("model.")}, single)
    in_float32 = TrainStep(single, build_optimizer(OptimizerConfig(), single.trainable_params()), 1, 0.5).set_train()
    wanted_loss, wanted_norm, _ = (float(output.asnumpy()) for output in in_float32(Tensor(HALF_BATCH)))
    assert loss == pytest.approx(wanted_loss, rel=1e-3) and norm == pytest.approx(wanted_norm, rel=1e-2)
