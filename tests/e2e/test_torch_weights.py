"""Export of weights to PyTorch, import, and the use of an imported run."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.conftest import TINY
from tests.e2e.test_evaluate_command import scored, summary_of
from tests.e2e.test_mistakes import one_line_error

IMPORT = "scripts/import_torch.py"
WINDOW = "model.local_attn_window_size=16"


@pytest.fixture(scope="module")
def exported(finished_run, commands):
    """The file with the best weights of the run, and the output."""
    path = commands.folder / "runs/weights, exported.safetensors"
    result = commands.call("scripts/export_torch.py", "run=runs/whole", f"output={path}")
    assert (result.returncode, result.stderr) == (0, "")
    return path, result.stdout.decode()


@pytest.fixture(scope="module")
def imported(exported, commands):
    """The run directory of the imported weights."""
    result = commands.call(IMPORT, f"weights={exported[0]}", "run_dir=runs/imported", WINDOW)
    assert (result.returncode, result.stderr) == (0, "")
    return commands.folder / "runs/imported"


def model_tensors(checkpoint):
    return {name: array for name, array in load_file(checkpoint).items() if name.startswith("model.")}


def test_the_arguments_for_pytorch_are_printed(exported):
    line, arguments = exported[1].splitlines()
    assert line.startswith(f"{exported[0]}: ")
    assert arguments.startswith(
        "LocalTransformer(num_tokens=256, max_seq_len=32, dim=32, depth=1, heads=2, dim_head=16,"
    )


def test_exported_and_imported_weights_are_unchanged(finished_run, imported):
    left = model_tensors(finished_run[0] / "checkpoints/best")
    came = load_file(imported / "checkpoints/last")
    assert left.keys() == came.keys()
    for name in left:
        np.testing.assert_array_equal(came[name], left[name], err_msg=name)


def test_an_imported_run_can_be_sampled(imported, commands):
    result = commands.call("generate.py", "run=runs/imported", "prompt=import ", "length=30")
    assert (result.returncode, len(result.stdout)) == (0, 30)
    assert "runs/imported/checkpoints/step-00000000.safetensors, step 0" in result.stderr


def test_an_imported_run_has_the_same_score(finished_run, imported, commands):
    sizes = ["seq_len=32", "batch_size=8", "data=file", f"data.path={commands.text}"]
    result = commands.call("scripts/evaluate.py", "run=runs/imported", *sizes)
    assert scored(result)[1] == pytest.approx(summary_of(finished_run[0])["test_bpb"], abs=5.1e-5)
    assert "warning" not in result.stderr


@pytest.mark.slow
def test_an_imported_run_continues_from_its_weights(imported, commands):
    """With other data and another optimizer; one step of Adam changes each weight by the learning rate."""
    changes = ["train.batch_size=2", "train.grad_accum_every=1", "optimizer=adam", "optimizer.lr=1e-4", "seed=9"]
    changes += ["train.max_steps=1", "schedule=constant", "schedule.warmup_steps=0", "train.generate_length=1"]
    arguments = [*TINY, *changes, f"data.path={commands.text}", "resume=runs/imported", "run_dir=runs/continued"]
    result = commands.run("train.py", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    before = load_file(imported / "checkpoints/last")
    after = model_tensors(commands.folder / "runs/continued/checkpoints/step-00000001.safetensors")
    moved = {name: abs(after[name] - before[name]).max() for name in before}
    assert max(moved.values()) < 1.01e-4
    assert min(moved.values()) > 0.9e-4
    meta = json.loads((commands.folder / "runs/continued/checkpoints/step-00000001.json").read_text())
    assert meta["bytes_seen"] == 2 * 32


def test_weights_that_do_not_fit_are_one_line_and_leave_nothing(exported, commands):
    state = load_file(exported[0])
    del state["layers.0.0.branch.to_qkv.weight"]
    save_file(state, commands.folder / "runs/less.safetensors")
    result = commands.call(IMPORT, "weights=runs/less.safetensors", "run_dir=runs/less", WINDOW)
    assert "missing: layers.0.0.branch.to_qkv.weight (96, 32)" in one_line_error(result)
    assert not (commands.folder / "runs/less").exists()
