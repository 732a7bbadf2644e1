"""Errors in float16 beside those of the original in float16, where PyTorch and the original are installed."""

from importlib import import_module

import mindspore as ms
import numpy as np
import pytest

from scripts.pytorch_original import folder_of_original
from tests.local_attention.test_fixtures import LOADED, outputs_and_gradients, parameters_of_tests

torch = pytest.importorskip("torch")
if not folder_of_original():
    pytest.skip("expected the original: see make parity", allow_module_level=True)

from_pytorch = import_module("scripts.make_fixtures").from_pytorch  # which needs both

FACTOR = 1.5
KINDS = ("LocalAttention", "LocalMHA", "LocalTransformer")
CASES = [entry for kind in KINDS for entry in LOADED[kind] if entry[0].source == "pytorch"]
ARRAYS = [entry for entry in CASES if entry[1]["out"].shape]
LOSSES = [entry for entry in CASES if not entry[1]["out"].shape]


def errors(case, expected):
    """Ours and the original's, by name as in ``expected``; the latter None where it computes nothing in float16."""
    try:
        theirs = from_pytorch(case, torch.float16)
    except RuntimeError as error:
        assert "dtype" in str(error) or "scalar type" in str(error)  # it makes some tensors in float32
        return None, None
    pair = (outputs_and_gradients(case, expected["out"].shape, ms.float16), theirs)
    return tuple({name: found[name].astype(np.float64) - expected[name] for name in expected} for found in pair)


def rms(arrays):
    """The root mean square, all arrays having the same weight."""
    return np.sqrt(np.mean([np.mean(array**2) for array in arrays]))


def largest(arrays):
    return max(abs(array).max() for array in arrays)


def assert_not_closer(theirs, ours):
    """Lists of errors; nothing is said where the original leaves the range of float16."""
    if all(np.isfinite(error).all() for error in theirs):
        for measure in (rms, largest):
            assert measure(ours) <= FACTOR * measure(theirs), measure.__name__


@pytest.mark.parametrize(("case", "expected"), parameters_of_tests(ARRAYS))
def test_the_original_is_not_much_closer_to_the_reference(case, expected):
    ours, theirs = errors(case, expected)
    if theirs is None:
        pytest.skip("the original does not compute it in float16")
    assert_not_closer([theirs.pop("out")], [ours.pop("out")])
    assert_not_closer(list(theirs.values()), list(ours.values()))


def test_the_original_is_not_much_closer_to_losses_and_their_gradients():
    """Losses all together, as the error of a single number may be small by chance."""
    found = [pair for pair in (errors(*entry) for entry in LOSSES) if pair[1] is not None]
    assert len(found) > 3
    ours, theirs = ([error.pop("out") for error in errors_of_all] for errors_of_all in zip(*found, strict=True))
    assert_not_closer(theirs, ours)
    for ours, theirs in found:
        assert_not_closer(list(theirs.values()), list(ours.values()))
