"""The optimizers that a config may name."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from local_attention.layers import tree_map


def sum_of_squares(tensor):
    """() float32, as a product of a row with itself: 9 ms a step of Muon instead of 17 for sums over all axes."""
    row = tensor.reshape((1, -1))
    return ops.matmul(row, row.reshape((-1, 1))).reshape(())


def is_decayed(parameter):
    """Whether weight decay applies: to matrices of linear layers, not to norms, biases and embeddings."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and "embedding_table" not in parameter.name


def is_hidden_matrix(parameter):
    """Whether a parameter of a model is a matrix within its layers, which :class:`Muon` orthogonalises."""
    return parameter.name.startswith("layers.") and parameter.name.endswith(".weight") and min(parameter.shape) > 1


apply_adam = ops.Adam()


def shrink(factor, weight):
    return ops.assign(weight, weight * factor)


def adam_step(beta1_power, beta2_power, rate, beta1, beta2, eps, weight, moment1, moment2, gradient):
    return apply_adam(weight, moment1, moment2, beta1_power, beta2_power, rate, beta1, beta2, eps, gradient)


def look_ahead(kept, momentum, total, gradient):
    """Add to the sum of gradients; where Nesterov's momentum looks, as a matrix of norm 1."""
    total = ops.depend(total, ops.assign(total, total * kept + gradient))
    ahead = gradient + total * momentum
    return ahead * (1 / (ops.sqrt(sum_of_squares(ahead)) + 1e-7))


def move(rate, weight, direction):
    return ops.assign(weight, weight - direction * rate)


class Adam(nn.Optimizer):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); with weight decay AdamW (Loshchilov & Hutter 2019, 1711.05101).

    As PyTorch computes them. ``nn.Adam`` leaves ``eps`` out of the bias correction, which moved the loss of the first
    steps by 1e-3 bits per byte, and ``nn.AdamWeightDecay`` has no bias correction at all.

    Args:
        params: parameters; ``parameters`` has them in another order, which is that of the gradients.
        learning_rate: initial learning rate.
        beta1, beta2: decay of the means of gradients and of squared gradients.
        eps: added to the root of the bias-corrected mean of squared gradients.
        weight_decay: what :func:`is_decayed` loses this fraction of itself a step, times the learning rate.
        left_out: tells of a parameter whether a subclass updates it instead.
    """

    def __init__(self, params, learning_rate, beta1, beta2, eps, weight_decay=0.0, left_out=lambda parameter: False):
        params = sorted(params, key=lambda parameter: (left_out(parameter), not is_decayed(parameter)))
        super().__init__(learning_rate, params)
        self.beta1, self.beta2, self.eps, self.decay = beta1, beta2, eps, weight_decay
        self.own = sum(not left_out(parameter) for parameter in params)
        self.moment1 = self.parameters.clone("moment1", init="zeros")
        self.moment2 = ms.ParameterTuple(params[: self.own]).clone("moment2", init="zeros")
        self.own_weights, self.own_moment1 = self.parameters[: self.own], self.moment1[: self.own]
        self.decayed = tuple(parameter for parameter in self.parameters if weight_decay > 0 and is_decayed(parameter))

    def construct(self, gradients, taken):
        """One step, or none: with ``taken``, a () float32, of 0, and gradients of 0, nothing changes; else it is 1."""
        ops.assign_add(self.global_step, taken.astype(ms.int32).reshape(1))
        steps = self.global_step.astype(ms.float32).reshape(())
        beta1_power, beta2_power = ops.pow(self.beta1, steps), ops.pow(self.beta2, steps)
        # The kernel divides by sqrt(moment2) + eps before it corrects the bias; so corrected, eps is PyTorch's.
        eps = self.eps * ops.sqrt(1 - beta2_power)
        rate, beta1, beta2 = self.get_lr() * taken, self.beta1 * taken + (1 - taken), self.beta2 * taken + (1 - taken)
        done = ()
        if self.decayed:
            done = done + (tree_map(ops.partial(shrink, 1 - rate * self.decay), self.decayed),)
        if self.own > 0:
            step = ops.partial(adam_step, beta1_power, beta2_power, rate, beta1, beta2, eps)
            own = self.own_weights, self.own_moment1, self.moment2, gradients[: self.own]
            done = done + (tree_map(step, *own),)
        return ops.depend(self.global_step, (done, self.update_left_out(gradients, rate, taken)))

    def update_left_out(self, gradients, rate, taken):
        """A subclass says how."""
        return ()


class Muon(Adam):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for hidden matrices, AdamW for everything else.

    A matrix moves along its gradient's momentum, of which five Newton-Schulz steps have made a matrix whose singular
    values are about 1.

    Args:
        params, learning_rate, beta1, beta2, eps, weight_decay: see :class:`Adam`.
        muon_lr: learning rate of the hidden matrices while the other one is ``learning_rate``; they change together.
        momentum: decay of the gradients' sum.
    """

    def __init__(self, params, learning_rate, beta1, beta2, eps, weight_decay, muon_lr, momentum):
        params = sorted(params, key=lambda parameter: tuple(parameter.shape))  # those alike side by side
        super().__init__(params, learning_rate, beta1, beta2, eps, weight_decay, left_out=is_hidden_matrix)
        self.relative_rate, self.momentum = muon_lr / learning_rate, momentum
        self.alike = tuple(  # of each shape: where it begins and ends, weights, sums of gradients, rate for its form
            (begin, end, self.parameters[begin:end], self.moment1[begin:end], max(1.0, m / n) ** 0.5)
            for begin, end, (m, n) in runs_of([tuple(parameter.shape) for parameter in self.parameters], self.own)
        )
        self.matmul = ops.BatchMatMul()
        self.matmul_nt, self.matmul_tn = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(transpose_a=True)

    def update_left_out(self, gradients, rate, taken):
        done = ()
        kept = self.momentum * taken + (1 - taken)
        for begin, end, weights, sums, tall in self.alike:
            directions = tree_map(ops.partial(look_ahead, kept, self.momentum), sums, gradients[begin:end])
            directions = ops.unstack(self.orthogonalise(ops.stack(directions)))  # by indices, it takes 42 ms of a step
            done = done + (tree_map(ops.partial(move, rate * (self.relative_rate * tall)), weights, directions),)
        return done

    def orthogonalise(self, x):
        """``x: (k, m, n)``, matrices of norm 1, to ones with singular values of 0.7 to 1.2.

        Those of one shape together: a hundred large products instead of several hundreds of small ones.
        """
        tall = x.shape[1] > x.shape[2]
        for _ in range(5):
            square = self.matmul_tn(x, x) if tall else self.matmul_nt(x, x)
            polynomial = square * -4.7750 + self.matmul(square, square) * 2.0315
            x = x * 3.4445 + (self.matmul(x, polynomial) if tall else self.matmul(polynomial, x))
        return x


