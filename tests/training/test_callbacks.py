import io
import math
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from local_attention.training import callbacks
from local_attention.training.callbacks import Evaluate, Report, Sample, SaveLast, Saver, StepController
from local_attention.training.checkpoint import Checkpoints, read
from local_attention.training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from local_attention.training.evaluate import EvalSpan, Score
from local_attention.training.optimizer import build_optimizer
from local_attention.training.schedule import learning_rate
from local_attention.training.state import RunState
from tests.training.toys import Bigram


@dataclass
class Context:
    """Replaces MindSpore's ``RunContext``."""

    outputs: tuple = (0.0, 0.0, 0.0)
    stopped: bool = False

    def original_args(self):
        return SimpleNamespace(net_outputs=tuple(Tensor(output) for output in self.outputs))

    def request_stop(self):
        self.stopped = True


@dataclass
class Log:
    """Replaces a ``RunLog``."""

    records: list = field(default_factory=list)

    def record(self, kind, state, **values):
        self.records.append((kind, state.step, values))


class Saves(list):
    """Replaces a ``Saver``; records the calls."""

    def __call__(self, best=False):
        self.append("best" if best else "save")


@pytest.fixture(autouse=True)
def log_level(caplog):
    caplog.set_level("INFO", logger="train")


def steps_of(callback, state, count):
    """Run ``count`` steps with this callback alone."""
    for _ in range(count):
        state.step += 1
        callback.on_train_step_end(Context())


# StepController


TRAIN = TrainConfig(seq_len=10, batch_size=3, grad_accum_every=2)
CONFIG = RunConfig(
    train=TRAIN,
    optimizer=OptimizerConfig(lr=0.5),
    schedule=ScheduleConfig("cosine", warmup_steps=3, final_fraction=0.1),
)


def controller(state):
    step_cell = SimpleNamespace(rates=[])
    step_cell.set_learning_rate = step_cell.rates.append
    return StepController(state, step_cell, CONFIG)


def one_step(callback, clock, seconds=2.0, outputs=(0.0, 0.0, 0.0)):
    context = Context(outputs)
    callback.on_train_step_begin(context)
    clock.now += seconds
    callback.on_train_step_end(context)
    return context


def test_a_step_is_counted_with_its_bytes_and_seconds(clock):
    state = RunState(100, None, step=7, bytes_seen=1000, train_s=5.0)
    callback = controller(state)
    one_step(callback, clock)
    clock.now += 100  # between two steps: evaluation, samples, checkpoints
    one_step(callback, clock, seconds=3.0)
    assert (state.step, state.bytes_seen, state.train_s) == (9, 1000 + 2 * 10 * 3 * 2, 10.0)
    assert callback.seconds == 3.0
    assert callback.bytes_per_step == 60


def test_the_results_of_a_step_are_stored_with_the_loss_in_bits(clock):
    callback = controller(RunState(100, None))
    one_step(callback, clock, outputs=(3 * math.log(2), 0.75, 0.125))
    assert callback.bpb == pytest.approx(3.0)
    assert (callback.grad_norm, callback.learning_rate) == (0.75, 0.125)


def test_each_step_gets_the_learning_rate_of_the_schedule(clock):
    callback = controller(RunState(10, None))
    for _ in range(10):
        one_step(callback, clock)
    wanted = [learning_rate(CONFIG.schedule, 0.5, step, step / 10) for step in range(10)]
    assert callback.step_cell.rates == pytest.approx(wanted)
    assert len(set(wanted)) == 10


def test_the_learning_rate_of_a_run_with_a_time_limit_follows_the_clock(clock):
    callback = controller(RunState(None, 1.0, step=50))
    clock.now += 30
    one_step(callback, clock)
    assert callback.step_cell.rates == [pytest.approx(0.5 * (0.1 + 0.9 * 0.5))]


