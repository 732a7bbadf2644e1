import mindspore as ms
import numpy as np
from mindspore import nn

from local_attention.constants import shared_constant
from tests.local_attention.cells import both_modes, run

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
