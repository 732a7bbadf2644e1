"""Embeddings of the last few tokens together: what a text's common turns lead to, without a layer that learns it."""

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import Normal

from local_attention.layers import dense

# Keys stay below 2**31: (2**18 - 1) * FACTOR + num_tokens. Prime, so that tokens far back do not fall out of a key.
FACTOR = 8167
MOST_BUCKETS = 2**18


class NgramEmbedding(nn.Cell):
    """For each token an embedding of the n-gram that it ends, for each ``n`` from 2 on, together mapped to ``dim``.

    An n-gram finds its embedding by a hash, which it may share with others (Pagnoni et al. 2024, arXiv 2412.09871,
    section 3.2.1, there from 3 to 8).

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
        self.before, self.buckets = max_ngram - 1, buckets
        self.embeddings = nn.CellList(
            [nn.Embedding(buckets, ngram_dim, embedding_table=Normal(0.02)) for _ in range(self.before)]
        )
        self.to_out = dense(self.before * ngram_dim, dim)

    def construct(self, tokens, mask=None):
        """Embed a text from its beginning.

        Args:
            tokens: ``(b, n)`` int32.
            mask: ``(b, n)`` booleans; tokens where it is False count as none.

        Returns:
            ``(b * n, dim)``.
        """
        numbers = tokens + 1
        if mask is not None:
            numbers = numbers * mask.astype(ms.int32)
        none = ops.zeros((numbers.shape[0], self.before), ms.int32)
        return self.embed(ops.cat((none, numbers), 1))

    def embed(self, numbers):
        """Embed the last ``n`` of ``numbers: (b, max_ngram - 1 + n)`` int32: 1 + token, 0 where there is none.

        Returns:
            ``(b * n, dim)``.
        """
        length = numbers.shape[1] - self.before
        keys, found = numbers[:, self.before :], ()
        for i in range(self.before):
            begin = self.before - 1 - i
            keys = ops.floor_mod(keys * FACTOR + numbers[:, begin : begin + length], self.buckets)
            found = found + (self.embeddings[i](keys.reshape(-1)),)
        return self.to_out(ops.cat(found, 1))
