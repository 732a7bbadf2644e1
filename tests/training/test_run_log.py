import errno
import html
import io
import json
import logging
import re
import sys
import warnings

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import backend_context

from local_attention.training import run_log
from local_attention.training.run_log import RunLog
from local_attention.training.state import RunState


def state_at(step):
    return RunState(100, None, step=step, bytes_seen=10 * step, earlier_s=5.0)


@pytest.fixture
def opened(tmp_path):
    """Opens logs in the test's directory, and closes them at its end."""
    logs = []

    def open_log(step=0, config=None, **events):
        state = state_at(step)
        state.events = {"eval": step, "sample": step} | events
        logs.append(RunLog(tmp_path, state, config))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()  # may already be closed


def lines(tmp_path):
    return (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def records(tmp_path):
    return [json.loads(line) for line in lines(tmp_path)]


def steps(tmp_path):
    return [record["step"] for record in records(tmp_path)]


def events(tmp_path, log, run="."):
    """What TensorBoard finds in one of its runs after ``log`` is closed."""
    log.close()
    return EventAccumulator(str(tmp_path / "tensorboard" / run), {"scalars": 0, "tensors": 0}).Reload()


def scalars(tmp_path, log, run):
    """The points of each curve of one of TensorBoard's runs, by tag."""
    found = events(tmp_path, log, run)
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def shown(point):
    """What TensorBoard makes of a text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
        from tensorboard.plugins.text.text_plugin import text_array_to_html
    (text,) = point.tensor_proto.string_val
    return html.unescape(text_array_to_html(np.array([text], object), enable_markdown=True))


# metrics.jsonl


def test_a_line_has_kind_step_bytes_seen_seconds_and_metrics(opened, tmp_path, clock):
    log, state = opened(), state_at(3)
    clock.now += 1.23456
    log.record("train", state, bpb=2.5, lr=1e-3)
    assert records(tmp_path) == [
        {"kind": "train", "step": 3, "bytes_seen": 30, "wall_s": 6.235, "bpb": 2.5, "lr": 1e-3}
    ]


def test_a_number_that_is_not_finite_is_null_and_no_point(opened, tmp_path, capfd):
    log = opened()
    log.record("eval", state_at(1), split="val", bpb=float("nan"), bytes_scored=3)
    assert records(tmp_path)[0]["bpb"] is None
    assert not (tmp_path / "tensorboard/val").exists()
    assert capfd.readouterr().err == ""


def test_a_line_is_there_as_soon_as_it_is_recorded(opened, tmp_path):
    log = opened()
    for step in (1, 2):
        log.record("eval", state_at(step), split="val", bpb=2.0)
        assert steps(tmp_path) == list(range(1, step + 1))


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b\u2029c", "\x00\x1b[31m\x85\x0b\x0c", "\r\n", '"\\', "Grüße 🎈"])
def test_any_text_is_one_line(opened, tmp_path, text):
    opened().record("sample", state_at(1), text=text, prompt=text)
    assert len(lines(tmp_path)) == 1
    assert records(tmp_path)[0]["text"] == text


def test_a_new_session_appends_to_the_same_file(opened, tmp_path):
    opened().record("train", state_at(1), bpb=3.0)
    opened(1).record("train", state_at(2), bpb=2.0)
    assert steps(tmp_path) == [1, 2]


def test_lines_after_the_resumed_step_are_dropped(opened, tmp_path):
    log = opened()
    for step in (1, 2, 3, 4):
        log.record("train", state_at(step), bpb=3.0)
    opened(2).record("train", state_at(3), bpb=2.0)
    assert [(record["step"], record["bpb"]) for record in records(tmp_path)] == [(1, 3.0), (2, 3.0), (3, 2.0)]


def test_a_new_run_drops_all_lines(opened, tmp_path):
    opened().record("train", state_at(1), bpb=3.0)
    opened(0)
    assert lines(tmp_path) == []


def test_records_of_an_interrupted_event_of_the_resumed_step_are_dropped_and_final_scores_are_kept(opened, tmp_path):
    log = opened()
    for step in (1, 2):
        log.record("train", state_at(step), bpb=3.0)
        log.record("sample", state_at(step), text="a", prompt="b")
        log.record("eval", state_at(step), split="val", bpb=2.5, bytes_scored=9)
    log.record("eval", state_at(2), split="val", bpb=2.25, bytes_scored=99, whole_split=True, checksum="c0ffee")
    opened(2, eval=1)
    kept = [(record["kind"], record["step"]) for record in records(tmp_path)]
    assert kept == [("train", 1), ("sample", 1), ("eval", 1), ("train", 2), ("sample", 2), ("eval", 2)]
    assert records(tmp_path)[-1]["whole_split"]


def test_final_scores_are_known_by_their_checksum_also_after_a_restart(opened):
    log = opened()
    log.record("eval", state_at(2), split="val", bpb=2.5, bytes_scored=9)
    for checksum, bpb in (("a", 2.25), ("b", float("nan"))):
        log.record("eval", state_at(2), split="val", bpb=bpb, bytes_scored=99, whole_split=False, checksum=checksum)
    assert log.final_scores == opened(2).final_scores == {"a": (2.25, 99)}


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', "{", '{"kind": "train"}', "\x00\x00", "5", '{"step": 1}'])
def test_a_torn_last_line_is_dropped(opened, tmp_path, torn):
    opened().record("train", state_at(1), bpb=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    opened(5).record("train", state_at(2), bpb=2.0)
    assert steps(tmp_path) == [1, 2]


# TensorBoard


def test_tensorboard_shows_training_and_validation_in_one_chart_and_nothing_that_is_no_curve(opened, tmp_path):
    log = opened()
    for step in (1, 2):
        log.record("train", state_at(step), bpb=3.0 / step, lr=1e-3)
    log.record("eval", state_at(2), split="val", bpb=2.5, bytes_scored=100)
    for split, bpb in (("val", 2.75), ("test", 2.25)):
        log.record("eval", state_at(2), split=split, bpb=bpb, bytes_scored=999, whole_split=True, checksum=split)
    log.log_hparams(2)
    rate = pytest.approx(1e-3)
    assert scalars(tmp_path, log, "train") == {"bpb": [(1, 3.0), (2, 1.5)], "train/lr": [(1, rate), (2, rate)]}
    assert scalars(tmp_path, log, "val") == {"bpb": [(2, 2.5)]}
    assert scalars(tmp_path, log, "final/val") == {"bpb": [(2, 2.75)]}
    assert scalars(tmp_path, log, "final/test") == {"bpb": [(2, 2.25)]}
    assert scalars(tmp_path, log, ".") == scalars(tmp_path, log, "final") == {}


def test_tensorboard_shows_samples_with_their_prompts_line_by_line_and_wraps_long_lines(opened, tmp_path):
    log = opened()
    text = "a  b\n\n```\n  <i>*c*\n" + "word " * 40
    log.record("sample", state_at(2), text=text, prompt="# Say\n1. x")
    (point,) = events(tmp_path, log).Tensors("sample/text_summary")
    assert point.step == 2
    prompt, sample = re.findall("<pre><code>(.*?)</code></pre>", shown(point), re.DOTALL)
    assert prompt.splitlines() == ["# Say", "1. x"]
    assert sample.splitlines()[:4] == ["a  b", "", "```", "  <i>*c*"]
    wrapped = sample.splitlines()[4:]
    assert len(wrapped) == 3 and max(map(len, wrapped)) <= 80
    assert "".join(wrapped) == ("word " * 40).rstrip()


def test_tensorboard_of_a_resumed_run_has_exactly_the_points_of_its_metrics(opened, tmp_path):
    log = opened()
    for step in (1, 2, 3):
        log.record("train", state_at(step), bpb=3.0)
    log.record("eval", state_at(3), split="val", bpb=3.0)
    log.record("sample", state_at(2), text="Hello", prompt="Say")
    (file,) = (tmp_path / "tensorboard/train").iterdir()
    file.write_bytes(file.read_bytes()[:60])  # as if the process was killed while writing
    log = opened(2)
    log.record("train", state_at(3), bpb=2.0)
    found = events(tmp_path, log, "train")
    assert [(point.step, point.value) for point in found.Scalars("bpb")] == [(1, 3.0), (2, 3.0), (3, 2.0)]
    times = [point.wall_time for point in found.Scalars("bpb")]
    assert times == sorted(times)
    assert len(events(tmp_path, log).Tensors("sample/text_summary")) == 1
    assert scalars(tmp_path, log, "val") == {}
    assert len(list((tmp_path / "tensorboard/val").iterdir())) == 1  # which tells a running TensorBoard


def test_tensorboard_has_the_config(opened, tmp_path):
    log = opened(0, {"optimizer": {"lr": 0.25}, "seed": 7})
    (config,) = events(tmp_path, log).Tensors("config/text_summary")
    assert "optimizer:\n  lr: 0.25\nseed: 7" in shown(config)


def test_hparams_shows_the_settings_that_differ_first_and_the_final_scores(tmp_path):
    for name, lr, limit in (("a", 1e-3, None), ("b", 2e-3, 5.0)):
        config = {
            "data": {"path": name},
            "device": {"target": name},
            "model": {"dim": 8, "shared_qk": True},
            "optimizer": {"lr": lr},
            "train": {"max_minutes": limit},
            "seed": 7,
        }
        (tmp_path / name).mkdir()
        log = RunLog(tmp_path / name, state_at(0), config)
        log.record("train", state_at(2), bpb=3.0, lr=lr)
        for split in ("val", "test"):
            log.record("eval", state_at(2), split=split, bpb=2.5, bytes_scored=9, whole_split=True, checksum=split)
        log.log_hparams(2)
        log.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
    experiment = context.experiment_from_metadata(
        RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), []
    )
    names = [(info.name, info.differs) for info in experiment.hparam_infos]
    assert names == [
        *(("optimizer.lr", True), ("train.max_minutes", True)),
        *(("model.dim", False), ("model.shared_qk", False), ("seed", False)),
    ]
    metrics = [(info.name.group, info.name.tag) for info in experiment.metric_infos]
    assert metrics == [("test", "bpb"), ("val", "bpb")]


# The terminal and train.log


@pytest.fixture
def program_logging():
    """The loggers as set up by the program; restored afterwards."""
    loggers = {name: logging.getLogger(name) for name in run_log.LOGGERS}
    before = {name: (logger.level, logger.propagate, logger.handlers) for name, logger in loggers.items()}
    run_log.log_to_terminal()
    yield loggers
    for name, logger in loggers.items():
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
        level, logger.propagate, logger.handlers = before[name]
        logger.setLevel(level)
    run_log._buffer.setTarget(None)
    run_log._buffer.buffer.clear()


def test_the_terminal_shows_messages_without_time_and_level(program_logging, capsys):
    program_logging["train"].info("compiled")
    program_logging["data"].warning("NOT ENWIK8")
    program_logging["train"].debug("only for the file")
    assert capsys.readouterr() == ("compiled\nNOT ENWIK8\n", "")


def test_train_log_begins_with_the_messages_before_the_directory_existed(program_logging, tmp_path, capsys):
    program_logging["data"].info("before")
    run_log.log_to_file(tmp_path)
    program_logging["train"].info("after")
    program_logging["train"].debug("only for the file")
    written = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in written] == ["INFO before", "INFO after", "DEBUG only for the file"]
    assert capsys.readouterr().out == "before\nafter\n"


def test_a_resumed_run_appends_to_train_log(program_logging, tmp_path):
    (tmp_path / "train.log").write_text("earlier\n")
    run_log.log_to_file(tmp_path)
    program_logging["train"].info("later")
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert (first, second.split(" ", 2)[2]) == ("earlier", "INFO later")


class Closed(io.StringIO):
    """Standard output that cannot be written to."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


OUTPUT_ERRORS = {
    "a pipe that was closed": BrokenPipeError(),
    "a terminal that was closed": OSError(errno.EIO, "Input/output error"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a stream that was closed": ValueError("I/O operation on closed file"),
    "a signal within another message": RuntimeError("reentrant call inside <_io.BufferedWriter>"),
    "an encoding": UnicodeEncodeError("latin-1", "\ufffd", 0, 1, "ordinal not in range(256)"),
}


@pytest.mark.parametrize("error", OUTPUT_ERRORS.values(), ids=OUTPUT_ERRORS)
def test_output_never_ends_a_run(program_logging, tmp_path, monkeypatch, error):
    run_log.log_to_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed(error))
        program_logging["train"].info("unread")
    assert "unread" in (tmp_path / "train.log").read_text()


def test_train_log_takes_names_that_are_not_utf8(program_logging, tmp_path, capsys):
    run_log.log_to_file(tmp_path)
    program_logging["train"].info("runs/\udcff")
    assert "INFO runs/?" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""
