"""Fused operators in C++, called without MindSpore: by several threads, or on some of the processor's cores."""

import ctypes
import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def onednn():
    """Path of the oneDNN that MindSpore brings."""
    (folder,) = find_spec("mindspore").submodule_search_locations
    return str(Path(folder, "lib", "libdnnl.so.3"))


def call(library, name, inputs, shapes):
    """The outputs of an operator, of these ``shapes``; raises ``ValueError`` for inputs that it does not take."""
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    arrays = [*inputs, *outputs]
    count, sizes = len(arrays), [(ctypes.c_int64 * x.ndim)(*x.shape) for x in arrays]
    status = getattr(library, name)(
        count,
        (ctypes.c_void_p * count)(*(x.ctypes.data for x in arrays)),
        (ctypes.c_int * count)(*(x.ndim for x in arrays)),
        (ctypes.c_void_p * count)(*map(ctypes.addressof, sizes)),
        (ctypes.c_char_p * count)(*(str(x.dtype).encode() for x in arrays)),
        None,
        None,
    )
    if status:
        raise ValueError(f"{name} returned {status}")
    return outputs


def numbers(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def attention_inputs(rng, b=2, n=200, heads=3, d=8, e=6, window=40, back=1, ahead=1):
    """Those of the forward pass, all optional ones among them."""
    q, k, v = numbers(rng, b, n, heads * d), numbers(rng, b, n, heads * d), numbers(rng, b, n, heads * e)
    sizes, factors = np.array([window, back, ahead, 0, 1], np.int32), np.full((heads, 2), (0.3, -1), np.float32)
    rotation, decay = numbers(rng, 2, n, d), numbers(rng, 2, (back + ahead + 2) * window + 64, d)
    keep = (rng.random((b, n)) < 0.7).astype(np.float32)
    return [q, k, v, sizes, factors, rotation, decay, keep, numbers(rng, heads, window, window * (back + 1 + ahead))]


def results(library, seed=0):
    """Outputs of all operators for random inputs of many tiles, forward and backward."""
    rng = np.random.default_rng(seed)
    inputs = attention_inputs(rng)
    q, k, v, bias, heads = *inputs[:3], inputs[-1], 6
    out, lse = call(library, "local_attention_forward", inputs, [v.shape, (heads, q.shape[1])])
    backward = [q.shape, k.shape, v.shape, (heads, *bias.shape[1:])]
    yield from (out, lse)
    yield from call(library, "local_attention_backward", [*inputs, out, lse, numbers(rng, *out.shape)], backward)

    rows, dim, inner = 2100, 24, 70
    norm = [numbers(rng, rows, dim), numbers(rng, 1, dim), numbers(rng, 1, dim)]
    norm += [numbers(rng, 130, dim), numbers(rng, inner, dim)]
    outs = call(library, "norm_linear_forward", norm, [(rows, 130), (rows, inner)])
    yield from outs
    yield from call(library, "norm_linear_backward", [*norm, *outs], [x.shape for x in norm])

    heads, scale = numbers(rng, rows, dim), numbers(rng, dim)
    yield from call(library, "l2_norm_forward", [heads, scale], [heads.shape])
    yield from call(library, "l2_norm_backward", [heads, scale, norm[0]], [heads.shape, scale.shape])

    weights = [numbers(rng, inner, dim), numbers(rng, inner, dim), numbers(rng, dim, inner)]
    inputs = [*norm[:3], *weights]
    out, *kept = call(library, "feed_forward_forward", inputs, [(rows, dim), (rows, inner), (rows, inner)])
    yield from (out, *kept)
    yield from call(library, "feed_forward_backward", [*inputs, *kept, out], [x.shape for x in inputs])

    logits, labels = numbers(rng, rows, 100), rng.integers(0, 100, rows).astype(np.int32)
    (losses,) = call(library, "cross_entropy_forward", [logits, labels], [(rows,)])
    yield losses
    yield from call(library, "cross_entropy_backward", [logits, labels, losses], [logits.shape])

    tensors = [logits, *weights, labels.astype(np.float32)]
    yield from call(library, "global_norm", tensors, [(1,)])
    yield from call(library, "times_or_zero", [numbers(rng, 1), *tensors], [x.shape for x in tensors])
    for shape in ((150, 70), (70, 150)):
        matrices, row_squares = [numbers(rng, *shape) for _ in range(3 * 4)], np.ones((4, shape[0], 1), np.float32)
        settings = np.array([0.9, 0.1, 0.8], np.float32)
        inputs = [settings, *matrices, row_squares]
        yield from call(library, "muon_step", inputs, [x.shape for x in inputs[5:]])


def digest(library):
    return hashlib.sha256(b"".join(x.tobytes() for x in results(library))).hexdigest()


if __name__ == "__main__":  # python operators.py CORES LIBRARY ONEDNN
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
    onednn_library = ctypes.CDLL(sys.argv[3])  # in which the other finds the matrix products
    print(digest(ctypes.CDLL(sys.argv[2])))
