import io
import json
import logging
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from local_attention.training import run_log
from local_attention.training.run_log import RunLog
from local_attention.training.state import RunState


def state_at(step):
    return RunState(100, None, step=step, bytes_seen=10 * step, earlier_s=5.0)


@pytest.fixture
def opened(tmp_path):
    """Opens logs in the test's directory, and closes them at its end."""
    logs = []

    def open_log(*arguments):
        logs.append(RunLog(tmp_path, *arguments))
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


def events(tmp_path, log):
    """What TensorBoard finds after ``log`` is closed."""
    log.close()
    return EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()


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
    assert "val/bpb" not in events(tmp_path, log).Tags()["scalars"]
    assert capfd.readouterr().err == ""


def test_a_line_is_there_as_soon_as_it_is_recorded(opened, tmp_path):
    log = opened()
    for step in (1, 2):
        log.record("eval", state_at(step), split="val", bpb=2.0)
        assert steps(tmp_path) == list(range(1, step + 1))


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b\u2029c", "\x00\x1b[31m\x85\x0b\x0c", "\r\n", '"\\', "Grüße 🎈"])
def test_any_text_is_one_line(opened, tmp_path, text):
    opened().record("sample", state_at(1), text=text)
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


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', "{", '{"kind": "train"}', "\x00\x00"])
def test_a_torn_last_line_is_dropped(opened, tmp_path, torn):
    opened().record("train", state_at(1), bpb=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    opened(5).record("train", state_at(2), bpb=2.0)
    assert steps(tmp_path) == [1, 2]


# TensorBoard


def test_tensorboard_has_a_curve_for_each_number_under_its_kind_or_split(opened, tmp_path):
    log = opened()
    for step in (1, 2):
        log.record("train", state_at(step), bpb=3.0 / step, lr=1e-3)
    log.record("eval", state_at(2), split="val", bpb=2.5, bytes_scored=100)
    log.record("eval", state_at(2), split="test", bpb=2.25)
    found = events(tmp_path, log)
    curves = {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert curves["train/bpb"] == [(1, 3.0), (2, 1.5)]
    assert curves["train/lr"] == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
    assert curves["val/bpb"] == [(2, 2.5)]
    assert curves["val/bytes_scored"] == [(2, 100)]
    assert curves["test/bpb"] == [(2, 2.25)]


def test_tensorboard_has_the_sampled_texts(opened, tmp_path):
    log = opened()
    log.record("sample", state_at(2), text="Hello\nworld", prompt="Say")
    (point,) = events(tmp_path, log).Tensors("sample/text_summary")
    assert point.step == 2
    assert b"Hello\nworld" in point.tensor_proto.string_val[0]


def test_tensorboard_of_a_resumed_run_has_exactly_the_points_of_its_metrics(opened, tmp_path):
    log = opened()
    for step in (1, 2, 3):
        log.record("train", state_at(step), bpb=3.0)
    log.record("sample", state_at(2), text="Hello", prompt="Say")
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:60])  # as if the process was killed while writing
    log = opened(2)
    log.record("train", state_at(3), bpb=2.0)
    found = events(tmp_path, log)
    assert [(point.step, point.value) for point in found.Scalars("train/bpb")] == [(1, 3.0), (2, 3.0), (3, 2.0)]
    assert len(found.Tensors("sample/text_summary")) == 1
    times = [point.wall_time for point in found.Scalars("train/bpb")]
    assert times == sorted(times)


def test_tensorboard_has_the_config_and_hparams(opened, tmp_path):
    log = opened(0, {"optimizer": {"lr": 0.25}, "seed": 7, "resume": None})
    log.log_hparams({"test_bpb": 1.75}, 12)
    found = events(tmp_path, log)
    (config,) = found.Tensors("config/text_summary")
    assert b"lr: 0.25" in config.tensor_proto.string_val[0]
    assert [(point.step, point.value) for point in found.Scalars("hparams/test_bpb")] == [(12, 1.75)]
    settings = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in settings and b"seed" in settings


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
    """A pipe whose reader has closed it."""

    def write(self, text):
        raise BrokenPipeError


def test_a_closed_pipe_does_not_end_a_run(program_logging, tmp_path, monkeypatch):
    run_log.log_to_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        program_logging["train"].info("unread")
    assert "unread" in (tmp_path / "train.log").read_text()
