"""The optimizers that a config may name."""

import mindspore as ms
from mindspore import Tensor, nn, ops


def is_decayed(parameter):
    """Whether weight decay applies: to matrices of linear layers, not to norms, biases and embeddings."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and "embedding_table" not in parameter.name


class Adam(nn.Optimizer):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); with weight decay AdamW (Loshchilov & Hutter 2019, 1711.05101).

    As PyTorch computes them. ``nn.Adam`` leaves ``eps`` out of the bias correction, which moved the loss of the first
    steps by 1e-3 bits per byte, and ``nn.AdamWeightDecay`` has no bias correction at all.

    Args:
        params: parameters.
        learning_rate: initial learning rate.
        beta1, beta2: decay of the means of gradients and of squared gradients.
        eps: added to the root of the bias-corrected mean of squared gradients.
        weight_decay: what :func:`is_decayed` loses this fraction of itself a step, times the learning rate.
    """

    def __init__(self, params, learning_rate, beta1, beta2, eps, weight_decay=0.0):
        super().__init__(learning_rate, params)
        self.beta1, self.beta2, self.eps, self.decay = beta1, beta2, eps, weight_decay
        self.decayed = tuple(weight_decay > 0 and is_decayed(parameter) for parameter in self.parameters)
        self.moment1 = self.parameters.clone("moment1", init="zeros")
        self.moment2 = self.parameters.clone("moment2", init="zeros")
        self.update = ops.Adam()

    def construct(self, gradients):
        ops.assign_add(self.global_step, self.global_step_increase_tensor)
        steps = self.global_step.astype(ms.float32).reshape(())
        beta1_power, beta2_power = ops.pow(self.beta1, steps), ops.pow(self.beta2, steps)
        # The kernel divides by sqrt(moment2) + eps before it corrects the bias; so corrected, eps is PyTorch's.
        eps = self.eps * ops.sqrt(1 - beta2_power)
        rate = self.get_lr()
        beta1, beta2 = Tensor(self.beta1, ms.float32), Tensor(self.beta2, ms.float32)
        for i in range(len(gradients)):
            weight = self.parameters[i]
            if self.decayed[i]:
                ops.assign(weight, weight * (1 - rate * self.decay))
            moments = self.moment1[i], self.moment2[i]
            self.update(weight, *moments, beta1_power, beta2_power, rate, beta1, beta2, eps, gradients[i])
        return self.global_step


def build_optimizer(config, params):
    """The optimizer of an ``OptimizerConfig`` over ``params``; its learning rate is set before each step."""
    decay = config.weight_decay if config.name == "adamw" else 0.0
    return Adam(params, config.lr, config.beta1, config.beta2, config.eps, decay)
