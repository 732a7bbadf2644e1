"""One token's attention to the cache and its feed-forward, each as one operator in C++, on a CPU: kernels.cpp.

They are optional. pip builds them where it finds a compiler; without them, on other devices, and elsewhere than on
Linux, where MindSpore takes no operators in C++, its own compute the same.
"""

import ctypes
import platform
from functools import cache
from importlib.util import find_spec

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


@cache
def library():
    """Path of the library that pip built of kernels.cpp, or None: there is none, or it is one for other machines."""
    spec = find_spec("local_attention._kernels")
    if spec is None:
        return None
    try:
        ctypes.CDLL(spec.origin)  # stays loaded, as its threads run until the process ends
    except OSError:
        return None
    return spec.origin


def can_use_kernels(model):
    """Whether the operators are there, for the device in use and for the numbers of a model."""
    in_float32 = all(parameter.dtype == ms.float32 for parameter in model.get_parameters())
    on_cpu = platform.system() == "Linux" and ms.get_context("device_target") == "CPU"
    return library() is not None and in_float32 and on_cpu


def operator(name):
    """An operator whose output has the shape of its first input."""
    return ops.Custom(f"{library()}:{name}", lambda x, *_: x, ms.float32, func_type="aot")


class LayerKernels(nn.Cell):
    """The two branches of a layer, for one token of each text, ``x: (b, dim) -> (b, dim)``.

    Args:
        layer: a :class:`Layer`.
        scale: the factor of the scores.
    """

    def __init__(self, layer, scale):
        super().__init__(auto_prefix=False)
        self.mha, self.ff = layer.attention, layer.feed_forward
        attention = self.mha.attention
        self.attend_to_cache, self.apply_feed_forward = operator("attend_to_cache"), operator("feed_forward")
        self.absent = Tensor(np.zeros(1, np.float32))
        self.unit_keys = Tensor(np.array([attention.l2_norm is not None], np.int32))
        self.rotary = attention.rel_pos is not None
        self.use_xpos = self.rotary and attention.use_xpos
        unturned = np.eye(self.mha.dim_head, dtype=np.float32)[None]
        self.keys_unturned, self.queries_unturned = Tensor(unturned), Tensor(unturned * np.float32(scale))

    def attend(self, x, keys, values, slots, bias, turn_query, turn_key, decay):
        """What :meth:`DecodeStep.attend` does. The operator itself writes the new key and value into ``slots``.

        MindSpore is not told so, which is safe as long as everything that reads the rings depends on the output.
        """
        mha = self.mha
        gate = gate_bias = q_scale = k_scale = self.absent
        if mha.to_v_gate is not None:
            gate, gate_bias = mha.to_v_gate.weight, mha.to_v_gate.bias
        if mha.qk_rmsnorm:
            q_scale, k_scale = mha.q_scale.reshape((1, -1)), mha.k_scale.reshape((1, -1))
        if not self.rotary:
            turn_query, turn_key = self.queries_unturned, self.keys_unturned
        if not self.use_xpos:
            decay = self.absent
        norm, weights = mha.norm, (mha.to_q.weight, mha.to_k.weight, mha.to_v.weight, mha.to_out.weight)
        options = (gate, gate_bias, q_scale, k_scale, self.unit_keys)
        positions = (turn_query, turn_key, bias, decay)
        return self.attend_to_cache(x, norm.gamma, norm.beta, *weights, *options, *positions, keys, values, slots)

    def feed_forward(self, x):
        ff = self.ff
        weights = (ff.to_value.weight, ff.to_gate.weight, ff.to_out.weight)
        return self.apply_feed_forward(x, ff.norm.gamma, ff.norm.beta, *weights)
