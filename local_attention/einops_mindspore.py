"""einops for MindSpore: eager operations on tensors, and cells that work inside a static graph.

* Importing this module gives einops a MindSpore backend, so that ``einops.rearrange(tensor, …)``, ``reduce``,
  ``repeat``, ``pack`` and ``unpack`` work eagerly.
* :class:`Rearrange`, :class:`Reduce` and :class:`Repeat` work inside ``construct`` in graph mode, too, where the parser
  refuses einops' own functions ("Unsupported statement 'Try'"): einops turns pattern and shape into reshapes and at
  most one reduction, one transposition and one tiling, at compile time.
"""

from math import prod

import mindspore as ms
from einops import EinopsError
from mindspore import ops
from mindspore.ops import constexpr

from local_attention.mindspore_quirks import EinopsBackend, TypedCell, einops_steps

MAX_PARTS = 64  # up to this many pieces, one Split and one Concat kernel are faster than Transpose
MIN_TAIL = 16  # with fewer columns than this, products with ones are small, many, and need much memory for the ones


@constexpr
def as_swap(shape, permutation):
    """``(lead, x, y, tail)`` if the permutation is ``(lead, x, y, tail) -> (lead, y, x, tail)``, else ``()``.

    Axes that stay next to each other count as one: ``b n h d -> b h n d`` is such a swap with ``tail = d``, and
    ``a b c -> c a b`` is one with ``x = a * b``.
    """
    runs = []
    for axis in permutation:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    lead = runs.pop(0) if runs[0][0] == 0 else []
    tail = runs.pop() if runs and runs[-1][-1] == len(shape) - 1 else []
    if len(runs) != 2 or 0 in shape:
        return ()
    y, x = runs
    return tuple(prod(shape[axis] for axis in axes) for axes in (lead, x, y, tail))


def transpose(x, permutation):
    """``ops.transpose``; a swap of neighbouring axes by Split and Concat if one of them is short.

    Every split or merge of heads is such a swap: on a CPU it takes 13 ms instead of 30, and a tenth of the memory.
    """
    shape = tuple(x.shape[axis] for axis in permutation)
    swap = as_swap(x.shape, permutation)
    if swap != () and swap[2] <= MAX_PARTS and swap[2] <= swap[1]:
        lead, rows, parts, tail = swap
        return ops.cat(ops.Split(2, parts)(x.reshape((lead, rows, parts * tail))), 1).reshape(shape)
    if swap != () and swap[1] <= MAX_PARTS:
        lead, parts, columns, tail = swap
        return ops.cat(ops.Split(1, parts)(x.reshape((lead, parts * columns, tail))), 2).reshape(shape)
    return ops.transpose(x, permutation)


@constexpr
def _as_product(shape, dtype, axes):
    """``(lead, run, tail, shape of the sum)`` if a product with ones is the fastest sum over these axes, else ``()``.

    A sum of 67 MB along neighbouring axes other than the last takes ReduceSum 75 to 190 ms on a CPU, and a product with
    a row of ones 5 to 20 ms. On other devices, products may round float32.
    """
    first, last = min(axes), max(axes)
    lead, run, tail = prod(shape[:first]), prod(shape[first : last + 1]), prod(shape[last + 1 :])
    neighbours = last - first + 1 == len(axes)
    fits = neighbours and dtype == ms.float32 and tail >= MIN_TAIL and ms.get_context("device_target") == "CPU"
    return (lead, run, tail, shape[:first] + shape[last + 1 :]) if fits else ()


def _sum_by_product(x, product):
    lead, run, tail, shape = product
    return ops.BatchMatMul()(ops.ones((lead, 1, run), x.dtype), x.reshape((lead, run, tail))).reshape(shape)


def _sum(x, axes):
    product = _as_product(x.shape, x.dtype, axes)
    return ops.sum(x, axes) if product == () else _sum_by_product(x, product)


def _mean(x, axes):
    product = _as_product(x.shape, x.dtype, axes)
    return ops.mean(x, axes) if product == () else _sum_by_product(x, product) / product[1]


def _prod(x, axes):
    if x.dtype in _SHORT:
        x = x.astype(ms.int64)  # as in NumPy and ops.sum: 13! needs more than 32 bits
    return ops.prod(x, axes)


def _any(x, axes):
    return ops.any(x.astype(ms.bool_), axes)  # ops.any reads the bytes of other types as booleans: any([1.0]) is False


def _all(x, axes):
    return ops.all(x.astype(ms.bool_), axes)


_FLOATING = (ms.float16, ms.bfloat16, ms.float32, ms.float64)
_SHORT = (ms.bool_, ms.int8, ms.int16, ms.int32, ms.uint8, ms.uint16, ms.uint32)
REDUCTIONS = {"min": ops.amin, "max": ops.amax, "sum": _sum, "mean": _mean, "prod": _prod, "any": _any, "all": _all}


def _refuse_empty(shape, axes):
    if any(shape[axis] == 0 for axis in axes):  # MindSpore would return uninitialised memory
        raise EinopsError("cannot reduce an axis of length 0")


