from functools import partial
from itertools import product

import mindspore as ms
import numpy as np
import pytest
from hypothesis import strategies as st
from mindspore import nn

from local_attention import LocalAttention
from local_attention.blocks import block_layout
from tests.local_attention import reference
from tests.local_attention.cells import (
    assert_gradients,
    both_modes,
    both_paths,
    directions_or_entries,
    for_all,
    in_a_graph,
    run,
    slowly_in_a_graph,
    tensor,
    value_and_gradients,
)

RULES = [
    dict(causal=causal, exact_windowsize=exact, look_backward=back, look_forward=forward)
    for causal, exact, back, forward in product([True, False], [True, False], [0, 1, 2], [0, 1, 2])
    if not (causal and forward)
]


def rule_name(rule):
    causal, exact = ("causal" if rule["causal"] else "open"), ("exact" if rule["exact_windowsize"] else "whole")
    return f"{causal}-{exact}-back{rule['look_backward']}-forward{rule['look_forward']}"


every_rule = pytest.mark.parametrize("rule", RULES, ids=rule_name)


def qkv(rng, *shape):
    return rng.standard_normal((3, *shape))


@every_rule
@pytest.mark.parametrize(
    ("rotary", "sizes"),
    [
        pytest.param(True, [(1, 4), (3, 1), (3, 11), (4, 12)], id="rotary"),
        pytest.param(False, [(4, 5)], id="plain"),
        *(
            pytest.param(rotary, product([1, 3, 4], [1, 2, 4, 5, 11, 12]), marks=pytest.mark.slow, id=f"all-{rotary}")
            for rotary in (True, False)
        ),
    ],
)
def test_every_rule_is_full_attention_with_a_mask(rule, rotary, sizes, rng):
    for window_size, n in sizes:
        q, k, v = qkv(rng, 2, n, 4)
        attention = LocalAttention(window_size, **rule, autopad=True, dim=4, use_rotary_pos_emb=rotary)
        wanted = reference.attention(q, k, v, rotary=rotary, window_size=window_size, **rule)
        np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5, err_msg=f"{window_size=}, {n=}")


@directions_or_entries
@every_rule
@both_paths
def test_every_rule_has_the_gradients_of_full_attention_with_a_mask(rule, every_entry, rng):
    check_gradients(rule, 3, rng.standard_normal((4, 1, 7, 4)), every_entry)


@in_a_graph
@pytest.mark.parametrize(
    "rule", [RULES[4], *(pytest.param(RULES[i], marks=pytest.mark.slow) for i in (1, 10, -1))], ids=rule_name
)
def test_output_and_gradients_are_right_in_a_graph(mode, rule, rng):
    check_gradients(rule, 3, rng.standard_normal((4, 2, 5, 4)), False)


def check_gradients(rule, window_size, inputs, every_entry):
    *inputs, cotangent = inputs
    definition = partial(reference.attention, rotary=True, window_size=window_size, **rule)
    value, gradients = value_and_gradients(LocalAttention(window_size, **rule, autopad=True, dim=4), inputs, cotangent)
    np.testing.assert_allclose(value, definition(*inputs), atol=1e-5)
    assert_gradients(definition, inputs, cotangent, gradients, every_entry)


@pytest.mark.parametrize(
    "rule",
    [
        dict(causal=True, exact_windowsize=True),  # in blocks of 128
        dict(causal=False, exact_windowsize=True, look_backward=1, look_forward=1),
        dict(causal=True, exact_windowsize=False),  # in blocks of 256
    ],
    ids=["exact", "exact-forward", "whole"],
)
@pytest.mark.parametrize("n", [100, 300, 512])  # less than a block, two windows not full, two windows
@both_paths
def test_a_window_of_several_blocks_is_full_attention_with_a_mask(rule, n, rng):
    q, k, v = qkv(rng, 1, n, 4)
    attention = LocalAttention(256, **rule, autopad=True, dim=4)
    assert block_layout(256, rule["exact_windowsize"], 1, 0)[0] == (128 if rule["exact_windowsize"] else 256)
    wanted = reference.attention(q, k, v, rotary=True, window_size=256, **rule)
    np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5)


def test_by_default_an_open_window_looks_one_back_and_one_forward(rng):
    q, k, v = qkv(rng, 1, 12, 4)
    wanted = reference.attention(q, k, v, window_size=2, look_backward=1, look_forward=1)
    np.testing.assert_allclose(run(LocalAttention(2), q, k, v), wanted, atol=1e-5)


