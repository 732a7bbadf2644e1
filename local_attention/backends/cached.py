"""Attention of new tokens to the KV cache by MindSpore's own operators: prefill and decoding."""

from mindspore import nn, ops


class CachedMHA(nn.Cell):
    """:class:`LocalMHA` for ``n`` more tokens, whose keys and values go to and come from the cache.

    Args:
        mha: the :class:`LocalMHA`.
        keys, values: of the cache, see :class:`decoding.KVCache`.
    """

    # fmt: off
    computes = frozenset({
        "dim", "window_size", "dim_head", "heads", "dropout", "causal", "prenorm", "qk_rmsnorm", "qk_scale",
        "use_xpos", "xpos_scale_base", "exact_windowsize", "gate_values_per_head", "look_backward", "look_forward",
        "shared_qk", "scale", "use_rotary_pos_emb",
    })
    # fmt: on

    def __init__(self, mha, keys, values):
        super().__init__(auto_prefix=False)
        self.mha, self.attend = mha, CachedAttention(mha.attention, keys, values)

    @staticmethod
    def is_available(mha):
        return True

    def construct(self, x, slots, mask, rotation, decay):
        """Attend.

        Args:
            x: ``(b, n, dim)``.
            slots: ``(b * heads * n,)`` int32, the rows of the cache that take the new keys and values.
            mask: ``(1 or b * heads, n, span)``, additive. The keys are those of the cache's slots; for more than one
                token also their own, after them.
            rotation: ``(4, b * heads * n, d)``, cosines and sines of the positions for queries, times the scale of the
                scores and their xPos decay, and for keys.
            decay: ``(1, span, d)``, the xPos decay of the keys.

        Returns:
            ``(b, n, dim)``.
        """
        return self.mha.attend_with(self.attend, x, (slots, mask, rotation, decay))


class CachedAttention(nn.Cell):
    """How the queries of :class:`CachedMHA` meet their keys."""

    def __init__(self, attention, keys, values):
        super().__init__(auto_prefix=False)
        self.attention, self.keys, self.values = attention, keys, values
        self.use_xpos = attention.rel_pos is not None and attention.use_xpos
        self.write, self.softmax, self.unstack = ops.ScatterUpdate(), ops.Softmax(-1), ops.Unstack()
        self.matmul, self.matmul_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)

    def construct(self, q, k, v, slots, mask, rotation, decay):
        """``q, k, v: (b, h, n, d)``, returns the like."""
        b, h, n, d = q.shape
        q, k = self.attention.encode(q, k, self.unstack(rotation))
        new_k, new_v = k.reshape((-1, d)), v.reshape((-1, d))
        if n == 1:
            keys, values = self.write(self.keys, slots, new_k), self.write(self.values, slots, new_v)
            out = self.meet(q.reshape((b * h, n, d)), keys, values, mask, decay)
        else:
            keys = ops.cat((self.keys.reshape((b * h, -1, d)), k.reshape((b * h, n, d))), 1)
            values = ops.cat((self.values.reshape((b * h, -1, d)), v.reshape((b * h, n, d))), 1)
            out = self.meet(q.reshape((b * h, n, d)), keys, values, mask, decay)
            # not before these tokens have seen what will be overwritten
            self.write(self.keys, slots, ops.depend(new_k, out))
            self.write(self.values, slots, ops.depend(new_v, out))
        return out.reshape((b, h, n, d))

    def meet(self, q, keys, values, mask, decay):
        groups, _, d = q.shape
        keys, values = keys.reshape((groups, -1, d)), values.reshape((groups, -1, d))
        if self.use_xpos:
            keys = keys * decay
        return self.matmul(self.softmax(self.matmul_nt(q, keys) + mask), values)
