"""Convert PyTorch weights into a run: ``python scripts/import_torch.py weights=FILE run_dir=RUN_DIR …``."""

import json
import re
import shlex
import sys
from dataclasses import field, make_dataclass, replace
from math import lcm
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import StrictStr
from pydantic.dataclasses import dataclass

from local_attention.options import CHECKED, Help
from local_attention.training.command import command
from local_attention.training.config import ModelConfig, RunConfig, UserPath, check_model
from local_attention.training.errors import UsageError
from local_attention.training.schema import as_dict, keys_of, parse, register_schema
from scripts.torch_files import ENDINGS, State, read_state, require_ending

TOKENS = "token_emb.weight"  # which every model has

# What the weights determine of their model: all but the size of its windows.
INFERRED = (
    *("num_tokens", "max_seq_len", "dim", "depth", "heads", "dim_head", "ff_mult", "num_residual_streams"),
    *("use_abs_pos_emb", "use_dynamic_pos_bias", "qk_rmsnorm", "gate_values_per_head"),
)


KEYS = keys_of(ModelConfig)


def unless_given(name: str, otherwise: str) -> tuple[str, Any, None]:
    """The field ``name`` of :class:`ModelConfig`, None by default."""
    declared = get_type_hints(ModelConfig, include_extras=True)[name]
    return name, Annotated[declared | None, Help(f"{KEYS[name].help}; null: {otherwise}")], None


UNKNOWN = [unless_given(name, "inferred from the weights") for name in INFERRED]
UNKNOWN.append(unless_given("local_attn_window_size", "must be given, as weights do not contain it"))
ImportedModelConfig: Any = dataclass(config=CHECKED, kw_only=True)(
    make_dataclass("ImportedModelConfig", UNKNOWN, bases=(ModelConfig,), kw_only=True)
)


@register_schema("import_torch")
@dataclass(config=CHECKED)
class ImportConfig:
    """The weights to import, the run directory to write, and what is known about the model."""

    weights: Annotated[
        UserPath | None,
        Help(f"state dict of PyTorch's LocalTransformer, alone or in a checkpoint: {', '.join(ENDINGS)}"),
    ] = None
    run_dir: Annotated[UserPath | None, Help("where to write")] = None
    model: ImportedModelConfig = field(default_factory=ImportedModelConfig)
    prefix: Annotated[
        StrictStr | None, Help("which of several models in the file: what its names begin with, such as ema_model.")
    ] = None


def import_config(config: DictConfig | dict[str, Any]) -> ImportConfig:
    """Check a config that Hydra has composed; raises :class:`UsageError`."""
    imported = parse(ImportConfig, config)
    if not imported.weights:
        raise UsageError("expected the weights to import, such as weights=model.pt")
    require_ending("weights", imported.weights)
    if not imported.run_dir:
        raise UsageError("expected the directory to write, such as run_dir=runs/imported")
    if imported.model.local_attn_window_size is None:
        raise UsageError(
            "expected model.local_attn_window_size=NUMBER, as weights do not contain it (PyTorch's default: 512)"
        )
    return imported


