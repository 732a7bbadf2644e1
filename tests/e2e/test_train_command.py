import json
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.conftest import DROPOUT, TINY
from tests.e2e.tensorboard_server import tensorboard


def records(run_dir, kind):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def metrics(run_dir):
    """Return all records without what depends on the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = {"wall_s", "bytes_per_s", "gflop_per_s", "peak_memory_bytes"}
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def test_a_run_writes_the_documented_files(finished_run):
    run_dir, _ = finished_run
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "train.log"}
    checkpoints = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"last", "best", "step-00000012.safetensors", "step-00000012.json"} <= checkpoints
    assert not [name for name in checkpoints if "partial" in name]


def test_a_run_writes_nothing_else_to_the_working_directory(finished_run, commands):
    assert {path.name for path in commands.folder.iterdir()} <= {"runs", commands.text.name}


def test_every_step_is_recorded_with_its_metrics(finished_run):
    run_dir, _ = finished_run
    train = records(run_dir, "train")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["bytes_seen"] for line in train] == [step * 2 * 4 * 32 for step in range(1, 13)]
    for line in train:
        assert all(np.isfinite(line[key]) for key in ("bpb", "lr", "grad_norm", "bytes_per_s", "wall_s"))
    assert train[-1]["bpb"] < train[0]["bpb"]
    assert [line["lr"] for line in train[:3]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3], rel=0.1)


def test_evaluations_and_samples_are_recorded_at_their_intervals_and_at_the_end(finished_run):
    run_dir, _ = finished_run
    during = [line for line in records(run_dir, "eval") if "whole_split" not in line]
    assert [(line["step"], line["split"], line["bytes_scored"]) for line in during] == [
        (4, "val", 500),
        (8, "val", 500),
        (12, "val", 500),
    ]
    assert [line["step"] for line in records(run_dir, "sample")] == [6, 12]
    assert all(line["text"] for line in records(run_dir, "sample"))


def test_the_summary_scores_the_whole_validation_and_test_splits(finished_run, commands):
    run_dir, result = finished_run
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary) == {
        "steps",
        "bytes_seen",
        "val_bpb",
        "test_bpb",
        "bytes_per_s",
        "peak_memory_bytes",
        "wall_s",
    }
    assert summary["steps"] == 12 and 0 < summary["test_bpb"] < 8.1
    size = commands.text.stat().st_size
    whole = {line["split"]: line["bytes_scored"] for line in records(run_dir, "eval") if line.get("whole_split")}
    assert whole == {"val": size * 95 // 100 - size * 90 // 100, "test": size - size * 95 // 100}
    assert f"test: {summary['test_bpb']:.4f} bpb" in result.stdout.decode()


def test_the_end_prints_how_to_sample_show_curves_and_continue(finished_run):
    _, result = finished_run
    last = result.stdout.decode().splitlines()[-3:]
    assert [line.split(":")[0] for line in last] == ["sample", "curves", "continue"]
    assert "generate.py run=runs/whole" in last[0]
    assert "tensorboard --logdir runs/whole" in last[1]
    assert "resume=auto" in last[2] and "train.max_steps=24" in last[2]


def test_nothing_is_printed_to_standard_error(finished_run):
    _, result = finished_run
    assert result.stderr == ""


@pytest.fixture(scope="module")
def interrupted_run(commands):
    """A run that was terminated in an evaluation and killed, and resumed each time."""
    name = "runs/interrupted"
    returned, printed, err = commands.train_until("step      4  train", signal.SIGTERM, name, DROPOUT)
    assert returned == 143, err
    assert "step      4  the evaluation was interrupted; a continued run begins with it\n" in printed
    assert f"interrupted: saved step 4 in {name}/checkpoints" in printed and "resume=auto" in printed
    returned, _, err = commands.train_until("step      7", signal.SIGKILL, name, DROPOUT)
    assert returned == -signal.SIGKILL, err
    result = commands.train(name, DROPOUT)
    assert result.returncode == 0, result.stderr
    return commands.folder / name


def test_an_interrupted_run_ends_with_the_weights_of_the_uninterrupted_one(finished_run, interrupted_run):
    ours, expected = (
        load_file(path / "checkpoints/step-00000012.safetensors") for path in (interrupted_run, finished_run[0])
    )
    assert ours.keys() == expected.keys()
    for tensor in expected:
        np.testing.assert_array_equal(ours[tensor], expected[tensor], err_msg=tensor)


def test_its_metrics_are_those_of_the_uninterrupted_one(finished_run, interrupted_run):
    assert metrics(interrupted_run) == metrics(finished_run[0])


@pytest.mark.slow
def test_a_run_in_float16_that_is_killed_ends_with_the_bits_of_one_that_is_not(commands):
    half = ["train.precision=float16", "train.loss_scale=1048576", DROPOUT]
    returned, printed, err = commands.train_until("step      8", signal.SIGKILL, "runs/half_killed", *half)
    assert returned == -signal.SIGKILL, err
    assert "skipped: loss" in printed and "the loss scale is now 524288" in printed
    for name in ("runs/half_killed", "runs/half"):
        result = commands.train(name, *half)
        assert result.returncode == 0, result.stderr
    killed, whole = (
        load_file(commands.folder / name / "checkpoints/step-00000012.safetensors")
        for name in ("runs/half_killed", "runs/half")
    )
    assert killed.keys() == whole.keys() and whole["loss_scaler.scale"] < 1048576
    for tensor in whole:
        np.testing.assert_array_equal(killed[tensor], whole[tensor], err_msg=tensor)


def test_it_leaves_no_incomplete_files(interrupted_run):
    assert not [path for path in interrupted_run.rglob("*") if "partial" in path.name]


def arguments(commands):
    return [*TINY, f"data.path={commands.text}", "run_dir=runs/whole"]


def test_a_run_is_not_overwritten(finished_run, commands):
    result = commands.call("train.py", *arguments(commands), "resume=null")
    assert result.returncode == 2
    assert "runs/whole already contains a run" in result.stderr


def test_continuing_with_another_model_is_refused_with_both_values(finished_run, commands):
    result = commands.call("train.py", *arguments(commands), "model.depth=3")
    assert result.returncode == 2
    assert "model.depth was 1 in the run and is 3 now" in result.stderr


def test_tensorboard_lists_the_scalars_and_the_samples(finished_run):
    run_dir, _ = finished_run
    with tensorboard(run_dir) as ask:
        scalars = {run: set(tags) for run, tags in ask("/data/plugin/scalars/tags").items() if tags}
        names = ("lr", "grad_norm", "bytes_per_s", "gflop_per_s", "skipped_steps", "peak_memory_bytes")
        assert scalars == {
            "tensorboard/train": {"bpb", *(f"train/{name}" for name in names)},
            **{f"tensorboard/{run}": {"bpb"} for run in ("val", "final/val", "final/test")},
        }
        texts = ask("/data/plugin/text/tags")["tensorboard"]
        assert any("sample" in tag for tag in texts)
        points = ask("/data/plugin/scalars/scalars?run=tensorboard%2Ftrain&tag=bpb")
        assert [step for _, step, _ in points] == list(range(1, 13))
