from functools import partial
from math import prod

import einops
import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import nn, ops

from local_attention import Rearrange, Reduce, Repeat
from local_attention.einops_mindspore import MAX_PARTS, MIN_TAIL, as_swap
from tests.local_attention.cells import (
    ValueAndGradients,
    assert_gradients,
    both_modes,
    examples,
    for_all,
    slowly_in_a_graph,
    tensor,
)

PATTERNS = {  # pattern: shape, lengths that the shape does not tell
    "b n (h d) -> b h n d": ((2, 5, 6), dict(h=3)),  # a split of heads
    "b h n d -> b n (h d)": ((2, 3, 5, 2), {}),
    "b h n d -> (b n) (h d)": ((2, 3, 5, 2), {}),
    "(b n) (h d) -> b h n d": ((10, 6), dict(b=2, h=3)),
    "b h (n d) -> (b n) (h d)": ((2, 1, 10), dict(d=2)),  # of a single head
    "b n (d h) -> b h n d": ((2, 5, 6), dict(h=3)),  # three axes turn: a true transposition
    "a b c -> c b a": ((2, 3, 4), {}),
    "a b c -> c a b": ((2, 3, 4), {}),
    "a b c -> b c a": ((2, 3, 4), {}),
    "a b -> b a": ((4, 3), {}),
    "a b c d -> d c b a": ((2, 1, 3, 4), {}),
    "a b c d -> c d a b": ((2, 3, 4, 5), {}),
    "a b c d -> a d b c": ((2, 3, 4, 5), {}),
    "b (n w) d -> (b n) w d": ((2, 6, 3), dict(w=2)),  # nothing moves
    "... n d -> (...) n d": ((2, 3, 4, 5), {}),
    "... n d -> ... d n": ((2, 3, 4, 5), {}),
    "b ... d -> d b ...": ((2, 3, 4, 5), {}),
    "b n d -> b 1 n d": ((2, 3, 4), {}),
    "b 1 n 1 -> n b": ((2, 1, 3, 1), {}),
    "a b -> a () b 1": ((2, 3), {}),
    "1 ->": ((1,), {}),
    "b n (h d) -> h b 1 n d": ((2, 5, 6), dict(h=6)),
    "a -> a": ((3,), {}),
    "a b -> (a b)": ((2, 3), {}),
    "a b -> (b a)": ((2, 3), {}),
    "(a b) -> b a": ((6,), dict(a=2)),
}
BEYOND = {  # more parts than one Split takes
    "n h -> h n": ((MAX_PARTS + 1, MAX_PARTS + 3), {}),
    "b n h -> b h n": ((1, MAX_PARTS, MAX_PARTS + 1), {}),
    "b h n -> b n h": ((1, MAX_PARTS + 1, MAX_PARTS), {}),
}


COMPILED = {
    "n d -> d": ((4, MIN_TAIL), {}),  # sums of float32 by a product
    "b n d -> n": ((2, 4, 3), {}),  # two axes apart
    "b ... d -> d ...": ((2, 3, 2, 3), {}),
}
REDUCED = COMPILED | {
    "b n d ->": ((2, 4, 3), {}),
    "b n d -> b n": ((2, 4, 3), {}),
    "b n d -> b d": ((2, 4, 3), {}),
    "b n m d -> d b": ((2, 3, 2, MIN_TAIL), {}),  # by several products over two axes that stand side by side
    "b (n w) d -> n 1 (d b)": ((2, 4, 3), dict(w=2)),
    "b (n 2) d -> b d n": ((2, 4, 3), {}),
    "b ... d -> b d": ((2, 3, 2, 3), {}),
    "... d -> (...) 1": ((2, 3, 2), {}),
    "b 1 n -> n b": ((2, 1, 3), {}),  # nothing to reduce
    "b h n -> n b": ((2, 1, 3), {}),  # an axis of a single element
}
REPEATED = {
    "a b -> a b c": ((2, 4), dict(c=3)),
    "a b -> (a c) b": ((2, 4), dict(c=3)),
    "a b -> b (c a) c2": ((2, 4), dict(c=3, c2=2)),
    "a b -> c 1 a b 2": ((2, 4), dict(c=3)),
    "(a b) -> b c a": ((6,), dict(a=2, c=2)),
    "... d -> c ... d": ((2, 3, 4), dict(c=2)),
    "a ... -> (... c) a": ((2, 3, 4), dict(c=2)),
    "a b c -> a b (c d)": ((2, 4, 1), dict(d=1)),
    "a b -> b a": ((2, 4), {}),  # nothing new
    "-> a b": ((), dict(a=2, b=3)),
}
REDUCTIONS = ["sum", "mean", "min", "max", "prod", "any", "all"]

