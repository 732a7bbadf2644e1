"""What the layers of a model share: constants of a static graph, and cells without parameters."""

from functools import cache, wraps
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.ops import constexpr

from local_attention.mindspore_quirks import keep_from_recompute


@cache
def shared_cell(cell: type[nn.Cell], *args: Any, **kwargs: Any) -> nn.Cell:
    """The one ``cell(*args, **kwargs)`` of all layers. For cells without parameters and state.

    A graph compiles each instance of a cell by itself; with shared ones, a step compiles in 15% less time.
    """
    return keep_from_recompute(cell(*args, **kwargs))


# How many bytes of constants are kept, those least recently used are dropped first. A forward pass uses up to 16 of
# them in each layer, so as many are kept in any case: else the layers of a model with large ones would not share them.
MAX_BYTES, MIN_COUNT = 2**28, 16
_kept: dict[tuple, Any] = {}


def shared_constant(build):
    """Decorate ``build(*hashable) -> array or tuple of arrays`` so that it gives tensors, also inside ``construct``.

    Those whose type depends on what is computed in are made by :func:`precision.constant`.

    The same arguments give the same tensor object, so all layers of a model share one copy of a large table.
    """

    @wraps(build)
    def cached(*args):
        key = (build, *args)
        if key in _kept:
            _kept[key] = _kept.pop(key)  # now the last one
            return _kept[key]
        arrays = build(*args)
        _kept[key] = tuple(map(_tensor, arrays)) if isinstance(arrays, tuple) else _tensor(arrays)
        while len(_kept) > MIN_COUNT and sum(map(_bytes, _kept.values())) > MAX_BYTES:
            del _kept[next(iter(_kept))]
        return _kept[key]

    return constexpr(cached)


def _tensor(array):
    return array if isinstance(array, ms.Tensor) else ms.Tensor(np.ascontiguousarray(array))


def _bytes(constant):
    return sum(tensor.nbytes for tensor in (constant if isinstance(constant, tuple) else (constant,)))
