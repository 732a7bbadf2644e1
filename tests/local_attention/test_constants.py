import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from local_attention import LocalTransformer, constants
from local_attention.constants import shared_constant
from tests.local_attention.cells import both_modes, portable, run

BUILT = []


@shared_constant
def counting(length, factor):
    BUILT.append((length, factor))
    return factor * np.arange(length, dtype=np.float32)


@shared_constant
def a_pair(length):
    return np.zeros(length, np.float32), np.ones((2, length), np.float32).T


class AddsConstants(nn.Cell):
    def construct(self, x):
        zeros, ones = a_pair(x.shape[0])
        return x + counting(x.shape[0], 2.0) + zeros + ones[:, 0]


@both_modes
def test_a_constant_of_the_input_shape_is_there_inside_construct(mode):
    np.testing.assert_array_equal(run(AddsConstants(), np.full(3, 10.0)), [11, 13, 15])


def test_the_same_arguments_give_the_same_tensor_built_once():
    BUILT.clear()
    first, other, again = counting(7, 1.5), counting(7, 2.5), counting(7, 1.5)
    assert isinstance(first, ms.Tensor) and first is again and first is not other
    assert BUILT == [(7, 1.5), (7, 2.5)]


def test_a_tuple_of_arrays_gives_a_tuple_of_tensors():
    zeros, ones = a_pair(4)
    assert zeros.shape == (4,) and ones.shape == (4, 2)
    assert all(a is b for a, b in zip(a_pair(4), (zeros, ones), strict=True))


@pytest.fixture
def none_kept(monkeypatch):
    monkeypatch.setattr(constants, "_kept", {})
    BUILT.clear()


def test_constants_beyond_the_bytes_to_keep_are_dropped_the_least_recently_used_first(none_kept, monkeypatch):
    monkeypatch.setattr(constants, "MAX_BYTES", 4 * (30 + 20 + 10))
    monkeypatch.setattr(constants, "MIN_COUNT", 2)
    first = counting(30, 1.0)
    counting(20, 1.0), counting(10, 1.0)
    assert counting(30, 1.0) is first and len(BUILT) == 3  # all fit
    counting(11, 1.0)  # the one of 20 is dropped
    assert counting(30, 1.0) is first and len(BUILT) == 4
    counting(20, 1.0)
    assert BUILT[4:] == [(20, 1.0)]
    large = counting(1000, 1.0)  # kept with the one before it, however large
    assert counting(20, 1.0) is not None and counting(1000, 1.0) is large and len(BUILT) == 6
    assert len(constants._kept) == 2


def test_many_lengths_do_not_add_up(none_kept, monkeypatch):
    monkeypatch.setattr(constants, "MAX_BYTES", 1000)
    for length in range(40):
        counting(1000, float(length))
    assert len(constants._kept) == constants.MIN_COUNT


def test_the_layers_of_a_model_share_constants_that_are_larger_than_what_is_kept(none_kept, monkeypatch):
    sizes = dict(num_tokens=5, dim=4, heads=1, dim_head=2, local_attn_window_size=2, max_seq_len=8)
    model = portable(lambda: LocalTransformer(**sizes, depth=2, use_xpos=True, gate_values_per_head=True))
    monkeypatch.setattr(constants, "MAX_BYTES", 0)
    run(model, np.zeros((1, 8), int))
    kept = list(constants._kept.values())
    run(model, np.zeros((1, 8), int))
    assert {id(value) for value in kept} == {id(value) for value in constants._kept.values()}
