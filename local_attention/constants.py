"""Constants of a static graph, computed by NumPy while the graph is compiled."""

from functools import lru_cache, wraps

import mindspore as ms
import numpy as np
from mindspore.ops import constexpr


def shared_constant(build):
    """Decorate ``build(*hashable) -> array or tuple of arrays`` so that it gives tensors, also inside ``construct``.

    The same arguments give the same tensor object, so all layers of a model share one copy of a large table.
    """

    @lru_cache(maxsize=32)
    def tensors(*args):
        arrays = build(*args)
        if isinstance(arrays, tuple):
            return tuple(ms.Tensor(np.ascontiguousarray(array)) for array in arrays)
        return ms.Tensor(np.ascontiguousarray(arrays))

    @wraps(build)
    def cached(*args):
        return tensors(*args)

    return constexpr(cached)
