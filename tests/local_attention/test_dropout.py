import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from local_attention.dropout import Dropout, dropout_cell, set_dropout_step
from local_attention.transformer import LocalTransformer
from tests.local_attention.cells import both_modes, run

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


def test_a_rate_of_zero_needs_no_cell():
    assert dropout_cell(0.0) is None


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5])
def test_a_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(ValueError, match=f"from 0 to below 1, got {rate}"):
        dropout_cell(rate)
