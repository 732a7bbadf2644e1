import io
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from data import Corpus
from local_attention.training import summary
from local_attention.training.arguments import quote
from local_attention.training.checkpoint import Checkpoints
from local_attention.training.config import RunConfig
from local_attention.training.distributed import SINGLE_PROCESS
from local_attention.training.evaluate import Score
from local_attention.training.run_log import NullRunLog
from local_attention.training.schema import keys_of
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

KEYS = keys_of(RunConfig)


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

    final_scores = NullRunLog.final_scores

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


def test_a_split_that_was_not_scored_is_null_in_the_summary(tmp_path, state):
    write_summary(tmp_path, state, {})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["val_bpb"], summary["test_bpb"]) == (None, None)


# The final scores


CORPUS = Corpus("some", np.arange(200, dtype=np.uint8))


class FakeEvaluator:
    """Replaces an ``Evaluator`` of the bytes 180 … 189, validation, and 190 … 199, test, in two batches each."""

    def __init__(self, weights="w", before=lambda split: None):
        self.weights, self.before, self.distributed, self.seen = weights, before, SINGLE_PROCESS, []

    def checksum(self, data, start, stop):
        return f"{self.weights} {start} {stop}"

    def estimate_seconds(self, data, start, stop):
        return 25.0 * (stop - start)

    def __call__(self, data, start, stop, progress, before_batch):
        split = "val" if start == 180 else "test"
        self.seen.append((data is CORPUS.bytes, start, stop))
        for _ in progress([1, 2]):
            before_batch()
            self.before(split)
        return SCORES[split]


def test_whole_validation_and_test_splits_are_scored_recorded_and_logged_with_an_estimate(state, caplog):
    evaluator, log = FakeEvaluator(), Log()
    assert score_splits(evaluator, CORPUS, state, log) == SCORES
    assert evaluator.seen == [(True, 180, 190), (True, 190, 200)]
    assert log == [
        ("eval", 40, {"split": split, "bpb": bpb, "bytes_scored": scored, "whole_split": True, "checksum": checksum})
        for split, bpb, scored, checksum in (("val", 2.5, 100, "w 180 190"), ("test", 2.25, 90, "w 190 200"))
    ]
    assert caplog.messages == [
        "scoring 10 bytes of val with the best weights, about 4:10",
        "val: 2.5000 bpb",
        "scoring 10 bytes of test with the best weights, about 4:10",
        "test: 2.2500 bpb",
    ]


@pytest.mark.parametrize(
    "max_bytes, spans, whole", [(4, [(180, 184), (190, 194)], False), (10, [(180, 190), (190, 200)], True), (0, [], 0)]
)
def test_only_the_first_bytes_of_each_split_are_scored_if_so_wanted(state, max_bytes, spans, whole):
    evaluator, log = FakeEvaluator(), Log()
    scores = score_splits(evaluator, CORPUS, state, log, max_bytes)
    assert [span[1:] for span in evaluator.seen] == spans
    assert len(scores) == len(spans)
    assert [values["whole_split"] for _, _, values in log] == [whole] * len(spans)


@pytest.mark.parametrize("interrupted, kept", [("val", ""), ("test", "; the score of val is kept")])
def test_a_signal_ends_the_scoring_between_batches_and_what_is_scored_is_kept(state, caplog, interrupted, kept):
    log, batches = Log(), []

    def before(split):
        batches.append(split)
        state.received_signal = 15 if split == interrupted else None

    scores = score_splits(FakeEvaluator(before=before), CORPUS, state, log)
    assert batches == (["val", "val", "test"] if kept else ["val"])
    assert state.signal == 15
    assert list(scores) == [values["split"] for _, _, values in log] == (["val"] if kept else [])
    assert caplog.messages[-1] == f"interrupted while scoring {interrupted}{kept}"


def test_what_was_scored_before_is_not_scored_again_unless_weights_or_bytes_have_changed(state, caplog):
    log = Log()
    log.final_scores = {"w 180 190": SCORES["val"], "w 190 194": Score(3.0, 4)}
    evaluator = FakeEvaluator()
    assert score_splits(evaluator, CORPUS, state, log) == SCORES
    assert evaluator.seen == [(True, 190, 200)]
    assert [values["split"] for _, _, values in log] == ["test"]
    assert caplog.messages[0] == "val: 2.5000 bpb, as scored before"
    evaluator = FakeEvaluator(weights="others")
    score_splits(evaluator, CORPUS, state, log)
    assert len(evaluator.seen) == 2


def test_sigusr1_while_scoring_does_not_save_the_best_weights_as_the_last_ones(state, caplog):
    state.received_save_request = True
    assert score_splits(FakeEvaluator(), CORPUS, state, Log()) == SCORES
    assert "step     40  saved because of SIGUSR1; the run goes on" in caplog.messages


@pytest.mark.parametrize("terminal", [True, False])
def test_scoring_shows_a_bar_on_a_terminal_only(state, monkeypatch, terminal):
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    score_splits(FakeEvaluator(), CORPUS, state, Log())
    assert ("0/2" in shown.getvalue()) is terminal


# The command that continues a run


def config_of(command):
    """Return the config that Hydra composes from a command line."""
    python, program, *arguments = shlex.split(command)
    assert (python, program) == ("python", "train.py")
    return composed("train", *(quote(argument, KEYS) for argument in arguments))


@pytest.mark.parametrize("run_dir", ["runs/a", "runs/it's a, ${b} & $HOME"])
def test_the_command_to_continue_keeps_overrides_and_adds_the_directory(run_dir):
    original = ["experiment=quickstart", "model.dim=64", "data.path=my 'file', too", "run_dir=old", "resume=old/best"]
    original = [quote(argument, KEYS) for argument in original]  # as in Hydra's list of overrides
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


def test_the_command_that_continues_a_run_that_was_stopped_early_lifts_that_limit(caplog):
    print_next_steps("runs/a", RunState(50, None, 2, evaluations_since_best=2), ["train.stop_after=2"])
    assert caplog.messages[-1].endswith("train.py run_dir=runs/a resume=auto train.max_steps=100 train.stop_after=null")
