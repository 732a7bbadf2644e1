"""How many floating-point operations training takes."""

import numpy as np

from local_attention.local_attention import LocalAttention
from local_attention.masks import MaskSpec, visible
from local_attention.transformer import LocalTransformer

ROWS = 256  # queries whose keys are counted at once


def flops_per_byte(model: LocalTransformer, seq_len: int) -> float:
    """The floating-point operations of a training step per input byte, in the matrix products that cannot be avoided.

    A product's forward pass takes two operations, a multiplication and an addition, per number, and its backward pass
    twice as many. This gives

    - 6 for each weight of a linear layer: projections of attention, feed-forward, n-grams, and logits;
    - 12 per channel of the heads and key that a query sees, for scores and weighted sums: keys are those in the real
      window, or in the whole sequence, cut off at the beginning of a sequence of ``seq_len`` bytes, on average over its
      queries.

    Embeddings, norms, activations, hyper-connections, the bias network and the optimizer are not counted, nor are
    scores that are computed only to be masked.
    """
    weights = sum(
        parameter.size
        for parameter in model.trainable_params()
        if parameter.name.endswith(".weight") and not parameter.name.startswith("dynamic_pos_bias.")
    )
    attention = sum(
        mha.heads * mha.dim_head * visible_keys(mha.attention, seq_len)
        for layer in model.layers
        for mha in layer.attentions()
    )
    return 6 * weights + 12 * attention


def visible_keys(attention: LocalAttention, length: int) -> float:
    """The keys that a query sees, on average over the queries of a sequence."""
    spec = MaskSpec(*attention.mask_spec(attention.window_size))
    window, total = spec.window_size, 0
    for start in range(0, length, ROWS):
        queries = np.arange(start, min(start + ROWS, length))[:, None]
        first = max(start // window - spec.look_backward, 0) * window
        end = (queries[-1, 0] // window + spec.look_forward + 1) * window
        total += visible(queries, np.arange(first, min(end, length)), length=length, **spec._asdict()).sum()
    return float(total / length)
