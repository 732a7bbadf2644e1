"""What the library computes, slowly and plainly, in NumPy float64, and independent of how the library does it."""

from math import erf

import numpy as np


def visibility(n, *, window_size, causal=False, exact_windowsize=False, look_backward=1, look_forward=0):
    """``(n, n)`` booleans: whether query ``i`` (row) sees key ``j`` (column)."""
    seen = np.zeros((n, n), bool)
    for i in range(n):
        window = i // window_size
        first = (window - look_backward) * window_size
        last = (window + look_forward + 1) * window_size - 1
        if exact_windowsize:
            first = max(first, i - look_backward * window_size)
        if exact_windowsize and not causal:
            last = min(last, i + look_forward * window_size)
        if causal:
            last = min(last, i)
        seen[i, max(first, 0) : last + 1] = True
    return seen


def rotate(x):
    """Rotary embedding of ``x: (..., n, d)``: channels ``c`` and ``c + d / 2`` are a complex number, which turns."""
    n, d = x.shape[-2:]
    turn = np.exp(1j * np.arange(n)[:, None] * 10000.0 ** (-2 * np.arange(d // 2) / d))
    turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(q, k, v, *, rotary=False, scale=None, **rule):
    """Attention of ``q, k, v: (..., n, d)`` through the full ``(n, n)`` matrix of scores."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if rotary:
        q, k = rotate(q), rotate(k)
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return softmax(np.where(visibility(q.shape[-2], **rule), scores, -np.inf)) @ v


def standardise(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(erf, otypes=[float])(x / np.sqrt(2)))


def cross_entropy(logits, labels):
    """Nats of each label, ``logits: (..., classes)``, ``labels: (...)``."""
    return -np.log(np.take_along_axis(softmax(logits), np.asarray(labels)[..., None], -1)[..., 0])


def layer_norm(x, p, name):
    return standardise(x) * p[f"{name}.gamma"] + p[f"{name}.beta"]


def feed_forward(x, p, name=""):
    x = layer_norm(x, p, f"{name}norm")
    return x @ p[f"{name}to_value.weight"].T * gelu(x @ p[f"{name}to_gate.weight"].T) @ p[f"{name}to_out.weight"].T


def mha(x, p, name="", *, heads, prenorm, **attention_options):
    """Multi-head attention of ``x: (b, n, dim)`` with the parameters ``p`` whose names begin with ``name``."""
    b, n, _ = x.shape
    if prenorm:
        x = layer_norm(x, p, f"{name}norm")
    q, k, v = ((x @ p[f"{name}to_{w}.weight"].T).reshape(b, n, heads, -1).transpose(0, 2, 1, 3) for w in "qkv")
    out = attention(q, k, v, **attention_options)
    return out.transpose(0, 2, 1, 3).reshape(b, n, -1) @ p[f"{name}to_out.weight"].T


def layers(x, p, *, depth, **mha_options):
    """The hidden state ``(b, n, dim)`` behind ``depth`` layers."""
    for i in range(depth):
        x = x + mha(x, p, f"layers.{i}.attention.", prenorm=True, **mha_options)
        x = x + feed_forward(x, p, f"layers.{i}.feed_forward.")
    return x


def transformer(tokens, p, **options):
    """Logits of ``tokens: (b, n)``; learned absolute positions if there are parameters for them."""
    x = p["token_emb.embedding_table"][tokens]
    if "pos_emb.embedding_table" in p:
        x = x + p["pos_emb.embedding_table"][: tokens.shape[1]]
    return layer_norm(layers(x, p, **options), p, "norm") @ p["to_logits.weight"].T


def language_model_loss(tokens, p, *, ignore_index=-1, **options):
    """Mean nats of the tokens of ``(b, n + 1)`` that are not ``ignore_index``, each given those before."""
    labels = tokens[:, 1:]
    counted = labels != ignore_index
    losses = cross_entropy(transformer(tokens[:, :-1], p, **options), np.where(counted, labels, 0))
    return losses[counted].mean()


def numerical_gradient(function, x, step=1e-5):
    """The gradient of the scalar ``function`` at the float64 array ``x``, by central differences of order 4."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        differences = []
        for shift in (step, 2 * step):
            x[index] = value + shift
            above = function(x)
            x[index] = value - shift
            differences.append((above - function(x)) / (2 * shift))
        x[index] = value
        gradient[index] = (4 * differences[0] - differences[1]) / 3
    return gradient


def numerical_gradients(function, inputs, cotangent, step=1e-5):
    """For each of ``inputs`` the gradient of ``sum(function(*inputs) * cotangent)``."""

    def of(i):
        return numerical_gradient(
            lambda x: (function(*inputs[:i], x, *inputs[i + 1 :]) * cotangent).sum(), inputs[i], step
        )

    inputs = [np.asarray(x, np.float64) for x in inputs]
    return [of(i) for i in range(len(inputs))]