def test_by_default_a_causal_window_looks_one_back_and_none_forward(rng):
    q, k, v = qkv(rng, 1, 12, 4)
    wanted = reference.attention(q, k, v, window_size=2, look_backward=1, look_forward=0, causal=True)
    np.testing.assert_allclose(run(LocalAttention(2, causal=True), q, k, v), wanted, atol=1e-5)


def test_without_dim_there_are_no_rotary_embeddings(rng):
    q, k, v = qkv(rng, 1, 8, 4)
    plain = run(LocalAttention(4), q, k, v)
    assert abs(plain - run(LocalAttention(4, dim=4), q, k, v)).max() > 0.01
    np.testing.assert_array_equal(plain, run(LocalAttention(4, dim=4, use_rotary_pos_emb=False), q, k, v))


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
@pytest.mark.parametrize("scale", [0.1, 1, 3.0])
def test_the_scale_replaces_the_root_of_the_head_size(scale, rotary, rng):
    q, k, v = qkv(rng, 2, 8, 4)
    attention = LocalAttention(4, scale=scale, dim=4 if rotary else None)
    wanted = reference.attention(q, k, v, window_size=4, look_forward=1, rotary=rotary, scale=scale)
    np.testing.assert_allclose(run(attention, q, k, v), wanted, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes_may_be_any_and_do_not_mix(leading, rng):
    q, k, v = qkv(rng, *leading, 8, 4)
    out = run(LocalAttention(4, dim=4, causal=True), q, k, v)
    assert out.shape == (*leading, 8, 4) and out.dtype == np.float32
    np.testing.assert_allclose(out, reference.attention(q, k, v, rotary=True, window_size=4, causal=True), atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 7, 9])
def test_autopad_without_causal_equals_the_unpadded_computation(n, rng):
    # windows that hold the whole sequence: no mask at all (the original lets the last queries attend to the padding)
    q, k, v = qkv(rng, 2, n, 4)
    unpadded = reference.softmax(q @ k.transpose(0, 2, 1) / 2) @ v
    np.testing.assert_allclose(run(LocalAttention(10, autopad=True), q, k, v), unpadded, atol=1e-5)
    np.testing.assert_allclose(run(LocalAttention(5, autopad=True), q, k, v), unpadded, atol=1e-5)
    np.testing.assert_allclose(run(LocalAttention(n), q, k, v), unpadded, atol=1e-5)


def test_autopad_of_whole_windows_changes_nothing(rng):
    inputs = qkv(rng, 2, 8, 4)
    np.testing.assert_array_equal(
        run(LocalAttention(4, dim=4, autopad=True), *inputs), run(LocalAttention(4, dim=4), *inputs)
    )


@pytest.mark.parametrize("look_forward", [0, 1, 2])
def test_scores_of_equal_vectors_depend_on_the_distance_alone_and_are_largest_at_none(look_forward):
    n = 12
    q = np.tile([1.0, -0.5, 0.3, 2.0], (1, n, 1))
    identity = np.eye(n)[None]  # as values they show the weights, four at a time
    attention = LocalAttention(4, look_backward=2, look_forward=look_forward, dim=4)
    weights = np.concatenate([run(attention, q, q, identity[..., c : c + 4]) for c in range(0, n, 4)], -1)[0]
    assert (weights.argmax(-1) == np.arange(n)).all()
    seen = reference.visibility(n, window_size=4, look_backward=2, look_forward=look_forward)
    of_distance = {}
    for i, j in np.argwhere(seen):
        of_distance.setdefault(abs(i - j), []).append(np.log(weights[i, j] / weights[i, i]))
    assert max(np.ptp(scores) for scores in of_distance.values()) < 1e-5
    assert len({round(scores[0], 4) for scores in of_distance.values()}) == len(of_distance)


