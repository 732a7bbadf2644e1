"""Decoding by a single backend, without a model around it."""

import mindspore as ms
import numpy as np

from local_attention.decoding.cache import KVCache
from tests.local_attention.cells import tensor


def decode(backend, mha, x, count=1, dtype=ms.float32):
    """The outputs of ``x: (b, n, dim)``, ``count`` tokens per step, through a KV cache of their own."""
    cache = KVCache([mha], len(x), dtype=dtype)
    cell, steps = backend(mha, cache.keys[0], cache.values[0]), x.shape[1] // count
    inputs, outputs = cache.step_inputs(0, steps, count, count), []
    for i in range(steps):
        arrays = (array[i] for array in (inputs.slots, inputs.mask, inputs.rotation, inputs.decay))
        out = cell(tensor(x[:, i * count : (i + 1) * count], dtype), *map(ms.Tensor, arrays))
        outputs.append(out.asnumpy().reshape((len(x), count, -1)))
    return np.concatenate(outputs, 1)
