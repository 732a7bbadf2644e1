"""From dataclasses that declare keys to what Hydra composes and back, checked: see ``local_attention.options``."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from local_attention.options import Option, options_of
from local_attention.training.errors import UsageError

Config = TypeVar("Config")

# Hydra makes no folders of its own and leaves logging to the commands.
HYDRA = {
    "defaults": [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}, "_self_"],
    "hydra": {"run": {"dir": "."}, "sweep": {"dir": ".", "subdir": "."}, "output_subdir": None},
}


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree as plain dictionaries."""
    return dataclasses.asdict(config)


def keys_for(command: str) -> Callable[[type[Config]], type[Config]]:
    """Decorate a dataclass: its keys and defaults are what ``{command}_keys`` stands for in ``configs/{command}.yaml``.

    A YAML file then holds only what differs. Plain values, as their types are checked by :func:`parse`.
    """

    def decorate(schema: type[Config]) -> type[Config]:
        ConfigStore.instance().store(f"{command}_keys", {**HYDRA, **as_dict(schema())})
        return schema

    return decorate


def parse(schema: type[Config], config: DictConfig | Mapping[str, Any]) -> Config:
    """An instance of the dataclass ``schema``, its values taken from ``config``; what that lacks has its default.

    Raises:
        UsageError: for a key that there is not, and for a value of another type or out of range.
    """

    def parse_group(group: type, tree: Any, path: str) -> Any:
        if not isinstance(tree, Mapping):
            raise UsageError(f"{path}={shown(tree)}: expected {path}.KEY=VALUE")
        prefix, declared, values = f"{path}." if path else "", options_of(group), {}
        for key in tree:
            if key not in declared:
                raise UsageError(unknown_key(f"{prefix}{key}", schema))
        given = set(tree)
        for key in (key for key in declared if key in given):  # in this order, as a value may refer to an earlier one
            option, value = declared[key], tree[key]
            if subgroup := group_of(option):
                value = parse_group(subgroup, value, prefix + key)
            elif option.problem(value):
                raise UsageError(f"{prefix}{key}={shown(value)}: expected {option.expected('null')}")
            values[key] = float(value) if float in option.kinds and isinstance(value, int) else value
        return group(**values)

    try:
        return parse_group(schema, config, "")
    except OmegaConfBaseException as error:  # a reference to another key that leads nowhere
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def shown(value: Any) -> str:
    """A value as on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def group_of(option: Option) -> type | None:
    """The dataclass of a group of keys; None for a single key."""
    (kind, *_) = option.kinds
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def unknown_key(key: str, schema: type) -> str:
    """What to say of a ``key`` that the dataclass ``schema`` does not have."""
    known = [*keys_of(schema), *(name for name, option in options_of(schema).items() if group_of(option))]
    similar = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    return f"{key}: no such key" + (f"; did you mean {similar[0]}?" if similar else "; --help lists them")


def keys_of(schema: type, prefix: str = "") -> dict[str, Option]:
    """The dotted keys of a tree of dataclasses, and their declarations."""
    keys: dict[str, Option] = {}
    for name, option in options_of(schema).items():
        group = group_of(option)
        keys |= keys_of(group, f"{prefix}{name}.") if group else {prefix + name: option}
    return keys


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