@pytest.mark.parametrize("outputs", [(math.nan, 1.0, 0.1), (1.0, math.inf, 0.1), (math.inf, math.nan, 0.1)])
def test_steps_that_are_not_finite_are_counted_and_too_many_in_a_row_end_the_run(clock, caplog, outputs):
    state = RunState(1000, None)
    callback = controller(state)
    callback.config = replace(CONFIG, train=replace(TRAIN, max_bad_steps=3))
    for _ in range(2):
        assert not one_step(callback, clock, outputs=outputs).stopped
    assert not one_step(callback, clock, outputs=(1.0, 1.0, 0.1)).stopped  # a finite one in between
    assert [one_step(callback, clock, outputs=outputs).stopped for _ in range(3)] == [False, False, True]
    assert (state.step, state.skipped_steps) == (6, 5)
    assert state.failure.startswith("step 6:") and "the last 3 steps were skipped" in state.failure
    assert caplog.text.count("skipped") == 5


def test_max_steps_end_the_run(clock):
    callback = controller(RunState(3, None))
    assert [one_step(callback, clock).stopped for _ in range(3)] == [False, False, True]


def test_max_minutes_end_the_run(clock):
    callback = controller(RunState(1000, 0.1))
    assert [one_step(callback, clock).stopped for _ in range(3)] == [False, False, True]


def test_a_signal_ends_the_run_after_the_step(clock):
    state = RunState(1000, None)
    callback = controller(state)
    assert not one_step(callback, clock).stopped
    state.signal = 2
    assert one_step(callback, clock).stopped
    assert state.step == 2


# Report


@dataclass
class Measured:
    """Replaces a :class:`StepController`: step n takes n seconds and gives n bits per byte."""

    state: RunState
    bytes_per_step: int = 60
    grad_norm: float = 0.5
    learning_rate: float = 0.25

    bpb = seconds = property(lambda self: float(self.state.step))


def report(state, interval=4):
    return Report(state, Measured(state), Log(), interval)


def test_the_first_step_each_interval_and_the_last_step_are_recorded(clock):
    state = RunState(10, None)
    callback = report(state)
    steps_of(callback, state, 10)
    assert [(kind, step) for kind, step, _ in callback.run_log.records] == [("train", step) for step in (1, 4, 8, 10)]


def test_the_interval_is_counted_from_the_beginning_of_the_run_not_of_the_session(clock):
    state = RunState(20, None, step=6)
    callback = report(state)
    steps_of(callback, state, 7)
    assert [step for _, step, _ in callback.run_log.records] == [8, 12]


def test_a_record_has_the_means_since_the_previous_one_and_the_newest_norm_and_rate(clock):
    state = RunState(100, None)
    callback = report(state)
    steps_of(callback, state, 8)
    values = [record[2] for record in callback.run_log.records]
    assert [value["bpb"] for value in values] == [1.0, 3.0, 6.5]  # of the steps 1, 2 to 4, 5 to 8
    assert [value["bytes_per_s"] for value in values] == pytest.approx([60.0, 60 / 3.0, 60 / 6.5])
    assert {(value["grad_norm"], value["lr"]) for value in values} == {(0.5, 0.25)}
    assert all(
        value.keys() >= {"bpb", "lr", "grad_norm", "bytes_per_s", "skipped_steps", "peak_memory_bytes"}
        for value in values
    )


