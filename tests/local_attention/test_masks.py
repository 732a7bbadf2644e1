import mindspore as ms
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from local_attention.windows import MASK_VALUE, additive_mask, block_size, look_around, visible
from mindspore import nn

from tests.local_attention import reference
from tests.local_attention.cells import both_modes, examples, tensor, value_and_gradients

PICTURES = {  # rows are queries, columns keys, of a sequence of 6 in windows of 2
    "causal": (
        dict(causal=True, exact_windowsize=False, look_backward=1, look_forward=0),
        """
        x.....
        xx....
        xxx...
        xxxx..
        ..xxx.
        ..xxxx
        """,
    ),
    "causal exact": (
        dict(causal=True, exact_windowsize=True, look_backward=1, look_forward=0),
        """
        x.....
        xx....
        xxx...
        .xxx..
        ..xxx.
        ...xxx
        """,
    ),
    "own window": (
        dict(causal=False, exact_windowsize=False, look_backward=0, look_forward=0),
        """
        xx....
        xx....
        ..xx..
        ..xx..
        ....xx
        ....xx
        """,
    ),
    "forward": (
        dict(causal=False, exact_windowsize=False, look_backward=0, look_forward=1),
        """
        xxxx..
        xxxx..
        ..xxxx
        ..xxxx
        ....xx
        ....xx
        """,
    ),
    "forward exact": (
        dict(causal=False, exact_windowsize=True, look_backward=0, look_forward=1),
        """
        xxx...
        .xxx..
        ..xxx.
        ...xxx
        ....xx
        .....x
        """,
    ),
    "back two, exact": (
        dict(causal=False, exact_windowsize=True, look_backward=2, look_forward=0),
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        .xxxxx
        """,
    ),
}


@pytest.mark.parametrize(("rule", "picture"), PICTURES.values(), ids=PICTURES)
def test_each_query_sees_the_keys_of_the_picture(rule, picture):
    wanted = np.array([[mark == "x" for mark in line] for line in picture.split()])
    i, j = np.arange(6)[:, None], np.arange(6)
    assert (visible(i, j, length=6, window_size=2, **rule) == wanted).all()
    assert (reference.visibility(6, window_size=2, **rule) == wanted).all()  # or the other tests rest on sand


def test_nothing_outside_the_sequence_is_seen():
    rule = dict(window_size=4, causal=False, exact_windowsize=False, look_backward=3, look_forward=3)
    seen = visible(np.arange(5)[:, None], np.arange(-12, 20), length=5, **rule)
    assert (seen == ((np.arange(-12, 20) >= 0) & (np.arange(-12, 20) < 5))).all()


rules = st.booleans().flatmap(
    lambda causal: st.fixed_dictionaries(
        dict(
            window_size=st.integers(1, 6),
            causal=st.just(causal),
            exact_windowsize=st.booleans(),
            look_backward=st.integers(0, 2),
            look_forward=st.just(0) if causal else st.integers(0, 2),
        )
    )
)


@given(rules, st.integers(1, 20))
@examples(100)
def test_visible_agrees_with_the_reference(rule, length):
    seen = visible(np.arange(length)[:, None], np.arange(length), length=length, **rule)
    assert (seen == reference.visibility(length, **rule)).all()


@pytest.mark.parametrize(
    ("window_size", "exact_windowsize", "block"),
    [
        (1, True, 1),
        (100, True, 100),  # smaller than the finest block
        (128, True, 128),
        (256, True, 128),
        (300, True, 150),
        (257, True, 257),  # prime
        (256, False, 256),  # its queries all see the same
    ],
)
def test_blocks_are_the_smallest_divisor_of_an_exact_window_from_128_on(window_size, exact_windowsize, block):
    assert block_size(window_size, exact_windowsize) == block


@given(rules, st.integers(1, 15), st.integers(1, 3))
@examples(50)
def test_the_additive_mask_holds_the_visible_keys_of_every_block(rule, length, groups):
    window = rule["window_size"]
    before, after = rule["look_backward"], rule["look_forward"]
    mask = additive_mask(groups, length, window, before, after, tuple(rule.items()), 0).asnumpy()
    blocks = -(-length // window)
    assert mask.dtype == np.float32
    assert mask.shape == (groups * blocks, window, (before + 1 + after) * window)
    wanted = np.zeros((blocks, window, length + (before + after) * window + window), bool)
    for i, j in np.argwhere(reference.visibility(length, **rule)):
        block, row = divmod(i, window)
        wanted[block, row, j - (block - before) * window] = True
    wanted = wanted[:, :, : mask.shape[-1]]
    for group in range(groups):
        of_group = mask[group * blocks : (group + 1) * blocks].reshape(blocks * window, -1)[:length]
        wanted_of_group = wanted.reshape(blocks * window, -1)[:length]
        assert (of_group[wanted_of_group] == 0).all()
        assert (of_group[~wanted_of_group] == np.float32(MASK_VALUE)).all()


def test_the_additive_mask_of_the_same_arguments_is_one_tensor():
    rule = dict(window_size=2, causal=True, exact_windowsize=True, look_backward=1, look_forward=0)
    masks = [additive_mask(2, 6, 2, 1, 0, tuple(rule.items()), 0) for _ in range(2)]
    assert isinstance(masks[0], ms.Tensor) and masks[0] is masks[1]


def test_the_additive_mask_marks_where_a_token_meets_itself():
    rule = dict(window_size=2, causal=False, exact_windowsize=False, look_backward=1, look_forward=0)
    plain, marked = (additive_mask(1, 4, 2, 1, 0, tuple(rule.items()), value).asnumpy() for value in (0, -7))
    itself = np.zeros((2, 2, 4))
    itself[:, [0, 1], [2, 3]] = -7
    np.testing.assert_array_equal(marked - plain, itself)


def test_what_hides_a_key_leaves_no_weight_and_makes_no_infinity():
    assert np.exp(np.float32(MASK_VALUE)) == 0
    assert np.isfinite(np.float32(3 * MASK_VALUE) - np.float32(1e30))


def surroundings(x, before, after):
    """``(g, blocks, block, d)`` to the blocks around each, with zeros beyond the ends."""
    groups, blocks, block, d = x.shape
    rows = np.zeros((groups, blocks, before + 1 + after, block, d))
    for w in range(blocks):
        for t in range(max(w - before, 0), min(w + after + 1, blocks)):
            rows[:, w, t - w + before] = x[:, t]
    return rearrange(rows, "g w s b d -> g w (s b) d")


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1), (2, 1), (4, 5)])
def test_look_around_gives_each_block_its_neighbours_and_zeros_beyond_the_ends(before, after, rng):
    x = rng.standard_normal((2, 3, 2, 4)).astype(np.float32)
    np.testing.assert_array_equal(look_around(tensor(x), before, after).asnumpy(), surroundings(x, before, after))


class LookAround(nn.Cell):
    def construct(self, x):
        return look_around(x, 2, 1)


@both_modes
def test_look_around_and_its_gradient(mode, rng):
    x = rng.standard_normal((2, 3, 2, 2)).astype(np.float32)
    cotangent = rng.standard_normal((2, 3, 8, 2))
    value, (gradient,) = value_and_gradients(LookAround(), [x], cotangent)
    np.testing.assert_array_equal(value, surroundings(x, 2, 1))
    (wanted,) = reference.numerical_gradients(lambda x: surroundings(x, 2, 1), [x], cotangent)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
