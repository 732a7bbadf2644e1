"""Signals at the end of a run, and a terminal that is closed; test_train_command.py has those in the middle."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios

import pytest

from local_attention.training import step
from local_attention.training.evaluate import Evaluator
from tests.e2e.conftest import DROPOUT, ROOT, TINY


def final_records(run_dir):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "whole_split" in record]


@pytest.fixture
def unscored_run(commands, finished_run):
    """Copies a run without the summary and the records of its final scores; returns its directory and arguments."""

    def copy(name):
        run_dir = commands.folder / "runs" / name
        shutil.copytree(finished_run[0], run_dir, symlinks=True)
        (run_dir / "summary.json").unlink()
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if "whole_split" not in line))
        return run_dir, [*TINY, f"data.path={commands.text}", f"run_dir=runs/{name}", DROPOUT]

    return copy


def test_scoring_that_was_interrupted_continues_with_what_is_not_scored(
    commands, finished_run, unscored_run, monkeypatch
):
    run_dir, arguments = unscored_run("unscored")
    score_batch, scored = Evaluator.score_batch, []

    def interrupt(evaluator, tokens, batch):
        scored.append(len(tokens))
        if len(final_records(run_dir)) == 1 and scored.count(scored[-1]) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return score_batch(evaluator, tokens, batch)

    monkeypatch.setattr(Evaluator, "score_batch", interrupt)
    result = commands.call("train.py", *arguments)
    shown = result.stdout.decode()
    assert result.returncode == 143, result.stderr
    assert "interrupted while scoring test; the score of val is kept\n" in shown
    assert f"interrupted: saved step 12 in runs/{run_dir.name}/checkpoints\ncontinue:  python train.py" in shown
    assert [record["split"] for record in final_records(run_dir)] == ["val"]
    assert not (run_dir / "summary.json").exists()

    monkeypatch.setattr(Evaluator, "score_batch", score_batch)
    result = commands.call("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "bpb, as scored before\nscoring 3,000 bytes of test" in result.stdout.decode()
    ours, wanted = (json.loads((run / "summary.json").read_text()) for run in (run_dir, finished_run[0]))
    assert (ours["val_bpb"], ours["test_bpb"]) == (wanted["val_bpb"], wanted["test_bpb"])
    assert [record["split"] for record in final_records(run_dir)] == ["val", "test"]


def test_without_final_scores_the_summary_has_none(commands, unscored_run):
    run_dir, arguments = unscored_run("without-scores")
    result = commands.call("train.py", *arguments, "train.final_eval_bytes=0")
    assert result.returncode == 0, result.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["val_bpb"], summary["test_bpb"]) == (12, None, None)
    assert not final_records(run_dir)


def test_after_a_signal_during_compilation_no_step_is_taken(commands, unscored_run, monkeypatch):
    _, arguments = unscored_run("compiled")
    monkeypatch.setattr(step, "compile_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = commands.call("train.py", *arguments, "train.max_steps=24")
    assert result.returncode == 143, result.stderr
    shown = result.stdout.decode()
    assert "interrupted: saved step 12 in runs/compiled/checkpoints\n" in shown and "\nstep " not in shown


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_its_step(commands):
    terminal, end = pty.openpty()
    arguments = [*TINY, f"data.path={commands.text}", "run_dir=runs/closed-terminal", "train.max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=commands.folder,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(end, termios.TIOCSCTTY, 0),  # closing it sends SIGHUP
    )
    os.close(end)
    shown = b""
    while b"/100,000" not in shown:  # a bar
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(timeout=120) == 129
    log = (commands.folder / "runs/closed-terminal/train.log").read_text()
    assert "SIGHUP: saving and stopping after the step or batch at hand" in log
    saved = int(log.split("interrupted: saved step ")[1].split()[0])
    assert (commands.folder / f"runs/closed-terminal/checkpoints/step-{saved:08d}.json").exists()
