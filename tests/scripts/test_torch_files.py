import os
import sys
from pickle import UnpicklingError
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from local_attention.training.errors import RunError, UsageError
from scripts.torch_files import ENDINGS, read_state, require_ending, write_state

STATE = {"to_out.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": np.array(0.5, np.float32)}


class Tensor:
    """Replaces ``torch.Tensor``."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


@pytest.fixture
def torch(monkeypatch, tmp_path):
    """Replaces ``torch``: the file ``weights.pt`` holds ``torch.content``, or raises it."""
    (tmp_path / "weights.pt").touch()

    def load(path, map_location, weights_only):
        assert (path, map_location, weights_only) == (str(tmp_path / "weights.pt"), "cpu", True)
        if isinstance(torch.content, Exception):
            raise torch.content
        return torch.content

    torch = SimpleNamespace(Tensor=Tensor, load=load, path=str(tmp_path / "weights.pt"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], wanted[name])


# .safetensors


def test_safetensors_come_back_as_they_were_written(tmp_path):
    write_state(str(tmp_path / "a.safetensors"), STATE)
    assert_same(read_state(str(tmp_path / "a.safetensors")), STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types_are_read_as_float32(tmp_path, dtype):
    save_file({name: array.astype(dtype) for name, array in STATE.items()}, tmp_path / "a.safetensors")
    assert_same(read_state(str(tmp_path / "a.safetensors")), STATE)


def test_a_damaged_file_is_refused_naming_it(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(os.urandom(100))
    with pytest.raises(UsageError, match=r"a\.safetensors cannot be read: "):
        read_state(str(path))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_file_that_is_missing_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        read_state(str(tmp_path / name))
    assert error.value.filename == str(tmp_path / name)


def test_a_file_that_cannot_be_written_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.safetensors"
    write_state(str(path), STATE)
    with pytest.raises(AttributeError):
        write_state(str(path), {"a": None})
    assert_same(read_state(str(path)), STATE)
    assert len(list(tmp_path.iterdir())) == 1


# .pt, .pth, .ckpt and .bin


def tensors(prefix=""):
    return {prefix + name: Tensor(array.astype(np.float64)) for name, array in STATE.items()}


def test_the_tensors_of_a_checkpoint_are_found_in_its_dictionaries(torch):
    torch.content = tensors()
    assert_same(read_state(torch.path), STATE)
    optimizer = {"state": {0: {"step": Tensor(3.0), "lr": 0.1}}, "param_groups": [{"params": [0]}]}
    torch.content = {"epoch": 3, "state_dict": tensors("net."), "optimizer": optimizer}
    wanted = {f"state_dict.net.{name}": array for name, array in STATE.items()}
    assert_same(read_state(torch.path), wanted | {"optimizer.state.0.step": np.array(3, np.float32)})


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([1], "got a list"),
        ({"net": {"a": 1}, "step": 3}, "got a dict of net, step"),
        ({"model": [1]}, "got a dict of model"),
        (OSError("many\nlines"), "got a OSError"),
        (
            UnpicklingError("a\nclass"),
            "got a UnpicklingError; objects other than tensors are not loaded, as they may run code",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_saying_what_it_is(torch, content, got):
    torch.content = content
    with pytest.raises(UsageError) as error:
        read_state(torch.path)
    assert str(error.value).startswith(f"{torch.path}: expected ")
    assert str(error.value).endswith(got)
    assert "\n" not in str(error.value)


def test_without_pytorch_its_files_are_refused_and_safetensors_are_not(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").touch()
    for call in (lambda path: read_state(path), lambda path: write_state(path, STATE)):
        with pytest.raises(RunError, match=r"a\.pt needs PyTorch: pip install torch, or use a \.safetensors file"):
            call(str(tmp_path / "a.pt"))
    write_state(str(tmp_path / "a.safetensors"), STATE)
    assert_same(read_state(str(tmp_path / "a.safetensors")), STATE)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin"])
def test_pytorch_reads_what_is_written_for_it(tmp_path, name):
    torch = pytest.importorskip("torch")
    write_state(str(tmp_path / name), STATE)
    loaded = torch.load(tmp_path / name, weights_only=True)
    assert_same({name: tensor.numpy() for name, tensor in loaded.items()}, STATE)
    assert_same(read_state(str(tmp_path / name)), STATE)


@pytest.mark.parametrize("path", ["a", "a.onnx", "pt"])
def test_other_endings_are_refused(path):
    with pytest.raises(UsageError) as error:
        require_ending("weights", path)
    assert str(error.value) == f"weights={path}: expected a file that ends in .pt, .pth, .ckpt, .bin, .safetensors"
    for ending in ENDINGS:
        require_ending("weights", f"a{ending}")
