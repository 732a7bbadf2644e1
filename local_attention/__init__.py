"""Local windowed attention for MindSpore: ``from local_attention import LocalAttention``."""

from importlib import import_module

# Imported when first used: MindSpore takes seconds to load, and a command line's --help must not wait for it.
_HOMES = {
    "DynamicPositionBias": "local_attention.position_bias",
    "LocalAttention": "local_attention.local_attention",
    "LocalMHA": "local_attention.transformer",
    "LocalTransformer": "local_attention.transformer",
    "Rearrange": "local_attention.einops_mindspore",
    "Reduce": "local_attention.einops_mindspore",
    "Repeat": "local_attention.einops_mindspore",
    "SinusoidalEmbeddings": "local_attention.rotary",
    "apply_rotary_pos_emb": "local_attention.rotary",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