def runs_of(items, begin):
    """``(begin, end, item)`` of each run of equal items from ``begin`` on."""
    while begin < len(items):
        end = next((i for i in range(begin, len(items)) if items[i] != items[begin]), len(items))
        yield begin, end, items[begin]
        begin = end


class RowAdagrad(nn.Cell):
    """Adagrad (Duchi et al. 2011, JMLR 12) of the rows of a large table that a step needs, one rate for a row.

    Of a row that occurs several times each occurrence counts as a gradient of its own, for the rate, too. The cost does
    not depend on the size of the table; of one of 15 million numbers Adam took a fifth of a step.

    Args:
        table: a Parameter ``(rows, d)``.
        relative_rate: how many times the optimizer's learning rate.
    """

    def __init__(self, table, relative_rate):
        super().__init__()
        rows, d = table.shape
        self.table, self.relative_rate = table, relative_rate
        self.squares = Parameter(Tensor(np.zeros((rows, 1), np.float32)), name="squares", requires_grad=False)
        self.average, self.spread = Tensor(np.full((d, 1), 1 / d, np.float32)), Tensor(np.ones((1, d), np.float32))
        self.add, self.matmul, self.rsqrt = ops.ScatterAdd(), ops.MatMul(), ops.Rsqrt()

    def construct(self, keys, gradients, rate):
        """``keys: (k,)`` int32, the rows; ``gradients: (k, d)`` of each occurrence; ``rate: ()``, the optimizer's."""
        squares = self.add(self.squares, keys, self.matmul(gradients * gradients, self.average))
        scale = self.rsqrt(ops.gather(squares, keys, 0) + 1e-20)
        directions = gradients * self.matmul(scale, self.spread)
        return self.add(self.table, keys, directions * (rate * -self.relative_rate))


def build_optimizer(config, params):
    """The optimizer of an ``OptimizerConfig`` over ``params``; its learning rate is set before each step.

    The table of a model with n-grams is left to its member ``of_ngrams``, a :class:`RowAdagrad`, else None.
    """
    tables = [parameter for parameter in params if parameter.name.endswith("ngram_emb.embedding_table")]
    dense = [parameter for parameter in params if all(parameter is not table for table in tables)]
    adam = (dense, config.lr, config.beta1, config.beta2, config.eps)
    if config.name == "muon":
        optimizer = Muon(*adam, config.weight_decay, config.muon_lr, config.momentum)
    else:
        optimizer = Adam(*adam, config.weight_decay if config.name == "adamw" else 0.0)
    optimizer.of_ngrams = RowAdagrad(tables[0], config.ngram_lr / config.lr) if tables else None
    return optimizer
