"""Hydra entry points with one-line errors and the usual exit statuses.

Status 0: success; 1: failure; 2: usage error; 129, 130, 141 and 143: ended by a closed terminal, Ctrl-C, a closed pipe,
SIGTERM.
"""

import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from local_attention.training.arguments import CONFIGS, SWEEP, groups_of, quote, split
from local_attention.training.errors import UsageError
from local_attention.training.schema import as_dict, flatten, format_value, keys_of, unknown_key
from local_attention.training.signals import deliver_to_python
from local_attention.training.sweep import sweep
from local_attention.training.terminal import accept_any_output, discard_unwritten_output

# Keys for files and directories that must exist, and what is said of one that does not.
MISSING = {
    **dict.fromkeys(("data.path", "data.val_path", "data.test_path"), " does not exist: check the path"),
    **dict.fromkeys(("checkpoint", "file", "prompt_file", "weights"), ": No such file or directory"),
    "resume": ": no such run directory or checkpoint",  # but not init_from, which a run that continues does not need
    "run": ": no such run directory",
}
NO_PATHS = (None, "auto", "-")  # other values of these keys
CHECKPOINT_NAMES = ("best", "last")  # are found without links of these names, too

Task = Callable[[Any], int | None]


def command(config_name: str, schema: type, check: Callable[[DictConfig], Any]) -> Callable[[Task], Callable[[], None]]:
    """Decorate ``task(config)``, which returns None or an exit status, as a command-line program.

    A task imports by itself what takes seconds, as mistakes in the config end the program before.

    Args:
        config_name: the config is what Hydra composes from ``configs/{config_name}.yaml``, checked.
        schema: the dataclass of that config; ``--help`` explains its keys, and a mistyped key is compared with them.
        check: turns what Hydra has composed into a ``schema``, or raises ``UsageError``.
    """
    keys = keys_of(schema)

    def checked(composed: DictConfig) -> Any:
        config = check(composed)
        require_files(config)
        return config

    def decorate(task: Task) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        @wraps(task)
        def run(composed: DictConfig) -> None:
            status, _ = run_task(lambda composed: task(checked(composed)), composed)
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
            try:
                flags, overrides = split(sys.argv[1:], config_name, keys)
                if SWEEP.isdisjoint(flags):
                    sys.argv[1:] = [*flags, *(quote(override, keys) for override in overrides)]
                    run()
                else:
                    sys.exit(sweep(overrides, config_name, keys, checked, lambda config: run_task(task, config)))
            except (HydraException, OmegaConfBaseException, ValueError) as error:  # "model=null" is a ValueError
                print_error(explain(error, schema))
                sys.exit(2)
            except KeyboardInterrupt:
                print_error("interrupted")
                sys.exit(130)
            finally:
                discard_unwritten_output()

        return main

    return decorate


def require_files(config: Any) -> None:
    """Raise ``UsageError`` if a file or directory that a config names does not exist."""
    if getattr(config, "parallel", "none") == "data":  # on other machines than that of the main process it need not
        return
    values = flatten(as_dict(config))
    for key, complaint in MISSING.items():
        path = values.get(key)
        if path in NO_PATHS or os.path.basename(path) in CHECKPOINT_NAMES:
            continue
        if not os.path.exists(os.path.expanduser(path)):
            raise UsageError(f"{key}={path}{complaint}")


def help_of(config_name: str, schema: type, about: str) -> str:
    """What ``--help`` prints: ``about``, the files to choose from in ``configs/``, and all keys."""
    rows: list[tuple[str, str, str]] = []
    for group, (default, names) in groups_of(config_name).items():
        rows.append((group, format_value(default), f"configs/{group}: one of {', '.join(names)}"))
    for name, about_key in keys_of(schema).items():
        help = about_key.help.replace("None:", "null:") + f" ({about_key.allowed})" * bool(about_key.allowed)
        rows.append((name, format_value(about_key.default), help))
    width, column = 120, 38
    lines = textwrap.wrap(about.replace("``", ""), width)
    for key, default, text in rows:
        first, *rest = textwrap.wrap(text, width - column - 3)
        lines += [f"  {f'{key}={default}':<{column}} {first}", *(f"{'':<{column + 3}}{line}" for line in rest)]
    lines.append("-m runs once for each combination of values that commas separate, such as -m seed=1,2.")
    lines.append("--cfg job prints the config of a command line instead of running it.")
    return "\n".join(lines) + "\n"


def run_task(task: Task, config: Any) -> tuple[int, str]:
    """Run ``task``; return its exit status and, if it failed, the reason in one line, which is printed, too."""
    try:
        return task(config) or 0, ""
    except BrokenPipeError:  # the reader has closed the pipe, as "| head" does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail
        return 128 + signal.SIGPIPE, ""
    except KeyboardInterrupt:
        return 130, print_error("interrupted")
    except OSError as error:
        is_usage_error = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        message = f"{error.filename}: {error.strerror}" if error.filename else error
        return 2 if is_usage_error else 1, print_error(message)
    except Exception as error:
        if hasattr(error, "exit_status"):
            return error.exit_status, print_error(error)
        traceback.print_exc()  # a bug: show the whole traceback
        return 1, traceback.format_exception_only(error)[-1].strip()


def print_error(error: object) -> str:
    """Print an error in one line, and return this line without its "error: "."""
    line = " ".join(str(error).splitlines())
    with suppress(OSError):  # the terminal may be gone
        print(f"error: {line}", file=sys.stderr)
    return line


def explain(error: Exception, schema: type) -> str:
    """Return one line for an error of Hydra or OmegaConf, whose messages have several."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: expected one of {', '.join(sorted(error.options))}"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        return unknown_key(str(error.__cause__.full_key), schema)
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("See https"))