@for_all(
    6,
    40,
    window_size=st.integers(1, 4),
    look_backward=st.integers(0, 2),
    look_forward=st.integers(0, 2),
    exact=st.booleans(),
    shift=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_what_lies_out_of_sight_before_a_sequence_shifts_it_and_changes_nothing(
    window_size, look_backward, look_forward, exact, shift, seed
):
    attention = LocalAttention(
        window_size, False, look_backward, look_forward, exact_windowsize=exact, dim=4, autopad=True
    )
    if not exact:
        shift *= window_size
    out_of_sight = (look_backward + 1) * window_size
    inputs = np.random.default_rng(seed).standard_normal((3, shift + out_of_sight + 6, 4))
    late = run(attention, *inputs)[shift + out_of_sight :]
    early = run(attention, *inputs[:, shift:])[out_of_sight:]
    np.testing.assert_allclose(late, early, atol=1e-5)


@for_all(
    10,
    60,
    causal=st.booleans(),
    exact=st.booleans(),
    window_size=st.integers(1, 4),
    look_backward=st.integers(0, 2),
    look_forward=st.integers(0, 2),
    n=st.integers(1, 13),
    data=st.data(),
)
def test_a_changed_key_and_value_changes_exactly_the_queries_that_see_it(
    causal, exact, window_size, look_backward, look_forward, n, data
):
    rule = dict(
        causal=causal,
        exact_windowsize=exact,
        look_backward=look_backward,
        look_forward=0 if causal else look_forward,
    )
    attention = LocalAttention(window_size, **rule, dim=2, autopad=True)
    q, k, v = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((3, n, 2))
    before = run(attention, q, k, v)
    j = data.draw(st.integers(0, n - 1))
    k[j] += 0.5
    v[j] += 3
    changed = (run(attention, q, k, v) != before).any(-1)
    assert (changed == reference.visibility(n, window_size=window_size, **rule)[:, j]).all()


@slowly_in_a_graph
@pytest.mark.parametrize(
    ("options", "shapes", "parts"),
    [
        (dict(window_size=4), [(1, 6, 2)] * 3, ["multiple of the window 4", "got 6"]),
        (dict(window_size=4, autopad=True), [(1, 4, 2), (1, 5, 2), (1, 4, 2)], ["(1, 4, 2)", "(1, 5, 2)"]),
        (dict(window_size=4), [(1, 4, 2), (1, 4, 2), (2, 4, 2)], ["(1, 4, 2)", "(2, 4, 2)"]),
        (dict(window_size=4, dim=4), [(1, 4, 2)] * 3, ["dim = 4", "(1, 4, 2)"]),
        (dict(window_size=4), [(4,)] * 3, ["(..., n, d)", "(4,)"]),
        (dict(window_size=4), [(1, 0, 2)] * 3, ["none of them empty", "(1, 0, 2)"]),
    ],
    ids=["no multiple", "k differs", "v differs", "wrong dim", "one axis", "empty"],
)
def test_inputs_that_do_not_fit_are_refused(mode, options, shapes, parts):
    with pytest.raises(ValueError) as error:
        run(LocalAttention(**options), *map(np.zeros, shapes))
    assert all(part in str(error.value) for part in parts)


@slowly_in_a_graph
def test_values_may_have_another_head_size_than_keys(mode, rng):
    q, k, v = rng.standard_normal((3, 2, 8, 6))
    narrow = run(LocalAttention(4, causal=True), q, k, v[..., :3])
    np.testing.assert_allclose(narrow, run(LocalAttention(4, causal=True), q, k, v)[..., :3], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(window_size=4, causal=True, look_forward=1), ["look_forward = 0", "got 1"]),
        (dict(window_size=4, dim=3), ["even head size", "dim = 3"]),
        (dict(window_size=0), ["window_size >= 1", "got 0"]),
        (dict(window_size=4, look_backward=-1), ["look_backward >= 0", "-1"]),
        (dict(window_size=4, look_forward=-2), ["look_forward >= 0", "-2"]),
    ],
    ids=["causal forward", "odd dim", "no window", "negative back", "negative forward"],
)
def test_options_that_do_not_fit_are_refused(options, parts):
    with pytest.raises(ValueError) as error:
        LocalAttention(**options)
    assert all(part in str(error.value) for part in parts)


def test_an_odd_dim_is_fine_without_rotary_embeddings(rng):
    q, k, v = qkv(rng, 1, 4, 3)
    attention = LocalAttention(4, dim=3, use_rotary_pos_emb=False)
    np.testing.assert_allclose(
        run(attention, q, k, v), reference.attention(q, k, v, window_size=4, look_forward=1), atol=1e-5
    )


# Masks, biases and the other options: all at once against the definition, then one by one.

visibilities = st.sampled_from(RULES)


