from copy import deepcopy

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from local_attention.dropout import Dropout, dropout_cell, set_dropout_step
from local_attention.transformer import LocalMHA, LocalTransformer
from tests.local_attention.cells import both_modes, in_a_graph, run

ONES = np.ones((300, 200))


def dropout(seed=0, rate=0.25):
    np.random.seed(seed)
    return Dropout(rate).set_train()


@both_modes
def test_a_fraction_becomes_zero_and_the_others_grow_in_training_only(mode, rng):
    cell, x = dropout(), rng.standard_normal((4, 300, 50))
    dropped = run(cell, x)
    zero = dropped == 0
    assert abs(zero.mean() - 0.25) < 0.01
    np.testing.assert_allclose(dropped[~zero], x[~zero] / 0.75, rtol=1e-5)
    np.testing.assert_array_equal(run(cell.set_train(False), x), x.astype(np.float32))


def test_no_element_knows_of_another():
    cell = dropout()
    masks = np.stack([run(cell, ONES) == 0 for _ in range(10)]) - 0.25
    deviation = 0.1875 / np.sqrt(masks.size)  # of the mean of a product of two independent ones
    for one, other in (
        (masks[1:], masks[:-1]),
        (masks[:, 1:], masks[:, :-1]),
        (masks[:, :, 1:], masks[:, :, :-1]),
        (masks[:, 7:, 3:], masks[:, :-7, :-3]),
    ):
        assert abs((one * other).mean()) < 4 * deviation
    np.testing.assert_allclose(masks.mean((0, 2)).std(), np.sqrt(0.1875 / 2000), rtol=0.15)
    np.testing.assert_allclose(masks.mean((0, 1)).std(), np.sqrt(0.1875 / 3000), rtol=0.2)


def test_masks_are_a_function_of_the_seed_and_the_number_of_the_call():
    cell = dropout()
    masks = [run(cell, ONES) for _ in range(3)]
    ms.set_context(mode=ms.GRAPH_MODE)
    again = dropout()
    for mask in masks:
        np.testing.assert_array_equal(run(again, ONES), mask)
    assert (masks[0] != masks[1]).mean() > 0.3
    assert (run(dropout(seed=1), ONES) != masks[0]).mean() > 0.3


def test_a_model_goes_on_as_after_so_many_calls():
    def model():
        np.random.seed(0)
        sizes = dict(num_tokens=8, max_seq_len=8, dim=8, depth=2, heads=2, dim_head=4, local_attn_window_size=4)
        return LocalTransformer(**sizes, attn_dropout=0.5, ff_dropout=0.5).set_train()

    one, x = model(), ms.Tensor(np.arange(8)[None], ms.int32)
    other = model()
    for mine, its in zip(other.get_parameters(), one.get_parameters()):
        mine.set_data(its.value())
    outputs = [one(x).asnumpy() for _ in range(4)]
    assert abs(outputs[2] - outputs[3]).max() > 1e-3
    set_dropout_step(other, 3)
    np.testing.assert_array_equal(other(x).asnumpy(), outputs[3])


def test_cells_of_one_model_drop_different_elements():
    np.random.seed(0)
    cells = nn.CellList([Dropout(0.5), Dropout(0.5)]).set_train()
    assert (run(cells[0], ONES) != run(cells[1], ONES)).mean() > 0.4


class Sum(nn.Cell):
    """The sum of what some cells give for one input."""

    def __init__(self, *cells):
        super().__init__()
        self.parts = nn.CellList(list(cells))

    def construct(self, x):
        total = 0
        for cell in self.parts:
            total = total + cell(x)
        return total


def test_a_copy_drops_other_elements_from_the_same_call_on():
    cell = dropout()
    run(cell, ONES)
    copied = deepcopy(cell)
    assert copied.training and not deepcopy(cell.set_train(False)).training
    assert copied.call == cell.call == 1
    cell.set_train()
    assert (run(copied, ONES) != run(cell, ONES)).mean() > 0.3
    run(copied, ONES)
    assert (copied.call, cell.call) == (3, 2)


def test_copies_are_reproducible():
    ones = [run(deepcopy(dropout(seed)), ONES) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(ones[0], ones[1])
    assert (ones[0] != ones[2]).any()


@in_a_graph
def test_a_cell_and_its_copy_fit_in_one_graph(mode):
    cell = dropout(rate=0.5)
    both = run(Sum(cell, deepcopy(cell)).set_train(), ONES)
    assert set(np.unique(both)) == {0, 2, 4}


@both_modes
def test_the_copies_of_a_global_layer_drop_different_elements(mode):
    np.random.seed(0)
    inserted = LocalMHA(dim=8, window_size=4, heads=1, dim_head=8, dropout=0.5)
    options = dict(num_tokens=None, max_seq_len=8, dim=8, depth=2, heads=1, dim_head=8, local_attn_window_size=4)
    model = LocalTransformer(**options, global_attn_layer=inserted).set_train()
    assert run(model, np.ones((1, 8, 8))).shape == (1, 8, 8)
    seeds = [layer.global_attention.attention.attend.dropout.seed for layer in model.layers]
    assert len({*seeds, inserted.attention.attend.dropout.seed}) == 3


def test_a_rate_of_zero_needs_no_cell():
    assert dropout_cell(0.0) is None


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5])
def test_a_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(ValueError, match=f"from 0 to below 1, got {rate}"):
        dropout_cell(rate)
