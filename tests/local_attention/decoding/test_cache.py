import numpy as np
import pytest

from local_attention.decoding import DecodingSession, cache_length
from local_attention.decoding.cache import caches_of
from local_attention.masks import MASK_VALUE
from tests.local_attention import reference
from tests.local_attention.models import sequences, transformer

LENGTHS = [
    (dict(), 4),
    (dict(exact_windowsize=False), 6),
    (dict(look_backward=2), 7),
    (dict(look_backward=2, exact_windowsize=False), 9),
    (dict(look_backward=0), 1),
]


@pytest.mark.parametrize(("options", "length"), LENGTHS, ids=str)
def test_the_size_of_the_cache_depends_on_the_window_alone(options, length):
    model = transformer(max_seq_len=1000, **options)
    (cache,) = caches_of(model, 3)
    assert cache_length(model.layers[0].attention.attention) == cache.length == length
    # with the slot that no query sees
    assert [p.shape for p in (*cache.keys, *cache.values)] == [(3 * 2 * (length + 1), 4)] * 2


def test_the_cache_does_not_grow_with_the_sequence():
    session = DecodingSession(transformer(depth=2), 3, prefill_chunk=5, prefill_threshold=15)
    shapes = [p.shape for p in session.state]
    session.feed(sequences(3, 15))
    session.feed(sequences(3, 4))
    assert [p.shape for p in session.state] == shapes == [(3 * 2 * 5, 4)] * 4


@pytest.mark.parametrize(("options", "length"), LENGTHS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_in_the_cache_is_visible_as_the_definition_says(options, length, count):
    """Follow which position each slot holds, and compare the mask of each step with the definition."""
    model = transformer(**options)
    (cache,) = caches_of(model, 1)
    steps = 6
    rule = dict(window_size=3, causal=True, exact_windowsize=True, look_backward=1) | options
    seen = reference.visibility(steps * count, **rule)
    inputs = cache.step_inputs(0, steps, count, count)
    held = np.full(length + 1, -1)  # the position whose key each slot holds
    for step in range(steps):
        positions = step * count + np.arange(count)
        if count == 1:
            held[inputs.slots[step][:1]] = positions
        keys = held if count == 1 else np.concatenate([held, positions])
        visible = inputs.mask[step][0] > MASK_VALUE / 2
        for query, row in zip(positions, visible, strict=True):
            assert sorted(keys[row & (keys >= 0)]) == np.flatnonzero(seen[query]).tolist()
        assert not visible[:, length].any()  # the slot that takes what need not be kept
        if count > 1:
            held[inputs.slots[step][:count]] = positions


def test_padding_of_a_chunk_is_not_kept():
    (cache,) = caches_of(transformer(), 1)
    inputs = cache.step_inputs(5, 1, 6, 2)
    # of each head: the slots of the tokens at positions 5 and 6, then four times the slot that no query sees
    assert inputs.slots[0].tolist() == [1, 2, 4, 4, 4, 4, 6, 7, 9, 9, 9, 9]


def test_positions_of_padding_stay_within_the_learned_ones():
    session = DecodingSession(transformer(max_seq_len=8))
    session.position = 6
    assert session.step_inputs(1, 4, 2)[0].tolist() == [[6, 7, 7, 7]]
