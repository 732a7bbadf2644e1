import ast
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

import local_attention

HEAVY = ["mindspore", "hydra", "omegaconf", "tqdm", "tensorboardX", "einops", "numpy"]


def python(program):
    """Run a program in a fresh interpreter, in the folder that holds the package."""
    home = Path(local_attention.__file__).parents[1]
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=home)


def test_importing_the_package_loads_nothing_heavy():
    done = python(f"import sys, local_attention; print([m for m in {HEAVY} if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_listing_the_package_loads_nothing_heavy():
    done = python(
        "import sys, local_attention; print('LocalTransformer' in dir(local_attention), 'mindspore' in sys.modules)"
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_importing_the_package_is_silent_where_warnings_are_errors():
    home = Path(local_attention.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import local_attention"], capture_output=True, text=True, cwd=home
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_library_works_without_what_only_the_application_needs():
    program = """
import sys
for name in ("hydra", "omegaconf", "tqdm", "tensorboardX", "tensorboard", "yaml", "matplotlib", "torch"):
    sys.modules[name] = None  # as if it were not installed
from local_attention import *
import local_attention.decoding, local_attention.torch_state
assert LocalAttention and LocalMHA and LocalTransformer and Rearrange and DynamicPositionBias
print([m for m in ("local_attention.training", "data") if m in sys.modules])
"""
    done = python(program)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("name", local_attention.__all__)
def test_every_public_name_has_a_docstring_and_that_name(name):
    public = getattr(local_attention, name)
    assert public.__name__ == name and public.__doc__
    assert name in dir(local_attention)


def test_the_public_names_are_these():
    assert sorted(local_attention.__all__) == [
        "DynamicPositionBias",
        "GlobalAttention",
        "LocalAttention",
        "LocalMHA",
        "LocalTransformer",
        "Rearrange",
        "Reduce",
        "Repeat",
        "SinusoidalEmbeddings",
        "apply_rotary_pos_emb",
    ]


def test_type_checkers_are_told_the_same_names():
    source = ast.parse(Path(local_attention.__file__).read_text())
    told = {
        alias.name: line.module
        for block in ast.walk(source)
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert told == local_attention._HOMES
    assert sorted(told) == sorted(local_attention.__all__)


def test_the_version_is_there_without_an_installation():
    program = "import sys; sys.path.insert(0, '.'); import local_attention; print(local_attention.__version__)"
    home = Path(local_attention.__file__).parents[1]
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=home)
    assert done.stdout.strip() == local_attention.__version__, done.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+", local_attention.__version__)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'local_attention' has no attribute 'SparseAttention'"):
        operator.attrgetter("SparseAttention")(local_attention)
    with pytest.raises(ImportError):
        exec("from local_attention import SparseAttention")
