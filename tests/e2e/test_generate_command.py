import signal

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import save_file

from local_attention.torch_state import torch_state
from tests.training.toys import tiny_transformer

SAMPLE = ["run=runs/whole", "length=30", "temperature=1", "seed=1"]
PROMPT = "class A: {b}, c"


@pytest.fixture(scope="module")
def sample(finished_run, commands):
    """30 bytes after ``PROMPT``."""
    return commands.call("generate.py", *SAMPLE, f"prompt={PROMPT}").stdout


def test_only_the_sampled_bytes_are_written_to_standard_output(finished_run, commands):
    result = commands.run("generate.py", "run=runs/whole", "prompt=def ", "length=50", "temperature=1")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 50
    assert "bytes/s" in result.stderr


def test_another_seed_gives_other_bytes(sample, commands):
    assert commands.call("generate.py", *SAMPLE, f"prompt={PROMPT}", "seed=2").stdout != sample


def test_the_first_of_several_samples_is_that_of_a_single_one(sample, commands):
    three = commands.call("generate.py", *SAMPLE, f"prompt={PROMPT}", "num_samples=3").stdout
    assert len(three) == 90
    assert three[:30] == sample
    assert len({three[:30], three[30:60], three[60:]}) == 3


def test_a_prompt_from_a_file_or_standard_input_is_used_like_the_same_text(sample, commands):
    (commands.folder / "runs/prompt").write_bytes(PROMPT.encode())
    assert commands.call("generate.py", *SAMPLE, "prompt_file=runs/prompt").stdout == sample
    result = commands.call("generate.py", *SAMPLE, "prompt_file=-", stdin=PROMPT.encode())
    assert result.stdout == sample


def test_temperature_zero_and_top_k_one_are_greedy(sample, commands):
    greedy = commands.call("generate.py", "run=runs/whole", "length=30", "temperature=0", "seed=1").stdout
    top_1 = commands.call("generate.py", "run=runs/whole", "length=30", "temperature=1", "top_k=1", "seed=2").stdout
    narrow = commands.call("generate.py", "run=runs/whole", "length=30", "temperature=1", "top_p=1e-9").stdout
    assert greedy == top_1 == narrow != sample


def test_checkpoints_can_be_given_by_name_and_by_path(finished_run, commands):
    path = "runs/whole/checkpoints/step-00000012.safetensors"
    last, by_path = (
        commands.call("generate.py", "run=runs/whole", f"checkpoint={name}", "length=20", "temperature=1").stdout
        for name in ("last", path)
    )
    assert last == by_path


def test_with_length_0_sampling_continues_until_ctrl_c_with_status_130(finished_run, commands):
    process = commands.start("generate.py", "run=runs/whole", "length=0", "temperature=1")
    assert len(process.stdout.read(200)) == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"bytes/s" in err and b"Traceback" not in err


def test_a_closed_pipe_ends_sampling_without_an_error(finished_run, commands):
    with commands.start("generate.py", "run=runs/whole", "length=1000000", "temperature=1") as process:
        assert process.stdout.read(10)
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141
    assert "Traceback" not in err and "error" not in err


def test_a_model_with_more_tokens_than_bytes_generates_bytes(commands):
    """Its logits favour token 300."""
    model = tiny_transformer(num_tokens=320)
    favour = np.zeros((320, 16), np.float32)
    favour[300] = 9
    model.to_logits.weight.set_data(Tensor(favour))
    model.norm.beta.set_data(Tensor(np.ones((1, 16), np.float32)))
    save_file(torch_state(model), commands.folder / "wide.safetensors")
    options = ["weights=wide.safetensors", "run_dir=runs/wide", "model.local_attn_window_size=8"]
    assert commands.call("scripts/import_torch.py", *options).returncode == 0
    result = commands.call("generate.py", "run=runs/wide", "length=20")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 20
