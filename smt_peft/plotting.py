"""Pictures: where the selected blocks are, and how well training went. They need matplotlib: smt-peft[plot].

Every function returns a matplotlib Figure, and saves it where it is given a path, whose ending chooses the format
(.png, .pdf, .svg). Colours are Okabe's and Ito's, which every eye tells apart; a marker, a dash or a hatch goes
with each, so that the pictures can be read in black and white, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smt_peft.selection import Selection, layer_and_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#f0e442"]
MARKERS = "osD^vPX*"
DASHES = ["-", "--", "-.", ":"]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++", "oo", "--"]
FRAME_COLOUR = "#e66100"  # orange, which every eye tells from grey; the white dot in each frame is for print
WIDTH = 1.4  # of the widest module, in inches
LAYERS_ABREAST = 8


def plot_selection(selection: Selection, path: str | Path | None = None) -> Figure:
    """Draw every target module as a grid of its blocks: the darker, the higher the score; framed, the selected ones.

    There is a row of modules for each module type (q_proj, ...) and a column for each layer, eight layers abreast, all
    on one logarithmic scale. The numbers above a module are its selected blocks and all its blocks.

    Args:
        selection: as `select_blocks` gives it and `SMTWarmupCallback.selection` keeps it.
        path: where to save the picture, too.

    Raises:
        ImportError: without matplotlib.
        ValueError: where the selection has no scores.
    """
    if selection.scores is None:
        raise ValueError("This selection has no scores to draw; select_blocks() gives one that has them.")
    everything = torch.cat([scores.flatten() for scores in selection.scores])
    rows, columns = _arrange(selection.names)
    heights = [0] * (max(rows) + 1)
    for row, scores in zip(rows, selection.scores, strict=True):
        heights[row] = max(heights[row], len(scores))
    abreast, widest = max(columns) + 1, max(scores.shape[1] for scores in selection.scores)
    inches = WIDTH / widest  # the side of a block
    figure = _figure(1.2 + abreast * (WIDTH + 0.08), 0.8 + sum(heights) * inches + 0.3 * len(heights))
    axes = figure.subplots(len(heights), abreast, squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        ax.set_axis_off()
    shades = _shades_of(everything)
    for target, (name, scores) in enumerate(zip(selection.names, selection.scores, strict=True)):
        layer, kind = layer_and_type(name)
        ax = axes[rows[target], columns[target]]
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[])
        image = ax.imshow(scores.numpy(), interpolation="nearest", **shades)
        blocks = selection.index[selection.index[:, 0] == target, 1:]
        _frame(ax, blocks, points=72 * inches)
        above = "" if layer is None or kind != layer_and_type(selection.names[0])[1] else f"layer {layer}\n"
        ax.set_title(f"{above}{len(blocks)}/{scores.numel()}", fontsize=7, pad=2)
        if columns[target] == 0:
            ax.set_ylabel(kind)
    figure.colorbar(image, ax=axes, label="score", fraction=0.02, aspect=30, pad=0.01)
    size, total = selection.block_size, len(everything)
    figure.suptitle(f"{len(selection.index)} of {total} blocks of {size} x {size} selected")
    return _saved(figure, path)


def plot_shares(selection: Selection, path: str | Path | None = None) -> Figure:
    """Draw the share of the selected blocks in each layer, in a bar that is divided by module type."""
    chosen = Counter(layer_and_type(selection.names[target]) for target in selection.index[:, 0].tolist())
    layers = list(dict.fromkeys(layer for layer, _ in map(layer_and_type, selection.names)))
    layers.sort(key=lambda layer: -1 if layer is None else layer)
    figure = _figure(max(4.5, 2.5 + 0.25 * len(layers)), 3.2)
    ax = figure.subplots()
    below = [0.0] * len(layers)
    for (kind, count), colour, hatch in zip(selection.counts_by_type().items(), cycle(COLOURS), cycle(HATCHES)):
        shares = [100 * chosen[layer, kind] / len(selection.index) for layer in layers]
        label = f"{kind}: {100 * count / len(selection.index):.0f} %"
        ax.bar(range(len(layers)), shares, 0.8, below, label=label, color=colour, hatch=hatch, edgecolor="black")
        below = [low + share for low, share in zip(below, shares, strict=True)]
    step = -(-len(layers) // 16)
    names = ["-" if layer is None else str(layer) for layer in layers]
    ax.set_xticks(range(0, len(layers), step), names[::step])
    ax.margins(x=0.02)
    ax.set(xlabel="layer", ylabel="% of the selected blocks", ylim=(0, 1.05 * max(below)))
    figure.legend(loc="outside right upper", frameon=False)
    return _saved(figure, path)


def plot_overlap(selections: Mapping[str, Selection], path: str | Path | None = None) -> Figure:
    """Draw which share of its blocks every selection has in common with every other (`Selection.overlap`), in %."""
    names = list(selections)
    shares = [[100 * one.overlap(other) for other in selections.values()] for one in selections.values()]
    cells, text = 0.6 * len(names), 0.08 * max(map(len, names))  # inches
    figure = _figure(cells + text + 0.6, cells + 0.6 * text + 0.6)
    ax = figure.subplots()
    ax.imshow(shares, cmap="Greys", vmin=0, vmax=100)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            ax.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 50 else "black")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.set_title("blocks in common, %", fontsize="medium")
    return _saved(figure, path)


def plot_losses(
    runs: Mapping[str, Sequence[dict | tuple[float, float]]], key: str = "loss", path: str | Path | None = None
) -> Figure:
    """Draw loss curves, one per run.

    Args:
        runs: name -> what `trainer.state.log_history` holds, or a list of (step, loss).
        key: which entry of a log to draw, such as "eval_loss" or "grad_norm".
        path: where to save the picture, too.
    """
    figure = _figure(5.5, 3.6)
    ax = figure.subplots()
    for (name, log), colour, marker, dash in zip(runs.items(), cycle(COLOURS), cycle(MARKERS), cycle(DASHES)):
        points = _points(name, log, key)
        every = -(-len(points) // 8)  # markers tell curves apart in print; on every point they would hide them
        ax.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markevery=every, label=name)
    return _saved(_with_legend(figure, xlabel="step", ylabel=key.replace("_", " ")), path)


def plot_quality(
    methods: Mapping[str, Sequence[tuple[float, ...]]],
    xlabel: str = "trained parameters",
    ylabel: str = "loss",
    path: str | Path | None = None,
) -> Figure:
    """Draw quality against budget, one curve per method, on a logarithmic axis.

    Args:
        methods: name -> (budget, loss) or (budget, loss, spread); a spread becomes a bar of that length each way.
        xlabel: what a budget is.
        ylabel: what a loss is.
        path: where to save the picture, too.
    """
    figure = _figure(5.5, 3.6)
    ax = figure.subplots()
    for (name, points), colour, marker, dash in zip(methods.items(), cycle(COLOURS), cycle(MARKERS), cycle(DASHES)):
        budgets, losses, *spreads = zip(*sorted(points), strict=True)
        ax.errorbar(budgets, losses, *spreads, fmt=dash, color=colour, marker=marker, capsize=3, label=name)
    _label_budgets(ax, [budget for points in methods.values() for budget, *_ in points])
    return _saved(_with_legend(figure, xlabel=xlabel, ylabel=ylabel), path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib; run: pip install 'smt-peft[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _points(name: str, log: Sequence[dict | tuple[float, float]], key: str) -> list[tuple[float, float]]:
    logs = [entry for entry in log if isinstance(entry, dict)]
    points = [(entry["step"], entry[key]) for entry in logs if key in entry] if logs else list(log)
    if not points:
        known = ", ".join(sorted({word for entry in logs for word in entry})) or "nothing"
        raise ValueError(f"The log of {name!r} has no {key!r} to draw; it has {known}.")
    return points


def _with_legend(figure: Figure, **labels: str) -> Figure:
    [ax] = figure.axes
    ax.set(**labels)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def _label_budgets(ax: Axes, budgets: list[float]) -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5, 10, ..., or powers of ten where those would be too many."""
    from matplotlib.ticker import LogLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(budgets) < 100 * min(budgets) else (1,)))
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.xaxis.set_minor_formatter("")


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _shades_of(scores: torch.Tensor) -> dict:
    """Greys on a logarithmic scale; a score of zero leaves its block white."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    lowest, highest = scores[scores > 0].min().item(), scores.max().item()
    greys = LinearSegmentedColormap.from_list("scores", ["#ffffff", "#333333"])  # frames must show on the darkest, too
    return {"cmap": greys, "norm": LogNorm(lowest, max(highest, 1.1 * lowest))}


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
    places = [layer_and_type(name) for name in names]
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
