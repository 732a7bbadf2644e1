"""Sweeps: with ``-m``, a program runs once for each combination of the values that its overrides list.

Hydra's own multirun ends at the first failure, writes ``multirun.yaml`` to the working directory, and tells a job
nothing of the others, so that it cannot be given a directory of its own.
"""

import gc
import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from local_attention.training.arguments import CONFIGS, QUOTED, quote
from local_attention.training.errors import UsageError
from local_attention.training.schema import Key

FUNCTION = re.compile(r"(choice|range|glob|shuffle|sort|tag|interval)\(.*\)", re.DOTALL)  # of Hydra's grammar

ONE_VALUE = re.compile(rf"(?:\A|,)\s*((?:{QUOTED}|\[.*?\]|\{{.*?\}})(?=\s*(?:,|\Z))|[^,]*)", re.DOTALL)

MAX_NAME = 150  # bytes; file systems allow 255


class Job(NamedTuple):
    """One run of a sweep."""

    name: str  # what was swept, such as "lr=1e-3,seed=2"; empty if nothing was
    composed: DictConfig  # by Hydra, with its own node "hydra"
    config: Any


def sweep(
    overrides: Sequence[str],
    config_name: str,
    keys: Mapping[str, Key],
    check: Callable[[DictConfig], Any],
    run: Callable[[Any], tuple[int, str]],
) -> int:
    """Run all jobs of a command line, also if some fail; an interruption ends the sweep.

    Args:
        overrides: with several values, such as ``optimizer.lr=1e-3,3e-3``.
        config_name, keys, check: see ``training.command``.
        run: runs a job with a checked config; returns the exit status and the reason of a failure.

    Returns:
        The exit status: 1 if a job failed; that of the job if there is only one.

    Raises:
        UsageError: the config of a job has a mistake; nothing was run.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        jobs = [composed_job(config_name, *one, check) for one in combinations(overrides, keys)]
    if len(jobs) == 1:
        return run(jobs[0].config)[0]
    jobs, folder = with_run_dirs(jobs)
    failed = []
    for number, job in enumerate(jobs, 1):
        say(f"run {number} of {len(jobs)}: {job.name}")
        HydraConfig.instance().set_config(job.composed)
        status, reason = run(job.config)
        gc.collect()  # graphs, weights and open files
        if status >= 128:
            break
        if status:
            failed.append(f"  {job.name}: {reason}")
    if failed:
        say(f"{len(failed)} of {len(jobs)} runs failed:", *failed)
    if folder:
        with suppress(OSError):
            folder.rmdir()  # if nothing was written
    if status >= 128:
        if getattr(job.config, "resume", None) == "auto":
            again = ["python", sys.argv[0], "-m", *overrides, *([f"run_dir={folder}"] if folder else [])]
            say(f"run {number} of {len(jobs)} was interrupted; continue the sweep:  {shlex.join(again)}")
        return status
    return 1 if failed else 0


def say(*lines: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def combinations(overrides: Sequence[str], keys: Mapping[str, Key]) -> list[tuple[str, list[str]]]:
    """The name and the overrides of each combination of the values in ``overrides``; the last vary fastest."""
    choices = [values_of(override) for override in overrides]
    swept = [number for number, values in enumerate(choices) if len(values) > 1]
    names = [overrides[number].partition("=")[0].lstrip("+") for number in swept]
    short = [name.rpartition(".")[2] for name in names]
    if len(set(short)) < len(short):
        short = names
    jobs = []
    for chosen in itertools.product(*choices):
        values = [chosen[number].partition("=")[2].strip("'\"") for number in swept]
        name = ",".join(f"{key}={value}" for key, value in zip(short, values, strict=True))
        safe = re.sub(r"[^\w.,=+-]+", "_", name, flags=re.ASCII)
        jobs.append((safe, [quote(override, keys) for override in chosen]))
    if len({name for name, _ in jobs}) < len(jobs) or any(len(name) > MAX_NAME for name, _ in jobs):
        jobs = [(f"{number},{name}"[:MAX_NAME], job) for number, (name, job) in enumerate(jobs, 1)]
    return jobs


def values_of(override: str) -> list[str]:
    """An override for each of the values in ``override``.

    Commas within quotes, brackets and the name of a file that exists do not separate values.
    """
    key, separator, value = override.partition("=")
    if not separator or os.path.exists(os.path.expanduser(value)):
        return [override]
    if not FUNCTION.fullmatch(value):
        return [f"{key}={one.strip()}" for one in ONE_VALUE.findall(value)]
    (parsed,) = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([override])
    values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [value]
    if not values:
        raise UsageError(f"{override}: expected at least one value")
    return [f"{key}={one}" for one in values]


def composed_job(config_name: str, name: str, overrides: list[str], check: Callable[[DictConfig], Any]) -> Job:
    """Compose and check the config of a job; raises ``UsageError``."""
    composed = compose(config_name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # what ${hydra:...} refers to
    try:
        config = check(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    except UsageError as error:
        raise UsageError(f"{name}: {error}" if name else str(error)) from None
    if getattr(config, "parallel", "none") != "none":
        raise UsageError("-m needs parallel=none: start runs with several processes one by one, without it")
    return Job(name, composed, config)


def with_run_dirs(jobs: list[Job]) -> tuple[list[Job], Path | None]:
    """Let each job write to a directory of its own, named by what was swept, unless the command line does.

    It lies in the ``run_dir`` of the command line or, without one, in a new directory of the sweep, which is returned.
    """
    given = [where_it_writes(job.config) for job in jobs]
    if not hasattr(jobs[0].config, "run_dir") or (None not in given and len(set(given)) == len(jobs)):
        return jobs, None
    folder = None
    if not all(job.config.run_dir for job in jobs):
        from local_attention.training.run_dir import RunPaths, claim  # here, as it imports MindSpore

        experiments = {job.composed.hydra.runtime.choices.get("experiment") or "default" for job in jobs}
        experiment = experiments.pop() if len(experiments) == 1 else "sweep"
        path = Path("runs") / experiment / time.strftime("%Y-%m-%d_%H-%M-%S")
        folder = claim(RunPaths(path, None, is_new=True)).run_dir

    def with_run_dir(job: Job) -> Job:
        return job._replace(config=replace(job.config, run_dir=str(Path(job.config.run_dir or str(folder), job.name))))

    return [with_run_dir(job) for job in jobs], folder


def where_it_writes(config: Any) -> str | None:
    """The run directory that a config names, if any."""
    resume = getattr(config, "resume", None)
    return getattr(config, "run_dir", None) or (resume if resume and Path(resume).is_dir() else None)
