"""Generation: a prompt, continued token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from local_attention.decoding.sampling import sampling_rule
from local_attention.decoding.session import STEPS_PER_CALL, Session


def generate_tokens(
    session: Session,
    prompt: Any,
    length: int | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
) -> Iterator[np.ndarray]:
    """Continue a prompt, each row of the batch with its own stream of random numbers.

    Args:
        session: a :class:`Session`; what it was fed before is forgotten.
        prompt: integers, at least one: ``(n,)`` for all rows, or ``(b, n)``.
        length: tokens to sample; None: without end.
        temperature, top_k, top_p: see :func:`sampling_rule`.
        seed: an integer from 0 to 2**32 - 1, or a sequence of them; with the same seed, prompt and weights row ``i`` is
            the same, whatever the batch.

    Yields:
        ``(b,)`` int32, ``length`` times. The first token is computed alone, then twice as many together each time, up
        to ``STEPS_PER_CALL``.

    Raises:
        ValueError: for an empty prompt.
    """
    prompt = np.asarray(prompt, np.int32)
    if prompt.shape[-1] == 0:
        raise ValueError("expected a prompt of at least one token, got none")
    rule = sampling_rule(session.num_tokens, temperature, top_k, top_p)
    rngs = [np.random.RandomState([*np.atleast_1d(seed), row]) for row in range(session.batch)]
    session.reset()
    tokens, done, count = np.broadcast_to(prompt, (session.batch, prompt.shape[-1])), 0, 1
    while done != length:
        if length is not None:
            count = min(count, length - done)
        uniforms = np.stack([rng.random_sample(count) for rng in rngs])
        sampled = session.sample(tokens, uniforms, rule)
        yield from sampled.T
        tokens, done, count = sampled[:, -1:], done + count, min(2 * count, STEPS_PER_CALL)
