"""A Hydra entry point with the exit statuses and one-line errors that a person expects.

Status 0: done; 1: failure; 2: usage; 130, 141 and 143: ended by Ctrl-C, a closed pipe, SIGTERM.
"""

import os
import re
import signal
import sys
import traceback
from functools import wraps
from pathlib import Path

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from local_attention.training.config import unknown_key
from local_attention.training.signals import deliver_to_python

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)

PLAIN_PATH = re.compile(r"[\w./-]*/[\w./-]*", re.ASCII)


def command(config_name, schema, text=()):
    """Decorate ``task(config)``, which returns None or an exit status, so that calling it runs the command line.

    Args:
        config_name: the task is called with what Hydra composes from ``configs/{config_name}.yaml``.
        schema: the dataclass of that config; its keys are what a mistyped one is compared with.
        text: keys whose values are taken as they are, whatever signs of Hydra's grammar they hold.
    """

    def decorate(task):
        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        @wraps(task)
        def run(config):
            try:
                status = status_of(task, config)
            except Exception:  # a fault of the program: all of it, for whoever mends it
                traceback.print_exc()
                status = 1
            if status:
                sys.exit(status)

        @wraps(task)
        def main():
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here instead of being printed in several lines
            os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
            deliver_to_python()
            sys.argv[1:] = [quoted(argument, text) for argument in sys.argv[1:]]
            try:
                run()
            except (HydraException, OmegaConfBaseException, ValueError) as error:  # "model=null" is a ValueError
                sys.exit(fail(explain(error, schema), 2))

        return main

    return decorate


def quoted(argument, text):
    """``prompt=a, b`` as ``prompt='a, b'``, for the keys in ``text``; ``null`` and what is in quotes stay as they are.

    Hydra and OmegaConf take a backslash as an escape only where one or several come before a quote or a ``${``.
    """
    key, separator, value = argument.partition("=")
    if not separator or key not in text or value == "null" or QUOTED.fullmatch(value) or PLAIN_PATH.fullmatch(value):
        return argument
    special = re.compile(r"(\\*)('|\$\{|\Z)")
    return f"{key}='{special.sub(lambda m: 2 * m[1] + (chr(92) + m[2] if m[2] else ''), value)}'"


def status_of(task, config):
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


def fail(error, status):
    print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
    return status


def explain(error, schema):
    """One line for an error of Hydra's or OmegaConf's, whose texts have several."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: expected one of {', '.join(sorted(error.options))}"
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        return unknown_key(error.__cause__.full_key, schema)
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("See https"))
