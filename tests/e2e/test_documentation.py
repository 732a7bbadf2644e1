"""The documentation: its Python code prints what the comments say, and its picture shows what the code does."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from scripts import draw_visibility
from scripts.draw_visibility import AFTER, BEFORE, LAST_RESORT, OWN, PADDING, PANELS, WINDOW
from tests.e2e.conftest import ROOT
from tests.local_attention import reference


def python_of(page):
    """Return the Python code of a page as one program, with blank lines elsewhere so that line numbers match."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, line = line == "```python", ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", "docs/local_attention.md"])
def test_the_python_of_a_page_runs_and_prints_what_its_comments_say(page, tmp_path):
    program = python_of(ROOT / page)
    (tmp_path / "page.py").write_text(program)
    result = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_a_panel_of_the_picture_shows_the_visible_keys(panel):
    kinds, options = draw_visibility.kinds(panel), dict(panel.options)
    options.pop("autopad", None)
    shared_qk = options.pop("shared_qk", False)
    forward = 0 if options.get("causal") else 1
    wanted = reference.visibility(panel.length, window_size=WINDOW, **{"look_forward": forward} | options)
    wanted[:, list(panel.hidden)] = False
    shown = np.zeros_like(wanted)
    for i, j in np.ndindex(wanted.shape):
        shown[i, j] = kinds[i, j] in (OWN, BEFORE, AFTER, LAST_RESORT)
        assert (kinds[i, j] is LAST_RESORT) == (shared_qk and i == j and wanted[i].sum() > 1)
    np.testing.assert_array_equal(shown, wanted)
    padding = {at for at, kind in kinds.items() if kind is PADDING}
    assert padding == {at for at in kinds if max(at) >= panel.length}


def test_the_picture_is_a_small_png_and_always_the_same(tmp_path):
    for name in ("a.png", "b.png"):
        draw_visibility.draw(tmp_path / name)
    picture = (tmp_path / "a.png").read_bytes()
    assert picture == (tmp_path / "b.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 150_000
