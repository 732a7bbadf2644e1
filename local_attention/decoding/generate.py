"""Generation: a prompt, continued token by token."""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import numpy as np

from local_attention.decoding.sampling import sampling_rule
from local_attention.decoding.session import STEPS_PER_CALL, Session
from local_attention.tokens import as_integers, check_range


def generate_tokens(
    session: Session,
    prompt: Any,
    length: int | None,
    *,
    lengths: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_tokens: int | None = None,
    seed: int | Sequence[int] = 0,
) -> Iterator[np.ndarray]:
    """Continue a prompt, each row of the batch with its own stream of random numbers.

    Args:
        session: a :class:`Session`; what it was fed before is forgotten.
        prompt: integers, at least one: ``(n,)`` for all rows, or ``(b, n)``.
        length: tokens to sample; None: without end.
        lengths: ``(b,)`` integers, where rows are shorter than ``n``: what follows in a row is padding.
        temperature, top_k, top_p, num_tokens: see :func:`sampling_rule`.
        seed: an integer from 0 to 2**32 - 1, or a sequence of them; with the same seed, prompt and weights row ``i`` is
            the same, whatever the batch.

    Yields:
        ``(b,)`` int32, ``length`` times. The first token is computed alone, then twice as many together each time, up
        to ``STEPS_PER_CALL``.

    Raises:
        ValueError: for what is no prompt of tokens of the vocabulary; for lengths outside 1 … n; for a negative
            ``length``; and as :func:`sampling_rule`.
    """
    if length is not None and length < 0:
        raise ValueError(f"expected a length >= 0, or None, got {length}")
    prompt = as_integers(prompt, "a prompt of integers, (n,) or (b, n), at least one token", 1, 2)
    prompt = np.broadcast_to(prompt, (session.batch, prompt.shape[-1]))
    expected = f"{session.batch} lengths from 1 to {prompt.shape[1]}"
    lengths = as_integers([prompt.shape[1]] * session.batch if lengths is None else lengths, expected, 1)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if len(lengths) != session.batch or shortest < 1 or longest > prompt.shape[1]:
        raise ValueError(f"expected {expected}, got {lengths.tolist()}")
    prompt, is_given = prompt[:, :longest], np.arange(longest) < lengths[:, None]
    check_range(prompt[is_given], session.num_tokens)
    prompt = np.where(is_given, prompt.astype(np.int32), -1)
    rule = sampling_rule(session.num_tokens, temperature, top_k, top_p, num_tokens)

    # All rows advance together from where the shortest one ends. While a longer one has tokens of its own, it gets
    # these, uses up no random numbers, and what is sampled for it is dropped.
    begin = (lengths.astype(int) - shortest)[:, None]
    uniforms = [
        chain(repeat(0.0, wait), iter(np.random.RandomState([*np.atleast_1d(seed), row]).random_sample, None))
        for row, (wait,) in enumerate(begin)
    ]
    session.reset()
    session.append(prompt[:, : shortest - 1])
    tokens, sampled, done, count = prompt[:, shortest - 1 :], np.zeros((session.batch, 0), np.int32), 0, 1
    while done != length:
        numbers = np.array([list(islice(row, tokens.shape[1])) for row in uniforms])
        sampled = np.concatenate([sampled, session.sample(tokens, numbers, rule)], 1)
        yield from np.take_along_axis(sampled, begin + np.arange(count), 1).T
        newest, sampled, done = sampled[:, -1:], sampled[:, count:], done + count
        count = min(2 * count, STEPS_PER_CALL, sys.maxsize if length is None else length - done)
        tokens = np.pad(newest, ((0, 0), (0, max(0, count - 1))), constant_values=-1)
