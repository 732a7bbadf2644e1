"""Optimizers: Adam, AdamW, Muon, and Adagrad for the rows of n-gram tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.amp import DynamicLossScaler

from local_attention.kernels import training_kernels_run
from local_attention.layers import dot, tree_map
from local_attention.training.config import OptimizerConfig
from local_attention.training.fused_update import FusedMuon


def sum_of_squares(tensor):
    """The sum of squares, ``()`` float32."""
    return dot(tensor, tensor)


def is_decayed(parameter: Parameter) -> bool:
    """Whether weight decay applies: to the matrices of linear layers, not to norms, biases and embeddings."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and "embedding_table" not in parameter.name


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Whether a parameter is a matrix within the layers of a model, for which :class:`Muon` is used."""
    return parameter.name.startswith("layers.") and parameter.name.endswith(".weight") and min(parameter.shape) > 1


apply_adam = ops.Adam()


def apply_decay(factor, weight):
    return ops.assign(weight, weight * factor)


def adam_step(beta1_power, beta2_power, rate, beta1, beta2, eps, weight, moment1, moment2, gradient):
    return apply_adam(weight, moment1, moment2, beta1_power, beta2_power, rate, beta1, beta2, eps, gradient)


def nesterov(decay, momentum, buffer, gradient):
    """Update the momentum buffer; return the Nesterov update, normalised to a Frobenius norm of 1."""
    buffer = ops.depend(buffer, ops.assign(buffer, buffer * decay + gradient))
    update = gradient + buffer * momentum
    return update * (1 / (ops.sqrt(sum_of_squares(update)) + 1e-7))


def apply_update(rate, weight, update):
    return ops.assign(weight, weight - update * rate)


class Adam(nn.Optimizer):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); with weight decay AdamW (Loshchilov & Hutter 2019, 1711.05101).

    The same formulas as in PyTorch. ``nn.Adam`` applies ``eps`` before the bias correction, which changed the loss of
    the first steps by 1e-3 bits per byte, and ``nn.AdamWeightDecay`` has no bias correction.

    Args:
        params: parameters. Gradients must be in the order of the attribute ``parameters``, which is another one.
        learning_rate: initial learning rate.
        beta1, beta2: decay rates of the moving averages of gradients and of squared gradients.
        eps: added to the square root of the bias-corrected average of squared gradients.
        weight_decay: in each step, parameters that satisfy :func:`is_decayed` shrink by the learning rate times this.
        excluded: whether a parameter is not updated by Adam, but by a subclass.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        learning_rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float = 0.0,
        excluded: Callable[[Parameter], bool] = lambda parameter: False,
    ) -> None:
        params = sorted(params, key=lambda parameter: (excluded(parameter), not is_decayed(parameter)))
        super().__init__(learning_rate, params)
        self.beta1, self.beta2, self.eps, self.decay = beta1, beta2, eps, weight_decay
        self.adam_count = sum(not excluded(parameter) for parameter in params)
        self.moment1 = self.parameters.clone("moment1", init="zeros")
        self.moment2 = ms.ParameterTuple(params[: self.adam_count]).clone("moment2", init="zeros")
        self.adam_weights = self.parameters[: self.adam_count]
        self.adam_moment1 = self.moment1[: self.adam_count]
        self.decayed = tuple(parameter for parameter in self.parameters if weight_decay > 0 and is_decayed(parameter))

    def construct(self, gradients, is_finite):
        """Take a step if ``is_finite``, a () float32, is 1. If it is 0, gradients must be 0, and nothing changes."""
        ops.assign_add(self.global_step, is_finite.astype(ms.int32).reshape(1))
        # Bias correction divides by zero after 0 steps, if the first one is skipped.
        steps = ops.clamp(self.global_step.astype(ms.float32).reshape(()), min=1.0)
        beta1_power, beta2_power = ops.pow(self.beta1, steps), ops.pow(self.beta2, steps)
        # The kernel divides by sqrt(moment2) + eps before the bias correction; this makes eps that of PyTorch.
        eps = self.eps * ops.sqrt(1 - beta2_power)
        rate, beta1 = self.get_lr() * is_finite, self.beta1 * is_finite + (1 - is_finite)
        beta2 = self.beta2 * is_finite + (1 - is_finite)
        done = ()
        if self.decayed:
            done = done + (tree_map(ops.partial(apply_decay, 1 - rate * self.decay), self.decayed),)
        if self.adam_count > 0:
            step = ops.partial(adam_step, beta1_power, beta2_power, rate, beta1, beta2, eps)
            operands = self.adam_weights, self.adam_moment1, self.moment2, gradients[: self.adam_count]
            done = done + (tree_map(step, *operands),)
        return ops.depend(self.global_step, (done, self.update_excluded(gradients, rate, is_finite)))

    def update_excluded(self, gradients, rate, is_finite):
        """Update the excluded parameters; implemented by subclasses."""
        return ()


class Muon(Adam):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for hidden matrices, AdamW for everything else.

    The update of a matrix is the momentum of its gradient, orthogonalised by five Newton-Schulz iterations: its
    singular values become about 1. With ``row_decay``, each of its rows is then divided by the root of the mean square
    that the row had in all updates so far, and the matrix scaled back to its norm (NorMuon, Li et al. 2025, arXiv
    2510.05491, algorithm 1).

    Args:
        params, learning_rate, beta1, beta2, eps, weight_decay: see :class:`Adam`.
        muon_lr: initial learning rate of the hidden matrices. It stays proportional to the learning rate.
        momentum: decay rate of the momentum buffers.
        row_decay: decay rate of the rows' mean squares; 0: rows are not divided.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        learning_rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        muon_lr: float,
        momentum: float,
        row_decay: float,
    ) -> None:
        params = sorted(params, key=lambda parameter: tuple(parameter.shape))  # groups equal shapes
        super().__init__(params, learning_rate, beta1, beta2, eps, weight_decay, excluded=is_hidden_matrix)
        self.lr_ratio, self.momentum, self.row_decay = muon_lr / learning_rate, momentum, row_decay
        self.shape_groups = tuple(  # begin, end, weights, momentum buffers, factor for the shape
            (begin, end, self.parameters[begin:end], self.moment1[begin:end], max(1.0, m / n) ** 0.5)
            for begin, end, (m, n) in equal_runs([p.shape for p in self.parameters], self.adam_count)
        )
        self.row_squares = ms.ParameterTuple(  # of each group, (matrices, rows, 1)
            Parameter(
                Tensor(np.zeros((end - begin, m, 1), np.float32)), name=f"row_squares.{m}x{n}", requires_grad=False
            )
            for begin, end, (m, n) in equal_runs([p.shape for p in self.parameters], self.adam_count)
            if row_decay > 0
        )
        self.fused = None
        if training_kernels_run(self):
            self.fused = nn.CellList([FusedMuon(end - begin) for begin, end, *_ in self.shape_groups])
        self.mean, self.sum = ops.ReduceMean(keep_dims=True), ops.ReduceSum(keep_dims=True)
        self.matmul = ops.BatchMatMul()
        self.matmul_nt, self.matmul_tn = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(transpose_a=True)

    def update_excluded(self, gradients, rate, is_finite):
        # in a skipped step, buffers and mean squares do not decay
        momentum = self.momentum * is_finite + (1 - is_finite)
        row_decay = self.row_decay * is_finite + (1 - is_finite)
        rate = rate * self.lr_ratio
        if self.fused is not None:
            return self.update_fused(gradients, ops.stack((momentum, rate, row_decay)))
        done = ()
        for number, (begin, end, weights, buffers, aspect_ratio) in enumerate(self.shape_groups):
            updates = tree_map(ops.partial(nesterov, momentum, self.momentum), buffers, gradients[begin:end])
            updates = self.orthogonalise(ops.stack(updates))
            if self.row_decay > 0:
                updates = self.divide_rows(updates, self.row_squares[number], row_decay)
            updates = ops.unstack(updates)  # indexing would take 42 ms per step
            done = done + (tree_map(ops.partial(apply_update, rate * aspect_ratio), weights, updates),)
        return done

    def update_fused(self, gradients, settings):
        done = ()
        for number, (begin, end, weights, buffers, _) in enumerate(self.shape_groups):
            count, row_squares = end - begin, settings[:1]
            if self.row_decay > 0:
                row_squares = self.row_squares[number]
            new = self.fused[number](settings, gradients[begin:end], buffers, weights, row_squares)
            done = done + (tree_map(ops.assign, buffers, new[:count]),)
            done = done + (tree_map(ops.assign, weights, new[count : 2 * count]),)
            if self.row_decay > 0:
                done = done + (ops.assign(row_squares, new[2 * count]),)
        return done

    def orthogonalise(self, x):
        """Map ``x: (k, m, n)``, matrices of norm 1, to matrices with singular values of 0.7 to 1.2.

        All matrices of one shape are batched: a hundred large products instead of several hundred small ones.
        """
        is_tall = x.shape[1] > x.shape[2]
        for _ in range(5):
            square = self.matmul_tn(x, x) if is_tall else self.matmul_nt(x, x)
            polynomial = square * -4.7750 + self.matmul(square, square) * 2.0315
            x = x * 3.4445 + (self.matmul(x, polynomial) if is_tall else self.matmul(polynomial, x))
        return x

    def divide_rows(self, updates, row_squares, decay):
        """Divide the rows of ``updates: (k, m, n)`` by the roots of ``row_squares: (k, m, 1)``, which are updated."""
        squares = row_squares * decay + self.mean(updates * updates, 2) * (1 - decay)
        squares = ops.depend(squares, ops.assign(row_squares, squares))
        divided = updates * ops.rsqrt(squares + 1e-10)
        # 1e-20, as all is zero in a matrix without a gradient
        return divided * ops.sqrt(self.sum(updates * updates, (1, 2)) / (self.sum(divided * divided, (1, 2)) + 1e-20))


class Run(NamedTuple):
    """Equal items ``begin … end - 1`` of a sequence."""

    begin: int
    end: int
    item: tuple[int, ...]


def equal_runs(items: Sequence[tuple[int, ...]], begin: int) -> Iterator[Run]:
    """Yield the maximal runs of equal items from ``begin`` on."""
    while begin < len(items):
        end = next((i for i in range(begin, len(items)) if items[i] != items[begin]), len(items))
        yield Run(begin, end, items[begin])
        begin = end


class RowAdagrad(nn.Cell):
    """Adagrad (Duchi et al. 2011, JMLR 12) for those rows of a large table that a step uses, with one rate per row.

    If a row occurs several times, each occurrence contributes a gradient to the row and to its rate. The cost does not
    depend on the size of the table, while Adam on a table of 15 million numbers took a fifth of a step.

    Args:
        table: a Parameter ``(rows, d)``.
        lr_ratio: the learning rate relative to that of the other optimizer.
    """

    def __init__(self, table: Parameter, lr_ratio: float) -> None:
        super().__init__()
        rows, d = table.shape
        self.table, self.lr_ratio = table, lr_ratio
        self.squares = Parameter(Tensor(np.zeros((rows, 1), np.float32)), name="squares", requires_grad=False)
        self.mean_column = Tensor(np.full((d, 1), 1 / d, np.float32))
        self.ones_row = Tensor(np.ones((1, d), np.float32))
        self.add, self.matmul, self.rsqrt = ops.ScatterAdd(), ops.MatMul(), ops.Rsqrt()

    def construct(self, rows, gradients, rate):
        """``rows: (k,)`` int32, their indices; ``gradients: (k, d)``; ``rate: ()``, the optimizer's learning rate."""
        squares = self.add(self.squares, rows, self.matmul(gradients * gradients, self.mean_column))
        scale = self.rsqrt(ops.gather(squares, rows, 0) + 1e-20)
        updates = gradients * self.matmul(scale, self.ones_row)
        return self.add(self.table, rows, updates * (rate * -self.lr_ratio))


