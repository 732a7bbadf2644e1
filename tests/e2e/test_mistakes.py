"""Usage errors: one line on standard error that says what was expected, and status 2, before anything is compiled."""

import pytest

from tests.e2e.conftest import TINY

NO_BFLOAT16 = "bfloat16: MindSpore's operators for CPUs do not multiply matrices in bfloat16: use float32"


def one_line_error(result, status=2):
    assert result.returncode == status, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.max_stepz=3"], "did you mean train.max_steps?"),
        (["+surprise=3"], "surprise: no such key"),
        (["train.max_steps=many"], "train.max_steps=many: expected a whole number >= 1, or null"),
        (["train.max_steps=0"], "train.max_steps=0: expected a whole number >= 1"),
        (["model.heads=0"], "model.heads=0: expected a whole number >= 1"),
        (["model.dim_head=15"], "an even head size, got dim_head = 15"),
        (["model.local_attn_window_size=24"], "train.seq_len=32 is not a multiple of model.local_attn_window_size=24"),
        (["data.path=missing.txt"], "missing.txt does not exist"),
        (["data.path=empty.txt"], "empty.txt is empty"),
        (["data.val_path=missing.txt"], "missing.txt does not exist"),
        (["data.test_path=empty.txt"], "empty.txt is empty"),
        (["data.path=text.7z"], "text.7z is packed with 7z, which cannot be read: unpack it first"),
        (["train.seq_len=4096"], "4097"),
        (["model=huge"], "model=huge: expected one of base, small, tiny"),
        (["max_steps"], "max_steps"),
        (["device.target=TPU"], "device.target=TPU: expected one of auto, CPU, GPU, Ascend"),
        (["resume=nowhere"], "resume=nowhere: no such run directory or checkpoint"),
        (["train.precision=bfloat16"], f"train.precision={NO_BFLOAT16}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_usage_error_in_training_is_one_line_and_status_2(commands, overrides, expected):
    (commands.folder / "empty.txt").touch()
    (commands.folder / "text.7z").write_bytes(b"7z\xbc\xaf\x27\x1c\0\4")
    try:
        arguments = [*TINY, f"data.path={commands.text}", "run_dir=runs/mistaken", *overrides]
        assert expected in one_line_error(commands.call("train.py", *arguments))
        assert not (commands.folder / "runs/mistaken").exists()
    finally:
        (commands.folder / "empty.txt").unlink()
        (commands.folder / "text.7z").unlink()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "expected the run to sample from"),
        (["run=nowhere"], "nowhere: no such run directory"),
        (["run=nowhere", "temperature=-1"], "temperature=-1: expected a number >= 0"),
        (["run=nowhere", "legth=3"], "did you mean length?"),
        (["run=nowhere", "prompt=a", "prompt_file=b"], "expected one of prompt and prompt_file"),
        (["run=nowhere", "prompt_file=missing.gz"], "missing.gz: No such file"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
def test_a_usage_error_in_sampling_is_one_line_and_status_2(commands, overrides, expected):
    assert expected in one_line_error(commands.call("generate.py", *overrides))


@pytest.mark.parametrize("program", ["generate.py", "scripts/evaluate.py", "scripts/score.py"])
def test_a_type_that_a_trained_model_cannot_be_computed_in_is_refused_by_its_key(finished_run, commands, program):
    file = [f"file={commands.text}"] if program == "scripts/score.py" else []
    result = commands.call(program, "run=runs/whole", *file, "device.precision=bfloat16")
    assert f"device.precision={NO_BFLOAT16}" in one_line_error(result)


@pytest.mark.parametrize(("program", "key"), [("train.py", "train.max_steps"), ("generate.py", "length")])
def test_the_process_exits_with_status_2(commands, program, key):
    result = commands.run(program, f"{key}z=3")
    assert f"did you mean {key}?" in one_line_error(result)
    assert result.stdout == b""


def test_without_enwik8_and_network_the_error_names_the_alternatives(commands):
    result = commands.call("train.py", f"data.dir={commands.folder / 'runs'}")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert all(alternative in last for alternative in ("enwik8.zip", "data=stdlib", "data=file data.path="))