TYPES = {"mean": [np.float32], "min": [np.float32, np.int32], "max": [np.float32, np.int32]}  # elsewhere booleans, too


def cells(kind, patterns, *words):
    """``(cell, shape)`` for every pattern."""
    return [(kind(pattern, *words, **axes), shape) for pattern, (shape, axes) in patterns.items()]


EAGER = cells(Rearrange, PATTERNS | BEYOND) + cells(Repeat, REPEATED)
EAGER += [case for reduction in REDUCTIONS for case in cells(Reduce, REDUCED, reduction)]
GRAPH = cells(Rearrange, PATTERNS) + cells(Repeat, REPEATED)
GRAPH += [case for reduction in REDUCTIONS for case in cells(Reduce, COMPILED, reduction)]


def numbered(shape):
    """All elements different, so that none can be in another's place unseen."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def by_einops(cell, x):
    """What einops' own function makes of an array or a tensor."""
    words = [cell.pattern, cell.operation] if isinstance(cell, Reduce) else [cell.pattern]
    return getattr(einops, type(cell).__name__.lower())(x, *words, **dict(cell.axes))


def assert_as_on_numpy(out, cell, x):
    wanted = by_einops(cell, x)
    assert isinstance(out, ms.Tensor)
    assert out.asnumpy().dtype == wanted.dtype, cell
    np.testing.assert_allclose(out.asnumpy(), wanted, rtol=1e-5, err_msg=str(cell))


@pytest.mark.parametrize(("cell", "shape"), EAGER, ids=str)
def test_a_cell_gives_what_einops_gives_on_numpy(cell, shape):
    assert_as_on_numpy(cell(tensor(numbered(shape))), cell, numbered(shape))


@pytest.mark.parametrize(("cell", "shape"), EAGER, ids=str)
def test_einops_gives_on_tensors_what_it_gives_on_numpy(cell, shape):
    assert_as_on_numpy(by_einops(cell, tensor(numbered(shape))), cell, numbered(shape))


class Several(nn.Cell):
    """Cells compiled into one graph, which takes as long as a single one."""

    def __init__(self, cells):
        super().__init__()
        self.several = nn.CellList(list(cells))

    def construct(self, *tensors):
        outs = ()
        for i in range(len(tensors)):
            outs = outs + (self.several[i](tensors[i]),)
        return outs


class WeightedSum(nn.Cell):
    """``sum(weight * cell(tensor))`` over several cells, of their tensors and then their weights."""

    def __init__(self, cells):
        super().__init__()
        self.several, self.count = Several(cells), len(cells)

    def construct(self, *tensors):
        total, outs = 0.0, self.several(*tensors[: self.count])
        for i in range(self.count):
            total = total + (outs[i] * tensors[self.count + i]).sum()
        return total


@both_modes
def test_the_cells_work_in_either_mode_and_on_any_type(mode, rng):
    several, shapes = zip(*GRAPH, strict=True)
    types = [TYPES.get(cell.operation, [np.float32, np.int32, np.bool_]) for cell in several]
    arrays = [numbered(shape).astype(types[i][i % len(types[i])]) for i, shape in enumerate(shapes)]
    arrays = [np.asarray(rng.random(x.shape) < 0.5) if x.dtype == np.bool_ else x for x in arrays]
    for cell, x, out in zip(several, arrays, Several(several)(*map(ms.Tensor, arrays)), strict=True):
        assert_as_on_numpy(out, cell, x)