GROWTH_INTERVAL = 1000  # steps without an overflow after which the loss scale is doubled


def loss_scaler(precision: str, initial: float) -> DynamicLossScaler | None:
    """The scaler of the loss, without which small gradients are 0 in float16; None for types of float32's range."""
    return DynamicLossScaler(initial, 2, GROWTH_INTERVAL) if precision == "float16" else None


def build_optimizer(
    config: OptimizerConfig, params: Iterable[Parameter], scaler: DynamicLossScaler | None = None
) -> Adam:
    """Build the optimizer that a config describes. Its learning rate must be set before each step.

    Its attribute ``ngram_optimizer`` is a :class:`RowAdagrad` for the n-gram table of the model, or None without one;
    ``loss_scaler`` is what the loss is to be scaled by, or None.
    """
    params = list(params)
    tables = [parameter for parameter in params if parameter.name.endswith("ngram_emb.embedding_table")]
    dense = [parameter for parameter in params if all(parameter is not table for table in tables)]
    adam = (dense, config.lr, config.beta1, config.beta2, config.eps)
    optimizer: Adam
    if config.name == "adam":
        optimizer = Adam(*adam)
    elif config.name == "adamw":
        optimizer = Adam(*adam, config.weight_decay)
    elif config.name == "muon":
        optimizer = Muon(*adam, config.weight_decay, config.muon_lr, config.momentum, config.muon_beta2)
    else:
        raise ValueError(f"no optimizer is called {config.name}")
    optimizer.ngram_optimizer = RowAdagrad(tables[0], config.ngram_lr / config.lr) if tables else None
    optimizer.loss_scaler = scaler
    return optimizer
