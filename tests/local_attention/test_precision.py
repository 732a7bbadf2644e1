"""Computing in float16 and float64, with every option, against the definition in float64."""

from dataclasses import fields

import mindspore as ms
import numpy as np
import pytest

from tests.local_attention.backends.test_backends import CELLS, arrays, defined, example, name_of
from tests.local_attention.cells import ValueAndGradients, randomise, slowly_in_a_graph, tensor

every_option = pytest.mark.parametrize(
    ("schema", "name"), [(schema, field.name) for schema in CELLS for field in fields(schema)], ids=name_of
)


def value_and_gradients(cell, inputs, cotangent, dtype):
    value, gradients = ValueAndGradients(cell)(tensor(cotangent, dtype), *(tensor(x, dtype) for x in inputs))
    assert {value.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    return value.asnumpy(), [gradient.asnumpy() for gradient in gradients]


@slowly_in_a_graph
@every_option
def test_every_option_is_computed_in_float16_and_float64(schema, name, mode, rng):
    used, _ = example(schema, name)
    cell = CELLS[schema](**used).set_train(False)
    p, inputs = randomise(cell), arrays(schema, used, rng)
    cotangent = rng.standard_normal(inputs[0].shape)
    exact, exact_gradients = value_and_gradients(cell, inputs, cotangent, ms.float64)
    np.testing.assert_allclose(exact, defined(schema, used, *inputs, p=p), atol=1e-6)
    half, half_gradients = value_and_gradients(cell, inputs, cotangent, ms.float16)
    np.testing.assert_allclose(half, exact, atol=2e-3, rtol=2e-3)
    for gradient, wanted in zip(half_gradients, exact_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-2, rtol=1e-2)
