import json
import logging
import math
import os

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from local_attention.training.build import build_model
from local_attention.training.checkpoint import Checkpoints, read, restore, tensors_of
from local_attention.training.config import ModelConfig, OptimizerConfig, TrainConfig
from local_attention.training.dynamic import dynamic_score, load_step, record_score
from local_attention.training.errors import RunError, UsageError
from local_attention.training.evaluate import Evaluator, Score
from local_attention.training.optimizer import build_optimizer
from local_attention.training.run_dir import lock
from local_attention.training.run_log import RunLog
from local_attention.training.schema import as_dict
from local_attention.training.state import RunState
from local_attention.training.step import TrainStep
from tests.training.toys import TOKENS, Bigram, BigramDefinition, randomise, weights_of

SEQ_LEN = 16
TOY_TEXT = np.random.default_rng(0).integers(0, TOKENS, 120, dtype=np.uint8)
TEXT = np.random.default_rng(1).integers(97, 101, 90, dtype=np.uint8)


class Recorded:
    """A step that records the loss of each sequence."""

    def __init__(self, step):
        self.step, self.network, self.losses = step, step.network, []

    def set_train(self):
        self.step.set_train()

    def __call__(self, sequences):
        outputs = self.step(sequences)
        self.losses.append(float(outputs[0].asnumpy()))
        return outputs


def sgd_step(rate, model=None):
    """A step that changes the weights by rate times gradient."""
    model = model or Bigram()
    return Recorded(TrainStep(model, nn.SGD(model.trainable_params(), rate), 1, clip_norm=1e9))


@pytest.mark.parametrize("start, stop", [(1, 81), (7, 100), (5, 9)])  # without and with a rest, and only a rest
def test_each_sequence_is_scored_by_weights_that_have_learned_from_all_earlier_ones(start, stop):
    step = sgd_step(rate=0.5)
    weights, nats = weights_of(step.network.model), 0.0
    for begin in range(start, stop, SEQ_LEN):
        end = min(begin + SEQ_LEN, stop)
        loss, gradients = BigramDefinition(**weights).loss_and_gradients(TOY_TEXT[None, begin - 1 : end])
        nats += loss * (end - begin)
        weights = {name: weights[name] - 0.5 * gradients[name] for name in weights}
    score = dynamic_score(step, TOY_TEXT, start, stop, SEQ_LEN)
    assert score.bytes_scored == stop - start
    assert score.bpb == pytest.approx(nats / math.log(2) / (stop - start), abs=1e-6)


def test_a_byte_to_come_has_no_influence_on_the_score_of_earlier_sequences():
    def losses(text):
        step = sgd_step(rate=0.5)
        dynamic_score(step, text, 1, 1 + 5 * SEQ_LEN, SEQ_LEN)
        return step.losses

    before = losses(TOY_TEXT)
    for byte in (1 + 2 * SEQ_LEN, 3 * SEQ_LEN):  # the first and the last of the third sequence
        changed = TOY_TEXT.copy()
        changed[byte] = (changed[byte] + 1) % TOKENS
        after = losses(changed)
        assert after[:2] == before[:2]
        assert all(abs(after[i] - before[i]) > 1e-5 for i in (2, 3, 4))  # and later ones have learned from it


def test_with_a_tiny_rate_the_score_is_the_static_one():
    score = dynamic_score(sgd_step(rate=1e-12), TOY_TEXT, 7, 100, SEQ_LEN)
    static = Evaluator(Bigram(), SEQ_LEN, 3)(TOY_TEXT, 7, 100)
    assert score.bytes_scored == static.bytes_scored
    assert score.bpb == pytest.approx(static.bpb, abs=1e-6)


def test_a_repetitive_text_is_learned_while_it_is_scored():
    text = np.resize(np.arange(TOKENS, dtype=np.uint8), 1 + 40 * SEQ_LEN)
    static = Evaluator(Bigram(), SEQ_LEN, 4)(text, 1, len(text))
    assert dynamic_score(sgd_step(rate=2.0), text, 1, len(text), SEQ_LEN).bpb < 0.3 * static.bpb


