"""A Hydra entry point with the exit statuses and one-line errors that a person expects.

Status 0: done; 1: failure; 2: usage; 130 and 143: ended by SIGINT and SIGTERM.
"""

import os
import sys
from functools import wraps
from pathlib import Path

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException


def command(config_name):
    """Decorate ``task(config)``, which returns None or an exit status, so that calling it runs the command line.

    Tasks are called with what Hydra composed from ``configs/{config_name}.yaml`` beside the program.
    """

    def decorate(task):
        program = Path(task.__globals__["__file__"]).resolve()

        @hydra.main(version_base="1.3", config_path=str(program.parent / "configs"), config_name=config_name)
        @wraps(task)
        def run(config):
            sys.exit(status_of(task, config))

        @wraps(task)
        def main():
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come here instead of being printed in several lines
            os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
            try:
                run()
            except (HydraException, OmegaConfBaseException) as error:
                sys.exit(fail(explain(error), 2))

        return main

    return decorate


def status_of(task, config):
    """Run ``task``; an exception for a person becomes a line and a status, any other one passes."""
    try:
        return task(config)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except OSError as error:
        return fail(error, 1)
    except Exception as error:
        if not hasattr(error, "exit_status"):
            raise
        return fail(error, error.exit_status)


def fail(error, status):
    print(f"error: {error}", file=sys.stderr)
    return status


def explain(error):
    """One line for an error of Hydra's or OmegaConf's, whose texts have several."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: expected one of {', '.join(sorted(error.options))}"
    lines = [line.strip() for text in (error, error.__cause__) if text for line in str(text).splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "See https")
    lines = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(dict.fromkeys(lines))
