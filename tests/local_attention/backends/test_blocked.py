import numpy as np

from local_attention.backends.blocked import Attend, AttendWithDropout
from tests.local_attention import reference
from tests.local_attention.cells import both_modes, value_and_gradients

MASK_VALUE = np.finfo(np.float32).min / 2


def attend(q, k, v, bias):
    return reference.softmax(q @ k.transpose(0, 2, 1) + bias) @ v


def inputs(rng):
    q, k, v = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 6, 3))
    hidden = rng.random((2, 4, 6)) < 0.4
    hidden[:, :, 0] = False
    return q, k, v, np.where(hidden, MASK_VALUE, 0)


@both_modes
def test_output_and_gradients_are_those_of_softmax_attention(mode, rng):
    q, k, v, bias = inputs(rng)
    cotangent = rng.standard_normal((2, 4, 3))
    value, gradients = value_and_gradients(Attend(), [q, k, v, bias], cotangent)
    np.testing.assert_allclose(value, attend(q, k, v, bias), atol=1e-5)
    wanted = reference.numerical_gradients(attend, [q, k, v, bias], cotangent)
    for gradient, numerical in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, numerical, atol=1e-4)


def test_a_hidden_key_has_no_effect_and_no_gradient(rng):
    q, k, v, bias = inputs(rng)
    bias[:, :, 4] = MASK_VALUE
    cotangent = np.ones((2, 4, 3))
    value, (_, dk, dv, _) = value_and_gradients(Attend(), [q, k, v, bias], cotangent)
    assert (dk[:, 4] == 0).all() and (dv[:, 4] == 0).all()
    k[:, 4], v[:, 4] = 5.0, -5.0
    np.testing.assert_array_equal(value_and_gradients(Attend(), [q, k, v, bias], cotangent)[0], value)


def test_large_scores_overflow_nothing(rng):
    q, k, v, bias = inputs(rng)
    value, gradients = value_and_gradients(Attend(), [1e4 * q, 1e4 * k, v, bias], np.ones((2, 4, 3)))
    np.testing.assert_allclose(value, attend(1e4 * q, 1e4 * k, v, bias), atol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@both_modes
def test_with_dropout_output_and_gradients_are_those_of_the_weights_kept(mode, rng):
    q, k, v, bias = inputs(rng)
    keep = (rng.random((2, 4, 6)) < 0.6) / 0.6

    def definition(q, k, v, bias):
        return reference.softmax(q @ k.transpose(0, 2, 1) + bias) * keep @ v

    cotangent = rng.standard_normal((2, 4, 3))
    value, (*gradients, _) = value_and_gradients(AttendWithDropout(), [q, k, v, bias, keep], cotangent)
    np.testing.assert_allclose(value, definition(q, k, v, bias), atol=1e-5)
    wanted = reference.numerical_gradients(definition, [q, k, v, bias], cotangent)
    for gradient, numerical in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, numerical, atol=1e-4)
