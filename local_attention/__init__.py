"""Local windowed attention for MindSpore: ``from local_attention import LocalAttention``."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # pyproject.toml takes it from here

__all__ = [
    "DynamicPositionBias",
    "GlobalAttention",
    "LocalAttention",
    "LocalMHA",
    "LocalTransformer",
    "Rearrange",
    "Reduce",
    "Repeat",
    "SinusoidalEmbeddings",
    "apply_rotary_pos_emb",
]

_HOMES = {
    "DynamicPositionBias": "local_attention.position_bias",
    "GlobalAttention": "local_attention.global_attention",
    "LocalAttention": "local_attention.local_attention",
    "LocalMHA": "local_attention.transformer",
    "LocalTransformer": "local_attention.transformer",
    "Rearrange": "local_attention.einops_mindspore",
    "Reduce": "local_attention.einops_mindspore",
    "Repeat": "local_attention.einops_mindspore",
    "SinusoidalEmbeddings": "local_attention.rotary",
    "apply_rotary_pos_emb": "local_attention.rotary",
}

if TYPE_CHECKING:  # type checkers and editors read these lines instead of __getattr__
    from local_attention.einops_mindspore import Rearrange, Reduce, Repeat
    from local_attention.global_attention import GlobalAttention
    from local_attention.local_attention import LocalAttention
    from local_attention.position_bias import DynamicPositionBias
    from local_attention.rotary import SinusoidalEmbeddings, apply_rotary_pos_emb
    from local_attention.transformer import LocalMHA, LocalTransformer
else:

    def __getattr__(name):
        """Import a name when it is first used: MindSpore takes seconds to load, and ``--help`` must not wait for it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
