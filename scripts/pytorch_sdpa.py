"""What an expert writes in PyTorch today: windows in the batch, and PyTorch's fused attention.

Keys and values of the window before are joined to those of each window, and one boolean mask serves all. Rotary
embeddings are applied by absolute position, before. The peer of ``scripts/benchmark_train.py``.
"""

from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

SUPPORTED = {"window_size", "causal", "dim", "exact_windowsize", "autopad", "look_backward"}


class WindowedSdpa(torch.nn.Module):
    """Causal attention with one window back, called as the original's ``LocalAttention``: ``q, k, v: (b, h, n, d)``."""

    def __init__(self, window_size: int, exact_windowsize: bool, dim: int) -> None:
        super().__init__()
        self.window_size, self.exact_windowsize = window_size, exact_windowsize
        self.look_backward, self.rel_pos = 1, None
        self.register_buffer("inv_freq", 10000 ** -(torch.arange(0, dim, 2) / dim), persistent=False)

    def forward(self, q: Any, k: Any, v: Any, mask: Any = None, attn_bias: Any = None) -> Any:
        b, h, n, d = q.shape
        w = self.window_size
        angles = torch.arange(n)[:, None] * self.inv_freq
        cos, sin = (torch.cat([table, table], -1) for table in (angles.cos(), angles.sin()))
        q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
        q, k, v = (x.to(v.dtype).reshape(b * h, n // w, w, d) for x in (q, k, v))
        k, v = (torch.cat([functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1], x], 2) for x in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.visible(n // w))
        return out.reshape(b, h, n, d)

    def visible(self, windows: int) -> Any:
        """``(windows, w, 2 w)``: which keys each query attends to; the first window has none before it."""
        w = self.window_size
        distance = torch.arange(w, 2 * w)[:, None] - torch.arange(2 * w)
        visible = (distance >= 0) & ((distance <= w) if self.exact_windowsize else True)
        first = visible & (torch.arange(2 * w) >= w)
        return torch.cat([first[None], visible.expand(windows - 1, -1, -1)])


def rotate_half(x: Any) -> Any:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def use_sdpa(model: Any, original: ModuleType) -> None:
    """Replace the attention of the original's ``LocalTransformer`` by :class:`WindowedSdpa`."""
    for module in model.modules():
        if isinstance(module, original.LocalMHA):
            attend = module.attn_fn
            dim = 2 * attend.rel_pos.inv_freq.numel()
            module.attn_fn = WindowedSdpa(attend.window_size, attend.exact_windowsize, dim)
