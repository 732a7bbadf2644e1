"""Runs of tiny models, created and read within the test process."""

import mindspore as ms
import numpy as np
import pytest

from local_attention.training.build import build_model
from local_attention.training.checkpoint import Checkpoints, tensors_of
from local_attention.training.config import ModelConfig, OptimizerConfig, RunConfig
from local_attention.training.optimizer import build_optimizer
from local_attention.training.schema import as_dict

SIZES = dict(max_seq_len=24, dim=8, depth=2, heads=2, dim_head=4, local_attn_window_size=8)
TOKENS = np.random.default_rng(1).integers(0, 256, (2, 20))


@pytest.fixture(autouse=True)
def eager():
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def made():
    """Makes a tiny model with random parameters, and its config, from options that are not the default."""

    def made(**options):
        config = ModelConfig(**SIZES | options)
        model, rng = build_model(config), np.random.default_rng(0)
        for parameter in model.get_parameters():
            parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape) * 0.3, ms.float32))
        return model, config

    return made


@pytest.fixture
def run(made, tmp_path):
    """Makes a run of such a model at step 7; returns its directory."""

    def run(**options):
        model, config = made(**options)
        tensors = tensors_of(model, build_optimizer(OptimizerConfig(), model.trainable_params()))
        meta = {"step": 7, "config": as_dict(RunConfig(model=config))}
        Checkpoints(tmp_path / "run/checkpoints").save(tensors, meta)
        return tmp_path / "run"

    return run


def logits(model):
    return model.set_train(False)(ms.Tensor(TOKENS, ms.int32)).asnumpy()
