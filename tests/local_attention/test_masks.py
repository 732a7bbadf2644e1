import mindspore as ms
import numpy as np
import pytest
from hypothesis import strategies as st

from local_attention.masks import (
    MASK_VALUE,
    MaskSpec,
    key_mask,
    sees_a_key,
    to_additive_mask,
    visible,
    window_bias,
    window_mask,
)
from tests.local_attention import reference
from tests.local_attention.cells import for_all, tensor

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


@for_all(50, 300, rules, st.integers(1, 20))
def test_visible_agrees_with_the_reference(rule, length):
    seen = visible(np.arange(length)[:, None], np.arange(length), length=length, **rule)
    assert (seen == reference.visibility(length, **rule)).all()


@for_all(15, 100, rules, st.integers(1, 15), st.integers(1, 3))
def test_the_window_mask_holds_the_visible_keys_of_every_block(rule, length, groups):
    window = rule["window_size"]
    back, ahead = rule["look_backward"], rule["look_forward"]
    mask = window_mask(groups, length, window, back, ahead, tuple(MaskSpec(**rule)), 0, ms.float32).asnumpy()
    blocks = -(-length // window)
    assert mask.dtype == np.float32
    assert mask.shape == (groups * blocks, window, (back + 1 + ahead) * window)
    wanted = np.zeros((blocks, window, length + (back + ahead) * window + window), bool)
    for i, j in np.argwhere(reference.visibility(length, **rule)):
        block, row = divmod(i, window)
        wanted[block, row, j - (block - back) * window] = True
    wanted = wanted[:, :, : mask.shape[-1]]
    for group in range(groups):
        of_group = mask[group * blocks : (group + 1) * blocks].reshape(blocks * window, -1)[:length]
        wanted_of_group = wanted.reshape(blocks * window, -1)[:length]
        assert (of_group[wanted_of_group] == 0).all()
        assert (of_group[~wanted_of_group] == np.float32(MASK_VALUE)).all()


def test_the_window_mask_of_the_same_arguments_is_one_tensor():
    rule = dict(window_size=2, causal=True, exact_windowsize=True, look_backward=1, look_forward=0)
    masks = [window_mask(2, 6, 2, 1, 0, tuple(MaskSpec(**rule)), 0, ms.float32) for _ in range(2)]
    assert isinstance(masks[0], ms.Tensor) and masks[0] is masks[1]


def test_the_window_mask_marks_where_a_token_meets_itself():
    rule = dict(window_size=2, causal=False, exact_windowsize=False, look_backward=1, look_forward=0)
    plain, marked = (
        window_mask(1, 4, 2, 1, 0, tuple(MaskSpec(**rule)), value, ms.float32).asnumpy() for value in (0, -7)
    )
    itself = np.zeros((2, 2, 4))
    itself[:, [0, 1], [2, 3]] = -7
    np.testing.assert_array_equal(marked - plain, itself)


def test_the_mask_value_leaves_no_weight_and_makes_no_infinity():
    assert np.exp(np.float32(MASK_VALUE)) == 0
    assert np.isfinite(np.float32(3 * MASK_VALUE) - np.float32(1e30))


def test_booleans_become_zero_and_the_mask_value():
    mask = to_additive_mask(np.array([True, False]))
    assert mask.dtype == np.float32 and mask.tolist() == [0, np.float32(MASK_VALUE)]


def around(x, block, back, ahead):
    """For each block the parts of the vector ``x: (n,)`` around it, zeros beyond its ends."""
    blocks = -(-len(x) // block)
    padded = np.pad(x, (back * block, (blocks + ahead) * block - len(x)))
    return np.stack([padded[w * block : (w + back + 1 + ahead) * block] for w in range(blocks)])


@pytest.mark.parametrize("length", [6, 7])
def test_a_mask_of_keys_hides_them_from_every_block_of_neighbouring_groups(length, rng):
    mask = rng.random((2, length)) < 0.5
    found = key_mask(tensor(mask.astype(float)), 4, 2, 1, 1).asnumpy()
    blocks = -(-length // 2)
    assert found.shape == (4 * blocks, 2, 6)
    for group in range(4):
        hidden = around((~mask[group // 2]).astype(float), 2, 1, 1) > 0
        for row in range(2):
            of_group = found[group * blocks : (group + 1) * blocks, row]
            np.testing.assert_array_equal(of_group, np.where(hidden, np.float32(MASK_VALUE), 0))


@pytest.mark.parametrize(("window_size", "block"), [(4, 4), (4, 2)])
def test_each_block_gets_its_part_of_the_bias_of_its_window(window_size, block, rng):
    back, ahead = window_size // block, 0
    bias = rng.standard_normal((3, window_size, 2 * window_size)).astype(np.float32)
    blocks = 5
    found = window_bias(tensor(bias), 6, blocks, block, back, ahead).asnumpy()
    assert found.shape == (6 * blocks, block, (back + 1) * block)
    for group, w, i, s in np.ndindex(6, blocks, block, (back + 1) * block):
        query, key = w * block + i, (w - back) * block + s
        window = query // window_size
        wanted = bias[group % 3, query % window_size, key - (window - 1) * window_size]
        assert found[group * blocks + w, i, s] == wanted


def test_a_query_sees_a_key_unless_all_are_masked():
    mask = np.array([[[0, MASK_VALUE], [MASK_VALUE, MASK_VALUE], [2 * MASK_VALUE, -5e4], [3 * MASK_VALUE, MASK_VALUE]]])
    assert sees_a_key(tensor(mask)).asnumpy().tolist() == [[[1], [0], [1], [0]]]
