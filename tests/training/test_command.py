import errno
import io
import os
import re
import sys

import pytest
from hydra.errors import HydraException
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from data import DataError
from local_attention.training import command as module
from local_attention.training.checkpoint import CheckpointError
from local_attention.training.command import command, explain, help_of, quote, run_task
from local_attention.training.config import GenerateConfig, RunConfig
from local_attention.training.errors import RunError, UsageError
from local_attention.training.schema import keys_of
from tests.training.toys import composed, examples

# Texts on the command line

TEXT = st.text(st.sampled_from("'\"\\${}[]()=,:; ~#@?!*\n\tab1") | st.characters(codec="utf-8"), max_size=12)
QUOTED = r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\""  # a text in quotes: they are removed


@given(texts=st.lists(TEXT, min_size=8, max_size=8))
@example(['"Hello," she said. "Bye."', "'a' b 'c'", "'", "''", "'a\\'", '"a\\"', "it's", "a\\"])
@example(["", " a ", "== a, b ==", "${prompt}", "\\${a}", "${", "a\\\\", "[1, 2]"])
@examples(60)
def test_hydra_parses_a_quoted_text_as_it_was(texts):
    texts = [text for text in texts if text not in ("null", "???") and not re.fullmatch(QUOTED, text, re.DOTALL)]
    keys = [f"key{i}" for i in range(len(texts))]
    arguments = [quote(f"{key}={text}", keys) for key, text in zip(keys, texts)]
    config = composed("generate", *(f"+{argument}" for argument in arguments))
    assert [config[key] for key in keys] == texts


@pytest.mark.parametrize("value", ["null", "'a, b'", '"a, b"', "'it\\'s'", "''"])
def test_null_and_text_in_quotes_are_not_changed(value):
    assert quote(f"prompt={value}", ["prompt"]) == f"prompt={value}"


@pytest.mark.parametrize("argument", ["length=5", "promptly=a, b", "--help", "prompt", "+prompt=a, b", "~prompt"])
def test_other_arguments_are_not_changed(argument):
    assert quote(argument, ["prompt"]) == argument


# Statuses


def status_and_line(capsys, error):
    """Return the exit status and the output of a task that raises ``error``."""

    def task(config):
        raise error

    status = run_task(task, None)
    return status, capsys.readouterr().err


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


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ValueError("a bug"), SystemExit(7)])
def test_any_other_exception_is_raised(error):
    def task(config):
        raise error

    with pytest.raises(type(error)):
        run_task(task, None)


@pytest.mark.parametrize("status", [None, 130])
def test_the_status_of_a_task_that_returns_is_what_it_returns(status):
    assert run_task(lambda config: status, None) == status


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
        ("experiment=nothing", "experiment=nothing: expected one of cpu_10min, enwik8_base, quickstart"),
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


@pytest.fixture
def program(monkeypatch):
    """Runs a command line of ``generate.yaml`` or ``train.yaml`` and returns its status."""
    for name in ("HYDRA_FULL_ERROR", "GLOG_v"):  # restored at the end
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(module, "deliver_to_python", lambda: None)  # its thread would take the tests' signals

    def run(task, *arguments, name="generate", schema=GenerateConfig):
        namespace = {"__name__": "program", "task": task}
        exec("def main(config):\n    return task(config)", namespace)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            command(name, schema)(namespace["main"])()
        except SystemExit as end:
            return end.code
        return None

    return run


def test_a_command_gets_what_the_command_line_says(program):
    seen = []
    assert program(seen.append, "run=a", "prompt=it's, ${b}", "length=5") is None
    assert (seen[0].run, seen[0].prompt, seen[0].length) == ("a", "it's, ${b}", 5)


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
    assert run_task(task, None) == 2


def test_an_error_within_the_task_keeps_its_status(program, capsys):
    def task(config):
        raise UsageError("expected this")

    assert program(task) == 2
    assert capsys.readouterr().err == "error: expected this\n"


@pytest.mark.parametrize("argument", ["xyz=5", "a b", "model=huge", "model=null", "experiment=null", "=5"])
def test_a_command_line_that_hydra_refuses_is_one_line_and_status_2(program, capsys, argument):
    def task(config):
        raise AssertionError("the task began")

    assert program(task, argument, name="train", schema=RunConfig) == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
