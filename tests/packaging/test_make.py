import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.local_attention.models import needs_kernels

ROOT = Path(__file__).resolve().parents[2]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@needs_make
def test_help_lists_every_target():
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test
    done = subprocess.run(["make", "help"], capture_output=True, text=True, timeout=60, cwd=ROOT, env=outside)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["make", target] for target in targets]


@needs_make
def test_parity_has_an_environment_of_its_own(tmp_path):
    """Where PyTorch's package is installed, it is what `import local_attention` finds outside the checkout."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test
    command = ["make", "--dry-run", "PYTHON=python3", "parity"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=outside)
    assert ".venv-parity/bin/python -m pip install --editable '.[train,dev,parity]'" in done.stdout.splitlines()
    assert not re.search(r"\.venv\b(?!-parity)", done.stdout)


@pytest.mark.slow
@needs_make
@needs_kernels
def test_sanitizers_find_no_error_in_the_operators():
    done = subprocess.run(["make", "sanitize"], capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "no error" in line] == [
        "thread",
        "address,undefined",
    ]