@st.composite
def calls(draw):
    """``(options of LocalAttention, shape of q, what the call adds)``; the seed gives the arrays."""
    rule = draw(visibilities)
    window = draw(st.integers(1, 4))
    options = dict(
        window_size=window,
        **rule,
        autopad=True,
        shared_qk=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.7])),
        **draw(st.sampled_from([{}, dict(dim=4), dict(dim=4, use_xpos=True, xpos_scale_base=5)])),
    )
    rows = draw(st.sampled_from([(), (1,), (4,), (2, 2), (2, 3)]))
    shape = (*rows, draw(st.integers(1, 11)), 4)
    merged = int(np.prod(rows))
    divisors = [b for b in range(1, merged + 1) if merged % b == 0]
    masks, heads = draw(st.sampled_from([None, *divisors])), draw(st.sampled_from([None, *divisors]))
    attn_masks = draw(st.sampled_from([None, None, *divisors]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    added = {}
    if masks:
        added["mask"] = rng.random((masks, shape[-2])) < 0.6
    if heads:
        span = window * (rule["look_backward"] + 1 + rule["look_forward"])
        added["attn_bias"] = rng.standard_normal((heads, window, span))
    if attn_masks:
        added["attn_mask"] = rng.random((attn_masks, shape[-2], shape[-2])) < 0.6
    return options, rng.standard_normal((4, *shape)), added


def defined(options, **added):
    """The definition of a LocalAttention of these options, as a function of arrays."""
    options = {name: value for name, value in options.items() if name != "autopad"}
    rotary = options.pop("dim", None) is not None
    base = options.pop("xpos_scale_base", None) if options.pop("use_xpos", False) else None
    return partial(reference.attention, rotary=rotary, xpos_scale_base=base, **options, **added)


def attend(options, q, k, v, **added):
    return LocalAttention(**options)(*map(tensor, (q, k, v)), **tensors(added)).asnumpy()


def tensors(added):
    return {name: ms.Tensor(x) if x.dtype == bool else tensor(x) for name, x in added.items()}


@both_paths
@for_all(40, 300, calls())
def test_any_options_give_full_attention_with_an_explicit_mask(call):
    options, (*inputs, _), added = call
    out = attend(options, *inputs, **added)
    np.testing.assert_allclose(out, defined(options, **added)(*inputs), atol=1e-5)


class Attention(nn.Cell):
    """A LocalAttention of ``q, k, v`` and ``attn_bias``, with a fixed mask or none."""

    def __init__(self, options, mask):
        super().__init__()
        self.attention, self.mask = LocalAttention(**options), mask

    def construct(self, q, k, v, attn_bias):
        return self.attention(q, k, v, mask=self.mask, attn_bias=attn_bias)


XPOS = dict(use_xpos=True, xpos_scale_base=3)


@pytest.mark.parametrize(
    ("mode", "causal", "position", "shared_qk"),
    [
        *(("eager", *options) for options in product([True, False], [{}, XPOS], [True, False])),
        ("graph", True, XPOS, True),
        pytest.param("graph", False, {}, False, marks=pytest.mark.slow),
    ],
    indirect=["mode"],
)
@directions_or_entries
@both_paths
def test_gradients_with_mask_and_bias_are_those_of_the_definition(mode, causal, position, shared_qk, every_entry, rng):
    options = dict(window_size=2, causal=causal, autopad=True, shared_qk=shared_qk, dim=4, **position)
    rule = dict(look_forward=0 if causal else 1)
    *inputs, cotangent = rng.standard_normal((4, 2, 5, 4))
    inputs.append(rng.standard_normal((2, 2, 4 if causal else 6)))
    mask = np.array([[True, False, False, True, True]])
    value, gradients = value_and_gradients(Attention(options, ms.Tensor(mask)), inputs, cotangent)

    def definition(q, k, v, attn_bias):
        return defined(options | rule, mask=mask, attn_bias=attn_bias)(q, k, v)

    np.testing.assert_allclose(value, definition(*inputs), atol=1e-5)
    assert_gradients(definition, inputs, cotangent, gradients, every_entry)


@both_paths
def test_a_bias_in_blocks_finer_than_the_window_is_that_of_the_whole_window(rng):
    options = dict(window_size=256, causal=True, exact_windowsize=True, autopad=True)
    inputs, bias = rng.standard_normal((3, 2, 300, 2)), rng.standard_normal((2, 256, 512))
    wanted = defined(options, attn_bias=bias)(*inputs)
    np.testing.assert_allclose(attend(options, *inputs, attn_bias=bias), wanted, atol=1e-5)


@both_paths
def test_a_mask_in_blocks_finer_than_the_window_hides_what_it_says(rng):
    options = dict(window_size=256, causal=True, exact_windowsize=True, autopad=True)
    inputs, mask = rng.standard_normal((3, 2, 300, 2)), rng.random((1, 300)) < 0.5
    np.testing.assert_allclose(attend(options, *inputs, mask=mask), defined(options, mask=mask)(*inputs), atol=1e-5)


def test_a_mask_per_query_and_key_in_blocks_finer_than_the_window_hides_what_it_says(rng):
    options = dict(window_size=256, causal=True, exact_windowsize=True, autopad=True)
    inputs, attn_mask = rng.standard_normal((3, 2, 300, 2)), rng.random((2, 300, 300)) < 0.5
    out = attend(options, *inputs, attn_mask=attn_mask)
    np.testing.assert_allclose(out, defined(options, attn_mask=attn_mask)(*inputs), atol=1e-5)


class Packed(nn.Cell):
    """Attention within two documents, of 5 and 6 tokens, in one sequence."""

    def __init__(self, options):
        super().__init__()
        document = np.arange(11) < 5
        self.attention, self.mask = LocalAttention(**options), ms.Tensor(document[:, None] == document)

    def construct(self, q, k, v):
        return self.attention(q, k, v, attn_mask=self.mask)


@both_modes
def test_packed_documents_get_outputs_and_gradients_as_if_alone(mode, rng):
    options = dict(window_size=3, causal=True, exact_windowsize=True, dim=4, autopad=True)
    *inputs, cotangent = rng.standard_normal((4, 2, 11, 4))
    out, gradients = value_and_gradients(Packed(options), inputs, cotangent)
    for part in (slice(5), slice(5, None)):
        alone = [x[:, part] for x in (*inputs, cotangent)]
        wanted, wanted_gradients = value_and_gradients(LocalAttention(**options), alone[:3], alone[3])
        np.testing.assert_allclose(out[:, part], wanted, atol=1e-5)
        for gradient, other in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(gradient[:, part], other, atol=1e-5)


@both_modes
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 7), bool), ((3, 8, 8), bool), ((0, 8, 8), bool), ((8,), bool), ((1, 1, 8, 8), bool), ((8, 8), np.float32)],
    ids=str,
)
def test_a_mask_per_query_and_key_of_another_shape_or_type_is_refused(mode, shape, dtype, rng):
    q, k, v = map(tensor, qkv(rng, 2, 8, 4))
    with pytest.raises(ValueError, match=r"expected attn_mask: \(8, 8\) or \(b, 8, 8\) booleans"):
        LocalAttention(4)(q, k, v, attn_mask=ms.Tensor(np.ones(shape, dtype)))


