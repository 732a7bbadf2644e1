import gzip
import io
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


@pytest.fixture(scope="module")
def three_samples(finished_run, commands):
    return commands.call("generate.py", *SAMPLE, f"prompt={PROMPT}", "num_samples=3")


def test_another_seed_gives_other_bytes(sample, commands):
    assert commands.call("generate.py", *SAMPLE, f"prompt={PROMPT}", "seed=2").stdout != sample


def test_the_first_of_several_samples_is_that_of_a_single_one(sample, three_samples):
    three = three_samples.stdout
    assert len(three) == 90
    assert three[:30] == sample
    assert len({three[:30], three[30:60], three[60:]}) == 3


def test_a_prompt_from_a_file_or_packed_standard_input_is_used_like_the_same_text(sample, commands):
    (commands.folder / "runs/prompt").write_bytes(PROMPT.encode())
    assert commands.call("generate.py", *SAMPLE, "prompt_file=runs/prompt").stdout == sample
    result = commands.call("generate.py", *SAMPLE, "prompt_file=-", stdin=gzip.compress(PROMPT.encode()))
    assert result.stdout == sample


def test_each_sample_ends_before_the_stop_text(three_samples, commands):
    samples = [three_samples.stdout[i : i + 30] for i in range(0, 90, 30)]
    stop = samples[1][20:22]
    arguments = [*SAMPLE, f"prompt={PROMPT}", "num_samples=3", rf"stop=\x{stop[0]:02x}\x{stop[1]:02x}"]
    result = commands.call("generate.py", *arguments)
    assert result.stdout == b"".join(text.partition(stop)[0] for text in samples)
    assert len(result.stdout) < 90


def test_sampling_ends_when_all_samples_have_stopped(sample, commands):
    arguments = ["run=runs/whole", "length=0", "temperature=1", "seed=1", f"prompt={PROMPT}"]
    result = commands.call("generate.py", *arguments, f"stop=\\x{sample[9]:02x}")
    assert (result.returncode, result.stdout) == (0, sample.partition(sample[9:10])[0])


def test_elsewhere_than_on_a_terminal_prompts_headings_and_the_speed_begin_lines(three_samples):
    _, *lines, speed = three_samples.stderr.splitlines()
    assert lines == [line for number in (1, 2, 3) for line in (f"--- sample {number} of 3", PROMPT, "")]
    assert speed.endswith(" bytes/s")


def test_on_a_terminal_a_sample_continues_its_prompt(finished_run, commands, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "TextIOWrapper", Terminal)
    result = commands.call("generate.py", "run=runs/whole", "length=3", "prompt=def ")
    assert result.stderr.splitlines()[1].startswith("def ") and len(result.stderr.splitlines()) == 2
    assert result.stdout.endswith(b"\n")


@pytest.mark.slow
def test_temperature_zero_and_top_k_one_are_greedy(sample, commands):
    greedy = commands.call("generate.py", "run=runs/whole", "length=30", "temperature=0", "seed=1").stdout
    top_1 = commands.call("generate.py", "run=runs/whole", "length=30", "temperature=1", "top_k=1", "seed=2").stdout
    narrow = commands.call("generate.py", "run=runs/whole", "length=30", "temperature=1", "top_p=1e-9").stdout
    assert greedy == top_1 == narrow != sample


@pytest.mark.slow
def test_checkpoints_can_be_given_by_name_and_by_path_which_needs_no_run(finished_run, commands):
    path = "runs/whole/checkpoints/step-00000012.safetensors"
    last, by_path = (
        commands.call("generate.py", *which, "length=20", "temperature=1")
        for which in (["run=runs/whole", "checkpoint=last"], [f"checkpoint={path}"])
    )
    assert by_path.returncode == 0 and by_path.stderr.startswith(f"{path}, step 12\n")
    assert len(last.stdout) == 20 and last.stdout == by_path.stdout


def test_with_length_0_sampling_continues_until_ctrl_c_with_status_130(finished_run, commands):
    process = commands.start("generate.py", "run=runs/whole", "length=0", "temperature=1")
    assert len(process.stdout.read(200)) == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    _, *empty, speed, end = err.decode().split("\n")
    assert not any(empty) and speed.endswith(" bytes/s") and end == ""


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