def test_progress_wraps_the_sequences():
    seen = []

    def progress(positions):
        assert len(positions) == 5  # tqdm shows how many
        for begin in positions:
            seen.append(begin)
            yield begin

    step = sgd_step(rate=0.5)
    dynamic_score(step, TOY_TEXT, 7, 100, SEQ_LEN, progress)
    assert seen == [7, 23, 39, 55, 71]


class Singular(Bigram):
    """A :class:`Bigram` whose gradients are infinite."""

    def __init__(self):
        super().__init__()
        self.root = Parameter(Tensor(np.zeros((1, 1), np.float32)), name="root")

    def construct(self, sequences, return_loss=False, ngram_rows=None):
        return super().construct(sequences) + ops.sqrt(self.root).sum()


def test_where_only_a_gradient_is_not_finite_the_loss_counts_and_nothing_is_learned():
    model = Singular()
    step = TrainStep(model, build_optimizer(OptimizerConfig("adam"), model.trainable_params()), 1, 1.0)
    before = tensors_of(model, step.optimizer)
    score = dynamic_score(step, TOY_TEXT, 7, 100, SEQ_LEN)
    assert score.bpb == pytest.approx(Evaluator(Bigram(), SEQ_LEN, 3)(TOY_TEXT, 7, 100).bpb, abs=1e-6)
    for name, value in tensors_of(model, step.optimizer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("stop", [40, 12])  # by a step, by the rest
def test_a_loss_that_is_not_finite_ends_the_evaluation(stop):
    model = Bigram()
    model.bias.set_data(Tensor(np.full((1, TOKENS), np.nan, np.float32)))
    with pytest.raises(RunError, match="the loss is nan after 0 bytes: lower dynamic_rate"):
        dynamic_score(sgd_step(0.5, model), TOY_TEXT, 1, stop, SEQ_LEN)


# The step of a checkpoint.

MODEL = ModelConfig(
    **dict(dim=16, depth=1, heads=2, dim_head=8, local_attn_window_size=8, max_seq_len=SEQ_LEN),
    **dict(attn_dropout=0.5, ff_dropout=0.5, max_ngram=2, ngram_buckets=97, ngram_dim=4),
)
OPTIMIZER = OptimizerConfig("muon", lr=0.02, muon_lr=0.04)
CONFIG = {"model": as_dict(MODEL), "optimizer": as_dict(OPTIMIZER), "train": as_dict(TrainConfig(clip_norm=0.25))}


def save(folder, config, optimizer=None):
    """Save a checkpoint of unusual weights and, if given, an unusual state of the optimizer; returns its path."""
    model = build_model(MODEL)
    if optimizer:
        optimizer = build_optimizer(optimizer, model.trainable_params())
        weights = {id(parameter) for parameter in model.get_parameters()}
        randomise(parameter for parameter in optimizer.get_parameters() if id(parameter) not in weights)
    return Checkpoints(folder).save(tensors_of(model, optimizer), {"step": 4, "best_step": None, "config": config})


def test_learning_continues_with_the_optimizer_of_the_run_and_its_state_at_a_fraction_of_its_rate(tmp_path):
    path = save(tmp_path, CONFIG, OPTIMIZER)
    tensors, model = read(path)[0], build_model(MODEL)
    step = load_step(path, model, 0.5)
    assert (step.grad_accum_every, step.clip_norm, step.ngram_optimizer.lr_ratio) == (1, 0.25, 0.1 / 0.02)
    state = tensors_of(model, step.optimizer)
    assert state.keys() == tensors.keys()
    assert state.pop("optimizer.learning_rate") == np.float32(0.01)
    for name, value in state.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


@pytest.mark.slow
def test_the_score_of_a_checkpoint_is_that_of_evaluations_between_steps_without_dropout(tmp_path):
    path = save(tmp_path, CONFIG, OPTIMIZER)
    tensors, stored = read(path)[0], {file: file.read_bytes() for file in tmp_path.iterdir()}
    model = build_model(MODEL)
    step = load_step(path, model, 0.5)
    score = dynamic_score(step, TEXT, 3, 83, SEQ_LEN)

    restore(tensors, model, step.optimizer)
    step.set_learning_rate(0.01)
    evaluator, losses = Evaluator(model, SEQ_LEN, 1), []
    static = evaluator(TEXT, 3, 83)
    for begin in range(3, 83, SEQ_LEN):
        losses.append(evaluator(TEXT, begin, begin + SEQ_LEN).bpb)
        step(Tensor(TEXT[None, None, begin - 1 : begin + SEQ_LEN].astype(np.int32)))
    assert score.bpb == pytest.approx(np.mean(losses), abs=1e-5)
    assert score.bpb < static.bpb - 0.05
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == stored


def test_weights_without_an_optimizer_get_a_new_one(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="evaluate")
    path = save(tmp_path, {"model": CONFIG["model"]})
    step = load_step(path, build_model(MODEL), 0.5)
    assert float(step.optimizer.learning_rate.asnumpy()) == np.float32(0.5 * OptimizerConfig.lr)
    assert step.clip_norm == TrainConfig.clip_norm
    assert not any(moment.asnumpy().any() for moment in step.optimizer.moment1)
    assert "the checkpoint has no optimizer: learning with a new adamw, optimizer.lr=0.001" in caplog.text


@pytest.fixture
def ended_run(tmp_path):
    """The directory of a run that has ended after 3 steps."""
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    state = RunState(3, None, step=3, bytes_seen=96)
    Checkpoints(tmp_path / "checkpoints").save({"model.a": np.zeros(1, np.float32)}, state.state_dict())
    log = RunLog(tmp_path, state, {"seed": 0})
    log.record("eval", state, split="test", bpb=3.0, bytes_scored=9, whole_split=True, checksum="a")
    log.close()
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "test_bpb": 3.0}))
    return tmp_path


