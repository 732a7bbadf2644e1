"""The train step as one static graph: accumulate gradients over micro-batches, clip, update."""

from __future__ import annotations

import logging
import time

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.amp import DynamicLossScaler

from local_attention.kernels import training_kernels_run
from local_attention.layers import tree_map
from local_attention.training.config import TrainConfig
from local_attention.training.fused_update import FusedNorm, FusedTimesOrZero
from local_attention.training.optimizer import Adam, sum_of_squares

log = logging.getLogger("train")

zero_for_nan = ops.NanToNum(0.0, 0.0, 0.0)


def number_times_or_zero(factor, tensor):
    """Multiply; NaN and infinity become 0."""
    return zero_for_nan(tensor * factor)


class GlobalNorm(nn.Cell):
    """The root of the sum of all squares of a tuple of tensors, ``()`` float32."""

    def construct(self, tensors):
        return ops.sqrt(ops.addn(tree_map(sum_of_squares, tensors)))


class TimesOrZero(nn.Cell):
    """``factor: ()`` times each of a tuple of tensors; NaN and infinity become 0."""

    def construct(self, factor, tensors):
        return tree_map(ops.partial(number_times_or_zero, factor), tensors)


class LanguageModelLoss(nn.Cell):
    """The mean cross-entropy in nats of the last ``n`` bytes of sequences ``(b, n + 1)``, times any loss scale."""

    def __init__(self, model: nn.Cell, loss_scaler: DynamicLossScaler | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.loss_scaler = model, loss_scaler

    def construct(self, sequences, ngram_rows=None):
        loss = self.loss(sequences, ngram_rows)
        return loss if self.loss_scaler is None else loss * self.loss_scaler.scale_value

    def loss(self, sequences, ngram_rows):
        # not in construct: MindSpore 2.10 never frees a cell whose construct itself gives keyword arguments
        return self.model(sequences, return_loss=True, ngram_rows=ngram_rows)


class TrainStep(nn.TrainOneStepCell):
    """Forward, backward, gradient accumulation, clipping by global norm, optimizer step.

    If loss or norm is NaN or infinite, the step is skipped: weights and the state of an :class:`Adam` do not change.
    Other optimizers get gradients of zero. With a ``loss_scaler`` of the optimizer, gradients are those of the scaled
    loss until they are clipped; the scale falls with each step that is skipped.

    The micro-batches run in a loop within the graph. Their number therefore affects neither the compile time nor,
    except for the accumulated gradients, the memory.

    Args:
        model: a ``LocalTransformer``.
        optimizer: an optimizer whose learning rate is a Parameter, set by :meth:`set_learning_rate`.
        grad_accum_every: number of micro-batches per step.
        clip_norm: maximum global norm of the gradients. Those of n-gram embeddings are not clipped: Adagrad
            bounds each update by the learning rate.
        world_size: number of processes, each with its own sequences; loss, gradients and norm are averaged over them.
    """

    def __init__(
        self, model: nn.Cell, optimizer: nn.Optimizer, grad_accum_every: int, clip_norm: float, world_size: int = 1
    ) -> None:
        loss_scaler = getattr(optimizer, "loss_scaler", None)
        super().__init__(LanguageModelLoss(model, loss_scaler), optimizer)
        self.loss_scaler = loss_scaler
        self.grad_accum_every, self.clip_norm = grad_accum_every, clip_norm
        self.can_skip = isinstance(optimizer, Adam)
        self.ngram_emb = getattr(model, "ngram_emb", None)
        self.ngram_optimizer = getattr(optimizer, "ngram_optimizer", None)
        grad_position = None if self.ngram_optimizer is None else 1  # of ngram_rows, as only they change in a step
        self.loss_and_gradients = ops.value_and_grad(self.network, grad_position, self.weights)
        is_fused = training_kernels_run(self)
        self.global_norm = FusedNorm() if is_fused else GlobalNorm()
        self.times_or_zero = FusedTimesOrZero(len(self.weights)) if is_fused else TimesOrZero()
        self.world_size = world_size
        if world_size > 1:
            self.all_reduce, self.all_gather = ops.AllReduce(), ops.AllGather()
        if grad_accum_every > 1:
            self.loss_sum = Parameter(Tensor(0.0, ms.float32), name="loss_sum", requires_grad=False)
            self.gradient_sums = self.weights.clone("gradient_sum", init="zeros")
            self.put = ops.TensorScatterUpdate()

    @property
    def loss_scale(self) -> float:
        """The factor of the loss in the next step."""
        return 1.0 if self.loss_scaler is None else float(self.loss_scaler.scale_value.asnumpy())

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        self.optimizer.learning_rate.set_data(Tensor(learning_rate, ms.float32))

    def construct(self, sequences):
        """Take a step with ``sequences: (grad_accum_every, b, n + 1)`` int32.

        Returns the loss in nats, the gradient norm before clipping, and the learning rate.
        """
        bucket_ids, rows = None, ops.zeros((self.grad_accum_every, 1), ms.float32)
        if self.ngram_optimizer is not None:
            inputs = sequences.reshape((-1, sequences.shape[-1]))[:, :-1]
            bucket_ids = self.ngram_emb.bucket_ids_of_sequence(inputs)
            rows = self.ngram_emb.look_up(bucket_ids)
        row_gradients = rows  # without n-grams, neither has a meaning
        if self.grad_accum_every > 1:
            loss, gradients, row_gradients = self.accumulate(sequences, rows)
        elif self.ngram_optimizer is not None:
            loss, (row_gradients, gradients) = self.loss_and_gradients(sequences[0], rows)
        else:
            loss, gradients = self.loss_and_gradients(sequences[0])
        if self.world_size > 1:
            loss = self.all_reduce(loss) / self.world_size
            gradients = self.grad_reducer(gradients)  # the mean over the processes
        if self.ngram_optimizer is not None and self.world_size > 1:
            # only the rows in use are sent, as the table is large
            bucket_ids = self.all_gather(bucket_ids)
            row_gradients = self.all_gather(row_gradients) / self.world_size
        norm = self.global_norm(gradients)
        if self.loss_scaler is not None:
            unscale = 1 / self.loss_scaler.scale_value
            loss, norm, row_gradients = loss * unscale, norm * unscale, row_gradients * unscale
            if self.ngram_optimizer is not None:  # whose gradients may overflow, too
                total = row_gradients.sum()
                norm = ops.select(ops.isfinite(total), norm, total)
        # An update inside an "if" of the graph does not reach the weights (MindSpore 2.10 on CPUs), so to skip a step,
        # it is multiplied by zero.
        is_finite = ops.isfinite(loss + norm).astype(norm.dtype)
        clip_coef = ops.minimum(ops.ones_like(norm), self.clip_norm / (norm + 1e-6)) * is_finite
        if self.loss_scaler is not None:
            clip_coef = clip_coef * unscale
            self.loss_scaler.adjust(is_finite > 0)
        clipped = self.times_or_zero(clip_coef, gradients)
        learning_rate = self.optimizer.learning_rate + 0.0  # a copy, as the parameter changes before it is read
        if self.can_skip:
            loss = ops.depend(loss, self.optimizer(clipped, is_finite))
        else:
            loss = ops.depend(loss, self.optimizer(clipped))
        if self.ngram_optimizer is not None:
            row_gradients = number_times_or_zero(is_finite, row_gradients)
            loss = ops.depend(loss, self.ngram_optimizer(bucket_ids, row_gradients, learning_rate))
        return loss, norm, learning_rate

    def accumulate(self, sequences, rows):
        """Return the mean loss and gradients over the micro-batches, and the gradients of their n-gram embeddings.

        ``rows: (k, ngram_dim)`` are these embeddings; without n-grams they have no meaning.
        """
        shape = rows.shape
        rows = rows.reshape((self.grad_accum_every, -1, shape[1]))  # of each micro-batch
        ops.assign(self.loss_sum, ops.zeros_like(self.loss_sum))
        tree_map(ops.assign, self.gradient_sums, tree_map(ops.zeros_like, self.gradient_sums))
        i = Tensor(0, ms.int32)
        while i < self.grad_accum_every:
            if self.ngram_optimizer is None:
                loss, gradients = self.loss_and_gradients(ops.gather(sequences, i, 0))
            else:
                loss, (row_gradients, gradients) = self.loss_and_gradients(
                    ops.gather(sequences, i, 0), ops.gather(rows, i, 0)
                )
                # These embeddings are not needed any more, so their gradients take their place.
                rows = self.put(rows, i.reshape((1, 1)), row_gradients.reshape((1, *row_gradients.shape)))
            ops.assign_add(self.loss_sum, loss)
            tree_map(ops.assign_add, self.gradient_sums, gradients)
            i = i + 1
        scale = 1 / self.grad_accum_every
        gradients = tree_map(ops.partial(ops.mul, scale), self.gradient_sums)
        return self.loss_sum * scale, gradients, rows.reshape(shape) * scale


def compile_step(step: TrainStep, train: TrainConfig) -> None:
    """Compile a train step for the batches of a config, so that compilation does not count as the time of a step."""
    begin = time.monotonic()
    step.set_train()
    step.compile(Tensor(shape=(train.grad_accum_every, train.batch_size, train.seq_len + 1), dtype=ms.int32))
    log.info(f"compiled the train step in {time.monotonic() - begin:.1f} s")
