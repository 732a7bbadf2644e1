"""What follows the gradients, by fused operators in C++, each for all tensors at once; see kernels/README.md.

Hundreds of MindSpore's operators on small tensors take a sixth of a small model's step, and a fifth of the time to
compile it.
"""

from local_attention.kernels import OperatorCell


class FusedNorm(OperatorCell):
    """The root of the sum of all squares of a tuple of tensors, ``()``."""

    def __init__(self) -> None:
        super().__init__("global_norm", lambda *shapes: [1])

    def construct(self, tensors):
        return self.operator(*tensors).reshape(())


class FusedTimesOrZero(OperatorCell):
    """``factor``, a number, times each of ``count`` tensors, as a tuple; NaN and infinity become 0."""

    def __init__(self, count: int) -> None:
        super().__init__("times_or_zero", lambda factor, *shapes: shapes if count > 1 else shapes[0], count)
        self.count = count

    def construct(self, factor, tensors):
        products = self.operator(factor, *tensors)
        return products if self.count > 1 else (products,)


class FusedMuon(OperatorCell):
    """A step of :class:`Muon` for ``count`` matrices ``(m, n)``.

    Called with a tensor of momentum, learning rate and ``row_decay``, the matrices' gradients, momentum buffers and
    weights, and the mean squares of their rows, ``(count, m, 1)``, or ``(1,)`` if rows are not divided. Returns the new
    buffers, weights and mean squares in one tuple.
    """

    def __init__(self, count: int) -> None:
        super().__init__("muon_step", lambda *shapes: shapes[1 + count :], 2 * count + 1)

    def construct(self, settings, gradients, buffers, weights, row_squares):
        return self.operator(settings, *gradients, *buffers, *weights, row_squares)