@slowly_in_a_graph
def test_the_cells_have_the_gradients_of_what_einops_computes(mode, rng):
    cases = [(cell, shape) for cell, shape in GRAPH if cell.operation not in ("any", "all")]
    several, shapes = zip(*cases, strict=True)
    arrays = [rng.permutation(np.linspace(-2, 2, np.prod(shape, dtype=int))).reshape(shape) for shape in shapes]
    weights = [rng.standard_normal(by_einops(cell, x).shape) for cell, x in zip(several, arrays, strict=True)]
    run = ValueAndGradients(WeightedSum(several))
    _, gradients = run(ms.Tensor(1.0, ms.float32), *map(tensor, arrays), *map(tensor, weights))
    gradients = gradients[: len(several)]  # the others are those of the weights
    for cell, x, weight, gradient in zip(several, arrays, weights, gradients, strict=True):
        definition = partial(by_einops, cell)
        assert_gradients(definition, [x], weight, [gradient.asnumpy()], err_msg=str(cell), rtol=1e-4, atol=1e-5)


@st.composite
def patterns(draw, operation):
    """A random pattern, a shape that fits it, and the lengths that the shape does not tell."""

    def groups(names):
        """Names put together as they stand; an empty group is a unit axis."""
        if not names:
            return []
        first = draw(st.integers(1, len(names)))
        return [[]] * draw(st.integers(0, 1)) + [names[:first]] + groups(names[first:])

    def side(groups):
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)

    names = [*"abcd"[: draw(st.integers(1, 4))]]
    lengths = {name: draw(st.integers(1, 3)) for name in names}
    on_both = [name for name in names if operation == "rearrange" or draw(st.booleans())]
    left = groups(on_both if operation == "repeat" else names)
    right = groups(draw(st.permutations(names if operation == "repeat" else on_both)))
    shape = tuple(prod(lengths[name] for name in group) for group in left)
    untold = {name for group in left for name in group[1:]} | (set(names) - {name for group in left for name in group})
    return f"{side(left)} -> {side(right)}", shape, {name: lengths[name] for name in sorted(untold)}


@for_all(50, 300, patterns("rearrange"))
def test_rearrange_gives_what_einops_gives_for_any_pattern(drawn):
    pattern, shape, axes = drawn
    cell = Rearrange(pattern, **axes)
    assert_as_on_numpy(cell(tensor(numbered(shape))), cell, numbered(shape))


@for_all(50, 300, patterns("reduce"), st.sampled_from(REDUCTIONS))
def test_reduce_gives_what_einops_gives_for_any_pattern(drawn, reduction):
    pattern, shape, axes = drawn
    cell = Reduce(pattern, reduction, **axes)
    assert_as_on_numpy(cell(tensor(numbered(shape))), cell, numbered(shape))


@for_all(50, 300, patterns("repeat"))
def test_repeat_gives_what_einops_gives_for_any_pattern(drawn):
    pattern, shape, axes = drawn
    cell = Repeat(pattern, **axes)
    assert_as_on_numpy(cell(tensor(numbered(shape))), cell, numbered(shape))


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5).flatmap(
        lambda s: st.tuples(st.just(s), st.permutations(range(len(s))))
    )
)
@examples(100)
def test_a_permutation_that_is_a_swap_moves_the_elements_like_the_swap(drawn):
    shape, permutation = drawn
    x = numbered(shape)
    swap = as_swap(tuple(shape), tuple(permutation))
    if swap:
        assert x.transpose(permutation).ravel().tolist() == x.reshape(swap).swapaxes(1, 2).ravel().tolist()


@pytest.mark.parametrize(
    ("permutation", "swap"),
    [
        ((0, 2, 1, 3), (2, 3, 4, 5)),  # heads
        ((1, 0, 2, 3), (1, 2, 3, 20)),
        ((0, 1, 3, 2), (6, 4, 5, 1)),
        ((2, 3, 0, 1), (1, 6, 20, 1)),
        ((3, 0, 1, 2), (1, 24, 5, 1)),
        ((0, 3, 1, 2), (2, 12, 5, 1)),
        ((3, 2, 1, 0), ()),
        ((1, 0, 3, 2), ()),
        ((0, 3, 2, 1), ()),
        ((0, 1, 2, 3), ()),
    ],
)
def test_which_permutations_swap_two_neighbours(permutation, swap):
    assert as_swap((2, 3, 4, 5), permutation) == swap


