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

FRAME_COLOUR = "#e66100"  # orange, which every eye tells from grey; the white dot in each frame is for print
WIDTH = 1.4  # of the widest module, in inches
LAYERS_ABREAST = 8


def plot_selection(selection: Selection, path: str | Path | None = None) -> Figure:
    """Draw every target module as a grid of its blocks: the darker, the higher the score; framed, the selected ones.

    There is a row of modules for each module type (q_proj, ...) and a column for each layer, eight layers abreast, all
    on one logarithmic scale. The numbers above a module are its selected blocks and all its blocks.

    Args:
        selection: as `select_blocks` gives it and `SMTWarmupCallback.selection` keeps it.
        path: where to save the picture, too; its ending chooses the format (.png, .pdf, .svg).

    Raises:
        ImportError: without matplotlib.
        ValueError: where the selection has no scores.
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap, LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib; run: pip install 'smt-peft[plot]'") from error
    if selection.scores is None:
        raise ValueError("This selection has no scores to draw; select_blocks() gives one that has them.")
    everything = torch.cat([scores.flatten() for scores in selection.scores])
    lowest, highest = everything[everything > 0].min().item(), everything.max().item()
    scale = LogNorm(lowest, max(highest, 1.1 * lowest))  # a score of zero leaves its block white
    greys = LinearSegmentedColormap.from_list("scores", ["#ffffff", "#333333"])  # frames must show on the darkest, too

    rows, columns = _arrange(selection.names)
    heights = [0] * (max(rows) + 1)
    for row, scores in zip(rows, selection.scores, strict=True):
        heights[row] = max(heights[row], len(scores))
    abreast, widest = max(columns) + 1, max(scores.shape[1] for scores in selection.scores)
    inches = WIDTH / widest  # the side of a block
    paper = (1.2 + abreast * (WIDTH + 0.08), 0.8 + sum(heights) * inches + 0.3 * len(heights))
    figure = Figure(figsize=paper, layout="constrained")
    axes = figure.subplots(len(heights), abreast, squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        ax.set_axis_off()
    for target, (name, scores) in enumerate(zip(selection.names, selection.scores, strict=True)):
        layer, kind = _layer_and_type(name)
        ax = axes[rows[target], columns[target]]
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[])
        image = ax.imshow(scores.numpy(), cmap=greys, norm=scale, interpolation="nearest")
        blocks = selection.index[selection.index[:, 0] == target, 1:]
        _frame(ax, blocks, points=72 * inches)
        above = "" if layer is None or kind != _layer_and_type(selection.names[0])[1] else f"layer {layer}\n"
        ax.set_title(f"{above}{len(blocks)}/{scores.numel()}", fontsize=7, pad=2)
        if columns[target] == 0:
            ax.set_ylabel(kind)
    figure.colorbar(image, ax=axes, label="score", fraction=0.02, aspect=30, pad=0.01)
    size, total = selection.block_size, len(everything)
    figure.suptitle(f"{len(selection.index)} of {total} blocks of {size} x {size} selected")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _frame(ax: Axes, blocks: torch.Tensor, points: float) -> None:
    """Frame blocks [n, 2] of (row, column), each `points` wide on paper."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    row, column = blocks.T.numpy()
    corners = (blocks.flip(1) - 0.42).tolist()  # a little inside, so that the frames of neighbours stay two
    frames = [Rectangle(corner, 0.84, 0.84) for corner in corners]
    width = min(2.0, 0.15 * points)
    ax.add_collection(PatchCollection(frames, facecolor="none", edgecolor=FRAME_COLOUR, linewidth=width))
    ax.scatter(column, row, s=(0.25 * points) ** 2, color="white", edgecolors="black", linewidths=0.2)


def _arrange(names: list[str]) -> tuple[list[int], list[int]]:
    """Each module's row and column in the picture."""
    places = [_layer_and_type(name) for name in names]
    layers = sorted({layer for layer, _ in places if layer is not None})
    types = list(dict.fromkeys(kind for _, kind in places))
    bands = -(-len(layers) // LAYERS_ABREAST) or 1
    abreast = -(-len(layers) // bands)
    rows, columns = [], []
    for layer, kind in places:
        band, column = divmod(layers.index(layer), abreast) if layer is not None else (0, 0)
        rows.append(band * len(types) + types.index(kind))
        columns.append(column)
    return rows, columns


def _layer_and_type(name: str) -> tuple[int | None, str]:
    """A module's layer, the first number in its name, and its type, the last part."""
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number.group(1)) if number else None, name.rpartition(".")[2]
