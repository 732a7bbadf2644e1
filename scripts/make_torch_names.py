"""Write the names and shapes of the original's state dicts, ``tests/local_attention/fixtures/torch_names.json``.

Needs the environment of ``make parity``:

    .venv-parity/bin/python scripts/make_torch_names.py
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pytorch_original import import_original

ORIGINAL = import_original()  # or says what is missing

import torch

OUTPUT = Path(__file__).resolve().parents[1] / "tests/local_attention/fixtures/torch_names.json"
SIZES: dict[str, Any] = dict(
    num_tokens=9, max_seq_len=12, dim=6, depth=2, heads=3, dim_head=4, local_attn_window_size=4
)
CASES: list[dict[str, Any]] = [  # global_layers: layers before which a linear layer is inserted
    dict(),
    dict(num_tokens=None),
    dict(ff_mult=3),
    dict(use_xpos=True),
    dict(shared_qk=True),
    dict(qk_rmsnorm=True),
    dict(gate_values_per_head=True),
    dict(use_dynamic_pos_bias=True),
    dict(num_residual_streams=3),
    dict(global_layers=[1, 2]),
    dict(num_residual_streams=2, global_layers=[2]),
    dict(num_residual_streams=2, qk_rmsnorm=True, gate_values_per_head=True, use_dynamic_pos_bias=True),
]


def state_shapes(options: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of the state dict of the original with these options, by name."""
    options = {"num_residual_streams": 1, **SIZES, **options}
    if inserted := options.pop("global_layers", None):
        linear = torch.nn.Linear(options["dim"], options["dim"])
        options |= dict(global_attn_layer=linear, layers_insert_global_attn=inserted)
    state = ORIGINAL.LocalTransformer(**options).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def main() -> None:
    lines = [json.dumps({"options": SIZES | case, "state": state_shapes(case)}) for case in CASES]
    OUTPUT.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
