"""The command line as people write it, and as Hydra parses it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from local_attention.training.errors import UsageError
from local_attention.training.schema import Key, format_value

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

SWEEP = {"-m", "--multirun", "hydra.mode=MULTIRUN"}

QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""

LITERAL = ("prompt", "stop")  # texts in which ${ begins no interpolation

PLAIN_PATH = re.compile(r"[\w./-]*/[\w./-]*|[a-z_]\w*\.[a-z]\w*", re.ASCII)


def groups_of(config_name: str) -> dict[str, tuple[Any, list[str]]]:
    """The groups of files that ``configs/{config_name}.yaml`` chooses from: the default, and the names."""
    groups = {}
    for entry in yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]:
        for group, default in entry.items() if isinstance(entry, dict) else ():
            groups[group] = (default, sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")))
    return groups


def split(arguments: list[str], config_name: str, keys: Mapping[str, Key]) -> tuple[list[str], list[str]]:
    """Split arguments into flags with their values, and overrides. Hydra's parser allows no flags between overrides.

    Raises:
        UsageError: for a word that is neither, with a guess what was meant, and for what does not go with a sweep.
    """
    flags: list[str] = []
    overrides: list[str] = []
    previous = ""
    for argument in arguments:
        is_value = previous.startswith("-") and previous not in SWEEP
        if argument.startswith("-") or argument in SWEEP:
            flags.append(argument)
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        elif is_value:
            flags.append(argument)
        else:
            raise UsageError(f"{argument}: expected KEY=VALUE{hint(argument, previous, config_name, keys)}")
        previous = argument
    if not SWEEP.isdisjoint(flags):
        others = [flag for flag in flags if flag not in SWEEP]
        others += [override for override in overrides if override.startswith(("hydra.", "hydra/"))]
        if others:
            raise UsageError(f"{others[0]}: expected keys of --help alone with -m, which is not Hydra's multirun")
    return flags, overrides


def hint(word: str, previous: str, config_name: str, keys: Mapping[str, Key]) -> str:
    """Guess what was meant by a word that follows the argument ``previous``."""
    for key in keys:
        if word in (key, key.rpartition(".")[2]):
            return f", such as {key}={format_value(keys[key].default)}"
    guesses = [f"{group}={word}" for group, (_, names) in groups_of(config_name).items() if word in names]
    path = Path(word).expanduser()
    if path.is_dir():
        guesses += [f"{key}={word}" for key in ("run", "run_dir") if key in keys]
    elif path.suffix == ".safetensors":
        guesses += [f"{key}={word}" for key in ("checkpoint", "weights", "resume") if key in keys]
    elif path.is_file():
        guesses += [f"{key}={word}" for key in ("file", "weights", "prompt_file") if key in keys]
        guesses += [f"data=file data.path={word}"] if "data.path" in keys else []
    if guesses:
        return f"; did you mean {guesses[0]}?"
    if "=" in previous:
        return f"; a value with spaces needs quotes: '{previous} {word}'"
    return "; --help lists the keys"


def quote(argument: str, keys: Mapping[str, Key]) -> str:
    """Quote the value of an argument if its key is for texts: ``prompt=a, b`` becomes ``prompt='a, b'``.

    ``null`` and values in quotes are not changed. In Hydra and OmegaConf, backslashes escape only before a quote or
    ``${``, which begins an interpolation, except in :data:`LITERAL` texts.
    """
    key, separator, value = argument.partition("=")
    if not separator or key not in keys or keys[key].kind != "string" or value == "null":
        return argument
    if re.fullmatch(QUOTED, value, re.DOTALL) or PLAIN_PATH.fullmatch(value):
        return argument
    if key in LITERAL:
        value = escape_interpolations(value)
    value = re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + (match[2] and "\\'"), value)
    return f"{key}='{value}'"


def unquote(argument: str) -> str:
    """Undo :func:`quote` where it would do the same again, for commands that are printed."""
    return re.sub(r"\A([^=]+)='(?!null')([\w./, -]+)'\Z", r"\1=\2", argument)


def escape_interpolations(text: str) -> str:
    """Escape a text such that OmegaConf finds no interpolation in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
