import io
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from data import Corpus
from local_attention.training import summary
from local_attention.training.checkpoint import Checkpoints
from local_attention.training.command import quote
from local_attention.training.evaluate import Score
from local_attention.training.state import RunState
from local_attention.training.summary import (
    continue_command,
    explain_failure,
    print_interruption,
    print_next_steps,
    score_splits,
    write_summary,
)
from tests.training.toys import composed

TEXT = ("data.path", "data.dir", "run_dir", "resume")  # as in train.py


@pytest.fixture(autouse=True)
def log_level(caplog):
    caplog.set_level("INFO", logger="train")


@pytest.fixture
def state(clock):
    state = RunState(50, 1.5, step=40, bytes_seen=8000, train_s=16.0, earlier_s=10.0)
    clock.now += 10
    return state


class Log(list):
    """Replaces a ``RunLog``."""

    def record(self, kind, state, **values):
        self.append((kind, state.step, values))


SCORES = {"val": Score(2.5, 100), "test": Score(2.25, 90)}


def test_the_summary_has_these_keys_and_values(tmp_path, state, monkeypatch):
    monkeypatch.setattr(summary, "peak_memory_bytes", lambda: 123456789)
    write_summary(tmp_path, state, SCORES)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 40,
        "bytes_seen": 8000,
        "val_bpb": 2.5,
        "test_bpb": 2.25,
        "bytes_per_s": 500.0,  # in steps alone
        "peak_memory_bytes": 123456789,
        "wall_s": 20.0,
    }


def test_a_summary_that_contains_the_scores_is_kept(tmp_path, state, caplog):
    write_summary(tmp_path, state, SCORES)
    written = (tmp_path / "summary.json").read_text()
    caplog.clear()
    state.earlier_s += 100
    for scores in (SCORES, {"val": SCORES["val"]}, {}):
        write_summary(tmp_path, state, scores)
    assert ((tmp_path / "summary.json").read_text(), caplog.messages) == (written, [])
    write_summary(tmp_path, state, {**SCORES, "test": Score(2.0, 80)})
    assert json.loads((tmp_path / "summary.json").read_text())["test_bpb"] == 2.0


def test_the_summary_is_logged_in_one_line(tmp_path, state, caplog):
    write_summary(tmp_path, state, SCORES)
    assert "40 steps, 8,000 bytes in 0:20, 500 bytes/s while training" in caplog.text


def test_whole_validation_and_test_splits_are_scored_recorded_and_logged(state, caplog):
    corpus = Corpus("some", np.arange(200, dtype=np.uint8))
    seen, log = [], Log()

    def evaluator(data, start, stop, progress):
        seen.append((data is corpus.bytes, start, stop, list(progress([1, 2]))))
        return SCORES["val" if start == 180 else "test"]

    assert score_splits(evaluator, corpus, state, log) == SCORES
    assert seen == [(True, 180, 190, [1, 2]), (True, 190, 200, [1, 2])]
    assert log == [
        ("eval", 40, {"split": split, "bpb": bpb, "bytes_scored": scored, "whole_split": True})
        for split, bpb, scored in (("val", 2.5, 100), ("test", 2.25, 90))
    ]
    assert "test: 2.2500 bpb" in caplog.messages


@pytest.mark.parametrize("terminal", [True, False])
def test_scoring_shows_a_bar_on_a_terminal_only(state, monkeypatch, terminal):
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)

    def evaluator(data, start, stop, progress):
        list(progress([1, 2]))
        return SCORES["val"]

    score_splits(evaluator, Corpus("some", np.arange(200, dtype=np.uint8)), state, Log())
    assert ("0/2" in shown.getvalue()) is terminal


# The command that continues a run


def config_of(command):
    """Return the config that Hydra composes from a command line."""
    python, program, *arguments = shlex.split(command)
    assert (python, program) == ("python", "train.py")
    return composed("train", *(quote(argument, TEXT) for argument in arguments))


@pytest.mark.parametrize("run_dir", ["runs/a", "runs/it's a, ${b} & $HOME"])
def test_the_command_to_continue_keeps_overrides_and_adds_the_directory(run_dir):
    original = ["experiment=quickstart", "model.dim=64", "data.path=my 'file', too", "run_dir=old", "resume=old/best"]
    original = [quote(argument, TEXT) for argument in original]  # as in Hydra's list of overrides
    wanted = config_of(shlex.join(["python", "train.py", *original]))
    wanted["run_dir"], wanted["resume"] = run_dir, "auto"
    assert config_of(continue_command(run_dir, original)) == wanted
    assert wanted["data"]["path"] == "my 'file', too"


def test_changes_replace_overrides_of_the_same_keys():
    overrides = ["train.max_steps=5", "train.max_minutes=1", "seed=3"]
    command = continue_command(Path("runs/a"), overrides, ["train.max_steps=10"])
    assert shlex.split(command)[2:] == [
        *("train.max_minutes=1", "seed=3", "run_dir=runs/a", "resume=auto", "train.max_steps=10")
    ]


def test_an_interrupted_run_logs_where_it_was_saved_and_how_to_continue(state, caplog):
    print_interruption(Path("runs/a"), state, ["seed=3"])
    assert caplog.messages == [
        "interrupted: saved step 40 in runs/a/checkpoints",
        "continue:  python train.py seed=3 run_dir=runs/a resume=auto",
    ]


def test_a_failed_run_says_from_where_to_continue_if_there_is_a_checkpoint(tmp_path):
    state = RunState(50, None, failure="step 7: loss nan bpb")
    advice = "step 7: loss nan bpb; lower optimizer.lr or train.clip_norm and {}, or raise train.max_bad_steps"
    assert explain_failure(tmp_path, state) == advice.format("start again")
    Checkpoints(tmp_path / "checkpoints").save({"model.w": np.zeros(1, np.float32)}, {"step": 5})
    assert explain_failure(tmp_path, state) == advice.format("continue from the last checkpoint, step 5")


def test_a_finished_run_goes_on_beyond_its_last_step(caplog):
    print_next_steps("runs/a", RunState(5, None, step=12), [])
    assert caplog.messages[-1].endswith("train.max_steps=24")


@pytest.mark.parametrize(
    "limits, longer",
    [
        ((50, 1.5), "train.max_steps=100 train.max_minutes=3"),
        ((50, None), "train.max_steps=100"),
        ((None, 0.25), "train.max_minutes=0.5"),
    ],
)
def test_the_end_logs_three_commands_the_last_for_a_run_twice_as_long(caplog, limits, longer):
    print_next_steps("runs/a b", RunState(*limits), ["seed=3", "train.max_steps=50"])
    kept = "seed=3" if limits[0] else "seed=3 train.max_steps=50"
    assert caplog.messages == [
        "sample:    python generate.py run='runs/a b' prompt=\"The \"",
        "curves:    tensorboard --logdir 'runs/a b'",
        f"continue:  python train.py {kept} 'run_dir=runs/a b' resume=auto {longer}",
    ]
