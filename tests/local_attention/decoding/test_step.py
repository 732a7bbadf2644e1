import numpy as np
import pytest

from local_attention.backends.cached import CachedMHA
from local_attention.backends.cached_cpu import CachedMHAOperator, FeedForwardOperator, PrefillMHAOperator
from local_attention.decoding.cache import caches_of
from local_attention.decoding.sampling import sampling_rule
from local_attention.decoding.step import DecodeLoop, DecodeStep
from local_attention.layers import FeedForward
from tests.local_attention.cells import run, tensor
from tests.local_attention.models import needs_kernels, sequences, transformer, with_and_without_kernels


def decode_step(model, count=1, use_kernels=False):
    (cache,) = caches = caches_of(model, 2)
    return DecodeStep(model, caches, count, [], use_kernels), cache


@with_and_without_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_gives_the_logits_after_each_of_its_tokens(count, use_kernels):
    model, x = transformer(), sequences(2, 3 * count)
    step, cache = decode_step(model, count, use_kernels)
    inputs = cache.step_inputs(0, 3, count, count)
    full = run(model, x)
    for i in range(3):
        tokens, previous = tensor(x[:, i * count : (i + 1) * count]), tensor(np.zeros((2, 1), int))
        positions = tensor(np.arange(i * count, (i + 1) * count))
        logits = step(tokens, previous, positions, *(tensor(array[i]) for array in inputs)).asnumpy()
        np.testing.assert_allclose(logits, full[:, i * count : (i + 1) * count], atol=1e-4)


@needs_kernels
def test_tokens_are_decoded_by_the_operators_in_cpp_for_one_or_for_several():
    model = transformer(depth=2)
    for count, use_kernels, attention, feed_forward in [
        (1, True, CachedMHAOperator, FeedForwardOperator),
        (1, False, CachedMHA, FeedForward),
        (3, True, PrefillMHAOperator, FeedForward),
        (3, False, CachedMHA, FeedForward),
    ]:
        for layer in decode_step(model, count, use_kernels)[0].layers:
            assert (type(layer.attention), type(layer.feed_forward)) == (attention, feed_forward)


def test_a_loop_decodes_given_tokens_and_where_there_is_none_the_one_it_sampled_just_before():
    model, x, count = transformer(), sequences(2, 4), 5
    step, cache = decode_step(model)
    loop = DecodeLoop(step, 7, 11)
    given = np.full((7, 2), -1)
    given[:4, 0], given[:2, 1] = x[0], x[1, :2]
    sampled, logits = loop(
        tensor(count),
        tensor(given),
        tensor(np.zeros((2, 1), int)),
        tensor(np.zeros((7, 2, 1))),
        *map(tensor, sampling_rule(11, temperature=0)),
        tensor(np.arange(7)[:, None]),
        *map(tensor, cache.step_inputs(0, 7, 1, 1)),
    )
    sampled, logits = sampled.asnumpy(), logits.asnumpy()
    decoded = [[*x[0], *sampled[3:4, 0]], [*x[1, :2], *sampled[1:4, 1]]]
    full = run(model, decoded)
    np.testing.assert_allclose(logits[:count].swapaxes(0, 1), full, atol=1e-4)
    np.testing.assert_array_equal(sampled[:count].T, full.argmax(-1))
    assert (logits[count:] == 0).all()
