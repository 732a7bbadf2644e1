"""The weights of a ``LocalTransformer`` under the names that the PyTorch package ``local-attention`` 1.11.2 gives them.

Works on plain arrays; PyTorch is not needed.
"""

from collections.abc import Callable, Mapping

import mindspore as ms
import numpy as np

from local_attention.transformer import LocalTransformer

# PyTorch's names of the parameters of MindSpore's own cells, for inserted global layers.
TORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}


def torch_state(model: LocalTransformer) -> dict[str, np.ndarray]:
    """The state dict of the original, as ``{name: array}``.

    Without learned absolute positions, which the original always has, they are zeros.

    Raises:
        ValueError: for a model that the original cannot be, see :meth:`LanguageModelOptions.original_arguments`.
    """
    model.options.original_arguments()  # refuses what the original cannot be
    parameters = arrays(model)
    state: dict[str, np.ndarray] = {}
    for theirs, ours, shape in correspondence(model):
        state[theirs] = np.concatenate([parameters[name] for name in ours]).reshape(shape)
    return state | constants(model)


def load_torch_state(model: LocalTransformer, state: Mapping[str, np.ndarray]) -> None:
    """Load a state dict of the original, ``{name: array}``, into a model.

    Raises:
        ValueError: as :func:`torch_state`; naming what is missing, unexpected, or of another shape. The model is then
            unchanged.
    """
    model.options.original_arguments()  # refuses what the original cannot be
    wanted = {theirs: shape for theirs, _, shape in correspondence(model)}
    constant = {name: array.shape for name, array in constants(model).items()}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in state]
    for name, array in state.items():
        shape = (wanted | constant).get(name)
        if shape is None:
            problems.append(f"unexpected: {name} {tuple(array.shape)}")
        elif tuple(array.shape) != shape:
            problems.append(f"of another shape: {name} {tuple(array.shape)}, expected {shape}")
        elif name == "pos_emb.weight" and name in constant and np.any(array):
            problems.append(f"unexpected: {name} holds learned positions, but use_abs_pos_emb is False")
    if problems:
        raise ValueError("the state dict does not fit the model; " + "; ".join(problems))
    parameters = dict(model.parameters_and_names())
    for theirs, ours, _ in correspondence(model):
        parts = np.split(np.atleast_1d(state[theirs]), len(ours))
        for name, part in zip(ours, parts):
            parameters[name].set_data(ms.Tensor(part.reshape(parameters[name].shape), ms.float32))


def arrays(model: LocalTransformer) -> dict[str, np.ndarray]:
    return {name: np.atleast_1d(parameter.asnumpy()) for name, parameter in model.parameters_and_names()}


def constants(model: LocalTransformer) -> dict[str, np.ndarray]:
    """What a state dict of the original holds besides parameters."""
    constant: dict[str, np.ndarray] = {}
    for i, layer in enumerate(model.layers):
        rotary = layer.attention.attention.rotary
        if rotary is not None:
            frequencies = rotary.theta ** -(np.arange(0, rotary.dim, 2) / rotary.dim)
            constant[f"layers.{i}.0.branch.attn_fn.rel_pos.inv_freq"] = frequencies.astype(np.float32)
    if model.num_tokens is not None and not model.use_abs_pos_emb:
        constant["pos_emb.weight"] = np.zeros((model.max_seq_len, model.dim), np.float32)
    return constant


def correspondence(model: LocalTransformer) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """For each parameter of the original its name, our names (stacked there if several) and its shape."""
    ours = {name: parameter.shape for name, parameter in model.parameters_and_names()}
    found: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = []

    def same(theirs: str, *names: str) -> None:
        shape = ours[names[0]]
        found.append((theirs, names, (shape[0] * len(names), *shape[1:]) if shape else ()))

    def norm(theirs: str, name: str) -> None:
        for their_part, part in (("weight", "gamma"), ("bias", "beta")):
            found.append((f"{theirs}.{their_part}", (f"{name}.{part}",), ours[f"{name}.{part}"][1:]))

    def below(theirs: str, prefix: str, rename: Callable[[str], str]) -> None:
        for name in ours:
            if name.startswith(f"{prefix}."):
                same(f"{theirs}.{rename(name.removeprefix(f'{prefix}.'))}", name)

    def connection(theirs: str, name: str) -> None:
        below(theirs, name, lambda rest: "norm.gamma" if rest == "gamma" else rest)

    def last_part(rest: str) -> str:
        path, dot, last = rest.rpartition(".")
        return path + dot + TORCH_NAMES.get(last, last)

    for i in range(len(model.layers)):
        layer, theirs = f"layers.{i}", f"layers.{i}.0"
        connection(f"global_layers.{i}", f"{layer}.global_connection")
        below(f"global_layers.{i}.branch", f"{layer}.global_attention", last_part)
        connection(theirs, f"{layer}.attention_connection")
        norm(f"{theirs}.branch.norm", f"{layer}.attention.norm")
        same(f"{theirs}.branch.to_qkv.weight", *(f"{layer}.attention.to_{name}.weight" for name in "qkv"))
        below(f"{theirs}.branch.to_v_gate.0", f"{layer}.attention.to_v_gate", str)
        for name in ("q_scale", "k_scale"):
            if f"{layer}.attention.{name}" in ours:
                same(f"{theirs}.branch.{name}", f"{layer}.attention.{name}")
        same(f"{theirs}.branch.to_out.weight", f"{layer}.attention.to_out.weight")
        theirs = f"layers.{i}.1"
        connection(theirs, f"{layer}.feed_forward_connection")
        norm(f"{theirs}.branch.0", f"{layer}.feed_forward.norm")
        same(
            f"{theirs}.branch.1.weight", f"{layer}.feed_forward.to_value.weight", f"{layer}.feed_forward.to_gate.weight"
        )
        same(f"{theirs}.branch.4.weight", f"{layer}.feed_forward.to_out.weight")
    below("dynamic_pos_bias", "dynamic_pos_bias", str)
    if model.num_tokens is not None:
        same("token_emb.weight", "token_emb.embedding_table")
        if model.use_abs_pos_emb:
            same("pos_emb.weight", "pos_emb.embedding_table")
        norm("to_logits.0", "norm")
        same("to_logits.1.weight", "to_logits.weight")
    return found