@for_all(8, 50, calls(), st.data())
def test_a_masked_key_has_no_influence(call, data):
    options, (q, k, v, _), added = call
    n = q.shape[-2]
    j = data.draw(st.integers(0, n - 1))
    added["mask"] = np.ones((1, n), bool)
    added["mask"][0, j] = False
    before = attend(options, q, k, v, **added)
    k[..., j, :] = 7 * k[..., j, :] + 1
    v[..., j, :] = -50
    np.testing.assert_array_equal(attend(options, q, k, v, **added), before)


@for_all(8, 50, calls(), st.integers(1, 6))
def test_autopad_equals_no_padding(call, more):
    # a sequence cut off by the mask is the sequence alone, whatever follows and wherever a window ends
    options, (q, k, v, _), added = call
    if options["shared_qk"]:  # would turn a row of zeros, too
        options["shared_qk"] = False
    n = q.shape[-2]
    padded = [np.concatenate([x, np.full((*x.shape[:-2], more, 4), 3.0)], -2) for x in (q, k, v)]
    mask = added.pop("mask", np.ones((1, n), bool))
    wide = added | {key: np.pad(added[key], ((0, 0), (0, more), (0, more))) for key in added if key == "attn_mask"}
    longer = attend(options, *padded, **wide, mask=np.pad(mask, ((0, 0), (0, more))))
    np.testing.assert_allclose(longer[..., :n, :], attend(options, q, k, v, **added, mask=mask), atol=1e-5)


@for_all(8, 50, calls())
def test_leading_axes_may_be_merged_or_not(call):
    options, (*inputs, _), added = call
    merged = [x.reshape(-1, *x.shape[-2:]) for x in inputs]
    out = attend(options, *inputs, **added)
    assert out.shape == inputs[0].shape
    np.testing.assert_array_equal(attend(options, *merged, **added), out.reshape(merged[0].shape))


def test_the_rows_of_a_mask_hold_for_neighbouring_rows(rng):
    q, k, v = qkv(rng, 2, 3, 4, 2)  # two batches of three heads
    mask = np.array([[True] * 4, [True, False, True, True]])
    out, all_seen = attend(dict(window_size=4), q, k, v, mask=mask), attend(dict(window_size=4), q, k, v)
    np.testing.assert_allclose(out[0], all_seen[0], atol=1e-6)
    assert (abs(out[1] - all_seen[1]).max((-1, -2)) > 1e-3).all()


