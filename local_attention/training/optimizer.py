"""The optimizers that a config may name."""

from mindspore import nn, ops


def is_decayed(parameter):
    """Whether weight decay applies: to matrices of linear layers, not to norms, biases and embeddings."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and "embedding_table" not in parameter.name


class AdamW(nn.Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), bias corrected.

    ``nn.AdamWeightDecay`` leaves the bias correction out, so this adds the decay to ``nn.Adam``.

    Args:
        params: parameters.
        decay: the weights of :func:`is_decayed` lose this fraction of themselves a step, times the learning rate.
        adam: further arguments of ``nn.Adam``.
    """

    def __init__(self, params, *, decay, **adam):
        super().__init__(params, **adam)
        self.decay = decay
        self.decayed = tuple(is_decayed(parameter) for parameter in self.parameters)

    def construct(self, gradients):
        keep = 1 - self.learning_rate * self.decay
        for i in range(len(self.decayed)):
            if self.decayed[i]:
                ops.assign(self.parameters[i], self.parameters[i] * keep)
        return super().construct(gradients)


def build_optimizer(config, params):
    """The optimizer of an :class:`OptimizerConfig` over ``params``; its learning rate is set before each step."""
    adam = dict(learning_rate=config.lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps)
    if config.name == "adamw":
        return AdamW(params, decay=config.weight_decay, **adam)
    return nn.Adam(params, **adam)
