"""The documentation: its Python code prints what the comments say, and its picture shows what the code does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from local_attention import LocalTransformer
from local_attention.training.build import build_model
from local_attention.training.checkpoint import Checkpoints, tensors_of
from local_attention.training.config import ModelConfig, RunConfig
from local_attention.training.optimizer import build_optimizer
from local_attention.training.schema import as_dict
from scripts import draw_visibility
from scripts.draw_visibility import AFTER, BEFORE, LAST_RESORT, OWN, PADDING, PANELS, WINDOW
from tests.e2e.conftest import ROOT
from tests.local_attention import reference
from tests.training.toys import randomise


def python_of(page):
    """Return the Python code of a page as one program, with blank lines elsewhere so that line numbers match."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, line = line == "```python", ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/local_attention.md", marks=pytest.mark.slow)])
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


def test_the_lines_that_load_the_weights_of_a_run_load_those_of_a_checkpoint(tmp_path, monkeypatch):
    config = RunConfig(
        model=ModelConfig(max_seq_len=8, dim=8, depth=1, heads=1, dim_head=8, local_attn_window_size=4, max_ngram=2)
    )
    model = build_model(config.model)
    randomise(model.get_parameters())
    tensors = tensors_of(model, build_optimizer(config.optimizer, model.trainable_params()))
    Checkpoints(tmp_path).save(tensors, {"step": 1000, "config": as_dict(config)})
    monkeypatch.chdir(tmp_path)
    restored = LocalTransformer(**json.loads(Path("step-00001000.json").read_text())["config"]["model"])
    lines = python_of(ROOT / "docs/local_attention.md").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("tensors = ms.load_checkpoint("))
    scope = {"ms": ms, "restored": restored}
    exec("\n".join(lines[first : first + 3]), scope)
    assert (scope["missing"], scope["unexpected"]) == ([], [])
    found = {parameter.name: parameter.asnumpy() for parameter in restored.get_parameters()}
    assert found.keys() == {parameter.name for parameter in model.get_parameters()}
    for parameter in model.get_parameters():
        np.testing.assert_array_equal(found[parameter.name], parameter.asnumpy(), err_msg=parameter.name)


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