def test_input_mask_is_another_name_of_mask(rng):
    inputs, mask = qkv(rng, 2, 8, 4), rng.random((2, 8)) < 0.5
    by_either_name = [attend(dict(window_size=4), *inputs, **{name: mask}) for name in ("mask", "input_mask")]
    np.testing.assert_array_equal(*by_either_name)
    assert abs(by_either_name[0] - attend(dict(window_size=4), *inputs)).max() > 1e-3


def test_a_bias_belongs_to_the_head_that_the_row_modulo_heads_is(rng):
    q, k, v = qkv(rng, 2, 3, 4, 2)  # two batches of three heads
    bias = np.zeros((3, 2, 4))
    bias[1, :, 0] = 3
    options = dict(window_size=2, look_forward=0)
    changed = abs(attend(options, q, k, v, attn_bias=bias) - attend(options, q, k, v)).max((-1, -2)) > 1e-3
    assert changed.tolist() == [[False, True, False]] * 2


@both_paths
@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min, -1e30])
def test_a_bias_may_hide_keys_and_never_shows_hidden_ones(low, rng):
    q, k, v = qkv(rng, 1, 6, 4)
    options = dict(window_size=3, causal=True)
    bias = np.zeros((1, 3, 6))
    bias[0, 1, [3, 4]] = low  # the second of each window sees the window before alone
    out = attend(options, q, k, v, attn_bias=bias)
    wanted = defined(options, attn_bias=np.maximum(bias, -1e30))(q, k, v)
    np.testing.assert_allclose(out[0, [0, 2, 3, 4, 5]], wanted[0, [0, 2, 3, 4, 5]], atol=1e-5)
    assert np.isfinite(out).all()
    if low < -1e31:
        np.testing.assert_array_equal(out[0, 1], 0)  # in the first window it sees nothing
    v[:, 2:] = 9
    np.testing.assert_allclose(attend(options, q, k, v, attn_bias=bias)[0, 1], out[0, 1], atol=1e-5)


@both_paths
def test_a_whole_row_of_negative_infinity_gives_zeros(rng):
    out = attend(dict(window_size=3, look_forward=0), *qkv(rng, 1, 6, 4), attn_bias=np.full((1, 3, 6), -np.inf))
    np.testing.assert_array_equal(out, 0)


def test_shared_queries_see_themselves_only_where_they_see_nothing_else(rng):
    q, _, v = qkv(rng, 1, 6, 4)
    options = dict(window_size=2, causal=True, look_backward=0, shared_qk=True)
    out = attend(options, q, q, v)
    np.testing.assert_allclose(out[:, ::2], v[:, ::2], atol=1e-6)  # the first of a window: nothing but itself
    np.testing.assert_allclose(out[:, 1::2], v[:, ::2], atol=1e-6)  # the second: the first


def test_shared_keys_are_normalised_and_queries_are_not(rng):
    q, k, v = qkv(rng, 1, 8, 4)
    options = dict(window_size=4, shared_qk=True)
    out = attend(options, q, k, v)
    np.testing.assert_allclose(attend(options, q, 5 * k, v), out, atol=1e-5)
    assert abs(attend(options, 5 * q, k, v) - out).max() > 1e-3


