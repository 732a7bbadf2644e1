"""From dataclasses that declare keys to what Hydra composes, and back, checked by Pydantic."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from local_attention.options import first_problem
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def format_value(value: Any) -> str:
    """A value as on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def register_schema(command: str) -> Callable[[type[Config]], type[Config]]:
    """Decorate a dataclass: its keys and defaults are what ``{command}_keys`` stands for in ``configs/{command}.yaml``.

    A YAML file then holds only choices.
    """

    def decorate(schema: type[Config]) -> type[Config]:
        ConfigStore.instance().store(f"{command}_keys", {**HYDRA, **as_dict(schema())})
        return schema

    return decorate


def parse(schema: type[Config], config: DictConfig | Mapping[str, Any]) -> Config:
    """An instance of the dataclass ``schema``, its values taken from ``config``; what that lacks has its default.

    Raises:
        UsageError: for an unknown key, and for a value of another type or out of range.
    """
    for name in groups_of(schema):
        if not isinstance(group := config.get(name, {}), Mapping):
            raise UsageError(f"{name}={format_value(group)}: expected {name}.KEY=VALUE")
    try:
        is_node = OmegaConf.is_config(config)
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True) if is_node else config
        return TypeAdapter(schema).validate_python(tree)
    except OmegaConfBaseException as error:  # a value is missing, or refers to another key that does not exist
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        key, expected, value = first_problem(error)
        if not key:
            raise UsageError(expected) from None
        if error.errors()[0]["type"] == "unexpected_keyword_argument":
            raise UsageError(unknown_key(key, schema)) from None
        raise UsageError(f"{key}={format_value(value)}: expected {keys_of(schema)[key].expected}") from None


def unknown_key(key: str, schema: type) -> str:
    """What to say of a ``key`` that the dataclass ``schema`` does not have."""
    known = [*keys_of(schema), *groups_of(schema)]
    similar = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    return f"{key}: no such key" + (f"; did you mean {similar[0]}?" if similar else "; --help lists them")


def groups_of(schema: type) -> dict[str, type]:
    """The dataclasses of the groups of keys in a dataclass, by name."""
    factories: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(schema)}
    return {name: group for name, group in factories.items() if isinstance(group, type)}


class Key(NamedTuple):
    """What a person may read about a key or an option."""

    default: Any  # dataclasses.MISSING if a value must be given
    kind: str  # a type of JSON Schema: "integer", "number", "boolean", "string", …
    names: str  # the allowed texts, such as "adam, adamw, muon"; empty: any
    bounds: str  # such as ">= 0 and < 1"; empty: none
    or_list: bool  # whether it may also be a list of one value per layer
    optional: bool  # whether it may be null
    help: str

    @property
    def allowed(self) -> str:
        return (self.names or self.bounds) + ", or a list of one per layer" * self.or_list

    @property
    def expected(self) -> str:
        """Such as ``"a number >= 0 and < 1, or null"``."""
        kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
        kinds["array"] = "a list of whole numbers"
        what = f"one of {self.names}" if self.names else f"{kinds.get(self.kind, self.kind)} {self.bounds}".strip()
        what += ", or a list of one per layer" * self.or_list
        return f"{what}, or null" if self.optional else what


def keys_of(schema: type) -> dict[str, Key]:
    """The dotted keys of a tree of dataclasses, and what they mean."""
    described = TypeAdapter(schema).json_schema()
    return _keys_in(schema, described, described.get("$defs", {}), "")


def _keys_in(schema: type, described: dict[str, Any], groups: dict[str, Any], prefix: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for field in dataclasses.fields(schema):
        entry = described["properties"][field.name]
        if group := groups_of(schema).get(field.name):
            keys |= _keys_in(group, groups[group.__name__], groups, f"{prefix}{field.name}.")
            continue
        kinds = entry.get("anyOf", [entry])
        kind = next(kind for kind in kinds if kind.get("type") != "null")
        optional, or_list = len(kinds) > 1, "oneOf" in kind
        kind, *_ = kind.get("oneOf", [kind])
        names = ", ".join(kind.get("enum", [kind["const"]] if "const" in kind else []))
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        bounds = " and ".join(f"{sign} {kind[bound]}" for bound, sign in signs.items() if bound in kind)
        help = entry.get("description") or kind.get("description", "")
        kind_name = kind.get("type", "any")
        keys[prefix + field.name] = Key(field.default, kind_name, names, bounds, or_list, optional, help)
    return keys


def markdown_table(schema: type) -> str:
    """The options of a dataclass as a table for the documentation."""
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, key in keys_of(schema).items():
        default = "" if key.default is dataclasses.MISSING else f"`{key.default!r}`"
        rows.append(f"| `{name}` | {default} | {key.help}{f' ({key.allowed})' * bool(key.allowed)} |")
    return "\n".join(rows) + "\n"
