"""The PyTorch package ``local-attention`` beside this project's package of the same import name.

Needs the parity extra: ``pip install -e '.[parity]'``.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np


def import_original():
    """The original's module ``local_attention.transformer``, which leaves ``import local_attention`` as it was."""
    try:
        folder = str(distribution("local-attention").locate_file(""))
    except PackageNotFoundError:
        sys.exit("error: expected the PyTorch package local-attention: pip install -e '.[parity]'")
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "local_attention"}
    sys.path.insert(0, folder)
    try:
        return import_module("local_attention.transformer")
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "local_attention"]:
            del sys.modules[name]
        sys.modules.update(ours)


def original_state(model):
    """The weights of a ``LocalTransformer`` under the original's names (for ``num_residual_streams=1``), as arrays."""
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    state = {"token_emb.weight": weights["token_emb.embedding_table"]}
    if model.use_abs_pos_emb:
        state["pos_emb.weight"] = weights["pos_emb.embedding_table"]

    def norm(theirs, ours):
        state[f"{theirs}.weight"], state[f"{theirs}.bias"] = (
            weights[f"{ours}.{name}"][0] for name in ("gamma", "beta")
        )

    def linear(theirs, *ours):
        state[f"{theirs}.weight"] = np.concatenate([weights[f"{name}.weight"] for name in ours])

    for i in range(len(model.layers)):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        norm(f"layers.{i}.0.branch.norm", f"{attention}.norm")
        linear(f"layers.{i}.0.branch.to_qkv", *(f"{attention}.to_{name}" for name in "qkv"))
        linear(f"layers.{i}.0.branch.to_out", f"{attention}.to_out")
        norm(f"layers.{i}.1.branch.0", f"{feed_forward}.norm")
        linear(f"layers.{i}.1.branch.1", f"{feed_forward}.to_value", f"{feed_forward}.to_gate")
        linear(f"layers.{i}.1.branch.4", f"{feed_forward}.to_out")
    norm("to_logits.0", "norm")
    linear("to_logits.1", "to_logits")
    return state