def test_a_dynamic_score_is_recorded_beside_the_others(ended_run):
    assert record_score(ended_run, "test", Score(2.5, 9), 0.3)
    assert json.loads((ended_run / "summary.json").read_text()) == {
        **{"steps": 3, "test_bpb": 3.0},
        **{"test_bpb_dynamic": 2.5, "dynamic_rate": 0.3},
    }
    records = [json.loads(line) for line in (ended_run / "metrics.jsonl").read_text().splitlines()]
    assert [(record["split"], record["step"], record["bpb"]) for record in records] == [
        ("test", 3, 3.0),
        ("test_dynamic", 3, 2.5),
    ]
    events = EventMultiplexer().AddRunsFromDirectory(str(ended_run / "tensorboard")).Reload()
    for folder, bpb in (("final/test", 3.0), ("final/test_dynamic", 2.5)):
        assert [value.tensor_proto.float_val[0] for value in events.Tensors(folder, "bpb")] == [bpb]
    assert "_hparams_/session_start_info" in events.PluginRunToTagToContent("hparams")["final"]


def test_without_the_end_of_a_run_nothing_is_recorded(ended_run):
    (ended_run / "summary.json").unlink()
    before = (ended_run / "metrics.jsonl").read_text()
    assert not record_score(ended_run, "test", Score(2.5, 9), 0.3)
    assert (ended_run / "metrics.jsonl").read_text() == before


def test_nothing_is_recorded_while_a_process_writes_to_the_run(ended_run):
    descriptor = lock(ended_run)
    with pytest.raises(UsageError, match="another process is writing"):
        record_score(ended_run, "test", Score(2.5, 9), 0.3)
    os.close(descriptor)
    assert record_score(ended_run, "test", Score(2.5, 9), 0.3)
