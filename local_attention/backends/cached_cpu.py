"""Prefill and decoding by operators in C++ on a CPU, one for each branch of a layer; see kernels/README.md."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn

from local_attention.backends.cached import CachedMHA
from local_attention.kernels import kernels_run, operator, training_kernels_run


class CachedMHAOperator(nn.Cell):
    """:class:`CachedMHA` for one token per sequence; takes and gives the same.

    The operator itself writes the new key and value into the cache. MindSpore is not told so, which is safe as long as
    everything that reads the cache depends on the output.
    """

    # fmt: off
    computes = frozenset({
        "dim", "window_size", "dim_head", "heads", "dropout", "causal", "prenorm", "qk_rmsnorm", "qk_scale",
        "use_xpos", "xpos_scale_base", "exact_windowsize", "gate_values_per_head", "look_backward", "look_forward",
        "shared_qk", "scale", "use_rotary_pos_emb",
    })
    # fmt: on

    @staticmethod
    def is_available(mha: nn.Cell) -> bool:
        """Where the operators run; they include the LayerNorm before the projections."""
        return mha.norm is not None and kernels_run(mha)

    def __init__(self, mha: nn.Cell, keys: Parameter, values: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.mha, self.keys, self.values = mha, keys, values
        self.attend_to_cache = operator("attend_to_cache")
        self.absent = ms.Tensor(np.zeros(1, np.float32))  # a single axis means absent, see kernels/decode.cpp
        self.l2_normalise_keys = ms.Tensor(np.array([mha.attention.l2_norm is not None], np.int32))
        self.has_decay = mha.attention.has_decay

    def construct(self, x, slots, mask, rotation, decay):
        mha = self.mha
        gate = gate_bias = q_scale = k_scale = self.absent
        if mha.to_v_gate is not None:
            gate, gate_bias = mha.to_v_gate.weight, mha.to_v_gate.bias
        if mha.qk_rmsnorm:
            q_scale, k_scale = mha.q_scale.reshape((1, -1)), mha.k_scale.reshape((1, -1))
        if not self.has_decay:
            decay = self.absent
        norm, weights = mha.norm, (mha.to_q.weight, mha.to_k.weight, mha.to_v.weight, mha.to_out.weight)
        optional = (gate, gate_bias, q_scale, k_scale, self.l2_normalise_keys)
        inputs = (rotation, mask, decay, self.keys, self.values, slots)
        rows = x.reshape((x.shape[0], x.shape[2]))
        return self.attend_to_cache(rows, norm.gamma, norm.beta, *weights, *optional, *inputs).reshape(x.shape)


class PrefillMHAOperator(CachedMHA):
    """:class:`CachedMHA` for several tokens per sequence, with the same in-place update of the cache as above."""

    # fmt: off
    computes = frozenset({
        "dim", "window_size", "dim_head", "heads", "dropout", "causal", "prenorm", "qk_rmsnorm", "qk_scale",
        "use_xpos", "xpos_scale_base", "exact_windowsize", "gate_values_per_head", "look_backward", "look_forward",
        "shared_qk", "scale", "use_rotary_pos_emb",
    })
    # fmt: on

    @staticmethod
    def is_available(mha: nn.Cell) -> bool:
        return training_kernels_run(mha)

    def __init__(self, mha: nn.Cell, keys: Parameter, values: Parameter) -> None:
        super().__init__(mha, keys, values)
        self.attend_chunk_to_cache = operator("attend_chunk_to_cache")
        self.absent = ms.Tensor(np.zeros(1, np.float32))

    def attend(self, q, k, v, slots, mask, rotation, decay):
        if self.mha.attention.l2_norm is not None:
            k = self.mha.attention.l2_norm(k.reshape((-1, self.mha.dim_head))).reshape(k.shape)
        if not self.has_decay:
            decay = self.absent
        return self.attend_chunk_to_cache(q, k, v, rotation, mask, decay, self.keys, self.values, slots)


class FeedForwardOperator(nn.Cell):
    """:class:`FeedForward` for one token per sequence, ``(b, 1, dim)``."""

    computes = frozenset({"dim", "mult", "dropout"})
    is_available = staticmethod(kernels_run)

    def __init__(self, feed_forward: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.ff, self.feed_forward = feed_forward, operator("feed_forward")

    def construct(self, x):
        ff, rows = self.ff, x.reshape((x.shape[0], x.shape[2]))
        weights = (ff.to_value.weight, ff.to_gate.weight, ff.to_out.weight)
        return self.feed_forward(rows, ff.norm.gamma, ff.norm.beta, *weights).reshape(x.shape)
