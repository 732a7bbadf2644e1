"""Drawing the next token."""

import numpy as np


def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from.

    Args:
        logits: ``(num_tokens,)``.
        temperature: divides the logits; 0 puts all weight on the largest.
        top_k: keep only the ``top_k`` most likely tokens.
        top_p: keep the most likely tokens until their sum reaches ``top_p`` (nucleus sampling, Holtzman et al. 2020,
            arXiv 1904.09751); always at least one.

    Returns:
        ``(num_tokens,)`` float64, of sum 1.

    Raises:
        ValueError: for a negative temperature or a ``top_k`` below 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"expected temperature >= 0 and top_k >= 1, got {temperature} and {top_k}")
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        top_k, temperature = 1, 1.0
    keep = order[:top_k]
    probabilities = np.zeros_like(logits)
    probabilities[keep] = np.exp((logits[keep] - logits[order[0]]) / temperature)
    probabilities /= probabilities.sum()
    if top_p is not None:
        before = np.cumsum(probabilities[keep]) - probabilities[keep]
        probabilities[keep[1:][before[1:] >= top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def draw(probabilities, uniform):
    """The token at which the running sum of ``probabilities`` passes ``uniform``, a number from [0, 1)."""
    running = np.cumsum(probabilities)
    return int(np.searchsorted(running, uniform * running[-1], side="right"))