def test_lines_say_step_bpb_speed_and_time_left(clock, caplog):
    state = RunState(100, None)
    callback = report(state)
    steps_of(callback, state, 4)
    callback.val_bpb = 2.34567
    steps_of(callback, state, 4)
    assert caplog.messages == [
        "step      1  train 1.000 bpb  60 bytes/s",
        "step      4  train 3.000 bpb  20 bytes/s  4:48 left",
        "step      8  train 6.500 bpb  val 2.346 bpb  9 bytes/s  9:58 left",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("max_steps, position", [(100, "step 4/100"), (None, "step 4")])
def test_a_terminal_gets_a_bar_instead_of_lines(clock, caplog, monkeypatch, max_steps, position):
    monkeypatch.setattr(sys, "stderr", Terminal())
    state = RunState(max_steps, None if max_steps else 60.0)
    callback = report(state)
    steps_of(callback, state, 4)
    callback.on_train_end(Context())
    shown = sys.stderr.getvalue()
    assert position in shown
    assert "train 3.000 bpb  20 bytes/s" in shown
    assert not caplog.messages


def test_without_a_terminal_there_is_no_bar(clock, capsys):
    state = RunState(100, None)
    callback = report(state)
    steps_of(callback, state, 4)
    callback.on_train_end(Context())
    assert capsys.readouterr().err == ""


# Evaluate

SPAN = EvalSpan(np.zeros(9, np.uint8), 3, 8)


def evaluate(state, scores, interval=2):
    """Return an :class:`Evaluate` whose evaluator returns these scores."""
    scores = iter(scores)
    seen = []

    def evaluator(*span):
        seen.append(span)
        return Score(next(scores), 5)

    callback = Evaluate(state, interval, SimpleNamespace(val_bpb=None), Log(), evaluator, SPAN, Saves())
    callback.seen = seen
    return callback


def test_the_span_is_scored_and_recorded_at_each_interval():
    state = RunState(100, None)
    callback = evaluate(state, [3.0, 2.5])
    steps_of(callback, state, 5)
    assert callback.seen == [SPAN, SPAN]
    assert callback.run_log.records == [
        ("eval", step, {"split": "val", "bpb": bpb, "bytes_scored": 5}) for step, bpb in ((2, 3.0), (4, 2.5))
    ]
    assert callback.report.val_bpb == 2.5


def test_the_best_weights_so_far_are_saved_and_logged_as_new_best(caplog):
    state = RunState(100, None)
    callback = evaluate(state, [3.0, 3.5, 2.5, 2.5])
    saved = []
    for _ in range(4):
        steps_of(callback, state, 2)
        saved.append((len(callback.save), state.best_val_bpb))
    assert saved == [(1, 3.0), (1, 3.0), (2, 2.5), (2, 2.5)]
    assert callback.save == ["best", "best"]
    assert [message.endswith(", new best") for message in caplog.messages] == [True, False, True, False]


def test_the_best_score_is_updated_before_its_checkpoint_is_saved():
    state = RunState(100, None)
    callback = evaluate(state, [3.0])
    known = []
    callback.save = lambda best: known.append(state.best_val_bpb)
    steps_of(callback, state, 2)
    assert known == [3.0]


def test_a_resumed_run_knows_the_best_score():
    state = RunState(100, None, best_val_bpb=2.0)
    callback = evaluate(state, [2.1])
    steps_of(callback, state, 2)
    assert callback.save == []
    assert state.best_val_bpb == 2.0


@pytest.mark.parametrize("act", [evaluate, "sample"])
@pytest.mark.parametrize("steps, at_the_end", [(5, True), (4, False)])
def test_a_finished_run_is_evaluated_and_sampled_once_at_its_end(sample, act, steps, at_the_end):
    state = RunState(steps, None)
    callback = sample(state, interval=2) if act == "sample" else evaluate(state, [3.0] * 9)
    steps_of(callback, state, steps)
    callback.on_train_end(Context())
    measured = [step for _, step, _ in callback.run_log.records]
    assert measured == ([2, 4, 5] if at_the_end else [2, 4])


@pytest.mark.parametrize("act", [evaluate, "sample"])
def test_an_interrupted_run_is_not_evaluated_and_sampled_at_its_end(sample, act):
    state = RunState(100, None)
    callback = sample(state, interval=2) if act == "sample" else evaluate(state, [3.0] * 9)
    steps_of(callback, state, 3)
    state.signal = 2
    callback.on_train_end(Context())
    assert [step for _, step, _ in callback.run_log.records] == [2]


# Sample


@pytest.fixture
def sample(monkeypatch):
    """Makes a :class:`Sample` whose model generates "é", ESC, "!"; records the calls."""
    calls = []

    def generate_tokens(session, prompt, length, **options):
        calls.append((session, bytes(prompt), length, options))
        yield from (np.array([token]) for token in b"\xc3\xa9\x1b!")

    monkeypatch.setattr(callbacks, "DecodingSession", lambda model: ["session", model])
    monkeypatch.setattr(callbacks, "generate_tokens", generate_tokens)

    def make(state, interval=2):
        callback = Sample(state, interval, Log(), "model", np.frombuffer(b"a\x00", np.uint8), 4, seed=7)
        callback.calls = calls
        return callback

    return make


def test_the_continuation_of_the_prompt_is_recorded_and_logged(sample, caplog):
    state = RunState(100, None)
    callback = sample(state)
    steps_of(callback, state, 2)
    assert callback.run_log.records == [("sample", 2, {"text": "é\ufffd!", "prompt": "a\ufffd"})]
    assert "step      2  sample:\n    é\ufffd!" in caplog.messages[0]
    ((_, prompt, length, options),) = callback.calls
    assert (prompt, length, options["seed"]) == (b"a\x00", 4, 7)
    assert options["num_tokens"] == 256  # bytes, whatever the model's vocabulary


def test_samples_share_one_session_and_its_graph(sample):
    state = RunState(100, None)
    callback = sample(state)
    assert callback.session is None  # compiled when it is needed
    steps_of(callback, state, 4)
    first, second = callback.calls
    assert first[0] is second[0]
    assert first[0] == ["session", "model"]


def test_each_line_of_a_sample_is_indented():
    assert callbacks.indent("a\n\nb") == "    a\n    \n    b"


# SaveLast and Saver


def test_a_checkpoint_is_saved_at_each_interval_and_at_the_end():
    state = RunState(100, None)
    callback = SaveLast(state, 3, Saves())
    steps_of(callback, state, 7)
    assert len(callback.save) == 2
    callback.on_train_end(Context())
    assert len(callback.save) == 3


@pytest.fixture
def saver(tmp_path, monkeypatch):
    """A :class:`Saver` with a list of the steps that it has saved."""
    model = Bigram()
    optimizer = build_optimizer(OptimizerConfig(), model.trainable_params())
    saver = Saver(Checkpoints(tmp_path, 2), model, optimizer, RunState(100, None), {"data": {"name": "some"}})
    saver.written = []
    save = saver.checkpoints.save
    monkeypatch.setattr(saver.checkpoints, "save", lambda *args: (saver.written.append(args[1]["step"]), save(*args)))
    return saver


def test_a_step_is_saved_once_unless_it_has_become_the_best(saver):
    saver.state.step = 4
    saver()
    saver()
    assert saver.written == [4]
    saver(best=True)
    assert saver.written == [4, 4]
    saver()
    saver.state.step = 5
    saver()
    assert saver.written == [4, 4, 5]
    assert [read(saver.checkpoints.find(name))[1]["step"] for name in ("best", "last")] == [4, 5]


def test_a_checkpoint_contains_weights_optimizer_state_and_provenance(saver, clock):
    saver.state.step, saver.state.bytes_seen = 4, 400
    saver()
    tensors, meta = read(saver.checkpoints.find("last"))
    np.testing.assert_array_equal(tensors["model.table"], saver.model.table.asnumpy())
    assert "optimizer.moment1.table" in tensors
    assert (meta["step"], meta["bytes_seen"], meta["data"]) == (4, 400, {"name": "some"})
    assert {"train_s", "wall_s", "best_val_bpb"} <= meta.keys()


def test_a_saver_keeps_the_newest_keep_last(saver):
    for step in range(5):
        saver.state.step = step
        saver()
    assert len(Checkpoints(saver.checkpoints.directory).complete()) == 2


def test_a_run_that_ends_with_a_checkpoint_does_not_save_it_again(saver):
    callback = SaveLast(saver.state, 3, saver)
    steps_of(callback, saver.state, 3)
    callback.on_train_end(Context())
    assert saver.written == [3]