def refuse(*args):
    raise AssertionError("the slow kernel was called")


@pytest.mark.parametrize("pattern", ["b n (h d) -> b h n d", "b h n d -> (b n) (h d)", "a b c -> c a b"])
def test_a_swap_needs_no_transpose_kernel(pattern, monkeypatch):
    shape, axes = PATTERNS[pattern]
    cell = Rearrange(pattern, **axes)
    monkeypatch.setattr(ops, "transpose", refuse)
    assert_as_on_numpy(cell(tensor(numbered(shape))), cell, numbered(shape))
    with pytest.raises(AssertionError, match="slow kernel"):  # or this test would see nothing
        Rearrange("a b c -> c b a")(tensor(numbered((2, 3, 4))))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("pattern", ["b n m d -> b d", "b n d e -> b d e", "n d -> d"])
def test_adding_up_wide_rows_needs_no_reduction_kernel(reduction, pattern, monkeypatch):
    shape = (2, 3, 4, MIN_TAIL)[-len(pattern.split(" -> ")[0].split()) :]
    cell = Reduce(pattern, reduction)
    monkeypatch.setattr(ops, reduction, refuse)
    assert_as_on_numpy(cell(tensor(numbered(shape))), cell, numbered(shape))
    for narrow, x in [("n d -> d", numbered((3, MIN_TAIL - 1))), ("b n m d -> n d", numbered((2, 3, 4, MIN_TAIL)))]:
        with pytest.raises(AssertionError, match="slow kernel"):
            Reduce(narrow, reduction)(tensor(x))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sums_and_means_keep_the_floating_type(dtype):
    x = numbered((3, MIN_TAIL)).astype(dtype)
    for reduction in ("sum", "mean"):
        cell = Reduce("n d -> d", reduction)
        assert_as_on_numpy(cell(ms.Tensor(x)), cell, x)


@pytest.mark.parametrize("operation", ["sum", "prod"])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_whole_numbers_are_added_and_multiplied_in_64_bits(operation, dtype):
    x, cell = np.full((3, 2), min(np.iinfo(dtype).max, 2**20), dtype), Reduce("a b -> b", operation)
    assert_as_on_numpy(cell(ms.Tensor(x)), cell, x)


@pytest.mark.parametrize("operation", ["any", "all"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int32, np.int64])
def test_any_and_all_take_numbers_for_booleans(operation, dtype):
    x = np.array([[0, 0, 1, 1], [0, 0, 1, 4], [0, 1, 0, 1]]).astype(dtype)
    cell = Reduce("a b -> b", operation)
    assert_as_on_numpy(cell(ms.Tensor(x)), cell, x)


@both_modes
@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        (Rearrange("b n (h d) -> b h n d", h=4), ['rearrange "b n (h d) -> b h n d"', "{'h': 4}", "6 in chunks of 4"]),
        (Reduce("b (n w) d -> b n d", "max", w=3), ['max "b (n w) d -> b n d"', "{'w': 3}", "5 in chunks of 3"]),
        (Repeat("b n d -> (b r) n d"), ['repeat "b n d -> (b r) n d"', "{}", "Specify sizes", "'r'"]),
        (Reduce("b d -> b", "mean"), ['mean "b d -> b"', "{}", "expected 2 dims. Received 3-dim"]),
    ],
    ids=str,
)
def test_an_error_names_operation_pattern_lengths_and_shape(mode, cell, parts):
    with pytest.raises(einops.EinopsError) as error:
        cell(tensor(numbered((2, 5, 6))))
    assert all(part in str(error.value) for part in [*parts, "(2, 5, 6)"]), error.value