@both_paths
@pytest.mark.parametrize("window_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_a_window_given_in_the_call_is_as_good_as_one_given_at_first(window_size, exact, rng):
    inputs = qkv(rng, 2, 11, 4)
    options = dict(causal=True, exact_windowsize=exact, autopad=True, dim=4, use_xpos=True, xpos_scale_base=4)
    first = LocalAttention(window_size, **options)(*map(tensor, inputs))
    later = LocalAttention(7, **options)(*map(tensor, inputs), window_size=window_size)
    np.testing.assert_array_equal(later.asnumpy(), first.asnumpy())


def test_the_base_of_xpos_is_half_the_window_given_at_first(rng):
    inputs, options = qkv(rng, 2, 12, 4), dict(dim=4, use_xpos=True, causal=True)
    default, given = (LocalAttention(6, **options, **base) for base in ({}, dict(xpos_scale_base=3)))
    for window in (6, 4):
        outs = [attention(*map(tensor, inputs), window_size=window).asnumpy() for attention in (default, given)]
        np.testing.assert_array_equal(*outs)


def test_scores_of_xpos_vanish_with_the_distance():
    n = 16
    q = np.ones((1, n, 4))
    identity = np.eye(n)[None]  # as values they show the weights
    attention = LocalAttention(n, causal=True, dim=4, use_xpos=True, xpos_scale_base=2)
    plain = LocalAttention(n, causal=True, dim=4)
    weights, undecayed = (run(cell, q, q, identity)[0, -1] for cell in (attention, plain))
    assert weights.argmax() == n - 1
    assert np.ptp(np.log(weights[:6])) < 0.1 * np.ptp(np.log(undecayed[:6]))


@both_paths
def test_a_base_of_xpos_that_is_too_small_for_the_window_is_refused(rng):
    options, inputs = dict(causal=True, dim=4, use_xpos=True, xpos_scale_base=1), qkv(rng, 1, 256, 4)
    with pytest.raises(ValueError, match="larger xpos_scale_base, got 1"):
        run(LocalAttention(256, **options), *inputs)
    with pytest.raises(ValueError, match="larger xpos_scale_base, got 1"):  # of the call
        LocalAttention(2, **options)(*map(tensor, inputs), window_size=256)


def test_rel_pos_emb_config_is_an_older_form_of_dim(rng):
    inputs = qkv(rng, 2, 8, 4)
    np.testing.assert_array_equal(
        run(LocalAttention(4, rel_pos_emb_config=(4, 2)), *inputs), run(LocalAttention(4, dim=4), *inputs)
    )


def test_options_may_be_given_by_position_as_in_the_original(rng):
    inputs = qkv(rng, 2, 7, 4)
    by_position = LocalAttention(3, True, 2, 0, 0.0, True, None, 4, True, True, 0.3, True, True, 5)
    by_name = LocalAttention(
        window_size=3,
        causal=True,
        look_backward=2,
        look_forward=0,
        dropout=0.0,
        shared_qk=True,
        rel_pos_emb_config=None,
        dim=4,
        autopad=True,
        exact_windowsize=True,
        scale=0.3,
        use_rotary_pos_emb=True,
        use_xpos=True,
        xpos_scale_base=5,
    )
    np.testing.assert_array_equal(run(by_position, *inputs), run(by_name, *inputs))


@slowly_in_a_graph
def test_dropout_drops_a_share_of_the_weights_in_training_only(mode, rng):
    q, k, _ = qkv(rng, 4, 32, 4)
    v = np.tile(np.eye(32), (4, 1, 1))  # shows the weights
    attention = LocalAttention(32, look_backward=0, look_forward=0, dropout=0.25)
    attention.set_train(False)
    weights = run(attention, q, k, v)
    without = run(LocalAttention(32, look_backward=0, look_forward=0), q, k, v)
    np.testing.assert_allclose(without, weights, atol=1e-5)
    attention.set_train()
    dropped, again = run(attention, q, k, v), run(attention, q, k, v)
    zero = dropped == 0
    assert 0.21 < zero.mean() < 0.29 and (dropped != again).any()
    np.testing.assert_allclose(dropped[~zero], weights[~zero] / 0.75, rtol=1e-4)


@slowly_in_a_graph
def test_a_window_in_the_call_is_refused_without_xpos(mode, rng):
    class Called(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention = LocalAttention(4)

        def construct(self, q, k, v):
            return self.attention(q, k, v, window_size=8)

    with pytest.raises(ValueError, match="no window_size in the call without use_xpos, got 8"):
        run(Called(), *qkv(rng, 1, 8, 4))


@pytest.mark.parametrize(
    ("added", "parts"),
    [
        (dict(mask=np.ones((3, 8), bool)), ["(b, 8) booleans", "divides the 4 rows", "(3, 8)"]),
        (dict(mask=np.ones((1, 7), bool)), ["(b, 8) booleans", "(1, 7)"]),
        (dict(mask=np.ones(8, bool)), ["(b, 8) booleans", "(8,)"]),
        (dict(mask=np.ones((1, 8))), ["booleans", "Float32"]),
        (dict(attn_bias=np.zeros((3, 4, 12))), ["(heads, 4, 12)", "divides the 4 rows", "(3, 4, 12)"]),
        (dict(attn_bias=np.zeros((2, 4, 8))), ["(heads, 4, 12)", "(2, 4, 8)"]),
        (dict(attn_bias=np.zeros((4, 12))), ["(heads, 4, 12)", "(4, 12)"]),
    ],
    ids=str,
)
@slowly_in_a_graph
def test_masks_and_biases_that_do_not_fit_are_refused(mode, added, parts, rng):
    with pytest.raises(ValueError) as error:
        attend(dict(window_size=4), *qkv(rng, 2, 2, 8, 4), **added)
    assert all(part in str(error.value) for part in parts), error.value


@in_a_graph
def test_what_does_not_fit_is_refused_in_a_graph_too(mode, rng):
    inputs = qkv(rng, 2, 2, 8, 4)
    with pytest.raises(ValueError, match="multiple of the window 3"):
        run(LocalAttention(3), *inputs)
    with pytest.raises(ValueError, match="divides the 4 rows"):
        attend(dict(window_size=4), *inputs, mask=np.ones((3, 8), bool))
    with pytest.raises(ValueError, match="divides the 4 rows"):
        attend(dict(window_size=4), *inputs, attn_bias=np.zeros((3, 4, 12)))


# The examples of the original's README


# Their sizes in the slow set; else one head.
heads_of_readme = pytest.mark.parametrize("heads", [1, pytest.param(8, marks=pytest.mark.slow)])


@heads_of_readme
def test_readme_causal_attention_with_a_mask(heads):
    q, k, v = (ms.ops.randn(2, heads, 2048, 64) for _ in range(3))
    attn = LocalAttention(
        dim=64,
        window_size=512,
        causal=True,
        look_backward=1,
        look_forward=0,
        dropout=0.1,
        exact_windowsize=False,
    )
    mask = ms.ops.ones((2, 2048)).bool()
    out = attn(q, k, v, mask=mask)
    assert out.shape == (2, heads, 2048, 64)


@heads_of_readme
def test_readme_shared_queries_and_keys(heads):
    qk, v = ms.ops.randn(2, heads, 2048, 64), ms.ops.randn(2, heads, 2048, 64)
    attn = LocalAttention(dim=64, window_size=512, shared_qk=True, causal=True)
    mask = ms.ops.ones((2, 2048)).bool()
    out = attn(qk, qk, v, mask=mask)
    assert out.shape == (2, heads, 2048, 64)


@heads_of_readme
def test_readme_autopad(heads):
    q, k, v = (ms.ops.randn(heads, 2057, 64) for _ in range(3))
    attn = LocalAttention(window_size=512, causal=True, autopad=True)
    mask = ms.ops.ones((1, 2057)).bool()
    out = attn(q, k, v, mask=mask)
    assert out.shape == (heads, 2057, 64)


# Types


@slowly_in_a_graph
@pytest.mark.parametrize("options", [{}, dict(causal=True, use_xpos=True), dict(shared_qk=True)], ids=str)
def test_float64_gives_float64_results_with_rotary_embeddings_too(mode, options, rng):
    q, k, v = qkv(rng, 2, 12, 4)
    attention = LocalAttention(3, **options, dim=4)
    out = attention(*(ms.Tensor(x, ms.float64) for x in (q, k, v)))
    assert out.dtype == ms.float64
    np.testing.assert_allclose(out.asnumpy(), run(attention, q, k, v), atol=1e-5)
    if not options:
        wanted = reference.attention(q, k, v, rotary=True, window_size=3, look_forward=1)
        np.testing.assert_allclose(out.asnumpy(), wanted, atol=1e-12)


@both_paths
@both_modes
@pytest.mark.parametrize(
    ("types", "problem"),
    [
        (3 * [ms.bfloat16], "CPUs do not multiply matrices in bfloat16: use float32"),
        (3 * [ms.int32], "expected float16, bfloat16, float32 or float64, got Int32"),
        ([ms.float32, ms.float64, ms.float32], "of one floating type, got Float32, Float64 and Float32"),
    ],
    ids=str,
)
def test_types_that_cannot_be_computed_in_are_refused_in_one_line(path, mode, types, problem):
    with pytest.raises(ValueError, match=problem):
        LocalAttention(4, dim=4)(*(ms.ops.ones((1, 8, 4), dtype) for dtype in types))


@both_paths
@pytest.mark.parametrize("dtype", [ms.float16, ms.float32, ms.float64], ids=str)
def test_a_bias_of_another_type_is_taken_in_that_of_the_queries(dtype, rng):
    q, k, v = qkv(rng, 2, 8, 4)
    bias, attention = rng.integers(-2, 2, (2, 4, 12)), LocalAttention(4)
    out = attention(*map(tensor, (q, k, v)), attn_bias=ms.Tensor(bias, dtype))
    wanted = attention(*map(tensor, (q, k, v)), attn_bias=ms.Tensor(bias, ms.float32))
    assert out.dtype == ms.float32
    np.testing.assert_array_equal(out.asnumpy(), wanted.asnumpy())
