from functools import cache
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_attention import LocalTransformer
from local_attention.decode import Decoder, generate_tokens, ring_size
from tests.local_attention.cells import both_modes, examples, randomise, run

SIZES = dict(num_tokens=11, max_seq_len=32, dim=6, depth=1, local_attn_window_size=3, dim_head=4, heads=2, ff_mult=2)


def transformer(seed=0, **options):
    """A small causal LocalTransformer with parameters that matter."""
    model = LocalTransformer(**SIZES | options)
    randomise(model, seed)
    return model


def texts(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 11, shape)


def fed(decoder, x):
    """The logits after each token of ``x: (b, n)``, as ``(b, n, num_tokens)``."""
    return np.stack([decoder.feed(column) for column in x.T], 1)


def assert_cached_equals_full(model, x, batch):
    np.testing.assert_allclose(fed(Decoder(model, batch), x), run(model, x), atol=1e-4)


CONFIGURATIONS = {
    "exact": dict(depth=2),
    "whole windows": dict(exact_windowsize=False),
    "own window only": dict(look_backward=0, exact_windowsize=False),
    "itself only": dict(look_backward=0),
    "two windows back": dict(look_backward=2),
    "two whole windows back": dict(look_backward=2, exact_windowsize=False),
    "no positions at all": dict(use_abs_pos_emb=False, use_rotary_pos_emb=False),
    "rotary alone": dict(use_abs_pos_emb=False),
    "learned alone": dict(use_rotary_pos_emb=False),
    "a scale of its own": dict(scale=0.9),
    "windows of one": dict(local_attn_window_size=1),
    "one window": dict(local_attn_window_size=32),
    "odd heads": dict(heads=3, dim_head=3, use_rotary_pos_emb=False),
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_cached_logits_equal_the_full_pass_token_after_token(options):
    assert_cached_equals_full(transformer(**options), texts(2, 14), 2)


@both_modes
def test_cached_logits_equal_the_full_pass_in_both_modes(mode):
    assert_cached_equals_full(transformer(), texts(2, 13), 2)


@given(
    options=st.fixed_dictionaries(
        dict(
            depth=st.integers(1, 2),
            heads=st.integers(1, 3),
            dim_head=st.sampled_from([2, 6]),
            local_attn_window_size=st.integers(1, 5),
            look_backward=st.integers(0, 2),
            exact_windowsize=st.booleans(),
            use_abs_pos_emb=st.booleans(),
            use_rotary_pos_emb=st.booleans(),
        )
    ),
    batch=st.integers(1, 3),
)
@examples(6)
def test_cached_logits_equal_the_full_pass_for_any_configuration(options, batch):
    windows = 2 * options["local_attn_window_size"] * (options["look_backward"] + 1)
    assert_cached_equals_full(transformer(**options), texts(batch, min(windows + 2, 20)), batch)


@pytest.mark.parametrize("options", [{}, dict(exact_windowsize=False, use_abs_pos_emb=False)], ids=["exact", "whole"])
def test_greedy_text_is_the_same_with_and_without_the_cache(options):
    model, prompt, length = transformer(seed=1, **options), [3, 1, 4], 15
    cached = [int(token) for (token,) in generate_tokens(Decoder(model), prompt, length, temperature=0)]
    text = list(prompt)
    for _ in range(length):
        text.append(int(run(model, [text])[0, -1].argmax()))
    assert cached == text[3:]
    assert len(set(cached)) > 2  # no model that always says the same


def test_the_size_of_the_cache_depends_on_the_window_alone():
    for options, size in [
        (dict(), 4),
        (dict(exact_windowsize=False), 6),
        (dict(look_backward=2), 7),
        (dict(look_backward=2, exact_windowsize=False), 9),
        (dict(look_backward=0), 1),
    ]:
        model = transformer(max_seq_len=1000, **options)
        assert ring_size(model.layers[0].attention.attention) == size
        cached = [p for p in Decoder(model, 3).step.get_parameters() if "cached" in p.name]
        assert len(cached) == 2 and all(p.shape == (3 * 2 * size, 4) for p in cached)


def test_without_learned_positions_text_goes_on_far_beyond_max_seq_len():
    model = transformer(max_seq_len=4, use_abs_pos_emb=False)
    assert_cached_equals_full(model, texts(1, 80), 1)


@pytest.mark.parametrize("limit", [1, 2, 7, 8])
def test_beyond_max_seq_len_the_context_starts_again_from_its_newest_half(limit):
    model = transformer(max_seq_len=limit, local_attn_window_size=2, look_backward=2)
    decoder = Decoder(model, 2)
    context = np.zeros((2, 0), int)
    for token in texts(2, 3 * limit).T:
        if context.shape[1] == limit:
            context = context[:, limit - limit // 2 :]
        context = np.concatenate([context, token[:, None]], 1)
        np.testing.assert_allclose(decoder.feed(token), run(model, context)[:, -1], atol=1e-4)


def test_the_rows_of_a_batch_do_not_see_each_other():
    model, x = transformer(), texts(3, 9)
    together = fed(Decoder(model, 3), x)
    for row in range(3):
        np.testing.assert_allclose(together[row], fed(Decoder(model), x[row : row + 1])[0], atol=1e-5)
    x[1] = (x[1] + 1) % 11
    changed = fed(Decoder(model, 3), x)
    np.testing.assert_array_equal(changed[[0, 2]], together[[0, 2]])
    assert abs(changed[1] - together[1]).max() > 0.01


def test_two_decoders_of_one_model_do_not_disturb_each_other():
    model, x = transformer(), texts(2, 10)
    decoders = Decoder(model), Decoder(model)
    for i in range(10):
        for decoder, row in zip(decoders, x, strict=True):
            logits = decoder.feed(row[i : i + 1])
            np.testing.assert_allclose(logits[0], run(model, row[None, : i + 1])[0, -1], atol=1e-4)


def test_after_a_reset_nothing_of_the_former_context_is_left():
    model = transformer()
    decoder = Decoder(model)
    fed(decoder, texts(1, 7))
    decoder.reset()
    x = texts(1, 9, seed=1)
    np.testing.assert_array_equal(fed(decoder, x), fed(Decoder(model), x))


def test_the_model_is_not_changed_by_decoding():
    model, x = transformer(), texts(1, 8)
    before, names = run(model, x), [p.name for p in model.trainable_params()]
    fed(Decoder(model), x)
    np.testing.assert_array_equal(run(model, x), before)
    assert [p.name for p in model.trainable_params()] == names


def test_a_decoder_follows_the_weights_of_its_model():
    model, x = transformer(), texts(1, 5)
    decoder = Decoder(model)
    fed(decoder, x)
    randomise(model, seed=1)
    decoder.reset()
    np.testing.assert_allclose(fed(decoder, x), run(model, x), atol=1e-4)


# generate_tokens


@cache
def decoder_of(batch):
    """One decoder a batch size, all of one model."""
    return Decoder(shared_model(), batch)


@cache
def shared_model():
    return transformer(seed=1, use_abs_pos_emb=False)


def generated(batch=1, prompt=(1, 2), length=10, **options):
    """``(batch, length)`` tokens."""
    drawn = list(generate_tokens(decoder_of(batch), prompt, length, **options))
    assert all(tokens.shape == (batch,) and tokens.dtype == np.int32 for tokens in drawn)
    return np.stack(drawn, 1)


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert (generated(seed=5) == generated(seed=5)).all()
    assert (generated(seed=5) != generated(seed=6)).any()
    assert (generated() == generated(seed=0)).all()


def test_a_tuple_of_numbers_is_a_seed():
    texts = [generated(seed=seed).tolist() for seed in [(3, 1), (3, 2), (4, 1), 3]]
    assert generated(seed=(3, 1)).tolist() == texts[0]
    assert all(texts[i] != texts[j] for i in range(4) for j in range(i))


def test_each_row_is_the_same_whatever_the_batch():
    single, pair, three = (generated(batch, seed=7) for batch in (1, 2, 3))
    np.testing.assert_array_equal(pair[:1], single)
    np.testing.assert_array_equal(three[:2], pair)
    assert (three[0] != three[1]).any() and (three[1] != three[2]).any()


def test_a_text_begins_anew_whatever_was_fed_before():
    first = generated(seed=1)
    decoder_of(1).feed([9])
    assert (generated(seed=1) == first).all()


def test_the_options_of_sampling_are_obeyed():
    greedy = generated(temperature=0)
    assert (generated(top_k=1, seed=1) == greedy).all()
    assert (generated(top_p=1e-6, seed=1) == greedy).all()
    assert (generated(temperature=1e-6, seed=1) == greedy).all()
    assert (generated(seed=1) != greedy).any()


def test_tokens_are_drawn_as_the_logits_say():
    logits = run(shared_model(), [[1, 2]])[0, -1].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    drawn = generated(400, length=1)[:, 0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=11) / 400, p, atol=0.07)


def test_the_prompt_matters_and_may_be_a_single_token():
    assert generated(prompt=[3], seed=1).shape == (1, 10)
    assert (generated(prompt=[3, 4], temperature=0) != generated(prompt=[5, 9], temperature=0)).any()


def test_tokens_come_one_by_one_as_they_are_drawn():
    model = transformer()
    decoder = Decoder(model)
    first = list(islice(generate_tokens(decoder, [1, 2], 10**9, seed=3), 2))
    assert decoder.position == 3  # the prompt and the first token
    assert [int(t) for (t,) in first] == [int(t) for (t,) in generate_tokens(decoder, [1, 2], 2, seed=3)]


def test_no_token_is_drawn_for_a_length_of_zero():
    assert list(generate_tokens(Decoder(transformer()), [1], 0)) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate_tokens(Decoder(transformer()), [], 3))


@pytest.mark.parametrize("options", [dict(causal=False), dict(num_tokens=None)])
def test_a_model_that_cannot_be_decoded_is_refused(options):
    model = LocalTransformer(
        **dict(num_tokens=11, max_seq_len=8, dim=8, depth=1, heads=1, dim_head=4, local_attn_window_size=4) | options
    )
    with pytest.raises(ValueError, match="causal model with num_tokens"):
        Decoder(model)
