"""The sdist and the wheel: what is in them, and that the wheel works outside the checkout."""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

import local_attention
from tests.local_attention import reference

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "local_attention"

pytestmark = pytest.mark.slow

can_build_operators = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("g++") is None, reason="there is no C++ compiler"
)


def run(*command, cwd):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_below(folder, *patterns):
    """Paths of files of the library, relative to the checkout, without those of the application."""
    paths = [path.relative_to(ROOT) for pattern in patterns for path in folder.rglob(pattern)]
    return {str(path) for path in paths if path.parts[:2] != ("local_attention", "training")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """``(sdist, wheel)``, the wheel built from the sdist, of a copy of the checkout, which stays as it is."""
    folder = tmp_path_factory.mktemp("distributions")
    ignore = shutil.ignore_patterns(".*", "runs", "*.so", "__pycache__", "build", "dist", "*.egg-info", "enwik8*")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "checkout", cwd=folder)
    shutil.rmtree(folder / "checkout")
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist_files(distributions):
    with tarfile.open(distributions[0]) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel_files(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        return set(archive.namelist())


def test_the_sdist_holds_what_the_wheel_is_built_of(sdist_files):
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "local_attention/py.typed"} <= sdist_files
    assert files_below(LIBRARY, "*.py", "*.cpp", "*.h", "*.hpp") <= sdist_files


def test_every_source_in_cpp_is_compiled():
    declared = (ROOT / "pyproject.toml").read_text()
    assert [path for path in files_below(LIBRARY, "*.cpp") if f'"{path}"' not in declared] == []


def test_the_wheel_holds_the_library_and_nothing_else(wheel_files):
    library = {name for name in wheel_files if ".dist-info/" not in name}
    operators = {name for name in library if fnmatch(name, "local_attention/_kernels.*")}
    assert library - operators == files_below(LIBRARY, "*.py") | {"local_attention/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_files)


@can_build_operators
def test_the_wheel_holds_the_operators_in_cpp(wheel_files):
    assert f"local_attention/_kernels{sysconfig.get_config_var('EXT_SUFFIX')}" in wheel_files


@pytest.fixture(scope="module")
def outside(distributions, tmp_path_factory):
    """``(python, folder)``: an interpreter of a new environment that has the wheel, and a folder to run it in.

    MindSpore and the other dependencies are those of the environment that runs the tests: a line of a .pth file makes
    its packages importable, but does not run its own .pth files, such as that of an editable installation.
    """
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", distributions[1], cwd=folder)
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    tested = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site_packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in tested))
    return python, folder


OPTIONS = dict(window_size=4, causal=True)
PROGRAM = f"""
import json
from importlib import metadata, util

import mindspore as ms
import numpy as np

import local_attention
from local_attention import LocalAttention, LocalTransformer

attend = LocalAttention(**{OPTIONS}, autopad=True, dim=8)
arrays = np.load("arrays.npz")
q, k, v, out_direction = (ms.Tensor(arrays[name]) for name in ("q", "k", "v", "out_direction"))
gradients = ms.grad(lambda q, k, v: (attend(q, k, v) * out_direction).sum(), (0, 1, 2))(q, k, v)
np.savez("results.npz", out=attend(q, k, v).asnumpy(), **dict(zip("qkv", (g.asnumpy() for g in gradients))))

ms.set_seed(1)
options = dict(num_tokens=16, max_seq_len=32, dim=16, depth=1, heads=2, dim_head=8, local_attn_window_size=8)
model = LocalTransformer(**options)
prime = ms.Tensor([[1, 2, 3], [4, 5, 6]], ms.int32)
ms.set_context(mode=ms.GRAPH_MODE)
texts = [model.generate(prime, 20, seed=1).asnumpy().tolist() for _ in range(2)]
uncached = model.generate(prime, 20, temperature=0, use_kv_cache=False).asnumpy().tolist()
cached = model.generate(prime, 20, temperature=0).asnumpy().tolist()

operators = util.find_spec("local_attention._kernels")
facts = dict(
    file=local_attention.__file__,
    version=local_attention.__version__,
    version_of_the_wheel=metadata.version("local-attention-mindspore"),
    training=util.find_spec("local_attention.training") is not None,
    operators=operators and operators.origin,
    texts=texts,
    uncached=uncached,
    cached=cached,
)
try:
    with open("/proc/self/maps") as maps:
        facts["loaded"] = "_kernels." in maps.read()
except FileNotFoundError:
    pass
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    names = ("q", "k", "v", "q_direction", "k_direction", "v_direction", "out_direction")
    return {name: random.standard_normal((1, 2, 10, 8)).astype(np.float32) for name in names}


@pytest.fixture(scope="module")
def facts(outside, arrays):
    python, folder = outside
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "program.py").write_text(PROGRAM)
    return json.loads(run(python, "-I", "program.py", cwd=folder).splitlines()[-1])


@pytest.fixture(scope="module")
def results(facts, outside):
    return np.load(outside[1] / "results.npz")


def test_what_is_imported_is_the_wheel(facts, outside):
    assert Path(facts["file"]).is_relative_to(outside[1])


def test_the_version_is_the_one_of_the_package(facts):
    assert facts["version"] == facts["version_of_the_wheel"] == local_attention.__version__


def test_the_application_is_not_there(facts):
    assert not facts["training"]


def attention(arrays, step=0.0):
    q, k, v = (arrays[name] + step * arrays[f"{name}_direction"].astype(np.float64) for name in "qkv")
    return reference.attention(q, k, v, rotary=True, **OPTIONS)


def test_local_attention_computes_what_it_should(results, arrays):
    np.testing.assert_allclose(results["out"], attention(arrays), atol=1e-5)


def test_so_do_its_gradients(results, arrays):
    slope = sum((results[name] * arrays[f"{name}_direction"]).sum() for name in "qkv")
    difference = (attention(arrays, 1e-5) - attention(arrays, -1e-5)) / 2e-5
    assert slope == pytest.approx((difference * arrays["out_direction"]).sum(), abs=1e-3)


def test_generate_continues_texts(facts):
    first, second = facts["texts"]
    assert first == second and np.shape(first) == (2, 20)
    assert facts["cached"] == facts["uncached"]


@can_build_operators
def test_generate_uses_the_operators_of_the_wheel(facts, outside):
    assert Path(facts["operators"]).is_relative_to(outside[1])
    assert facts["loaded"]


def test_type_checkers_see_its_types(outside):
    python, folder = outside
    (folder / "typed.py").write_text(
        "from local_attention import LocalAttention, __version__\n"
        "reveal_type(__version__)\n"
        "reveal_type(LocalAttention)\n"
        "from local_attention import NoSuchAttention\n"
    )
    environment = os.environ | {"MYPYPATH": ""}
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--ignore-missing-imports", "typed.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert "typed.py:2: note: Revealed type is" in done.stdout and "str" in done.stdout.splitlines()[0], done.stdout
    assert "local_attention.local_attention.LocalAttention" in done.stdout, done.stdout
    assert 'Module "local_attention" has no attribute "NoSuchAttention"' in done.stdout, done.stdout
