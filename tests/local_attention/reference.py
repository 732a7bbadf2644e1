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


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def decay(n, d, base):
    """``(n, n, d)``: what xPos multiplies the channels of the product of query ``i`` and key ``j`` by."""
    rate = (np.arange(0, d, 2) + 0.4 * d) / (1.4 * d)
    distance = np.arange(n)[:, None] - np.arange(n)
    return np.tile(rate, 2) ** (distance[..., None] / base)


def attention(
    q,
    k,
    v,
    *,
    rotary=False,
    xpos_scale_base=None,
    scale=None,
    shared_qk=False,
    mask=None,
    attn_bias=None,
    attn_mask=None,
    **rule,
):
    """Attention of ``q, k, v: (..., n, d)`` through the full ``(n, n)`` matrix of scores, row by row.

    ``mask: (b, n)``, ``attn_bias: (heads, window, span)``, whose minus infinity hides keys, ``attn_mask: (b, n, n)``;
    xPos with a base. A query without a key gets zeros.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    shape, n, d = (*q.shape[:-1], v.shape[-1]), *q.shape[-2:]
    q, k, v = (x.reshape(-1, n, x.shape[-1]) for x in (q, k, v))
    if shared_qk:
        k = unit(k)
    if rotary:
        q, k = rotate(q), rotate(k)
    factor = np.ones((n, n, d)) if xpos_scale_base is None else decay(n, d, xpos_scale_base)
    scores = np.einsum("gic,gjc,ijc->gij", q, k, factor) * (d**-0.5 if scale is None else scale)
    seen = np.repeat(visibility(n, **rule)[None], len(q), 0)
    if attn_bias is not None:
        window, back = rule["window_size"], rule.get("look_backward", 1)
        g, i, j = np.nonzero(seen)
        scores[g, i, j] += attn_bias[g % len(attn_bias), i % window, j - (i // window - back) * window]
        seen &= scores > -np.inf
    if mask is not None:
        seen &= np.repeat(mask, len(q) // len(mask), 0)[:, None]
    if attn_mask is not None:
        seen &= np.repeat(attn_mask, len(q) // len(attn_mask), 0)
    if shared_qk:  # itself only where it sees nothing else
        itself = np.eye(n, dtype=bool) & seen
        seen &= ~itself | (seen.sum(-1, keepdims=True) == 1)
    something = seen.any(-1, keepdims=True)
    weights = softmax(np.where(seen, scores, np.where(something, -np.inf, 0))) * something
    return (weights @ v).reshape(shape)


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


def mha(
    x, p, name="", *, heads, prenorm, qk_rmsnorm=False, qk_scale=8, gate_values_per_head=False, **attention_options
):
    """Multi-head attention of ``x: (b, n, dim)`` with the parameters ``p`` whose names begin with ``name``."""
    b, n, _ = x.shape
    if prenorm:
        x = layer_norm(x, p, f"{name}norm")
    q, k, v = ((x @ p[f"{name}to_{w}.weight"].T).reshape(b, n, heads, -1).transpose(0, 2, 1, 3) for w in "qkv")
    if qk_rmsnorm:
        q, k = unit(q) * p[f"{name}q_scale"], unit(k) * p[f"{name}k_scale"]
        attention_options["scale"] = qk_scale
    out = attention(q, k, v, **attention_options)
    if gate_values_per_head:
        gates = x @ p[f"{name}to_v_gate.weight"].T + p[f"{name}to_v_gate.bias"]
        out = out / (1 + np.exp(-gates)).transpose(0, 2, 1)[..., None]
    return out.transpose(0, 2, 1, 3).reshape(b, n, -1) @ p[f"{name}to_out.weight"].T


def silu(x):
    return x / (1 + np.exp(-x))


def position_bias(distance, p, name=""):
    """``(heads, *distance.shape)``: what the MLP of a dynamic bias makes of distances."""
    x = distance[..., None].astype(np.float64)
    for layer in "024":
        x = x @ p[f"{name}mlp.{layer}.weight"].T + p[f"{name}mlp.{layer}.bias"]
        x = x if layer == "4" else silu(x)
    return np.moveaxis(x, -1, 0)


def hyper_connection(branch, x, p, name=""):
    """``x: (b, n, s, d)`` with a branch ``(b, n, d) -> (b, n, d)``: arXiv 2409.19606, algorithm 2, token by token."""
    b, n, s, d = x.shape
    into, rest, beta = np.zeros((b, n, d)), np.zeros_like(x), np.zeros((b, n, s))
    for at in np.ndindex(b, n):
        normed = unit(x[at]) * d**0.5 * (1 + p[f"{name}gamma"])
        dynamic = np.tanh(normed @ p[f"{name}dynamic_alpha_fn"]) * p[f"{name}dynamic_alpha_scale"]
        alpha = dynamic + p[f"{name}static_alpha"]
        dynamic = np.tanh(normed @ p[f"{name}dynamic_beta_fn"]) * p[f"{name}dynamic_beta_scale"]
        beta[at] = dynamic + p[f"{name}static_beta"]
        into[at], *rest[at] = alpha.T @ x[at]
    return rest + beta[..., None] * branch(into)[:, :, None]


def layers(x, p, *, depth, streams=1, global_attention=None, inserted=(), **mha_options):
    """The hidden state ``(b, n, dim)`` behind ``depth`` layers; ``global_attention(x, p, name)`` goes before some.

    ``window_size`` and ``look_backward`` may be lists of one number per layer.
    """

    def of_layer(i):
        options = {name: value[i] if isinstance(value, list) else value for name, value in mha_options.items()}
        if any(name.startswith("dynamic_pos_bias") for name in p):
            window, back = options["window_size"], options.get("look_backward", 1)
            span = window * (back + 1 + options.get("look_forward", 0))
            distance = abs(back * window + np.arange(window)[:, None] - np.arange(span))
            options["attn_bias"] = position_bias(distance, p, "dynamic_pos_bias.")
        return options

    def connect(branch, x, name):
        if streams == 1:
            return x + branch(x)
        return hyper_connection(branch, x, p, name)

    if streams > 1:
        x = np.repeat(x[:, :, None], streams, 2)
    embeddings = x
    for i in range(depth):
        layer = f"layers.{i}."
        if "residual_factors" in p:
            x = x * p["residual_factors"][i] + embeddings * p["embedding_factors"][i]
        if i + 1 in inserted:
            x = connect(
                lambda x, layer=layer: global_attention(x, p, f"{layer}global_attention."),
                x,
                f"{layer}global_connection.",
            )
        x = connect(
            lambda x, layer=layer, i=i: mha(x, p, f"{layer}attention.", prenorm=True, **of_layer(i)),
            x,
            f"{layer}attention_connection.",
        )
        x = connect(
            lambda x, layer=layer: feed_forward(x, p, f"{layer}feed_forward."), x, f"{layer}feed_forward_connection."
        )
    return x if streams == 1 else x.sum(2)


def transformer(tokens, p, **options):
    """Logits of ``tokens: (b, n)``; learned absolute positions if there are parameters for them."""
    x = p["token_emb.embedding_table"][tokens]
    if "pos_emb.embedding_table" in p:
        x = x + p["pos_emb.embedding_table"][: tokens.shape[1]]
    return layer_norm(layers(x, p, **options), p, "norm") @ p["to_logits.weight"].T


def language_model_loss(tokens, p, *, ignore_index=-1, **options):
    """Mean nats of the tokens of ``(b, n + 1)`` that are not ``ignore_index``, each given those before."""
    labels = tokens[:, 1:]
    if options.get("mask") is not None:
        options["mask"] = options["mask"][:, :-1]
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