class MindSporeBackend(EinopsBackend):
    """What einops needs to know about MindSpore's tensors; it finds this class by its base class."""

    framework_name = "mindspore"

    def is_appropriate_type(self, tensor):
        return isinstance(tensor, ms.Tensor)

    def shape(self, x):
        return tuple(x.shape)

    def reshape(self, x, shape):
        return ops.reshape(x, tuple(shape))

    def transpose(self, x, axes):
        return transpose(x, tuple(axes))

    def reduce(self, x, operation, axes):
        _refuse_empty(x.shape, axes)
        return REDUCTIONS[operation](x, tuple(axes))

    def stack_on_zeroth_dimension(self, tensors):
        return ops.stack(tensors)

    def add_axis(self, x, new_position):
        return ops.expand_dims(x, new_position)

    def tile(self, x, repeats):
        return ops.tile(x, tuple(repeats))

    def concat(self, tensors, axis):
        return ops.cat(tensors, axis)

    def is_float_type(self, x):
        return x.is_floating_point()


@constexpr
def _plan(operation, pattern, axes, shape, dtype):
    """``(shape, reduced axes, permutation of the others, shape, repeats, final shape)``; ``()`` for no such step.

    Unlike einops, the plan reduces before it transposes, so that less is moved.
    """
    try:
        split, order, reduced, added, final, rank = einops_steps(operation, pattern, axes, shape)
        split = tuple(shape if split is None else split)
        order = order or range(len(split))  # the axes that stay, then those that go
        order, reduced = order[: rank - len(added) - len(reduced)], sorted(order[axis] for axis in reduced)
        _refuse_empty(split, reduced)
        if operation == "mean" and dtype not in _FLOATING:
            raise EinopsError(f"no mean of {dtype}: cast to a floating type first")
    except (EinopsError, ValueError, ZeroDivisionError) as error:
        raise EinopsError(f'{operation} "{pattern}" with {dict(axes)} on shape {tuple(shape)}: {error}') from None
    lengths = iter([split[axis] for axis in order])
    expanded = tuple(1 if axis in added else next(lengths) for axis in range(len(order) + len(added)))
    repeats = tuple(added.get(axis, 1) for axis in range(len(expanded)))
    if final is None:
        final = [length * times for length, times in zip(expanded, repeats, strict=True)]
    long_axes = [axis for axis in order if split[axis] > 1]
    moves = long_axes != sorted(long_axes)
    permutation = tuple(sorted(order).index(axis) for axis in order) if moves else ()
    return split, tuple(reduced), permutation, expanded, repeats if added else (), tuple(final)


class _Transformation(TypedCell):
    """The base of the three cells: follows the plan for the shape of the input."""

    def __init__(self, operation, pattern, axes):
        super().__init__()
        self.operation, self.pattern, self.axes = operation, pattern, tuple(axes.items())
        self.reduce = REDUCTIONS.get(operation)

    def construct(self, x):
        plan = _plan(self.operation, self.pattern, self.axes, x.shape, x.dtype)
        split, reduced, permutation, expanded, repeats, final = plan
        x = x.reshape(split)
        if reduced != ():
            x = self.reduce(x, reduced)
        if permutation != ():
            x = transpose(x, permutation)
        if repeats != ():
            # Copies of 67 MB on a CPU: Tile 5 to 10 ms (of single elements 48), broadcast_to 46 to 97, Concat 5 to 8
            # (of single elements 160), `x * ones` 22 and 256 MB of index table.
            x = ops.tile(x.reshape(expanded), repeats)
        return x.reshape(final)

    def extend_repr(self):
        words = [self.pattern, self.operation] if self.reduce else [self.pattern]
        return ", ".join([*(f'"{word}"' for word in words), *(f"{name}={length}" for name, length in self.axes)])


class Rearrange(_Transformation):
    """``einops.rearrange`` as a cell, for eager and graph mode.

    Args:
        pattern: einops pattern, e.g. ``"b n (h d) -> b h n d"``.
        axes: lengths of axes that the shape does not determine, e.g. ``h=8``.

    Called with a tensor of any type, it returns its elements in the shape of the pattern's right side.

    Raises:
        einops.EinopsError: when called with a tensor whose shape does not fit the pattern.
    """

    def __init__(self, pattern: str, **axes: int) -> None:
        super().__init__("rearrange", pattern, axes)


class Reduce(_Transformation):
    """``einops.reduce`` as a cell, for eager and graph mode.

    Args:
        pattern: einops pattern; axes that are missing on its right side are reduced, e.g. ``"b (n w) d -> b n d"``.
        reduction: ``"min"``, ``"max"``, ``"sum"``, ``"mean"``, ``"prod"``, ``"any"`` or ``"all"``.
        axes: lengths of axes that the shape does not determine, e.g. ``w=4``.

    Called with a tensor, it returns booleans for ``any`` and ``all``, int64 for ``sum`` and ``prod`` of integers and
    booleans, else the type of the tensor.

    Raises:
        einops.EinopsError: for an unknown reduction; when called with a tensor whose shape does not fit the pattern,
            for an axis of length 0, or for the mean of other than floating-point numbers.
    """

    def __init__(self, pattern: str, reduction: str, **axes: int) -> None:
        if reduction not in REDUCTIONS:
            raise EinopsError(f"unknown reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
        super().__init__(reduction, pattern, axes)


class Repeat(_Transformation):
    """``einops.repeat`` as a cell, for eager and graph mode; the arguments and errors are those of :class:`Rearrange`.

    Axes that are new on the pattern's right side repeat the elements, e.g. ``"n d -> b n d"`` with ``b=8``.
    """

    def __init__(self, pattern: str, **axes: int) -> None:
        super().__init__("repeat", pattern, axes)
