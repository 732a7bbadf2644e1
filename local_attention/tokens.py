"""Checks of tokens that come from outside."""

from typing import Any

import numpy as np


def as_integers(numbers: Any, expected: str, *ranks: int) -> np.ndarray:
    """Nested lists, an array or a Tensor as an array.

    Raises:
        ValueError: "expected …", for what is no array of integers of one of the ``ranks``, or has no elements.
    """
    try:
        array = np.asarray(numbers)
    except ValueError:
        raise ValueError(f"expected {expected}, got rows of different lengths") from None
    if array.dtype.kind not in "iu" or array.ndim not in ranks or not array.size:
        raise ValueError(f"expected {expected}, got {array.dtype} of shape {array.shape}")
    return array


def check_range(tokens: np.ndarray, num_tokens: int) -> None:
    """Raise ``ValueError`` for a token that the vocabulary does not have."""
    outside = tokens[(tokens < 0) | (tokens >= num_tokens)]
    if outside.size:
        raise ValueError(f"expected tokens from 0 to {num_tokens - 1}, got {outside[0]}")
