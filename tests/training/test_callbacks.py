import errno
import io
import math
import os
import re
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from local_attention.training import callbacks
from local_attention.training.callbacks import Evaluate, Report, Sample, SaveLast, Saver, StepController, Stop, make_up
from local_attention.training.checkpoint import Checkpoints, read
from local_attention.training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.evaluate import EvalSpan, Score
from local_attention.training.optimizer import build_optimizer
from local_attention.training.schedule import learning_rate
from local_attention.training.signals import SignalCheck
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


def check_signals(state, save=lambda: None):
    return SignalCheck(state, SINGLE_PROCESS, save)


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
    step_cell = SimpleNamespace(rates=[], loss_scale=1.0)
    step_cell.set_learning_rate = step_cell.rates.append
    return StepController(state, step_cell, CONFIG)


def one_step(callback, clock, seconds=2.0, outputs=(0.0, 0.0, 0.0)):
    context = Context(outputs)
    callback.on_train_step_begin(context)
    clock.now += seconds
    callback.on_train_step_end(context)
    Stop(callback.state, check_signals(callback.state)).on_train_step_end(context)
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
    callback.state.synchronise(SINGLE_PROCESS)
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
    state.received_signal = 2
    assert one_step(callback, clock).stopped
    assert state.step == 2


def test_a_signal_after_the_step_prevents_the_next_one(clock):
    state, context = RunState(1000, None), Context()
    controller(state).on_train_step_begin(context)
    state.synchronise(SINGLE_PROCESS)
    state.received_signal = 15  # while a checkpoint is written
    Stop(state, check_signals(state)).on_train_step_end(context)
    assert context.stopped and state.signal == 15


def test_sigusr1_saves_once_after_the_step_and_the_run_goes_on(clock, caplog):
    state, saves, context = RunState(1000, None, step=7), Saves(), Context()
    stop = Stop(state, check_signals(state, saves))
    state.received_save_request = True
    for _ in range(3):
        stop.on_train_step_end(context)
    assert saves == ["save"] and not context.stopped
    assert caplog.messages == ["step      7  saved because of SIGUSR1; the run goes on"]


# Report


@dataclass
class Measured:
    """Replaces a :class:`StepController`: step n takes n seconds and gives n bits per byte."""

    state: RunState
    bytes_per_step: int = 60
    grad_norm: float = 0.5
    learning_rate: float = 0.25

    bpb = seconds = property(lambda self: float(self.state.step))


FLOPS_PER_BYTE = 3e9


def report(state, interval=4):
    return Report(state, Measured(state), Log(), interval, FLOPS_PER_BYTE)


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
    assert [value["gflop_per_s"] for value in values] == pytest.approx([180.0, 60.0, 180 / 6.5])
    assert {(value["grad_norm"], value["lr"]) for value in values} == {(0.5, 0.25)}
    assert all(
        value.keys() >= {"bpb", "lr", "grad_norm", "bytes_per_s", "skipped_steps", "peak_memory_bytes"}
        for value in values
    )


def test_the_last_step_of_a_run_that_an_evaluation_ends_is_recorded(clock):
    state = RunState(100, None, stop_after=2)
    callback = report(state)
    steps_of(callback, state, 6)
    state.evaluations_since_best = 2
    callback.on_train_end(Context())
    assert [step for _, step, _ in callback.run_log.records] == [1, 4, 6]


def test_lines_say_step_bpb_speed_and_time_left(clock, caplog):
    state = RunState(100, None)
    callback = report(state)
    steps_of(callback, state, 4)
    callback.val_bpb = 2.34567
    steps_of(callback, state, 4)
    assert caplog.messages == [
        "step      1  train 1.000 bpb  60 bytes/s  180.0 GFLOP/s",
        "step      4  train 3.000 bpb  20 bytes/s  60.0 GFLOP/s  4:48 left",
        "step      8  train 6.500 bpb  val 2.346 bpb  9 bytes/s  27.7 GFLOP/s  9:58 left",
    ]


