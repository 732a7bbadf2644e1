"""Hydra entry points with one-line errors and the usual exit statuses.

Status 0: success; 1: failure; 2: usage error; 129, 130, 141 and 143: ended by a closed terminal, Ctrl-C, a closed pipe,
SIGTERM.
"""

import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Container
from contextlib import suppress
from functools import wraps
from pathlib import Path

import hydra
import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from local_attention.training.schema import format_value, keys_of, unknown_key
from local_attention.training.signals import deliver_to_python
from local_attention.training.terminal import accept_any_output, discard_unwritten_output

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)

PLAIN_PATH = re.compile(r"[\w./-]*/[\w./-]*", re.ASCII)

Task = Callable[[DictConfig], int | None]


def command(config_name: str, schema: type) -> Callable[[Task], Callable[[], None]]:
    """Decorate ``task(config)``, which returns None or an exit status, as a command-line program.

    Args:
        config_name: the task gets the config that Hydra composes from ``configs/{config_name}.yaml``.
        schema: the dataclass of that config; ``--help`` explains its keys, and a mistyped key is compared with them.
    """
    text = {key for key, described in keys_of(schema).items() if described.kind == "string"}

    def decorate(task: Task) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        @wraps(task)
        def run(config: DictConfig) -> None:
            try:
                status = run_task(task, config)
            except Exception:  # a bug: show the whole traceback
                traceback.print_exc()
                status = 1
            if status:
                sys.exit(status)

        @wraps(task)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
            os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
            accept_any_output()
            deliver_to_python()
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(help_of(config_name, schema, task.__globals__.get("__doc__") or ""), end="")
                return
            sys.argv[1:] = [quote(argument, text) for argument in sys.argv[1:]]
            try:
                run()
            except (HydraException, OmegaConfBaseException, ValueError) as error:  # "model=null" is a ValueError
                sys.exit(print_error(explain(error, schema), 2))
            finally:
                discard_unwritten_output()

        return main

    return decorate


def help_of(config_name: str, schema: type, about: str) -> str:
    """What ``--help`` prints: ``about``, the files to choose from in ``configs/``, and all keys."""
    rows: list[tuple[str, str, str]] = []
    for entry in yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]:
        for group, default in entry.items() if isinstance(entry, dict) else ():
            names = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
            rows.append((group, format_value(default), f"configs/{group}: one of {', '.join(names)}"))
    for name, about_key in keys_of(schema).items():
        help = about_key.help.replace("None:", "null:") + f" ({about_key.allowed})" * bool(about_key.allowed)
        rows.append((name, format_value(about_key.default), help))
    width, column = 120, 38
    lines = textwrap.wrap(about.replace("``", ""), width)
    for key, default, text in rows:
        first, *rest = textwrap.wrap(text, width - column - 3)
        lines += [f"  {f'{key}={default}':<{column}} {first}", *(f"{'':<{column + 3}}{line}" for line in rest)]
    return "\n".join([*lines, "--cfg job prints the config of a command line instead of running it."]) + "\n"


def quote(argument: str, text: Container[str]) -> str:
    """Quote the value of an argument if its key is in ``text``: ``prompt=a, b`` becomes ``prompt='a, b'``.

    ``null`` and values in quotes are not changed. In Hydra and OmegaConf, backslashes escape only before a quote or
    ``${``.
    """
    key, separator, value = argument.partition("=")
    if not separator or key not in text or value == "null" or QUOTED.fullmatch(value) or PLAIN_PATH.fullmatch(value):
        return argument
    special = re.compile(r"(\\*)('|\$\{|\Z)")
    return f"{key}='{special.sub(lambda m: 2 * m[1] + (chr(92) + m[2] if m[2] else ''), value)}'"


def run_task(task: Task, config: DictConfig) -> int | None:
    """Run ``task`` and return its exit status. Errors that the user can act on are printed, others are raised."""
    try:
        return task(config)
    except KeyboardInterrupt:
        return print_error("interrupted", 130)
    except BrokenPipeError:  # the reader has closed the pipe, as "| head" does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail
        return 128 + signal.SIGPIPE
    except OSError as error:
        is_usage_error = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        message = f"{error.filename}: {error.strerror}" if error.filename else error
        return print_error(message, 2 if is_usage_error else 1)
    except Exception as error:
        if not hasattr(error, "exit_status"):
            raise
        return print_error(error, error.exit_status)


def print_error(error: object, status: int) -> int:
    """Print an error in one line and return ``status``."""
    with suppress(OSError):  # the terminal may be gone
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
    return status


def explain(error: Exception, schema: type) -> str:
    """Return one line for an error of Hydra or OmegaConf, whose messages have several."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: expected one of {', '.join(sorted(error.options))}"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        return unknown_key(str(error.__cause__.full_key), schema)
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("See https"))
