import numpy as np
import pytest

from local_attention import GlobalAttention, LocalAttention
from local_attention.training.flops import flops_per_byte, visible_keys
from tests.training.toys import tiny_transformer


@pytest.mark.parametrize(
    "options",
    [
        dict(exact_windowsize=True),
        dict(exact_windowsize=False),
        dict(exact_windowsize=True, look_backward=2),
        dict(look_backward=0),
        dict(causal=False, look_forward=1),
    ],
)
@pytest.mark.parametrize("length", [4, 12, 32])
def test_visible_keys_are_those_that_an_attention_with_equal_weights_averages_over(options, length):
    attention = LocalAttention(4, **{"causal": True, **options}, use_rotary_pos_emb=False, autopad=True)
    query, key = np.ogrid[:length, :length]
    windows = key // 4 - query // 4
    seen = (windows >= -attention.look_backward) & (windows <= attention.look_forward)
    if attention.causal:
        seen &= key <= query
    if attention.exact_windowsize:
        seen &= query - key <= 4 * attention.look_backward
    assert visible_keys(attention, length) == seen.sum() / length


def test_the_operations_of_a_byte_are_those_of_weights_and_scores():
    model = tiny_transformer(depth=2, exact_windowsize=True)
    inner, feed_forward = 2 * 8, 16 * 4 * 2 // 3
    weights = 2 * (4 * 16 * inner + 3 * 16 * feed_forward) + 16 * 256
    keys = (sum(range(1, 9)) + 8 * 9) / 16  # a sequence of 16 bytes, a window of 8 and the byte itself
    assert flops_per_byte(model, 16) == 6 * weights + 2 * 12 * inner * keys


def test_a_query_of_global_attention_sees_half_of_the_sequence_on_average():
    attention = GlobalAttention(dim=8, causal=True).attention
    assert visible_keys(attention, 1000) == 1001 / 2
    inserted = tiny_transformer(global_attn_layer=GlobalAttention(dim=16, heads=3, dim_head=4, causal=True))
    more = flops_per_byte(inserted, 16) - flops_per_byte(tiny_transformer(), 16)
    assert more == 6 * 4 * 16 * 12 + 12 * 12 * 17 / 2


def test_each_layer_sees_the_keys_of_its_own_windows():
    windows, model = [8, 2, 4], tiny_transformer(depth=3, local_attn_window_size=[8, 2, 4])
    alone = [flops_per_byte(tiny_transformer(local_attn_window_size=window), 16) for window in windows]
    logits = 6 * 16 * 256  # which a model has once
    assert flops_per_byte(model, 16) == sum(alone) - 2 * logits


def test_tables_of_embeddings_take_no_operations_but_their_projection_does():
    without, with_ngrams = (tiny_transformer(max_ngram=n, ngram_buckets=97, ngram_dim=8) for n in (1, 3))
    assert flops_per_byte(with_ngrams, 16) - flops_per_byte(without, 16) == 6 * 16 * (2 * 8)


def test_gates_are_counted_and_the_bias_network_is_not():
    options = [dict(use_dynamic_pos_bias=True), dict(use_dynamic_pos_bias=True, gate_values_per_head=True)]
    plain, biased, gated = (flops_per_byte(tiny_transformer(**more), 16) for more in ({}, *options))
    assert plain == biased
    assert gated - biased == 6 * 16 * 2
