"""``Cell.recompute``: the same gradients, and less memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from local_attention import LocalTransformer
from local_attention.constants import shared_cell
from local_attention.layers import GEGLU
from tests.local_attention.cells import Loss, needs_fused, randomise, tensor

SIZES = dict(num_tokens=11, max_seq_len=32, dim=8, depth=2, local_attn_window_size=4, dim_head=4, heads=2, ff_mult=2)
DROPOUT = dict(attn_dropout=0.3, ff_dropout=0.2)
# With tensors in tuples (the bias), and all cells whose gradient is written by hand.
EVERYTHING = dict(use_dynamic_pos_bias=True, num_residual_streams=2, qk_rmsnorm=True, shared_qk=True)
WHAT = {
    "layers": lambda layer: [layer],
    "branches": lambda layer: [layer.attention, layer.feed_forward],
    "inner cells": lambda layer: [layer.attention.attention, layer.feed_forward],  # which end in a gradient by hand
    "nothing": lambda layer: [],
}


def loss_and_gradients(what, options):
    """Of the second step of a model."""
    np.random.seed(0)
    model = LocalTransformer(**SIZES | options).set_train()
    randomise(model)
    for layer in model.layers:
        for cell in WHAT[what](layer):
            cell.recompute()
    x = tensor(np.random.default_rng(0).integers(0, 11, (3, 31)))  # more rows than layers.FEW_ROWS
    step = ms.value_and_grad(Loss(model), None, ms.ParameterTuple(model.trainable_params()))
    step(x)
    return step(x)


@pytest.mark.parametrize(
    ("mode", "path", "what", "options"),
    [
        pytest.param("eager", "fused", "layers", EVERYTHING, marks=needs_fused),
        ("eager", "portable", "layers", EVERYTHING | DROPOUT),
        ("eager", "portable", "branches", DROPOUT),
        ("eager", "portable", "inner cells", DROPOUT),
        pytest.param("eager", "fused", "inner cells", {}, marks=needs_fused),
        pytest.param("graph", "fused", "layers", {}, marks=needs_fused),
        pytest.param("graph", "portable", "layers", {}, marks=pytest.mark.slow),
        *(
            pytest.param("graph", path, what, EVERYTHING | options, marks=[pytest.mark.slow, *marks])
            for path, what, options, marks in (
                ("fused", "branches", {}, [needs_fused]),
                ("portable", "layers", DROPOUT, []),
            )
        ),
    ],
    indirect=["mode", "path"],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
def test_recomputed_cells_have_the_same_gradients(mode, path, what, options):
    loss, gradients = loss_and_gradients(what, options)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    wanted_loss, wanted = loss_and_gradients("nothing", options)
    np.testing.assert_allclose(loss.asnumpy(), wanted_loss.asnumpy(), atol=1e-5)
    for gradient, right in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient.asnumpy(), right.asnumpy(), atol=1e-4)


def test_recomputing_one_model_does_not_mark_cells_that_others_share():
    model = LocalTransformer(**SIZES)
    model.layers[0].recompute()
    assert model.layers[0].feed_forward.geglu is shared_cell(GEGLU)
    marked = [cell for _, cell in shared_cell(GEGLU).cells_and_names() if "recompute" in (cell.get_scope() or "")]
    assert not marked and "recompute" in model.layers[0].feed_forward.get_scope()


STEP = """
import sys
import mindspore as ms, numpy as np
from tests.local_attention.cells import Loss
from local_attention import LocalTransformer, kernels
from local_attention.mindspore_quirks import GradientByHand
ms.set_context(mode=ms.GRAPH_MODE)
if "portable" in sys.argv:
    kernels.library = lambda: None
model = LocalTransformer(
    num_tokens=256, max_seq_len=512, dim=64, depth=6, heads=4, dim_head=16, local_attn_window_size=128
).set_train()
if "recompute" in sys.argv:
    for layer in model.layers:
        layer.recompute()
if "scopeless" in sys.argv:
    del GradientByHand.get_scope
step = ms.value_and_grad(Loss(model), None, ms.ParameterTuple(model.trainable_params()))
step(ms.Tensor(np.zeros((8, 513)), ms.int32))[0].asnumpy()
"""


def run_step(folder, *how):
    """Run ``STEP``, and return its status and what it wrote."""
    statistics = {"MS_DEV_RUNTIME_CONF": "memory_statistics:True"}
    environment = os.environ | statistics | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", STEP, *how]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param("fused", marks=needs_fused), "portable"])
def test_recomputed_layers_take_less_memory(path, tmp_path):
    outputs = [run_step(tmp_path, path, how)[1] for how in ("keep", "recompute")]
    kept, recomputed = (int(re.search(r"actual peak used mem:(\d+)M", output)[1]) for output in outputs)
    assert recomputed < kept / 2


@pytest.mark.slow
def test_the_scope_of_gradients_by_hand_is_needed(tmp_path):
    status, output = run_step(tmp_path, "portable", "recompute", "scopeless")
    assert status != 0 and "Graph cycle exists" in output
