import errno
import io
import os
import re
import sys

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from data import DataError
from local_attention.training.checkpoint import CheckpointError
from local_attention.training.command import explain, help_of, run_task
from local_attention.training.config import EvaluateConfig, GenerateConfig, RunConfig, ScoreConfig
from local_attention.training.errors import RunError, UsageError
from local_attention.training.schema import keys_of
from scripts.import_torch import ImportConfig
from tests.training.toys import composed

# Statuses


def status_and_line(capsys, error):
    """Return the exit status and the output of a task that raises ``error``."""

    def task(config):
        raise error

    status, reason = run_task(task, None)
    shown = capsys.readouterr().err
    assert shown == (f"error: {reason}\n" if reason else "")
    return status, shown


@pytest.mark.parametrize(
    "error, status",
    [
        (UsageError("expected this"), 2),
        (CheckpointError("expected this"), 2),
        (DataError("expected this"), 2),
        (RunError("expected this"), 1),
    ],
)
def test_an_expected_error_is_one_line_and_its_status(capsys, error, status):
    assert status_and_line(capsys, error) == (status, "error: expected this\n")


@pytest.mark.parametrize(
    "error, status",
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2),
        (IsADirectoryError(21, "Is a directory", "a.txt"), 2),
        (NotADirectoryError(20, "Not a directory", "a.txt"), 2),
        (PermissionError(13, "Permission denied", "a.txt"), 1),
        (OSError(28, "No space left on device", "a.txt"), 1),
    ],
)
def test_a_system_error_names_the_file(capsys, error, status):
    assert status_and_line(capsys, error) == (status, f"error: a.txt: {error.strerror}\n")


def test_a_system_error_without_a_file_is_its_message(capsys):
    assert status_and_line(capsys, OSError("no device")) == (1, "error: no device\n")


def test_an_interrupted_task_has_status_130(capsys):
    assert status_and_line(capsys, KeyboardInterrupt()) == (130, "error: interrupted\n")


def test_a_closed_pipe_is_no_error(capsys, tmp_path, monkeypatch):
    with (tmp_path / "stdout").open("w") as stdout:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert status_and_line(capsys, BrokenPipeError(32, "Broken pipe"))[0] == 141
        os.write(stdout.fileno(), b"unread")  # as the interpreter does when it exits
    assert (tmp_path / "stdout").read_bytes() == b""
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ValueError("a bug")])
def test_a_bug_has_status_1_and_shows_its_traceback(capsys, error):
    def task(config):
        raise error

    assert run_task(task, None) == (1, f"{type(error).__name__}: a bug")
    assert "in task\n    raise error" in capsys.readouterr().err


def test_sigterm_ends_a_task_at_once():
    def task(config):
        raise SystemExit(143)  # as the handler of SIGTERM does

    with pytest.raises(SystemExit):
        run_task(task, None)


@pytest.mark.parametrize("returned, status", [(None, 0), (130, 130)])
def test_the_status_of_a_task_that_returns_is_what_it_returns(returned, status):
    assert run_task(lambda config: returned, None) == (status, "")


@pytest.mark.parametrize("error", [UsageError("a\nb"), FileNotFoundError(2, "No such file or directory", "a\nb")])
def test_an_error_is_one_line_even_if_its_message_has_several(capsys, error):
    assert status_and_line(capsys, error)[1].count("\n") == 1


# Errors of Hydra


def explanation(override):
    with pytest.raises((HydraException, OmegaConfBaseException)) as error:
        composed("train", override)
    line = explain(error.value, RunConfig)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "override, line",
    [
        ("model=huge", "model=huge: expected one of base, small, tiny"),
        ("optimizer=sgd", "optimizer=sgd: expected one of "),
        ("experiment=nothing", "experiment=nothing: expected one of cpu_10min, enwik8_12l, enwik8_base, quickstart"),
        ("train.seqlen=5", "train.seqlen: no such key; did you mean train.seq_len?"),
        ("seq_len=5", "seq_len: no such key; did you mean train.seq_len?"),
        ("model.windowsize=5", "model.windowsize: no such key; did you mean model.exact_windowsize?"),
        ("xyz=5", "xyz: no such key; --help lists them"),
    ],
)
def test_an_unknown_key_or_group_is_one_line_that_names_what_there_is(override, line):
    assert explanation(override).startswith(line)


@pytest.mark.parametrize("override, shown", [("a b", "a b"), ("seed=1,2", "seed=1,2"), ("train.seq_len=[1", "[1")])
def test_invalid_syntax_is_one_line_that_shows_it(override, shown):
    assert shown in explanation(override)


@pytest.mark.parametrize("override", ["modell=small", "optimiser=adam"])
def test_a_mistyped_group_is_answered_with_the_group(override):
    group = {"modell": "model", "optimiser": "optimizer"}[override.split("=")[0]]
    assert re.search(rf"did you mean {group}\b(?!\.)", explanation(override))


# Whole commands

