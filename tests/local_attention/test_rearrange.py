from math import prod

import einops
import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import nn, ops

from local_attention import Rearrange
from local_attention.rearrange import MAX_PARTS, as_swap
from tests.local_attention.cells import ValueAndGradients, both_modes, examples, tensor

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


def numbered(shape):
    """All elements different, so that none can be in another's place unseen."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("pattern", [*PATTERNS, *BEYOND])
def test_the_cell_gives_what_einops_gives_on_numpy(pattern):
    shape, axes = (PATTERNS | BEYOND)[pattern]
    x = numbered(shape)
    out = Rearrange(pattern, **axes)(tensor(x))
    np.testing.assert_array_equal(out.asnumpy(), einops.rearrange(x, pattern, **axes))


class Several(nn.Cell):
    """Patterns compiled into one graph, which takes as long as a single one."""

    def __init__(self, patterns):
        super().__init__()
        self.rearranges = nn.CellList([Rearrange(pattern, **axes) for pattern, (_, axes) in patterns.items()])

    def construct(self, *tensors):
        outs = ()
        for i in range(len(tensors)):
            outs = outs + (self.rearranges[i](tensors[i]),)
        return outs


class WeightedSum(nn.Cell):
    """``sum(weight * rearranged)`` over several patterns: its gradient is the weights, rearranged back."""

    def __init__(self, patterns):
        super().__init__()
        self.several, self.count = Several(patterns), len(patterns)

    def construct(self, *tensors):
        total, outs = 0.0, self.several(*tensors[: self.count])
        for i in range(self.count):
            total = total + (outs[i] * tensors[self.count + i]).sum()
        return total


@both_modes
def test_the_cell_works_in_either_mode_and_on_either_type(mode):
    # every other pattern on whole numbers
    arrays = [numbered(shape).astype([np.float32, np.int32][i % 2]) for i, (shape, _) in enumerate(PATTERNS.values())]
    outs = Several(PATTERNS)(*map(tensor, arrays))
    for x, out, (pattern, (_, axes)) in zip(arrays, outs, PATTERNS.items(), strict=True):
        assert out.asnumpy().dtype == x.dtype
        np.testing.assert_array_equal(out.asnumpy(), einops.rearrange(x, pattern, **axes), err_msg=pattern)


@both_modes
def test_the_gradient_goes_back_the_way_the_elements_came(mode, rng):
    arrays = [numbered(shape) for shape, _ in PATTERNS.values()]
    # einops on the positions of the elements tells where each came from
    sources = [
        einops.rearrange(numbered(shape), pattern, **axes).astype(int) for pattern, (shape, axes) in PATTERNS.items()
    ]
    weights = [rng.standard_normal(source.shape) for source in sources]
    cell = ValueAndGradients(WeightedSum(PATTERNS))
    _, gradients = cell(ms.Tensor(1.0, ms.float32), *map(tensor, arrays), *map(tensor, weights))
    gradients = gradients[: len(PATTERNS)]  # the others are those of the weights
    for x, source, weight, gradient, pattern in zip(arrays, sources, weights, gradients, PATTERNS, strict=True):
        wanted = np.zeros(x.size)
        wanted[source.ravel()] = weight.ravel()
        np.testing.assert_allclose(gradient.asnumpy(), wanted.reshape(x.shape), atol=1e-6, err_msg=pattern)


@st.composite
def patterns(draw):
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
    left, right = groups(names), groups(draw(st.permutations(names)))
    shape = tuple(prod(lengths[name] for name in group) for group in left)
    return f"{side(left)} -> {side(right)}", shape, {name: lengths[name] for group in left for name in group[1:]}


@given(patterns())
@examples(150)
def test_the_cell_gives_what_einops_gives_for_any_pattern(drawn):
    pattern, shape, axes = drawn
    x = numbered(shape)
    out = Rearrange(pattern, **axes)(tensor(x))
    np.testing.assert_array_equal(out.asnumpy(), einops.rearrange(x, pattern, **axes))


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


@pytest.mark.parametrize("pattern", ["b n (h d) -> b h n d", "b h n d -> (b n) (h d)", "a b c -> c a b"])
def test_a_swap_needs_no_transpose_kernel(pattern, monkeypatch):
    def refuse(*args):
        raise AssertionError("ops.transpose was called")

    shape, axes = PATTERNS[pattern]
    x, cell = numbered(shape), Rearrange(pattern, **axes)
    monkeypatch.setattr(ops, "transpose", refuse)
    np.testing.assert_array_equal(cell(tensor(x)).asnumpy(), einops.rearrange(x, pattern, **axes))
    with pytest.raises(AssertionError, match="transpose was called"):  # or this test would see nothing
        Rearrange("a b c -> c b a")(tensor(numbered((2, 3, 4))))


@both_modes
def test_an_error_names_shape_pattern_and_lengths(mode):
    with pytest.raises(einops.EinopsError) as error:
        Rearrange("b n (h d) -> b h n d", h=4)(tensor(numbered((2, 5, 6))))
    assert all(part in str(error.value) for part in ("(2, 5, 6)", '"b n (h d) -> b h n d"', "{'h': 4}", "6", "4"))


@pytest.mark.parametrize(
    ("pattern", "axes", "shape"),
    [
        ("a b -> b a", {}, (2, 3, 4)),  # too many axes
        ("a b -> a", {}, (2, 3)),  # an axis is lost
        ("a b -> b a c", {}, (2, 3)),
        ("(a b) -> a b", {}, (6,)),  # ambiguous
        ("a b -> (a b", {}, (2, 3)),
        ("a b -> b a", dict(a=5), (2, 3)),
    ],
)
def test_what_does_not_fit_is_refused(pattern, axes, shape):
    with pytest.raises(einops.EinopsError):
        Rearrange(pattern, **axes)(tensor(numbered(shape)))


def test_the_cell_shows_its_pattern_and_lengths():
    assert repr(Rearrange("b n (h d) -> b h n d", h=8)) == 'Rearrange("b n (h d) -> b h n d", h=8)'


# einops' own functions on MindSpore's tensors


def check(function, *arrays, equal=np.testing.assert_array_equal):
    """``function`` gives the same for tensors as for NumPy arrays, and gives tensors."""
    out, wanted = function(*map(tensor, arrays)), function(*arrays)
    assert isinstance(out, ms.Tensor)
    equal(out.asnumpy(), wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_einops_rearrange_works_on_tensors(pattern):
    shape, axes = PATTERNS[pattern]
    check(lambda x: einops.rearrange(x, pattern, **axes), numbered(shape))


@pytest.mark.parametrize("operation", ["sum", "mean", "min", "max", "prod"])
@pytest.mark.parametrize("pattern", ["b n d -> b d", "b n d -> d", "b n d ->", "b (n w) d -> n 1 (d b)", "b ... -> b"])
def test_einops_reduce_works_on_tensors(operation, pattern, rng):
    x = rng.standard_normal((2, 4, 3)).astype(np.float32)
    axes = dict(w=2) if "w" in pattern else {}
    check(
        lambda x: einops.reduce(x, pattern, operation, **axes),
        x,
        equal=lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    )


@pytest.mark.parametrize("operation", ["any", "all"])
def test_einops_reduce_works_on_booleans(operation, rng):
    x = rng.random((3, 4, 5)) < 0.5
    out = einops.reduce(ms.Tensor(x), "a b c -> a c", operation)
    np.testing.assert_array_equal(out.asnumpy(), getattr(np, operation)(x, 1))


@pytest.mark.parametrize("pattern", ["a b -> a b c", "a b -> (a c) b", "a b -> b (c a) c2", "a b -> c 1 a b"])
def test_einops_repeat_works_on_tensors(pattern):
    axes = dict(c=3) | (dict(c2=2) if "c2" in pattern else {})
    check(lambda x: einops.repeat(x, pattern, **axes), numbered((2, 4)))


def test_einops_takes_lists_of_tensors():
    check(lambda *xs: einops.rearrange(list(xs), "s a b -> a (s b)"), numbered((2, 3)), -numbered((2, 3)))


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
