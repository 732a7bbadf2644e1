"""Small replacements for the parts of a training run, and reference implementations in float64."""

from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from hydra import compose, initialize_config_dir
from hypothesis import settings
from mindspore import Parameter, Tensor, nn, ops
from omegaconf import OmegaConf

from local_attention.layers import CrossEntropy
from local_attention.transformer import LocalTransformer

ROOT = Path(__file__).parents[2]
CONFIGS = str(ROOT / "configs")
TOKENS = 8  # vocabulary size of a Bigram


def examples(count):
    """Hypothesis settings for deterministic tests."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def composed(name, *overrides):
    """Return the config that Hydra composes from overrides, with interpolations resolved, as dictionaries."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)


def tiny_transformer(**options):
    sizes = dict(num_tokens=256, max_seq_len=16, dim=16, depth=1, heads=2, dim_head=8, local_attn_window_size=8)
    return LocalTransformer(**{**sizes, **options})


class Bigram(nn.Cell):
    """A language model that compiles fast: the logits of the next token are a row of a table plus a bias."""

    def __init__(self, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        for name, shape in (("table", (TOKENS, TOKENS)), ("bias", (1, TOKENS))):
            setattr(self, name, Parameter(Tensor(rng.standard_normal(shape), ms.float32), name=name))
        self.cross_entropy = CrossEntropy()

    def construct(self, sequences, return_loss=False, ngram_rows=None):
        return self.token_losses(sequences[:, :-1], sequences[:, 1:].reshape(-1)).mean()

    def token_losses(self, tokens, labels):
        return self.cross_entropy(ops.gather(self.table, tokens.reshape(-1), 0) + self.bias, labels)


@dataclass
class BigramDefinition:
    """Reference for the loss in nats and the gradients of a :class:`Bigram`, in float64."""

    table: np.ndarray
    bias: np.ndarray

    def loss_and_gradients(self, sequences):
        tokens, labels = sequences[..., :-1].reshape(-1), sequences[..., 1:].reshape(-1)
        log_p = log_softmax(self.table[tokens] + self.bias)
        error = (np.exp(log_p) - np.eye(TOKENS)[labels]) / labels.size
        table = np.zeros_like(self.table)
        np.add.at(table, tokens, error)
        return -log_p[np.arange(labels.size), labels].mean(), {"table": table, "bias": error.sum(0, keepdims=True)}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def global_norm(gradients):
    return np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))


def weights_of(cell):
    """Return copies of the trainable parameters in float64, by name."""
    return {parameter.name: parameter.asnumpy().astype(np.float64) for parameter in cell.trainable_params()}


def set_weights(cell, weights):
    for parameter in cell.trainable_params():
        parameter.set_data(Tensor(weights[parameter.name], ms.float32))


def randomise(parameters, seed=0):
    """Set floating-point parameters to values that no initialiser gives."""
    rng = np.random.default_rng(seed)
    for parameter in parameters:
        if parameter.dtype == ms.float32:
            parameter.set_data(Tensor(rng.uniform(0.1, 1, parameter.shape), ms.float32))


class Clock:
    """Replaces the module ``time``."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now