GROUPS = {"model": "base", "data": "enwik8", "optimizer": "adamw", "schedule": "cosine", "experiment": "null"}


def test_a_command_gets_what_the_command_line_says(program, tmp_path):
    seen = []
    assert program(seen.append, f"run={tmp_path}", "prompt=it's, ${b}", "length=5") is None
    assert (seen[0].run, seen[0].prompt, seen[0].length) == (str(tmp_path), "it's, ${b}", 5)


def refuse_to_begin(config):
    raise AssertionError("the task began")


@pytest.mark.parametrize(
    "name, schema, overrides, message",
    [
        ("generate", GenerateConfig, ["run=absent"], "run=absent: no such run directory"),
        ("generate", GenerateConfig, ["checkpoint=absent"], "checkpoint=absent: No such file or directory"),
        ("generate", GenerateConfig, ["prompt_file=absent"], "prompt_file=absent: No such file or directory"),
        ("score", ScoreConfig, ["file=absent"], "file=absent: No such file or directory"),
        ("evaluate", EvaluateConfig, ["data.path=absent"], "data.path=absent does not exist: check the path"),
        ("train", RunConfig, ["data.path=absent"], "data.path=absent does not exist: check the path"),
        ("train", RunConfig, ["resume=absent"], "resume=absent: no such run directory or checkpoint"),
        ("import_torch", ImportConfig, ["weights=absent"], "weights=absent: No such file or directory"),
    ],
)
def test_a_file_that_does_not_exist_is_found_before_the_task_begins(program, capsys, name, schema, overrides, message):
    assert program(refuse_to_begin, *overrides, name=name, schema=schema) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_what_stands_for_no_file_and_files_of_other_machines_need_not_exist(program):
    def task(config):
        return 7

    assert program(task, "prompt_file=-", "checkpoint=last") == 7
    for overrides in (["resume=auto"], ["resume=null"], ["resume=absent", "parallel=data"]):
        assert program(task, *overrides, name="train", schema=RunConfig) == 7


def test_a_mistake_that_the_check_finds_ends_the_command_before_the_task(program, capsys):
    def check(config):
        raise UsageError("expected this")

    assert program(refuse_to_begin, check=check) == 2
    assert capsys.readouterr().err == "error: expected this\n"


def test_a_command_line_that_is_interrupted_before_the_task_has_status_130(program, capsys):
    def check(config):
        raise KeyboardInterrupt

    assert program(refuse_to_begin, "-m", check=check) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_key_with_its_default_and_meaning(program, capsys, flag):
    assert program(None, "train.seq_len=8", flag, name="train", schema=RunConfig) is None
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line[:2] == "  " != line[2:4]]
    shown = {line[0]: line[1] for line in lines}
    keys = keys_of(RunConfig)
    assert shown.keys() == {f"{group}={default}" for group, default in GROUPS.items()} | {
        f"{key}={str(option.default).replace('None', 'null').replace('False', 'false').replace('True', 'true')}"
        for key, option in keys.items()
    }
    assert shown["model=base"] == "configs/model: one of base, small, tiny"
    assert shown["train.batch_size=4"] == "sequences per micro-batch of each process (>= 1)"
    assert shown["device.target=auto"] == "where MindSpore runs (auto, CPU, GPU, Ascend)"
    assert shown["train.max_steps=10000"].endswith("; null: no limit (>= 1)")


@pytest.mark.parametrize(
    "name, schema, groups", [("generate", GenerateConfig, []), ("evaluate", EvaluateConfig, ["data"])]
)
def test_help_lists_only_the_groups_that_a_command_has(name, schema, groups):
    assert re.findall(r"configs/(\w+): one of", help_of(name, schema, "")) == groups


def test_help_fits_a_terminal_and_begins_with_what_the_command_does():
    lines = help_of("generate", GenerateConfig, "Sample text: ``python generate.py run=RUN_DIR``.").splitlines()
    assert lines[0] == "Sample text: python generate.py run=RUN_DIR."
    assert max(map(len, lines)) <= 120


def test_a_command_ends_with_the_status_of_its_task(program):
    assert program(lambda config: 143) == 143


def test_a_command_prints_in_any_encoding(program, monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert program(lambda config: print("sample: ü\ufffd")) is None
    assert output.getvalue() == b"sample: ??\n"


def test_an_error_on_a_terminal_that_is_gone_keeps_its_status(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    def task(config):
        raise UsageError("expected this")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert run_task(task, None) == (2, "expected this")


def test_an_error_within_the_task_keeps_its_status(program, capsys):
    def task(config):
        raise UsageError("expected this")

    assert program(task) == 2
    assert capsys.readouterr().err == "error: expected this\n"


@pytest.mark.parametrize("argument", ["xyz=5", "a b", "model=huge", "model=null", "experiment=null", "=5"])
def test_a_command_line_that_hydra_refuses_is_one_line_and_status_2(program, capsys, argument):
    assert program(refuse_to_begin, argument, name="train", schema=RunConfig) == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
