"""Pictures of a selection: the score of every block, and which blocks won. They need matplotlib: smt-peft[plot]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smt_peft.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORE_COLOURS = "Greys"  # prints as it looks
FRAME_COLOUR = "#d55e00"  # vermilion of the Okabe-Ito palette, which every eye tells from grey; its dot is for print


def plot_selection(selection: Selection, path: str | Path | None = None) -> Figure:
    """Draw every target module as a grid of its blocks: the darker, the higher the score; a frame, selected.

    A row of modules per module type (q_proj, ...), a column per layer, all on one logarithmic scale. A title says how
    many of the module's blocks are selected.

    Args:
        selection: as `select_blocks` gives it and `SMTWarmupCallback.selection` keeps it.
        path: where to save the picture, too; its ending chooses the format (.png, .pdf, .svg).

    Raises:
        ImportError: without matplotlib.
        ValueError: where the selection has no scores.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib; run: pip install 'smt-peft[plot]'") from error
    if selection.scores is None:
        raise ValueError("This selection has no scores to draw; select_blocks() gives one that has.")
    rows, columns = _arrange(selection.names)
    everything = torch.cat([scores.flatten() for scores in selection.scores])
    lowest, highest = everything[everything > 0].min().item(), everything.max().item()
    norm = LogNorm(lowest, highest if highest > lowest else 2 * lowest)

    figure = Figure(figsize=(1.5 + 1.35 * len(columns), 1.3 + 1.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    image = None
    for target, name in enumerate(selection.names):
        layer, kind = _layer_and_type(name)
        ax = axes[rows.index(kind), columns.index(layer)]
        ax.set_axis_on()
        image = ax.imshow(selection.scores[target], cmap=SCORE_COLOURS, norm=norm, interpolation="nearest")
        blocks = selection.index[selection.index[:, 0] == target, 1:]
        _frame(ax, blocks)
        ax.set_title(f"{len(blocks)} of {selection.scores[target].numel()}", fontsize=8, pad=2)
        ax.set_xticks([])
        ax.set_yticks([])
    for row, kind in enumerate(rows):
        first = next(ax for ax in axes[row] if ax.axison)
        first.set_ylabel(kind, fontsize=10)
    for column, layer in enumerate(columns):
        last = next(ax for ax in reversed(axes[:, column]) if ax.axison)
        last.set_xlabel(f"layer {layer}" if layer is not None else "", fontsize=10)
    size, total = selection.block_size, len(selection.index)
    figure.suptitle(f"The {total} selected of {len(everything)} blocks of {size} × {size}", fontsize=11)
    figure.colorbar(image, ax=axes, label="score", shrink=0.6, pad=0.02)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _frame(ax: Axes, blocks: torch.Tensor) -> None:
    """Frame blocks [n, 2] of (row, column), with a dot in each, which also shows where colours do not."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    frames = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in blocks.tolist()]
    ax.add_collection(PatchCollection(frames, facecolor="none", edgecolor=FRAME_COLOUR, linewidth=1.2))
    ax.scatter(blocks[:, 1], blocks[:, 0], s=4, color="white", edgecolors="black", linewidths=0.4)


def _layer_and_type(name: str) -> tuple[int | None, str]:
    """A module's layer, the first number in its name, and its type, the last part."""
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number.group(1)) if number else None, name.rpartition(".")[2]


def _arrange(names: list[str]) -> tuple[list[str], list[int | None]]:
    """The types in the order in which the model has them, and the layers by number."""
    places = [_layer_and_type(name) for name in names]
    layers = sorted({layer for layer, _ in places}, key=lambda layer: -1 if layer is None else layer)
    return list(dict.fromkeys(kind for _, kind in places)), layers