class Terminal(io.StringIO):
    """A terminal, and what is seen of it: the line that the bar has drawn last."""

    is_gone = False

    def write(self, text):
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)

    def isatty(self):
        return True

    def fileno(self):
        return 2

    @property
    def line(self):
        return [line.strip() for line in re.split("[\r\n]", self.getvalue()) if line.strip()][-1]


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a terminal of this width."""

    def make(columns):
        monkeypatch.setattr(sys, "stderr", Terminal())
        size = os.terminal_size((columns, columns and 24))
        monkeypatch.setattr(os, "get_terminal_size", lambda fd: size)
        return sys.stderr

    return make


@pytest.mark.parametrize("max_steps, position", [(100, "step 4/100"), (None, "step 4")])
def test_a_terminal_gets_a_bar_instead_of_lines(clock, caplog, terminal, max_steps, position):
    stream = terminal(120)
    state = RunState(max_steps, None if max_steps else 60.0)
    callback = report(state)
    steps_of(callback, state, 4)
    callback.on_train_end(Context())
    left = "4:48" if max_steps else "1:00:00"
    assert stream.line.endswith(f"{position}  {left} left  train 3.000 bpb  20 bytes/s  60.0 GFLOP/s")
    assert not caplog.messages


@pytest.mark.parametrize("limits, filled", [((100, 1.0), 8), ((100, 8.0), 5), ((None, 1.0), 8), ((100, None), 5)])
def test_the_bar_shows_the_progress_by_steps_or_by_minutes_whichever_is_larger(clock, terminal, limits, filled):
    stream = terminal(120)
    state = RunState(*limits, step=48)
    callback = report(state)
    clock.now += 48
    state.synchronise(SINGLE_PROCESS)
    steps_of(callback, state, 2)
    callback.on_train_end(Context())
    assert stream.line.split(" ")[0].count("#") == filled  # of 10


def test_a_narrow_terminal_shows_the_time_left_and_whole_parts(clock, terminal):
    stream = terminal(60)
    state = RunState(200_000, None, step=3)
    callback = report(state)
    callback.val_bpb = 2.5
    steps_of(callback, state, 1)
    callback.on_train_end(Context())
    assert stream.line == "step 4/200,000  222:13:04 left  train 4.000 bpb"  # and a bar that is still empty


def test_a_terminal_of_unknown_size_shows_a_bar(clock, terminal):
    stream = terminal(0)
    state = RunState(100, None)
    steps_of(report(state), state, 1)
    assert stream.line.endswith(" step 1/100  train 1.000 bpb  60 bytes/s  180.0 GFLOP/s")


def test_a_terminal_that_is_gone_does_not_end_the_run(clock, terminal):
    stream = terminal(80)
    state = RunState(100, None)
    callback = report(state)
    stream.is_gone = True
    steps_of(callback, state, 4)
    callback.on_train_end(Context())
    assert [step for _, step, _ in callback.run_log.records] == [1, 4]


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

    def evaluator(*span, before_batch):
        seen.append(span)
        before_batch()
        return Score(next(scores), 5)

    shown = SimpleNamespace(val_bpb=None)
    callback = Evaluate(state, interval, check_signals(state), shown, Log(), evaluator, SPAN, Saves())
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


# Early stopping


def test_evaluations_without_a_new_best_end_the_run_and_it_says_why(caplog):
    state = RunState(1000, None, stop_after=2)
    callback, context = evaluate(state, [3.0, 3.5, 2.5, 2.5, 2.75, 2.0]), Context()
    stop = Stop(state, check_signals(state))
    while not context.stopped:
        steps_of(callback, state, 1)
        stop.on_train_step_end(context)
    assert (state.step, state.finished, state.best_val_bpb) == (10, True, 2.5)
    assert caplog.messages[-1] == (
        "stopping early: no new best in the last 2 evaluations, which is train.stop_after=2; raise it, or set it to "
        "null, to continue"
    )


@pytest.mark.parametrize("stop_after, finished", [(2, True), (3, False), (None, False)])
def test_a_run_that_was_stopped_early_is_finished_until_the_limit_is_raised(stop_after, finished):
    stopped = RunState(1000, None, stop_after=2)
    steps_of(evaluate(stopped, [3.0, 3.5, 3.5]), stopped, 6)
    assert stopped.finished
    state = RunState(1000, None, stop_after)
    state.load_state_dict(stopped.state_dict())
    assert state.finished is finished


def test_a_best_checkpoint_counts_no_evaluations():
    state = RunState(1000, None, stop_after=5)
    callback = evaluate(state, [3.0, 3.5, 2.5])
    counted = []
    callback.save = lambda best: counted.append(state.evaluations_since_best)
    steps_of(callback, state, 6)
    assert counted == [0, 0]


# Interrupted events


def evaluate_or_sample(act, sample, state):
    return sample(state, interval=2) if act == "sample" else evaluate(state, [3.0] * 9)


@pytest.mark.parametrize("act", ["evaluate", "sample"])
def test_a_signal_interrupts_an_event_which_is_made_up_when_the_run_continues(sample, caplog, act):
    state = RunState(100, None)
    callback = evaluate_or_sample(act, sample, state)
    steps_of(callback, state, 3)
    state.received_signal = 15
    steps_of(callback, state, 1)
    callback.on_train_end(Context())
    name = {"evaluate": "evaluation"}.get(act, act)
    assert caplog.messages[-1] == f"step      4  the {name} was interrupted; a continued run begins with it"
    assert [step for _, step, _ in callback.run_log.records] == [2]

    continued, saves = RunState(100, None), Saves()
    continued.load_state_dict(state.state_dict())
    callback = evaluate_or_sample(act, sample, continued)
    for _ in range(2):
        make_up([callback], saves)
    assert [step for _, step, _ in callback.run_log.records] == [4]
    assert saves == ["save"]
    steps_of(callback, continued, 2)
    assert [step for _, step, _ in callback.run_log.records] == [4, 6]


@pytest.mark.parametrize("act", ["evaluate", "sample"])
def test_an_event_does_not_begin_after_a_signal_or_a_failure(sample, act):
    for ended in ({"signal": 15}, {"failure": "NaN"}):
        state = RunState(100, None, step=3, **ended)
        callback = evaluate_or_sample(act, sample, state)
        steps_of(callback, state, 1)
        assert not callback.run_log.records
        assert not state.has_happened(callback.kind)


def test_what_an_older_checkpoint_does_not_know_is_not_made_up(sample):
    state = RunState(100, None)
    old = {key: value for key, value in RunState(100, None, step=4).state_dict().items() if key != "events"}
    state.load_state_dict(old)
    make_up([evaluate(state, [3.0]), sample(state)], Saves())
    assert state.has_happened("eval") and state.has_happened("sample")
    assert state.best_val_bpb is None


def test_sigusr1_during_an_evaluation_saves_at_once_and_the_evaluation_goes_on():
    state = RunState(100, None)
    callback = evaluate(state, [3.0])
    saved = []
    callback.check_signals = check_signals(state, lambda: saved.append(len(callback.run_log.records)))
    state.received_save_request = True
    steps_of(callback, state, 2)
    assert saved == [0] and len(callback.run_log.records) == 1


def test_a_sample_is_interrupted_before_it_is_complete(sample, monkeypatch):
    state = RunState(100, None)
    callback, drawn = sample(state), []

    def tokens(*_, **options):
        for number in range(200):
            drawn.append(number)
            state.received_signal = 15 if number > 40 else None
            yield np.array([number % 256])

    monkeypatch.setattr(callbacks, "generate_tokens", tokens)
    steps_of(callback, state, 2)
    assert state.signal == 15 and len(drawn) <= 40 + 2 * 16


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
        callback = Sample(
            state, interval, check_signals(state), Log(), "model", np.frombuffer(b"a\x00", np.uint8), 4, seed=7
        )
        callback.calls = calls
        return callback

    return make


def test_the_continuation_of_the_prompt_is_recorded_and_logged(sample, caplog):
    state = RunState(100, None)
    callback = sample(state)
    steps_of(callback, state, 2)
    assert callback.run_log.records == [("sample", 2, {"text": "é\ufffd!", "prompt": "a\ufffd"})]
    assert "step      2  prompt:\n    a\ufffd\nstep      2  sample:\n    é\ufffd!" in caplog.messages[0]
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
    metas = [read(saver.checkpoints.find(name))[1] for name in ("best", "last")]
    assert [(meta["step"], meta["best_step"]) for meta in metas] == [(4, 4), (5, 4)]


def test_a_step_is_saved_again_once_its_evaluation_is_done(saver):
    saver.state.step = 4
    saver()  # because of SIGUSR1 during the evaluation
    saver.state.events = {"eval": 4}
    saver()
    assert saver.written == [4, 4]
    assert read(saver.checkpoints.find("last"))[1]["events"] == {"eval": 4}


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
