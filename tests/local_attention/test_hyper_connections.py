import numpy as np
import pytest
from mindspore import nn

from local_attention.hyper_connections import HyperConnection, Residual, connection, expand_streams, reduce_streams
from tests.local_attention import reference
from tests.local_attention.cells import (
    assert_gradients,
    directions_or_entries,
    parameters,
    randomise,
    run,
    tensor,
    value_and_gradients,
)


class Connected(nn.Cell):
    """A branch that multiplies by a matrix, connected: ``(rows, s, d) -> (rows, s, d)``."""

    def __init__(self, connection):
        super().__init__()
        self.connection = connection
        self.branch = nn.Dense(4, 4, has_bias=False)

    def construct(self, x):
        branch_input, x, beta = self.connection.pre(x)
        return self.connection.post(self.branch(branch_input), x, beta)


def definition(p):
    def connected(x):
        return reference.hyper_connection(lambda x: x @ p["branch.weight"].T, x[None], p, "connection.")[0]

    return connected


@pytest.mark.parametrize(
    ("mode", "streams"),
    [("eager", 2), ("eager", 3), ("graph", 3), pytest.param("graph", 2, marks=pytest.mark.slow)],
    indirect=["mode"],
)
@directions_or_entries
def test_output_and_gradient_are_those_of_the_definition(mode, streams, every_entry, rng):
    cell = Connected(HyperConnection(4, streams, 0))
    p = randomise(cell)
    x, cotangent = rng.standard_normal((2, 5, streams, 4))
    value, gradients = value_and_gradients(cell, [x], cotangent)
    np.testing.assert_allclose(value, definition(p)(x), atol=1e-5)
    assert_gradients(definition(p), [x], cotangent, gradients, every_entry)


@pytest.mark.parametrize("index", [0, 1, 2, 5])
def test_before_training_a_branch_reads_one_stream_and_writes_to_all(index, rng):
    cell = Connected(HyperConnection(4, 3, index))
    x, p = rng.standard_normal((5, 3, 4)), parameters(cell)
    wanted = x + x[:, index % 3, None] @ p["branch.weight"].T
    np.testing.assert_allclose(run(cell, x), wanted, atol=1e-5)


def test_streams_of_zeros_have_finite_gradients():
    cell = Connected(HyperConnection(4, 2, 0))
    randomise(cell)
    value, (gradient,) = value_and_gradients(cell, [np.zeros((3, 2, 4))], np.ones((3, 2, 4)))
    assert (value == 0).all() and np.isfinite(gradient).all()


def test_a_single_stream_is_a_plain_residual_connection(rng):
    cell = Connected(connection(4, 1, 0))
    assert isinstance(cell.connection, Residual) and set(parameters(cell)) == {"branch.weight"}
    x = rng.standard_normal((5, 4))
    np.testing.assert_allclose(run(cell, x), x + x @ parameters(cell)["branch.weight"].T, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_streams_begin_equal_and_end_as_their_sum(streams, rng):
    x = rng.standard_normal((5, 4)).astype(np.float32)
    expanded = expand_streams(tensor(x), streams)
    assert expanded.shape == ((5, 4) if streams == 1 else (5, streams, 4))
    np.testing.assert_allclose(reduce_streams(expanded, streams).asnumpy(), streams * x, rtol=1e-6)
