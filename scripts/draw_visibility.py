"""Draw which keys each query of ``LocalAttention`` attends to, for the main combinations of its options.

    python scripts/draw_visibility.py -o docs/visibility.png

Each panel is computed by calling ``LocalAttention``, so the picture shows what the code does.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mindspore as ms
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from local_attention import LocalAttention

WINDOW = 4


@dataclass(frozen=True)
class Panel:
    """``LocalAttention(WINDOW, **options)`` on ``length`` tokens, of which ``hidden`` are masked."""

    title: str
    options: dict[str, Any]
    length: int = 4 * WINDOW
    hidden: tuple[int, ...] = ()


PANELS = [
    Panel("Causal, one window back", dict(causal=True)),
    Panel("Causal, own window only", dict(causal=True, look_backward=0)),
    Panel("Causal, two windows back", dict(causal=True, look_backward=2)),
    Panel(f"Causal and exact: {WINDOW} keys back", dict(causal=True, exact_windowsize=True)),
    Panel("Both ways, one window each", dict(causal=False, look_forward=1)),
    Panel(f"Both ways, exact: {WINDOW} keys each", dict(causal=False, exact_windowsize=True)),
    Panel("Shared queries and keys", dict(causal=True, shared_qk=True)),
    Panel("A mask hides keys 0, 1, 6, 7", dict(causal=True), hidden=(0, 1, 6, 7)),
    Panel("14 tokens, padded to 16", dict(causal=False, autopad=True), length=14),
]


class Kind(NamedTuple):
    """What a cell of the picture can show: how it is filled, and its label in the legend."""

    fill: dict[str, Any]
    label: str


OWN = Kind(dict(facecolor="#1f5a96"), "seen, in the query's own window")
BEFORE = Kind(dict(facecolor="#8ebbe3"), "seen, in a window before")
AFTER = Kind(dict(facecolor="#f2b36b"), "seen, in a window after")
LAST_RESORT = Kind(dict(facecolor="white", edgecolor="#1f5a96", hatch="...."), "itself: seen only if nothing else is")
MASKED = Kind(dict(facecolor="#fbe9e7", edgecolor="#d98880", hatch="////"), "hidden by the mask")
PADDING = Kind(dict(facecolor="#cfcfcf"), "padding, never seen")
NOT_SEEN = Kind(dict(facecolor="#f4f4f4"), "not seen")
LEGEND = [OWN, BEFORE, AFTER, LAST_RESORT, MASKED, PADDING, NOT_SEEN]


class Visibility(NamedTuple):
    """Arrays ``(length, length)``, query by key.

    ``weights`` are the attention weights if all scores are equal; ``alone`` is 1 if the query attends to the key when
    all others are masked.
    """

    weights: np.ndarray
    alone: np.ndarray


def visibility(panel: Panel) -> Visibility:
    """Compute attention weights that show which keys each query attends to."""
    n = panel.length
    attention = LocalAttention(WINDOW, **panel.options)
    shown = ~np.isin(np.arange(n), panel.hidden)
    equal = ms.Tensor(np.zeros((n, n, 2)), ms.float32)  # queries and keys; in batch row j only key j is not masked
    values = ms.Tensor(np.tile(np.eye(n), (n, 1, 1)), ms.float32)  # with these values the output is the weights
    weights = attention(equal[:1], equal[:1], values[:1], mask=ms.Tensor(shown[None]))
    alone = attention(equal, equal, values, mask=ms.Tensor(np.eye(n, dtype=bool) & shown))
    return Visibility(weights.asnumpy()[0], alone.asnumpy().sum(0))


def kinds(panel: Panel) -> dict[tuple[int, int], Kind]:
    """Return the :class:`Kind` of each cell ``(query, key)``, including padding."""
    padded = panel.length + -panel.length % WINDOW
    found = {(i, j): PADDING for i, j in np.ndindex(padded, padded)}
    weights, alone = visibility(panel)
    for i, j in np.ndindex(weights.shape):
        if weights[i, j] > 0:
            found[i, j] = OWN if i // WINDOW == j // WINDOW else BEFORE if j < i else AFTER
        elif alone[i, j] > 0:
            found[i, j] = LAST_RESORT
        else:
            found[i, j] = MASKED if j in panel.hidden else NOT_SEEN
    return found


def draw_panel(axes: plt.Axes, panel: Panel) -> None:
    found = kinds(panel)
    size = max(found)[0] + 1
    axes.set_facecolor(NOT_SEEN.fill["facecolor"])
    for (i, j), kind in found.items():
        if kind is not NOT_SEEN:
            axes.add_patch(Rectangle((j, i), 1, 1, linewidth=0, **kind.fill))
    for step, colour in ((1, "white"), (WINDOW, "0.3")):
        lines = range(0, size + 1, step)
        axes.hlines(lines, 0, size, color=colour, linewidth=0.9)
        axes.vlines(lines, 0, size, color=colour, linewidth=0.9)
    for i in range(panel.length):
        if not any(found[i, j] in (OWN, BEFORE, AFTER) for j in range(size)):
            box = dict(facecolor=NOT_SEEN.fill["facecolor"], linewidth=0, pad=0.5)
            axes.text(WINDOW * 2 + 0.3, i + 0.5, "sees no key: output 0", va="center_baseline", fontsize=8, bbox=box)
    axes.set_title(panel.title, fontsize=10.5, loc="left", pad=21, weight="bold")
    arguments = ", ".join(f"{name}={value}" for name, value in panel.options.items())
    axes.text(0, -0.5, arguments, fontsize=8.5, family="monospace", color="0.2")
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="key", ylabel="query")
    first = np.arange(0, size, WINDOW)
    axes.set_xticks(first + 0.5, first)
    axes.set_yticks(first + 0.5, first)
    axes.tick_params(length=0, labelsize=9, pad=2)
    axes.spines[:].set_visible(False)


def draw(output: str | Path) -> None:
    """Write the picture to ``output``, in the format of its suffix."""
    figure, grid = plt.subplots(3, 3, figsize=(10, 12.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.16))
    for axes, panel in zip(grid.flat, PANELS):
        draw_panel(axes, panel)
    figure.suptitle(
        f"Which keys (columns) each query (row) sees, with LocalAttention({WINDOW}, …): "
        f"the lines are the borders of windows of {WINDOW} tokens",
        fontsize=11,
    )
    figure.legend(
        handles=[Patch(**{"edgecolor": "0.6"} | fill, linewidth=0.5, label=label) for fill, label in LEGEND],
        loc="outside lower center",
        ncols=3,
        handleheight=1.2,
        frameon=False,
        fontsize=10,
    )
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="visibility.png", help="picture to write (default: visibility.png)")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
