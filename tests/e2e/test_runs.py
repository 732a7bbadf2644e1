"""What people do with runs: call them again, copy them, continue them elsewhere, begin new ones with their weights."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.e2e.conftest import DROPOUT, TINY, some_text
from tests.e2e.test_train_command import records


def call(commands, *overrides):
    """Train within this process; returns the lines that were printed."""
    result = commands.call("train.py", *TINY, f"data.path={commands.text}", *overrides)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode().splitlines()


def continue_command(lines):
    return shlex.split(next(line for line in lines if line.startswith("continue:")))[3:]


def newest(run_dir):
    path = max((run_dir / "checkpoints").glob("step-*.safetensors"))
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def copied(commands, finished_run, request):
    """A copy of a finished run, its path relative to the working directory."""
    name = f"runs/{request.node.name}"
    shutil.copytree(finished_run[0], commands.folder / name, symlinks=True)
    return name


def test_a_finished_run_that_is_called_with_other_settings_stays_what_was_trained(commands, finished_run, copied):
    run_dir = commands.folder / copied
    lines = call(commands, DROPOUT, f"run_dir={copied}", "optimizer.lr=0.01")
    assert "changed since the checkpoint: optimizer.lr from 0.001 to 0.01" in lines
    assert "finished at step 12; nothing to train: raise train.max_steps to go on" in lines
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optimizer"]["lr"] == 0.001
    assert (run_dir / "summary.json").read_text() == (finished_run[0] / "summary.json").read_text()
    assert {"optimizer.lr=0.01", "train.max_steps=24"} < set(continue_command(lines))


def test_a_finished_run_that_goes_on_in_another_directory_can_be_continued_there(commands, finished_run):
    lines = call(commands, DROPOUT, "resume=runs/whole/checkpoints/best", "run_dir=runs/elsewhere")
    assert "finished at step 12; nothing to train: raise train.max_steps to go on" in lines
    assert {"run_dir=runs/elsewhere", "resume=auto"} < set(continue_command(lines))
    tensors, wanted = (load_file(commands.folder / f"runs/{name}/checkpoints/best") for name in ("elsewhere", "whole"))
    assert tensors.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(tensors[name], wanted[name], err_msg=name)
    assert (commands.folder / "runs/elsewhere/summary.json").exists()


@pytest.mark.slow
def test_outputs_of_layers_may_begin_at_zero(commands):
    run = commands.train("runs/zero", "train.zero_init_outputs=true", "train.max_steps=1", "optimizer.lr=1e-12")
    assert run.returncode == 0, run.stderr
    for name, weight in load_file(commands.folder / "runs/zero/checkpoints/best").items():
        if name.startswith("model.layers."):
            assert (abs(weight).max() < 1e-9) == name.endswith("to_out.weight") or "norm" in name


@pytest.fixture(scope="module")
def fine_tuned(commands, finished_run):
    """A run that begins with the weights of another one, on other data and with another optimizer; its output."""
    other = commands.folder / "runs/other.txt"
    other.write_bytes(some_text(50_000)[::-1])
    settings = ["train.max_steps=3", "train.eval_every=2", "train.eval_bytes=300", "train.generate_length=5"]
    arguments = ["init_from=runs/whole", "run_dir=runs/tuned", "data=file", f"data.path={other}", "optimizer=adam"]
    result = commands.call("train.py", *arguments, *settings)
    assert result.returncode == 0, result.stderr
    return commands.folder / "runs/tuned", result.stdout.decode().splitlines(), [*arguments, *settings]


def test_a_new_run_begins_with_the_weights_and_the_model_of_another_one(finished_run, fine_tuned):
    run_dir, lines, _ = fine_tuned
    source = finished_run[0] / "checkpoints/step-00000012.safetensors"
    assert "beginning with the weights of runs/whole/checkpoints/step-00000012.safetensors" in lines
    config, meta = yaml.safe_load((run_dir / "config.yaml").read_text()), newest(run_dir)
    assert config["model"]["dim"] == 32 and config["train"]["seq_len"] == 32 and config["optimizer"]["name"] == "adam"
    assert (meta["step"], meta["init_from"]["path"], meta["init_from"]["step"]) == (3, str(source), 12)
    first = records(run_dir, "train")[0]
    assert first["bpb"] < records(finished_run[0], "train")[0]["bpb"] - 0.5  # not random weights


def test_the_printed_command_continues_it(commands, fine_tuned):
    _, lines, arguments = fine_tuned
    assert set(continue_command(lines)) == {*arguments[:5], *arguments[6:], "resume=auto", "train.max_steps=6"}
    result = commands.call("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert b"finished at step 3; nothing to train" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_dir=runs/new", "model.dim=64"], "init_from=runs/whole: model.dim is 32 in the checkpoint and 64 here"),
        (["run_dir=runs/new", "resume=runs/whole"], "init_from=runs/whole begins a new run, resume=runs/whole"),
        (["run_dir=runs/whole"], "runs/whole already contains a run that did not begin with the weights of runs/whole"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_with_init_from_is_one_line(commands, finished_run, overrides, message):
    result = commands.call("train.py", *TINY, f"data.path={commands.text}", DROPOUT, "init_from=runs/whole", *overrides)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not (commands.folder / "runs/new").exists()


@pytest.mark.parametrize("argument", ["train.py resume", "train.py init_from", "generate.py run"])
def test_a_tilde_on_the_command_line_is_the_home_directory(commands, monkeypatch, argument):
    program, key = argument.split()
    monkeypatch.setenv("HOME", str(commands.folder))
    result = commands.call(program, f"{key}=~/nowhere")
    assert result.returncode == 2
    assert f"{commands.folder}/nowhere: no such run directory" in result.stderr


@pytest.mark.slow
def test_a_copy_without_links_goes_on_with_its_steps_divided_and_measured_otherwise(commands, finished_run, tmp_path):
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run[0], run_dir)  # as cp -rL does
    changes = ["train.batch_size=2", "train.grad_accum_every=4", "train.eval_bytes=300", "train.max_steps=18"]
    lines = call(commands, DROPOUT, f"run_dir={run_dir}", "resume=auto", *changes)
    assert any(line.endswith("divided otherwise: results differ by rounding") for line in lines)
    assert any("other bytes (300, before 500)" in line for line in lines)
    assert "because of these changes, the learning rate rises from 1.15e-04 to 3.25e-04" in lines
    first = next(line for line in lines if re.match(r"step +\d+  val", line))
    assert first.endswith("on 300 bytes, new best")
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 18


@pytest.mark.slow
def test_steps_that_are_divided_otherwise_end_with_the_same_weights_up_to_rounding(commands):
    common = ["schedule=constant", "train.eval_every=99", "train.generate_every=99"]
    call(commands, "run_dir=runs/undivided", *common, "train.max_steps=8")
    call(commands, "run_dir=runs/divided", *common, "train.max_steps=4")
    divided = ["train.max_steps=8", "train.batch_size=2", "train.grad_accum_every=4"]
    call(commands, "run_dir=runs/divided", *common, *divided)
    ours, wanted = (
        load_file(commands.folder / f"runs/{name}/checkpoints/step-00000008.safetensors")
        for name in ("divided", "undivided")
    )
    assert ours.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(ours[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)
