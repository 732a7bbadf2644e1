import dataclasses
from copy import deepcopy
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from hypothesis import strategies as st

from local_attention import GlobalAttention
from local_attention.backends import tiled
from local_attention.backends.fused import FusedAttention
from local_attention.backends.tiled import TiledAttend, TiledAttention, query_blocks
from local_attention.dropout import dropout_cell
from local_attention.options import GlobalAttentionOptions
from tests.local_attention import reference
from tests.local_attention.cells import (
    assert_gradients,
    both_modes,
    both_paths,
    for_all,
    portable,
    randomise,
    run,
    slowly_in_a_graph,
    tensor,
    value_and_gradients,
)

SIZES = dict(dim=6, dim_head=4, heads=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that short sequences have several blocks, the last one smaller than the others."""
    monkeypatch.setattr(tiled, "MIN_BLOCK", 4)


def attention(**options):
    """A GlobalAttention with parameters that matter, and what it should compute."""
    cell = GlobalAttention(**SIZES | options)
    p = randomise(cell)
    wanted = dict(heads=2, prenorm=False, rotary=True, window_size=10**6, look_backward=0) | options
    for name in {"dim", "dim_head", "dropout"} & wanted.keys():
        del wanted[name]
    if "use_rotary_pos_emb" in wanted:
        wanted["rotary"] = wanted.pop("use_rotary_pos_emb")
    return cell, partial(reference.mha, p=p, **wanted)


# Of each option a value that is not the default, with what else it needs to matter.
OPTIONS = {
    "dim": dict(dim=5),
    "heads": dict(heads=3),
    "dim_head": dict(dim_head=2),
    "use_rotary_pos_emb": dict(use_rotary_pos_emb=False),
    "scale": dict(scale=0.2),
    "qk_rmsnorm": dict(qk_rmsnorm=True),
    "qk_scale": dict(qk_rmsnorm=True, qk_scale=3.0),
    "shared_qk": dict(shared_qk=True),
    "gate_values_per_head": dict(gate_values_per_head=True),
    "causal": dict(causal=True),
    "dropout": dict(dropout=0.5),
    "prenorm": dict(prenorm=True),
}


def test_every_option_has_an_example():
    assert OPTIONS.keys() == {field.name for field in dataclasses.fields(GlobalAttentionOptions)}


@both_paths
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_token_sees_the_whole_sequence_as_the_options_say(options, causal, path, rng):
    cell, definition = attention(**dict(causal=causal) | options)
    cell.set_train(False)
    backend = FusedAttention if path == "fused" and "dropout" not in options else TiledAttention
    assert type(cell.attention.attend) is backend
    for n in (1, 3, 11):
        x = rng.standard_normal((2, n, options.get("dim", 6)))
        np.testing.assert_allclose(run(cell, x), definition(x), atol=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"dim", "dim_head", "heads", "dropout"}))
def test_each_example_differs_from_the_output_without_the_option(name, rng):
    options, x = OPTIONS[name], rng.standard_normal((2, 11, 6))
    without = {key: value for key, value in options.items() if key != name}
    with_it, without_it = (run(attention(**chosen)[0], x) for chosen in (options, without))
    assert abs(with_it - without_it).max() > 1e-3


@slowly_in_a_graph
@both_paths
@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True),
        dict(causal=True, shared_qk=True, qk_rmsnorm=True, gate_values_per_head=True, prenorm=True),
        {},
    ],
    ids=["causal", "all options", "not causal"],
)
def test_the_gradient_is_that_of_the_definition(mode, options, path, rng):
    cell, definition = attention(**options)
    x, cotangent = rng.standard_normal((2, 2, 11, 6))
    value, gradients = value_and_gradients(cell, [x], cotangent)
    np.testing.assert_allclose(value, definition(x), atol=1e-5)
    assert_gradients(definition, [x], cotangent, gradients)


@both_paths
@pytest.mark.parametrize("options", [dict(causal=True), dict(), dict(causal=True, shared_qk=True)], ids=str)
def test_a_mask_hides_keys_and_a_query_without_a_key_gets_zeros(options, path, rng):
    cell, definition = attention(**options)
    x, cotangent, mask = *rng.standard_normal((2, 2, 11, 6)), rng.random((2, 11)) < 0.5
    mask[0, :3], mask[1] = False, [True] + [False] * 10

    class Masked(ms.nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.cell, self.mask = cell, ms.Tensor(mask)

        def construct(self, x):
            return self.cell(x, self.mask)

    value, gradients = value_and_gradients(Masked(), [x], cotangent)
    np.testing.assert_allclose(value, definition(x, mask=mask), atol=1e-5)
    assert not options.get("causal") or (value[0, :3] == 0).all()
    assert_gradients(partial(definition, mask=mask), [x], cotangent, gradients)


@both_paths
def test_a_changed_future_token_changes_no_earlier_output(path, rng):
    cell, _ = attention(causal=True)
    x = rng.standard_normal((1, 11, 6))
    before = run(cell, x)
    x[0, 6] += 1
    after = run(cell, x)
    np.testing.assert_array_equal(after[0, :6], before[0, :6])
    assert (abs(after - before).max(-1)[0, 6:] > 1e-5).all()  # however far away


@for_all(
    5,
    40,
    n=st.integers(1, 40),
    batch=st.integers(1, 3),
    causal=st.booleans(),
    shared_qk=st.booleans(),
    block=st.integers(1, 9),
)
def test_blocks_and_tiles_compute_the_same_for_any_length(n, batch, causal, shared_qk, block):
    rng = np.random.default_rng(n)
    x, cotangent = rng.standard_normal((2, batch, n, 6))
    options = dict(causal=causal, shared_qk=shared_qk)
    fast, (slow, _) = GlobalAttention(**SIZES, **options), portable(lambda: attention(**options))
    randomise(fast)
    tiled.MIN_BLOCK = block
    for one, other in zip(*(value_and_gradients(cell, [x], cotangent) for cell in (fast, slow)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# Blocks


@pytest.mark.parametrize("length", [1, 3, 4, 5, 63, 64, 65, 1000])
def test_blocks_cover_the_queries_and_hold_a_bounded_part_of_the_scores(length):
    blocks = query_blocks(length)
    assert [i for start, end in blocks for i in range(start, end)] == list(range(length))
    assert len(blocks) <= tiled.MAX_BLOCKS
    assert max(end - start for start, end in blocks) <= max(tiled.MIN_BLOCK, -(-length // tiled.MAX_BLOCKS))


@both_modes
@pytest.mark.parametrize("causal", [True, False])
def test_with_dropout_output_and_gradients_are_those_of_the_weights_kept(mode, causal, rng):
    dropout, n = dropout_cell(0.4), 11
    attend = TiledAttend(causal, 0, dropout)
    call = dropout.next_call()
    keep = np.zeros((2, n, n))
    for start, end in query_blocks(n):
        keys = end if causal else n
        weights = ms.Tensor(np.ones((2, end - start, keys), np.float32))
        keep[:, start:end, :keys] = attend.keep(weights, call, start).asnumpy()
    seen = np.tril(np.ones((n, n), bool)) | (not causal)
    assert 0.4 < (keep[:, seen] > 0).mean() < 0.8

    class Dropping(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.attend, self.call = attend, call

        def construct(self, q, k, v):
            return self.attend(q, k, v, self.call, True)

    def definition(q, k, v):
        return reference.softmax(np.where(seen, q @ k.transpose(0, 2, 1), -np.inf)) * keep @ v

    inputs, cotangent = list(rng.standard_normal((3, 2, n, 4))), rng.standard_normal((2, n, 4))
    value, gradients = value_and_gradients(Dropping(), inputs, cotangent)
    np.testing.assert_allclose(value, definition(*inputs), atol=1e-5)
    assert_gradients(definition, inputs, cotangent, gradients)


def test_all_blocks_of_a_long_sequence_have_other_masks():
    offsets = [tiled.block_offset(start).asnumpy() for start, _ in query_blocks(2**20)]
    assert (
        all(offset.dtype == np.int32 for offset in offsets)
        and len({offset.item() for offset in offsets}) == tiled.MAX_BLOCKS
    )


def test_weights_are_dropped_in_training_only_and_by_a_copy_differently(rng):
    cell, definition = attention(dropout=0.5)
    x = rng.standard_normal((2, 11, 6))
    copy = deepcopy(cell.set_train())
    outputs = [run(cell, x), run(cell, x), run(copy, x)]
    assert all(abs(outputs[i] - outputs[j]).max() > 1e-3 for i in range(3) for j in range(i))
    np.testing.assert_allclose(run(cell.set_train(False), x), definition(x), atol=1e-5)


@slowly_in_a_graph
def test_recomputation_gives_the_same_gradients(mode, rng):
    x, cotangent = rng.standard_normal((2, 1, 11, 6))
    cells = [portable(lambda: attention(causal=True)[0]) for _ in range(2)]
    cells[1].recompute()
    for one, other in zip(*(value_and_gradients(cell, [x], cotangent) for cell in cells), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# Refusals


def test_options_of_windows_are_unknown():
    for name in ("window_size", "look_backward", "exact_windowsize", "use_xpos"):
        with pytest.raises(TypeError, match=name):
            GlobalAttention(**SIZES, **{name: 1})


@both_paths
def test_what_is_no_sequence_of_the_size_is_refused(path, rng):
    cell, _ = attention()
    with pytest.raises(ValueError, match=r"expected x: \(b, n, 6\), got \(2, 3, 5\)"):
        run(cell, rng.standard_normal((2, 3, 5)))
    with pytest.raises(ValueError, match=r"expected mask: \(b, 3\) booleans"):
        cell(tensor(rng.standard_normal((2, 3, 6))), ms.Tensor(np.ones((2, 4), bool)))


def test_the_portable_backend_is_for_whole_sequences_alone():
    from local_attention import LocalAttention

    assert not TiledAttention.is_available(LocalAttention(3))
    assert TiledAttention.is_available(attention()[0].attention)
