"""Attention of new tokens to the KV cache by MindSpore's own operators: prefill and decoding."""

from mindspore import Parameter, nn, ops

from local_attention.precision import cast, widen


class CachedMHA(nn.Cell):
    """:class:`LocalMHA` for ``n`` more tokens, whose keys and values go to and come from the cache.

    Args:
        mha: the :class:`LocalMHA`.
        keys, values: of its layer, see :class:`decoding.KVCache`.
    """

    # fmt: off
    computes = frozenset({
        "dim", "window_size", "dim_head", "heads", "dropout", "causal", "prenorm", "qk_rmsnorm", "qk_scale", "use_xpos",
        "xpos_scale_base", "exact_windowsize", "gate_values_per_head", "look_backward", "look_forward", "shared_qk",
        "scale", "use_rotary_pos_emb",
    })
    # fmt: on

    def __init__(self, mha: nn.Cell, keys: Parameter, values: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.mha, self.keys, self.values = mha, keys, values
        self.has_decay = mha.attention.has_decay
        self.write, self.softmax, self.unstack = ops.ScatterUpdate(), ops.Softmax(-1), ops.Unstack()
        self.matmul, self.matmul_nt = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)

    @staticmethod
    def is_available(mha: nn.Cell) -> bool:
        return True

    def construct(self, x, slots, mask, rotation, decay):
        """``x: (b, n, dim)``, returns the same shape; the other arguments: see :class:`decoding.cache.StepInputs`."""
        q, k, v, gates = self.mha.project(x)
        return self.mha.merge(self.attend(q, k, v, slots, mask, rotation, decay), gates)

    def attend(self, q, k, v, slots, mask, rotation, decay):
        """``q, k, v: (b, n, h d)``, returns the same shape."""
        mha, shape = self.mha, q.shape
        q, k, v = mha.split_heads(q), mha.split_heads(k), mha.split_heads(v)
        if self.has_decay:  # widened, as the decay may leave float16's range
            q, k = widen(q), widen(k)
        q_cos, q_sin, k_cos, k_sin = self.unstack(cast(rotation, q.dtype))
        q, k = mha.attention.scale_and_rotate(q, k, q_cos, q_sin, k_cos, k_sin)
        k = cast(k, v.dtype)
        groups, n, d = q.shape
        new_k, new_v = k.reshape((-1, d)), v.reshape((-1, d))
        if n == 1:  # written first, as a token sees itself
            keys, values = self.write(self.keys, slots, new_k), self.write(self.values, slots, new_v)
            keys, values = keys.reshape((groups, -1, d)), values.reshape((groups, -1, d))
        else:  # read beside the cache, as writing would overwrite what they still see
            keys = ops.cat((self.keys.reshape((groups, -1, d)), k), 1)
            values = ops.cat((self.values.reshape((groups, -1, d)), v), 1)
        if self.has_decay:
            keys = widen(keys) * decay
        weights = self.softmax(cast(self.matmul_nt(q, keys), mask.dtype) + mask)
        out = self.matmul(cast(weights, values.dtype), values)
        if n > 1:
            self.write(self.keys, slots, ops.depend(new_k, out))
            self.write(self.values, slots, ops.depend(new_v, out))
        return mha.merge_heads(out).reshape(shape)