def find_model(config: ImportConfig, state: State) -> tuple[str, State]:
    """Return the prefix that the names of a model have in a state dict, and its weights without it.

    Raises:
        UsageError: there are several models and ``config.prefix`` names none of them.
    """
    found = sorted(name.removesuffix(TOKENS) for name in state if f".{name}".endswith(f".{TOKENS}"))
    prefix = config.prefix
    if prefix is None:
        prefix = "" if not found or "" in found else found[0]
        if prefix and len(found) > 1:
            choices = " or ".join(f"prefix={name}" for name in found)
            raise UsageError(f"{config.weights} contains {len(found)} models: choose one with {choices}")
    elif prefix not in found:
        raise UsageError(f"prefix={prefix}: expected one of {', '.join(found)}, as in {config.weights}")
    return prefix, {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def complete(config: ImportConfig, state: State) -> ModelConfig:
    """Return the config of the model: given values, completed by those that the state dict determines.

    Raises:
        UsageError: a given value contradicts the state dict, or a value is neither given nor determined.
    """
    inferred = infer_config(state, config)
    for key, value in inferred.items():
        given = getattr(config.model, key)
        if given is not None and given != value:
            raise UsageError(f"model.{key}={json.dumps(given)}: expected {json.dumps(value)}, as in {config.weights}")
    model = parse(RunConfig, {"model": as_dict(replace(config.model, **inferred))}).model
    check_model(model)
    return model


def infer_config(state: State, config: ImportConfig) -> dict[str, Any]:
    """Return the keys of a ``ModelConfig`` that a state dict determines."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = state[name].shape if name in state else None
        if found is None or len(found) != axes:
            raise UsageError(
                f"{config.weights}: expected the state dict of a LocalTransformer with num_tokens, in which {name} has "
                f"{axes} axes; got {'none' if found is None else found}"
            )
        return found

    def length(name: str) -> int | None:
        return shape(name, 1)[0] if name in state else None

    attention, given = "layers.0.0.branch", config.model
    num_tokens, dim = shape("token_emb.weight", 2)
    max_seq_len, _ = shape("pos_emb.weight", 2)
    _, channels = shape(f"{attention}.to_out.weight", 2)
    _, inner = shape("layers.0.1.branch.4.weight", 2)
    frequencies = length(f"{attention}.attn_fn.rel_pos.inv_freq")  # one per pair of channels
    dim_head = 2 * frequencies if frequencies else length(f"{attention}.q_scale") or given.dim_head
    heads = channels // dim_head if dim_head else given.heads
    heads = length("dynamic_pos_bias.mlp.4.bias") or length(f"{attention}.to_v_gate.0.bias") or heads
    if heads is None:
        raise UsageError(
            f"expected model.heads=NUMBER or model.dim_head=NUMBER: {config.weights} does not contain how its "
            f"{channels} channels of attention are divided"
        )
    if heads == 0 or channels % heads:
        raise UsageError(
            f"model.heads={heads}: expected a divisor of {channels}, {config.weights}'s channels of attention"
        )

    is_consistent = given.ff_mult is not None and inner_size(dim, given.ff_mult) == inner
    return {
        "num_tokens": num_tokens,
        "max_seq_len": max_seq_len,
        "dim": dim,
        "depth": 1 + max(int(number) for name in state for number in re.findall(r"^layers\.(\d+)\.", name)),
        "heads": heads,
        "dim_head": channels // heads,
        "ff_mult": given.ff_mult if is_consistent else simplest_ff_mult(dim, inner),
        "num_residual_streams": length("layers.0.0.static_beta") or 1,
        "use_abs_pos_emb": bool(given.use_abs_pos_emb or state["pos_emb.weight"].any()),
        "use_dynamic_pos_bias": "dynamic_pos_bias.mlp.0.weight" in state,
        "qk_rmsnorm": f"{attention}.q_scale" in state,
        "gate_values_per_head": f"{attention}.to_v_gate.0.weight" in state,
    }


def inner_size(dim: int, ff_mult: float) -> int:
    """The inner size of a feed-forward layer, as the original computes it."""
    return int(dim * ff_mult * 2 / 3)


def simplest_ff_mult(dim: int, inner: int) -> float:
    """Return the ``ff_mult`` with the fewest digits for which a feed-forward layer has that inner size."""
    digits = 0
    while True:
        least = -(-3 * inner * 10**digits // (2 * dim))  # 3 inner / (2 dim), rounded up
        for numerator in (least, least + 1):  # the latter if the product is rounded to just below inner
            if inner_size(dim, numerator / 10**digits) == inner:
                return numerator / 10**digits
        digits += 1


@command("import_torch", ImportConfig, import_config)
def main(config: ImportConfig) -> None:
    import yaml

    from local_attention.torch_state import load_torch_state
    from local_attention.training.build import build_model
    from local_attention.training.checkpoint import Checkpoints, tensors_of, write_text
    from local_attention.training.run_dir import refuse_to_overwrite
    from local_attention.training.state import RunState
    from local_attention.training.summary import continue_command

    # Build the model and load the weights.
    assert config.weights and config.run_dir  # checked above
    run_dir = Path(config.run_dir)
    refuse_to_overwrite(run_dir)
    everything = read_state(config.weights)
    prefix, state = find_model(config, everything)
    model_config = complete(config, state)
    model = build_model(model_config)
    try:
        load_torch_state(model, state)
    except ValueError as error:
        raise UsageError(f"{config.weights}: {error}") from None

    # Write a run at step 0 that can be continued with any data, optimizer and lengths.
    provenance = {"config": {"model": as_dict(model_config)}}
    tensors = tensors_of(model)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", yaml.safe_dump(provenance["config"], sort_keys=False))
    Checkpoints(run_dir / "checkpoints").save(tensors, {**RunState(None, None).state_dict(), **provenance})

    # Print the commands to use next.
    window, default = lcm(*model_config.per_layer("local_attn_window_size")), as_dict(ModelConfig())
    seq_len = max(model_config.max_seq_len // window, 1) * window
    changes = {key: value for key, value in as_dict(model_config).items() if value != default[key]}
    changes["max_seq_len"] = model_config.max_seq_len  # by default that of train.seq_len
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in changes.items()]
    run = shlex.quote(str(run_dir))
    if prefix:
        others = f"; not imported: {len(everything) - len(state)} others" * (len(everything) > len(state))
        print(f"imported the {len(state)} weights named {prefix}…, without this prefix{others}")
    print(f"{sum(array.size for array in tensors.values()):,} parameters of {config.weights} in {run_dir}")
    print(f'sample:    python generate.py run={run} prompt="The "')
    print(f"score:     python scripts/evaluate.py run={run} seq_len={seq_len} batch_size=4 data=enwik8")
    print(f"continue:  {continue_command(run_dir, [*overrides, f'train.seq_len={seq_len}'])}")


if __name__ == "__main__":
    main()
