"""Attention backends: how attention is computed, from queries, keys and values to the output of each head.

docs/architecture.md lists them. Everything else, from projections to rotation and the merging of heads, is written
once, in :class:`LocalMHA` and :class:`LocalAttention`. A backend *declares* the options that it computes;
:func:`choose_backend` takes the first one that computes all options in use, that is, those with another value than the
default. So the default of an option must leave the formula as it is. An option in use that no backend declares is
refused.
"""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


def options_in_use(options: Any) -> set[str]:
    """The names of a dataclass' fields whose values are not their defaults; those without a default are in use."""
    return {f.name for f in fields(options) if f.default is MISSING or getattr(options, f.name) != f.default}


def can_compute(backend: Any, cell: Any) -> bool:
    """Whether a backend declares all options that ``cell`` uses, and can run here.

    Args:
        backend: a class with ``computes``, a set of names of options, and ``is_available(cell)``.
        cell: a cell with ``options``, the dataclass of its options.
    """
    return options_in_use(cell.options) <= backend.computes and backend.is_available(cell)


def choose_backend(backends: Sequence[Any], cell: Any) -> Any:
    """The first of ``backends`` that :func:`can_compute` a cell.

    Raises:
        ValueError: naming the options that none of them computes.
    """
    for backend in backends:
        if can_compute(backend, cell):
            return backend
    unknown = options_in_use(cell.options).difference(*(backend.computes for backend in backends))
    names = ", ".join(backend.__name__ for backend in backends)
    what = f"computes {', '.join(sorted(unknown))}" if unknown else "is available with these options"
    raise ValueError(f"{type(cell).__name__}: none of {names} {what}")
