"""Norm, clipping and Muon by fused operators, for sizes around their tiles, against definitions and MindSpore's own."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor

from local_attention.training.config import OptimizerConfig
from local_attention.training.fused_update import FusedNorm, FusedTimesOrZero
from local_attention.training.optimizer import build_optimizer
from local_attention.training.step import GlobalNorm, TimesOrZero
from tests.local_attention.cells import needs_fused, portable

SHAPES = [(3,), (1, 7), (300, 300), (2, 40_000), (32_768,)]  # a task has 32,768 numbers


def tensors(rng):
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


@pytest.mark.parametrize("build", [pytest.param(FusedNorm, marks=needs_fused), GlobalNorm])
def test_the_norm_is_that_of_all_numbers(build, rng):
    arrays = tensors(rng)
    for count in (1, len(arrays)):
        wanted = np.linalg.norm(np.concatenate([array.ravel() for array in arrays[:count]]).astype(np.float64))
        norm = build()(tuple(map(Tensor, arrays[:count])))
        assert norm.shape == () and float(norm.asnumpy()) == pytest.approx(wanted, rel=1e-6)
    for value in (np.nan, np.inf):
        arrays[3][1, -1] = value
        assert not np.isfinite(build()(tuple(map(Tensor, arrays))).asnumpy())


@pytest.mark.parametrize(
    "build",
    [pytest.param(FusedTimesOrZero, marks=needs_fused), pytest.param(lambda count: TimesOrZero(), id="portable")],
)
@pytest.mark.parametrize("factor", [0.3, 0.0])
def test_products_are_zero_where_they_are_not_finite(build, factor, rng):
    arrays = tensors(rng)
    arrays[0][1], arrays[1][0, 6], arrays[3][1, -1], arrays[2][299, 0] = np.nan, np.inf, -np.inf, 3e38
    for count in (1, len(arrays)):
        products = build(count)(Tensor(factor, ms.float32), tuple(map(Tensor, arrays[:count])))
        assert len(products) == count
        for array, product in zip(arrays, products):
            wanted = np.where(np.isfinite(array), np.nan_to_num(array) * np.float32(factor), 0)
            np.testing.assert_array_equal(product.asnumpy(), wanted)


@needs_fused
@pytest.mark.parametrize("row_decay", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(64, 64), (65, 130), (130, 65), (2, 200)])
def test_fused_muon_does_what_mindspores_operators_do(shape, row_decay, rng):
    config = OptimizerConfig(name="muon", lr=0.05, muon_lr=0.02, momentum=0.8, muon_beta2=row_decay, weight_decay=0.0)
    names = [f"layers.{i}.attention.to_q.weight" for i in range(3)]
    start = [rng.standard_normal(shape) for _ in names]

    def build():
        return build_optimizer(
            config, ParameterTuple([Parameter(Tensor(x, ms.float32), name=name) for x, name in zip(start, names)])
        )

    fused, other = build(), portable(build)
    assert fused.fused is not None and other.fused is None
    for _ in range(3):
        gradients = tuple(Tensor(rng.standard_normal(shape) * scale, ms.float32) for scale in (1e-4, 1.0, 30.0))
        for optimizer in (fused, other):
            optimizer(gradients, Tensor(1.0, ms.float32))
    states = [{p.name: p.asnumpy() for p in optimizer.get_parameters()} for optimizer in (fused, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        np.testing.assert_allclose(states[0][name], value, rtol=2e-5, atol=2e-5, err_msg=name)
    assert all(abs(states[0][name] - x).max() > 1e-3 for name, x in zip(names, start))
