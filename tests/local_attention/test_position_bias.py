import numpy as np
import pytest
from mindspore import nn

from local_attention import DynamicPositionBias
from tests.local_attention import reference
from tests.local_attention.cells import (
    both_modes,
    parameters,
    randomise,
    slowly_in_a_graph,
    tensor,
    value_and_parameter_gradients,
)


class WeightedSum(nn.Cell):
    def __init__(self, bias, weight, *args):
        super().__init__(auto_prefix=False)
        self.bias, self.weight, self.args = bias, weight, args

    def construct(self):
        return (self.bias(*self.args) * self.weight).sum()


@slowly_in_a_graph
@pytest.mark.parametrize(("i", "j", "first"), [(3, 6, None), (2, 2, None), (3, 9, 3), (3, 6, 0), (2, 5, 1)])
def test_the_bias_is_an_mlp_of_the_distance(mode, i, j, first, rng):
    bias = DynamicPositionBias(5, 2)
    p = randomise(bias)
    distance = abs((j - i if first is None else first) + np.arange(i)[:, None] - np.arange(j))
    np.testing.assert_allclose(bias(i, j, first).asnumpy(), reference.position_bias(distance, p), atol=1e-5)


@both_modes
def test_gradients_reach_every_parameter_and_are_right(mode, rng):
    bias, weight = DynamicPositionBias(3, 2), rng.standard_normal((2, 2, 4)).astype(np.float32)
    p = randomise(bias)
    distance = abs(2 + np.arange(2)[:, None] - np.arange(4))
    _, gradients = value_and_parameter_gradients(WeightedSum(bias, tensor(weight), 2, 4))
    assert set(gradients) == set(p)
    for name in p:
        wanted = reference.numerical_gradient(
            lambda value, name=name: (reference.position_bias(distance, p | {name: value}) * weight).sum(), p[name]
        )
        np.testing.assert_allclose(gradients[name], wanted, atol=1e-4, err_msg=name)
        assert abs(gradients[name]).max() > 1e-3, name


def test_it_has_two_hidden_layers():
    shapes = {name: value.shape for name, value in parameters(DynamicPositionBias(5, 2)).items()}
    assert shapes == {
        "mlp.0.weight": (5, 1),
        "mlp.0.bias": (5,),
        "mlp.2.weight": (5, 5),
        "mlp.2.bias": (5,),
        "mlp.4.weight": (2, 5),
        "mlp.4.bias": (2,),
    }
