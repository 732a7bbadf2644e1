"""A Hydra entry point with the exit statuses and one-line errors that a person expects.

Status 0: done; 1: failure; 2: usage; 130, 141 and 143: ended by Ctrl-C, a closed pipe, SIGTERM.
"""

import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from local_attention.training.keys import keys_of, shown, unknown_key
from local_attention.training.signals import deliver_to_python

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)

PLAIN_PATH = re.compile(r"[\w./-]*/[\w./-]*", re.ASCII)


Task = Callable[[DictConfig], int | None]


def command(config_name: str, schema: type) -> Callable[[Task], Callable[[], None]]:
    """Decorate ``task(config)``, which returns None or an exit status, so that calling it runs the command line.

    Args:
        config_name: the task is called with what Hydra composes from ``configs/{config_name}.yaml``.
        schema: the dataclass of that config; ``--help`` explains its keys, and a mistyped one is compared with them.
    """
    text = {key for key, option in keys_of(schema).items() if str in option.kinds}

    def decorate(task: Task) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        @wraps(task)
        def run(config: DictConfig) -> None:
            try:
                status = status_of(task, config)
            except Exception:  # a fault of the program: all of it, for whoever fixes it
                traceback.print_exc()
                status = 1
            if status:
                sys.exit(status)

        @wraps(task)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here instead of being printed in several lines
            os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
            deliver_to_python()
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(help_of(config_name, schema, task.__globals__.get("__doc__") or ""), end="")
                return
            sys.argv[1:] = [quoted(argument, text) for argument in sys.argv[1:]]
            try:
                run()
            except (HydraException, OmegaConfBaseException, ValueError) as error:  # "model=null" is a ValueError
                sys.exit(fail(explain(error, schema), 2))

        return main

    return decorate


def help_of(config_name: str, schema: type, about: str) -> str:
    """What ``--help`` prints: ``about``, the files to choose from in ``configs/``, and all keys."""
    rows: list[tuple[str, str, str]] = []
    for entry in yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]:
        for group, default in entry.items() if isinstance(entry, dict) else ():
            names = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
            rows.append((group, shown(default), f"configs/{group}: one of {', '.join(names)}"))
    for key, option in keys_of(schema).items():
        allowed = option.bounds or option.names
        rows.append((key, shown(option.default), option.help("null") + f" ({allowed})" * bool(allowed)))
    width, column = 120, 38
    lines = textwrap.wrap(about.replace("``", ""), width)
    for key, default, text in rows:
        first, *rest = textwrap.wrap(text, width - column - 3)
        lines += [f"  {f'{key}={default}':<{column}} {first}", *(f"{'':<{column + 3}}{line}" for line in rest)]
    return "\n".join([*lines, "--cfg job prints the config of a command line instead of running it."]) + "\n"


def quoted(argument: str, text: Collection[str]) -> str:
    """``prompt=a, b`` as ``prompt='a, b'``, for the keys in ``text``; ``null`` and what is in quotes stay as they are.

    Hydra and OmegaConf take a backslash as an escape only where one or several come before a quote or a ``${``.
    """
    key, separator, value = argument.partition("=")
    if not separator or key not in text or value == "null" or QUOTED.fullmatch(value) or PLAIN_PATH.fullmatch(value):
        return argument
    special = re.compile(r"(\\*)('|\$\{|\Z)")
    return f"{key}='{special.sub(lambda m: 2 * m[1] + (chr(92) + m[2] if m[2] else ''), value)}'"


def status_of(task: Task, config: Any) -> int | None:
    """Run ``task``; an exception for a person becomes a line and a status, any other one passes."""
    try:
        return task(config)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader has what it wanted, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 128 + signal.SIGPIPE
    except OSError as error:
        named_by_a_person = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return fail(f"{error.filename}: {error.strerror}" if error.filename else error, 2 if named_by_a_person else 1)
    except Exception as error:
        if not hasattr(error, "exit_status"):
            raise
        return fail(error, error.exit_status)


def fail(error: object, status: int) -> int:
    print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
    return status


def explain(error: Exception, schema: type) -> str:
    """One line for an error of Hydra's or OmegaConf's, whose texts have several."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: expected one of {', '.join(sorted(error.options))}"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        return unknown_key(str(error.__cause__.full_key), schema)
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("See https"))