@pytest.mark.parametrize(
    ("cell", "shape"),
    [
        (Rearrange("a b -> b a"), (2, 3, 4)),  # too many axes
        (Rearrange("a b -> a"), (2, 3)),  # an axis is lost
        (Rearrange("a b -> b a c"), (2, 3)),
        (Rearrange("(a b) -> a b"), (6,)),  # ambiguous
        (Rearrange("(a b) -> a b", a=0), (6,)),
        (Rearrange("a b -> (a b"), (2, 3)),
        (Rearrange("a b"), (2, 3)),
        (Rearrange("a b -> b a", a=5), (2, 3)),
        (Reduce("a b -> c", "sum"), (2, 3)),
        (Reduce("a b -> a", "sum", c=2), (2, 3)),
        (Reduce("a b -> b", "max"), (0, 3)),  # has no greatest element
        (Repeat("a b -> b"), (2, 3)),
        (Repeat("a b -> a b c"), (2, 3)),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(cell, shape):
    with pytest.raises(einops.EinopsError):
        cell(tensor(numbered(shape)))


@both_modes
def test_whole_numbers_have_no_mean(mode):
    with pytest.raises(einops.EinopsError, match=r'mean "a b -> a".*Int32.*cast'):
        Reduce("a b -> a", "mean")(tensor(np.ones((2, 3), int)))


def test_an_unknown_reduction_is_refused_at_once():
    with pytest.raises(einops.EinopsError, match=r"'median'.*min, max, sum, mean, prod, any, all"):
        Reduce("a b -> a", "median")


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (Rearrange("b n (h d) -> b h n d", h=8), 'Rearrange("b n (h d) -> b h n d", h=8)'),
        (Reduce("b n d -> b d", "mean"), 'Reduce("b n d -> b d", "mean")'),
        (Reduce("(b c) n -> b n", "max", c=2), 'Reduce("(b c) n -> b n", "max", c=2)'),
        (Repeat("n d -> b n d", b=8), 'Repeat("n d -> b n d", b=8)'),
    ],
)
def test_a_cell_shows_its_pattern_and_lengths(cell, shown):
    assert repr(cell) == shown


# einops' own functions on MindSpore's tensors


def test_einops_takes_lists_of_tensors():
    arrays = [numbered((2, 3)), -numbered((2, 3))]
    out = einops.rearrange([*map(tensor, arrays)], "s a b -> a (s b)")
    np.testing.assert_array_equal(out.asnumpy(), np.concatenate(arrays, 1))


def test_an_empty_tensor_is_rearranged_like_any_other():
    cell = Rearrange("b n (h d) -> b h n d", h=2)
    assert_as_on_numpy(cell(tensor(numbered((0, 3, 4)))), cell, numbered((0, 3, 4)))


def test_einops_refuses_to_reduce_nothing():
    with pytest.raises(einops.EinopsError, match="length 0"):
        einops.reduce(tensor(np.ones((0, 3))), "a b -> b", "max")


def test_einops_packs_and_unpacks_tensors():
    arrays = [numbered(shape) for shape in ((2, 3, 4), (2, 5, 4), (2, 2, 3, 4))]
    packed, shapes = einops.pack([*map(tensor, arrays)], "b * d")
    wanted, wanted_shapes = einops.pack(arrays, "b * d")
    np.testing.assert_array_equal(packed.asnumpy(), wanted)
    assert [tuple(shape) for shape in shapes] == [tuple(shape) for shape in wanted_shapes]
    for part, array in zip(einops.unpack(packed, shapes, "b * d"), arrays, strict=True):
        np.testing.assert_array_equal(part.asnumpy(), array)


def test_einops_parses_the_shape_of_a_tensor():
    assert einops.parse_shape(tensor(numbered((2, 3, 4))), "b _ d") == {"b": 2, "d": 4}


def test_einops_functions_have_gradients(rng):
    x, weight = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 3))
    gradient = ms.grad(lambda x: (einops.reduce(x, "b n d -> d n", "sum") * tensor(weight)).sum())(tensor(x))
    np.testing.assert_allclose(gradient.asnumpy(), np.stack([weight.T] * 2), atol=1e-6)
