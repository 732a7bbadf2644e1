"""Embeddings of the last few tokens together: what a text's common turns lead to, without a layer that learns it."""

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import initializer

from local_attention.layers import dense

# Keys stay below 2**31: (2**18 - 1) * FACTOR + num_tokens. Prime, so that tokens far back do not fall out of a key.
FACTOR = 8167
MOST_BUCKETS = 2**18


class NgramEmbedding(nn.Cell):
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

    def __init__(self, max_ngram, buckets, ngram_dim, dim):
        super().__init__()
        if not 2 <= buckets <= MOST_BUCKETS:
            raise ValueError(f"expected ngram_buckets from 2 to {MOST_BUCKETS}, got {buckets}")
        if ngram_dim < 1:
            raise ValueError(f"expected ngram_dim >= 1, got {ngram_dim}")
        self.before, self.buckets, self.ngram_dim = max_ngram - 1, buckets, ngram_dim
        rows = self.before * buckets
        self.embedding_table = Parameter(initializer("zeros", (rows, ngram_dim), ms.float32), name="embedding_table")
        self.to_out = dense(self.before * ngram_dim, dim)

    def construct(self, tokens, mask=None, rows=None):
        """Embed a text from its beginning.

        Args:
            tokens: ``(b, n)`` int32.
            mask: ``(b, n)`` booleans; tokens where it is False count as none.
            rows: what :meth:`look_up` finds for :meth:`bucket_ids_of_sequence`, if that was looked up before.

        Returns:
            ``(b * n, dim)``.
        """
        if rows is None:
            rows = self.look_up(self.bucket_ids_of_sequence(tokens, mask))
        return self.combine(rows)

    def bucket_ids_of_sequence(self, tokens, mask=None):
        """The arguments as :meth:`construct`'s; returns what :meth:`keys` does."""
        numbers = tokens + 1
        if mask is not None:
            numbers = numbers * mask.astype(ms.int32)
        none = ops.zeros((numbers.shape[0], self.before), ms.int32)
        return self.keys(ops.cat((none, numbers), 1))

    def keys(self, numbers):
        """Which rows of the table belong to the last ``n`` of ``numbers: (b, max_ngram - 1 + n)``.

        The numbers are int32: 1 + token, 0 where there is none. Returns ``(b * n * (max_ngram - 1),)``, those of one
        token side by side.
        """
        length = numbers.shape[1] - self.before
        key, keys = numbers[:, self.before :], ()
        for i in range(self.before):
            begin = self.before - 1 - i
            key = ops.floor_mod(key * FACTOR + numbers[:, begin : begin + length], self.buckets)
            keys = keys + (key + i * self.buckets,)
        return ops.stack(keys, -1).reshape(-1)

    def look_up(self, keys):
        """``(rows,) -> (rows, ngram_dim)``."""
        return ops.gather(self.embedding_table, keys, 0)

    def combine(self, rows):
        """``(b * n * (max_ngram - 1), ngram_dim) -> (b * n, dim)``."""
        return self.to_out(rows.reshape((-1, self.before * self.ngram_dim)))
