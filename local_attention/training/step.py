"""One optimizer step as one static graph: accumulate over micro-batches, clip, update."""

import logging
import time

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from local_attention.layers import tree_map
from local_attention.training.optimizer import Adam, sum_of_squares

log = logging.getLogger("train")

zero_for_nan = ops.NanToNum(0.0, 0.0, 0.0)


def times_or_zero(factor, tensor):
    return zero_for_nan(tensor * factor)


class LanguageModelLoss(nn.Cell):
    """Crops ``(b, n + 1)`` to the mean cross-entropy of their last ``n`` bytes, in nats."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, crops, ngram_rows=None):
        if ngram_rows is None:
            return self.model(crops, return_loss=True)
        return self.model(crops, return_loss=True, ngram_rows=ngram_rows)


class TrainStep(nn.TrainOneStepCell):
    """Forward, backward, mean over micro-batches, clip by global norm, optimizer step.

    Where loss or norm is NaN or infinite, weights and the state of an :class:`Adam` stay as they are; another optimizer
    gets gradients of zero.

    The micro-batches run one after the other in a loop of the graph, so the memory is that of one of them (and of a
    second set of gradients), and compiling takes as long as for one.

    Args:
        model: a ``LocalTransformer``.
        optimizer: an ``nn.Optimizer`` whose learning rate is a Parameter, set by :meth:`set_learning_rate`.
        grad_accum_every: micro-batches a step.
        clip_norm: the gradient's global norm is scaled down to this where it is larger; without that of n-grams, whose
            optimizer does not care for scale.
        workers: how many train together, each with crops of its own; loss, gradients and norm are means over them.
    """

    def __init__(self, model, optimizer, grad_accum_every, clip_norm, workers=1):
        super().__init__(LanguageModelLoss(model), optimizer)
        self.grad_accum_every, self.clip_norm = grad_accum_every, clip_norm
        self.can_skip = isinstance(optimizer, Adam)
        self.ngram_emb, self.of_ngrams = getattr(model, "ngram_emb", None), getattr(optimizer, "of_ngrams", None)
        of_rows = None if self.of_ngrams is None else 1
        self.loss_and_gradients = ops.value_and_grad(self.network, of_rows, self.weights)
        self.workers = workers
        if workers > 1:
            self.all_reduce, self.all_gather = ops.AllReduce(), ops.AllGather()
        if grad_accum_every > 1:
            self.loss_sum = Parameter(Tensor(0.0, ms.float32), name="loss_sum", requires_grad=False)
            self.gradient_sums = self.weights.clone("gradient_sum", init="zeros")
            self.put = ops.TensorScatterUpdate()

    def set_learning_rate(self, learning_rate):
        """The rate of the next steps."""
        self.optimizer.learning_rate.set_data(Tensor(learning_rate, ms.float32))

    def construct(self, crops):
        """``crops: (grad_accum_every, b, n + 1)`` int32. Returns loss in nats, unclipped norm, learning rate."""
        keys, rows = None, ops.zeros((self.grad_accum_every, 1, 1), ms.float32)
        if self.of_ngrams is not None:
            keys = self.ngram_emb.bucket_ids_of_sequence(crops.reshape((-1, crops.shape[-1]))[:, :-1])
            rows = self.ngram_emb.look_up(keys).reshape((self.grad_accum_every, -1, self.ngram_emb.ngram_dim))
        if self.grad_accum_every > 1:
            loss, gradients, rows = self.accumulate(crops, rows)
        elif self.of_ngrams is not None:
            loss, (rows, gradients) = self.loss_and_gradients(crops[0], rows[0])
        else:
            loss, gradients = self.loss_and_gradients(crops[0])
        if self.workers > 1:
            loss = self.all_reduce(loss) / self.workers
            gradients = self.grad_reducer(gradients)  # their means
        norm = global_norm(gradients)
        # An update inside an "if" of the graph does not reach the weights (MindSpore 2.10 on a CPU), so one that is to
        # be skipped is made an update by nothing.
        taken = ops.isfinite(loss + norm).astype(norm.dtype)
        shrink = ops.minimum(ops.ones_like(norm), self.clip_norm / (norm + 1e-6)) * taken
        clipped = tree_map(ops.partial(times_or_zero, shrink), gradients)
        learning_rate = self.optimizer.learning_rate + 0.0
        if self.can_skip:
            loss = ops.depend(loss, self.optimizer(clipped, taken))
        else:
            loss = ops.depend(loss, self.optimizer(clipped))
        if self.of_ngrams is not None:
            rows = rows.reshape((-1, self.ngram_emb.ngram_dim))
            if self.workers > 1:  # of a table that no worker could send as a whole
                keys, rows = self.all_gather(keys), self.all_gather(rows) / self.workers
            rows = times_or_zero(taken, rows)
            loss = ops.depend(loss, self.of_ngrams(keys, rows, learning_rate))
        return loss, norm, learning_rate

    def accumulate(self, crops, rows):
        """Mean loss and mean gradients over the micro-batches, and the gradients of all their rows of n-grams.

        ``rows: (grad_accum_every, k, ngram_dim)``; without n-grams of no meaning, and returned.
        """
        ops.assign(self.loss_sum, ops.zeros_like(self.loss_sum))
        tree_map(ops.assign, self.gradient_sums, tree_map(ops.zeros_like, self.gradient_sums))
        i = Tensor(0, ms.int32)
        while i < self.grad_accum_every:
            if self.of_ngrams is None:
                loss, gradients = self.loss_and_gradients(ops.gather(crops, i, 0))
            else:
                loss, (of_rows, gradients) = self.loss_and_gradients(ops.gather(crops, i, 0), ops.gather(rows, i, 0))
                rows = self.put(rows, i.reshape((1, 1)), of_rows.reshape((1, *of_rows.shape)))  # these are done with
            ops.assign_add(self.loss_sum, loss)
            tree_map(ops.assign_add, self.gradient_sums, gradients)
            i = i + 1
        share = 1 / self.grad_accum_every
        return self.loss_sum * share, tree_map(ops.partial(ops.mul, share), self.gradient_sums), rows * share


def global_norm(tensors):
    """Square root of the sum of all squares."""
    return ops.sqrt(ops.addn(tree_map(sum_of_squares, tensors)))


def compile_step(step, train):
    """Compile a :class:`TrainStep` for the crops of a ``TrainConfig``, so that no step is timed with it."""
    begin = time.monotonic()
    step.set_train()
    step.compile(Tensor(shape=(train.grad_accum_every, train.batch_size, train.seq_len + 1), dtype=ms.int32))
    log.info(f"compiled the step in {time.monotonic() - begin:.1f} s")
