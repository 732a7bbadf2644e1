"""Attention within windows: the core of the library."""

from mindspore import nn, ops
from mindspore.ops import constexpr

from local_attention.attend import Attend
from local_attention.rotary import RotaryEmbedding
from local_attention.windows import LookAround, additive_mask, block_size


@constexpr
def _check_shapes(q, k, v, window_size, autopad, dim):
    if not (len(q) >= 2 and q == k and q[:-1] == v[:-1] and min(q + v) > 0):
        raise ValueError(f"expected q, k: (..., n, d) and v: (..., n, e), none of them empty; got {q}, {k} and {v}")
    if dim is not None and q[-1] != dim:
        raise ValueError(f"expected a head size of dim = {dim}, got q of shape {q}")
    if q[-2] % window_size and not autopad:
        raise ValueError(f"expected a length that is a multiple of the window {window_size}, got {q[-2]}: set autopad")


class LocalAttention(nn.Cell):
    """Scaled dot-product attention in which a query sees only the keys of the windows around it.

    The query at position ``i`` lies in window ``i // window_size`` and looks at windows ``w - look_backward`` to
    ``w + look_forward``. Time and memory grow with ``n * window_size`` instead of ``n ** 2``. (Beltagy et al. 2020,
    arXiv 2004.05150, section 3.1; blocked as in Roy et al. 2020, arXiv 2003.05997.)

    Args:
        window_size: tokens in a window.
        causal: a query sees no later key.
        look_backward: windows seen before a query's own.
        look_forward: windows seen after it; 0 with ``causal``, 1 without, unless given.
        dim: head size ``d``; with it queries and keys get rotary position embeddings.
        autopad: take any length: pad to whole blocks, never attend to the padding, cut it off again.
        exact_windowsize: a query sees exactly ``window_size * look_backward`` tokens back (and, without ``causal``,
            ``window_size * look_forward`` ahead), wherever in its window it stands.
        scale: factor of the scores, ``d ** -0.5`` unless given.
        use_rotary_pos_emb: False: no rotary embeddings although ``dim`` is given.

    Raises:
        ValueError: for ``causal`` with ``look_forward > 0``; for sizes that are no positive numbers; for an odd ``dim``
            with rotary embeddings.
    """

    def __init__(
        self,
        window_size,
        causal=False,
        look_backward=1,
        look_forward=None,
        *,
        dim=None,
        autopad=False,
        exact_windowsize=False,
        scale=None,
        use_rotary_pos_emb=True,
    ):
        super().__init__()
        look_forward = (0 if causal else 1) if look_forward is None else look_forward
        if window_size < 1 or look_backward < 0 or look_forward < 0:
            raise ValueError(
                "expected window_size >= 1, look_backward >= 0 and look_forward >= 0, "
                f"got {window_size}, {look_backward} and {look_forward}"
            )
        if causal and look_forward:
            raise ValueError(f"causal attention cannot look forward: expected look_forward = 0, got {look_forward}")
        self.window_size, self.autopad, self.scale, self.dim = window_size, autopad, scale, dim
        self.causal, self.exact_windowsize = causal, exact_windowsize
        self.look_backward, self.look_forward = look_backward, look_forward
        self.block = block_size(window_size, exact_windowsize)
        self.before = look_backward * window_size // self.block
        self.after = look_forward * window_size // self.block
        self.rule = (
            ("window_size", window_size),
            ("causal", causal),
            ("exact_windowsize", exact_windowsize),
            ("look_backward", look_backward),
            ("look_forward", look_forward),
        )
        self.rotary = RotaryEmbedding(dim) if dim is not None and use_rotary_pos_emb else None
        self.look_around = LookAround(self.before, self.after)
        self.attend = Attend()

    def construct(self, q, k, v):
        """Attend.

        Args:
            q, k: ``(..., n, d)`` float32, any leading axes.
            v: ``(..., n, e)``.

        Returns:
            ``(..., n, e)``.

        Raises:
            ValueError: for shapes that do not fit, a head size other than ``dim``, or a length that is no multiple of
                the window without ``autopad``.
        """
        _check_shapes(q.shape, k.shape, v.shape, self.window_size, self.autopad, self.dim)
        shape = q.shape
        length, d = shape[-2], shape[-1]
        q, k, v = [t.reshape((-1, length, t.shape[-1])) for t in (q, k, v)]
        scale = d**-0.5 if self.scale is None else self.scale
        if self.rotary is not None:
            q, k = self.rotary(q, scale), self.rotary(k, 1.0)
        else:
            q = q * scale
        groups = q.shape[0]
        bias = additive_mask(groups, length, self.block, self.before, self.after, self.rule)
        out = self.attend(self.blocks(q).reshape((-1, self.block, d)), self.surroundings(k), self.surroundings(v), bias)
        out = out.reshape((groups, -1, v.shape[-1]))
        if length % self.block:
            out = out[:, :length]
        return out.reshape((*shape[:-1], v.shape[-1]))

    def blocks(self, x):
        """``(g, n, d) -> (g, blocks, block, d)``, padded with zeros on the right."""
        groups, length, d = x.shape
        missing = -length % self.block
        if missing:
            x = ops.cat((x, ops.zeros((groups, missing, d), x.dtype)), 1)
        return x.reshape((groups, -1, self.block, d))

    def surroundings(self, x):
        """``(g, n, d) -> (g * blocks, span, d)``: for each block of queries the keys that it may see."""
        x = self.look_around(self.blocks(x))
        return x.reshape((-1,) + x.shape[2:])
