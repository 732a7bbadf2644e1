"""Embeddings of n-grams: what follows the common phrases of a text, looked up instead of computed."""

import mindspore as ms
from mindspore import Parameter, ops
from mindspore.common.initializer import initializer

from local_attention.constants import shared_cell
from local_attention.layers import Product, dense
from local_attention.mindspore_quirks import TypedCell

# Hashes stay below 2**31: (2**18 - 1) * FACTOR + num_tokens. A prime, so that the earliest tokens still count.
FACTOR = 8167


class NgramEmbedding(TypedCell):
    """For each token an embedding of the n-gram that it ends, for each ``n`` from 2 on, together mapped to ``dim``.

    An n-gram finds its embedding by a hash, which it may share with others (Pagnoni et al. 2024, arXiv 2412.09871,
    section 3.2.1, there from 3 to 8). All are zero at first, so that one that was never trained changes nothing.

    Args:
        max_ngram: the largest ``n``, from 2.
        buckets: embeddings for each ``n``, best a prime, up to 2**18.
        ngram_dim: their channels.
        dim: channels of the result.

    Raises:
        ValueError: for sizes outside these.
    """

    def __init__(self, max_ngram: int, buckets: int, ngram_dim: int, dim: int) -> None:
        super().__init__()
        self.context, self.buckets, self.ngram_dim = max_ngram - 1, buckets, ngram_dim
        rows = self.context * buckets
        self.embedding_table = Parameter(initializer("zeros", (rows, ngram_dim), ms.float32), name="embedding_table")
        self.to_out, self.product = dense(self.context * ngram_dim, dim), shared_cell(Product)

    def construct(self, tokens, mask=None):
        """``(b, n) -> (b * n, dim)``; the arguments are those of :meth:`bucket_ids_of_sequence`."""
        return self.combine(self.look_up(self.bucket_ids_of_sequence(tokens, mask)))

    def bucket_ids_of_sequence(self, tokens, mask=None):
        """The :meth:`bucket_ids` of whole sequences.

        Args:
            tokens: ``(b, n)`` integers.
            mask: ``(b, n)`` booleans; tokens where it is False count as none.
        """
        numbers = tokens.astype(ms.int32) + 1
        if mask is not None:
            numbers = numbers * mask.astype(ms.int32)
        none = ops.zeros((numbers.shape[0], self.context), ms.int32)
        return self.bucket_ids(ops.cat((none, numbers), 1))

    def bucket_ids(self, numbers):
        """The rows of the table for the last ``n`` of ``numbers: (b, max_ngram - 1 + n)``, one per token and order.

        The numbers are int32: 1 + token, 0 where there is none. Returns ``(b * n * (max_ngram - 1),)``, those of one
        token side by side.
        """
        length = numbers.shape[1] - self.context
        bucket, ids = numbers[:, self.context :], ()
        for i in range(self.context):
            begin = self.context - 1 - i
            bucket = ops.floor_mod(bucket * FACTOR + numbers[:, begin : begin + length], self.buckets)
            ids = ids + (bucket + i * self.buckets,)
        return ops.stack(ids, -1).reshape(-1)

    def look_up(self, bucket_ids):
        """``(rows,) -> (rows, ngram_dim)``."""
        return ops.gather(self.embedding_table, bucket_ids, 0)

    def combine(self, rows):
        """``(b * n * (max_ngram - 1), ngram_dim) -> (b * n, dim)``."""
        return self.product(rows.reshape((-1, self.context * self.ngram_dim)), self.to_out.weight)
