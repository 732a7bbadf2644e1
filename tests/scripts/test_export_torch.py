import re

import numpy as np
import pytest

from local_attention import LocalTransformer
from local_attention.torch_state import torch_state
from local_attention.training.build import load_model
from local_attention.training.checkpoint import Checkpoints
from local_attention.training.errors import UsageError
from scripts.export_torch import export_config, main
from scripts.pytorch_original import import_original
from scripts.torch_files import read_state
from tests.scripts.conftest import TOKENS, logits
from tests.training.toys import composed

# Keyword arguments of the original's LocalTransformer, LocalMHA and LocalAttention that a causal byte model may have.
ORIGINAL_ARGUMENTS = {
    *("num_tokens", "max_seq_len", "dim", "depth", "local_attn_window_size", "dim_head", "heads", "ff_mult"),
    *("attn_dropout", "ff_dropout", "use_xpos", "xpos_scale_base", "use_dynamic_pos_bias", "num_residual_streams"),
    *("qk_rmsnorm", "qk_scale", "exact_windowsize", "gate_values_per_head", "look_backward", "shared_qk"),
}
OPTIONS = [
    dict(),
    dict(num_residual_streams=2, qk_rmsnorm=True, qk_scale=3.0, gate_values_per_head=True, use_xpos=True),
    dict(use_dynamic_pos_bias=True, use_rotary_pos_emb=False, use_abs_pos_emb=False, shared_qk=True, ff_mult=2.5),
]


def export(tmp_path, *overrides):
    config = composed("export_torch", f"output={tmp_path}/weights.safetensors", *overrides)
    main.__wrapped__(export_config(config))
    return read_state(f"{tmp_path}/weights.safetensors")


def arguments_of(printed):
    """The keyword arguments in the second line that is printed."""
    _, call = printed.splitlines()
    return eval(re.fullmatch(r"LocalTransformer\((.*)\)", call)[1].join(("dict(", ")")))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_weights_of_a_run_are_written_with_the_names_of_the_original(run, tmp_path, options):
    run_dir = run(**options)
    state = export(tmp_path, f"run={run_dir}")
    model, _ = load_model(Checkpoints(run_dir / "checkpoints").find("best"))
    wanted = torch_state(model)
    assert state.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(state[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_printed_arguments_build_the_model_in_pytorch(run, tmp_path, capsys, options):
    state = export(tmp_path, f"run={run(**options)}")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/weights.safetensors: {tmp_path}/run/checkpoints/step-00000007.safetensors, ")
    arguments = arguments_of(printed)
    assert arguments.keys() == ORIGINAL_ARGUMENTS
    rebuilt = torch_state(LocalTransformer(**arguments))
    assert {name: array.shape for name, array in rebuilt.items()} == {
        name: array.shape for name, array in state.items()
    }
    for key in options.keys() & ORIGINAL_ARGUMENTS:
        assert arguments[key] == options[key]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pytorch_computes_the_same_logits(run, tmp_path, capsys, options):
    torch = pytest.importorskip("torch")
    run_dir = run(**options)
    state = export(tmp_path, f"run={run_dir}")
    theirs = import_original().LocalTransformer(**arguments_of(capsys.readouterr().out)).eval()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    model, _ = load_model(Checkpoints(run_dir / "checkpoints").find("last"))
    np.testing.assert_allclose(logits(model), theirs(torch.from_numpy(TOKENS)).detach().numpy(), atol=1e-4)


def test_a_list_of_equal_windows_is_one_window_in_the_original(run, tmp_path, capsys):
    export(tmp_path, f"run={run(local_attn_window_size=[4, 4], look_backward=[2, 2])}")
    arguments = arguments_of(capsys.readouterr().out)
    assert (arguments["local_attn_window_size"], arguments["look_backward"]) == (4, 2)


def test_a_checkpoint_file_needs_no_run(run, tmp_path):
    assert export(tmp_path, f"checkpoint={run()}/checkpoints/step-00000007.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale=0.5), "model.scale=0.5: the original has no model with another scale than the default"),
        (dict(use_rotary_pos_emb=False), "model.use_rotary_pos_emb=False: the original has no model without"),
        (dict(max_ngram=3), "model.max_ngram=3: the original has no embeddings of n-grams"),
        (
            dict(use_dynamic_pos_bias=True, look_backward=2),
            "model.look_backward=2 with use_dynamic_pos_bias=True",
        ),
        (
            dict(local_attn_window_size=[4, 8]),
            "model.local_attn_window_size=[4, 8]: in the original, it is the same in all layers",
        ),
        (dict(global_attn_layers=[2]), "model.global_attn_layers=[2]: the original has no global attention"),
        (dict(embedding_skip=True), "model.embedding_skip=True: the original adds the embeddings"),
        (dict(look_backward=[1, 2]), "model.look_backward=[1, 2]: in the original, it is the same in all layers"),
    ],
    ids=str,
)
def test_options_that_the_original_lacks_are_refused_and_nothing_is_written(run, tmp_path, options, message):
    run_dir = run(**options)
    with pytest.raises(UsageError) as error:
        export(tmp_path, f"run={run_dir}")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [run_dir]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run=null"], "expected the run to export, such as run=runs/"),
        (["run=a", "output=null"], "expected the file to write, such as output=model.pt"),
        (
            ["run=a", "output=model.onnx"],
            "output=model.onnx: expected a file that ends in .pt, .pth, .ckpt, .bin, .safetensors",
        ),
        (["run=a", "output=absent/model.pt"], "output=absent/model.pt: there is no folder absent"),
        (["run=absent"], "absent: no such run directory"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(tmp_path, overrides, expected):
    with pytest.raises(UsageError) as error:
        export(tmp_path, *overrides)
    assert expected in str(error.value) and "\n" not in str(error.value)
