"""Pictures: where the selected blocks are, and how well training went. They need matplotlib.

Every function returns a matplotlib Figure, and saves it where it is given a path, whose ending chooses the format
(.png, .pdf, .svg). Colours are Okabe's and Ito's, which every eye tells apart; a marker, a dash or a hatch goes
with each, so that the pictures can be read in black and white, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import adaptive_max_pool2d, pad

from smt_peft.checks import by_target
from smt_peft.files import StoredAdapter
from smt_peft.locations import Location, layers_of, locations_of
from smt_peft.selected import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#f0e442"]
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY, YELLOW = COLOURS
# One more than there are colours: when both begin again, they do so in other pairs.
MARKERS = "osD^vPX*<"
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++", "oo", "--", "||"]
DASHES = ["-", "--", "-.", ":"]

# plot_selection: every selected block is darker than every other, so that print tells them apart, too ...
SHADES, SELECTED_SHADES = ["#ffffff", "#949494"], ["#d94801", "#7f2704"]
# ... and its measures in inches: of all modules together, of a module, and of the room around one.
PAGE = 9.5, 12.0
NARROWEST, WIDEST = 0.2, 1.0
FLATTEST, STEEPEST = 0.35, 1.6  # in terms of the width
ABOVE, HEADING, BESIDE = 0.19, 0.25, 0.1
MOST_TILES = 2**27  # of an adapter; two values each
FINEST = 1 / 75  # two pixels, or selected blocks would not be seen


def plot_selection(selection: Selection, path: str | Path | None = None) -> Figure:
    """Draw every target module as a grid of its blocks: the darker, the higher the score; in colour, the selected.

    There is a row of modules for each module type (q_proj, ...) and a column for each layer: eight abreast, or as
    many more as the height of the page demands. All modules have one width, and one logarithmic scale from the 5th to
    the 99th percentile of the scores. Where blocks are too fine to be seen, several share a cell, which shows the best
    of them. Above a module, if there is room, are the numbers of its selected blocks and of all. Sorted blocks lie in
    the order of their rows and columns, the most important first. A selection without scores raises ValueError: use
    that of `select_blocks` or `SMTWarmupCallback.selection`.
    """
    if selection.scores is None:
        raise ValueError("This selection has no scores to draw; select_blocks() gives one that has them.")
    side, all_blocks = selection.block_size, sum(scores.numel() for scores in selection.scores)
    order = ", rows and columns in the order of importance" if selection.lines else ""
    title = f"{len(selection.index)} of {all_blocks} blocks of {side} x {side} selected{order}"
    return _saved(_sheet(selection, title, {"": SHADES, "score; in colour: selected": SELECTED_SHADES}), path)


def _sheet(selection: Selection, title: str, scales: dict[str, list[str]]) -> Figure:
    """All modules of a selection; beside them, by its label, a bar for each scale of colours."""
    rows, width = _arrange(selection)
    left, y = 0.3 + 0.085 * max(len(row.kind) for row in rows), 0.3
    right = left + max(len(row.targets) for row in rows) * (width + BESIDE)
    size = right + 1.2, max(2.8, y + sum(row.height(width) for row in rows) + 0.1)
    figure = _figure(*size, layout="none")
    sheet = figure.add_axes((0, 0, 1, 1))  # whose coordinates are inches from the left and from the top
    scale = _scale_of(torch.cat([scores.flatten() for scores in selection.scores]))
    chosen = [torch.zeros_like(scores) for scores in selection.scores]
    for target, slots in by_target(selection.index).items():
        chosen[target][selection.index[slots, 1:].long().unbind(1)] = 1
    for row in rows:
        y += row.height(width)
        top = y - width * row.steepness
        sheet.text(left - 0.08, (top + y) / 2, row.kind, ha="right", va="center")
        for column, target in enumerate(row.targets):
            x = left + column * (width + BESIDE)
            if row.headings:
                sheet.text(x + width / 2, top - ABOVE, row.headings[column], ha="center", fontsize="small")
            if target is not None:
                _draw_blocks(sheet, (x, x + width, y, top), selection.scores[target], chosen[target], scale)
                if width >= 0.4:  # there is room
                    count = f"{int(chosen[target].sum())}/{chosen[target].numel()}"
                    sheet.text(x + width / 2, top - 0.03, count, ha="center", fontsize=7)
    _draw_scales(figure, right + 0.1, scale, scales)
    sheet.text(size[0] / 2, 0.2, title, ha="center", fontsize="large")
    sheet.set(xlim=(0, size[0]), ylim=(size[1], 0))
    sheet.set_axis_off()
    return figure


def plot_shares(selection: Selection, path: str | Path | None = None) -> Figure:
    """Draw the share of the selected blocks in each layer, in a bar that is divided by module type."""
    locations = locations_of(selection.names)
    chosen = Counter(
        (locations[target].layer_name, locations[target].kind) for target in selection.index[:, 0].tolist()
    )
    layers = layers_of(locations)
    figure = _figure(min(max(4.5, 2.5 + 0.25 * len(layers)), 11), 3.2)
    ax = figure.subplots()
    below = [0.0] * len(layers)
    for (kind, count), colour, hatch in zip(selection.counts_by_type().items(), cycle(COLOURS), cycle(HATCHES)):
        shares = [100 * chosen[layer, kind] / len(selection.index) for layer in layers]
        label = f"{kind}: {100 * count / len(selection.index):.0f} %"
        ax.bar(range(len(layers)), shares, 0.8, below, label=label, color=colour, hatch=hatch, edgecolor="black")
        below = [low + share for low, share in zip(below, shares, strict=True)]
    step = -(-len(layers) // 16)
    ax.set_xticks(range(0, len(layers), step), layers[::step], rotation=90 if "." in layers[-1] else 0)
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
    """
    curves = {name: _points(name, log, key) for name, log in runs.items()}
    figure = _figure(5.5, 3.6)
    ax = figure.subplots()
    for (name, points), colour, marker, dash in zip(curves.items(), cycle(COLOURS), cycle(MARKERS), cycle(DASHES)):
        every = -(-len(points) // 8)  # markers tell curves apart in print; on every point they would hide them
        look = {"color": colour, "marker": marker, "linestyle": dash, "markevery": every}
        ax.plot(*zip(*points, strict=True), label=name, **look)
    ax.set(xlabel="step", ylabel=key.replace("_", " "))
    ax.grid(alpha=0.3)
    ax.legend()
    return _saved(figure, path)


def _figure(width: float, height: float, layout: str = "constrained") -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib; run: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout=layout)


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _points(name: str, log: Sequence[dict | tuple[float, float]], key: str) -> list[tuple[float, float]]:
    logs = [entry for entry in log if isinstance(entry, dict)]
    points = [(entry["step"], entry[key]) for entry in logs if key in entry] if logs else list(log)
    if not points:
        known = ", ".join(sorted({word for entry in logs for word in entry})) or "nothing"
        raise ValueError(f"The log of {name!r} has no {key!r} to draw; it has {known}.")
    return points


# --- parts of plot_selection -------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """Modules of one kind abreast: their positions in the selection, None where a layer has no such module. The first
    row of some layers has their names as headings. Steepness: height in terms of width, the matrix's within bounds."""

    kind: str
    targets: list[int | None]
    headings: list[str]
    steepness: float

    def height(self, width: float) -> float:
        """With the room above."""
        return width * self.steepness + ABOVE + HEADING * bool(self.headings)


def _arrange(selection: Selection) -> tuple[list[_Row], float]:
    """Rows of modules, and the width of a module: as few abreast, from eight on, as fit the height of the page."""
    locations = locations_of(selection.names)
    if len(set(locations)) < len(locations):
        locations = locations_of(selection.names, numbered=True)
    layers = len(layers_of(locations))
    for abreast in range(min(8, layers), layers + 1):
        rows = _rows(locations, selection.scores, abreast)
        width = max(NARROWEST, min(WIDEST, PAGE[0] / abreast - BESIDE))
        if sum(row.height(width) for row in rows) <= PAGE[1]:
            break
    return rows, width


def _rows(locations: list[Location], scores: list[torch.Tensor], abreast: int) -> list[_Row]:
    """A row per type for every so many layers; stacks do not share rows, nor layers with what is outside of them."""
    rows, positions = [], {location: position for position, location in enumerate(locations)}
    for stack, is_outside in dict.fromkeys((location.stack, location.layer is None) for location in locations):
        here = [location for location in locations if (location.stack, location.layer is None) == (stack, is_outside)]
        layers = sorted({location.layer for location in here})
        for band in (layers[start : start + abreast] for start in range(0, len(layers), abreast)):
            headings = [] if is_outside else [f"{stack or 'layer'} {band[0]}", *map(str, band[1:])]
            for kind in dict.fromkeys(location.kind for location in here if location.layer in band):
                targets = [positions.get(Location(stack, layer, kind)) for layer in band]
                shapes = [scores[target].shape for target in targets if target is not None]
                steepness = max(height / width for height, width in shapes)
                rows.append(_Row(kind, targets, headings, max(FLATTEST, min(steepness, STEEPEST))))
                headings = []
    return rows


def _draw_blocks(
    sheet: Axes, box: tuple[float, float, float, float], scores: torch.Tensor, chosen: torch.Tensor, scale: LogNorm
) -> None:
    """The picture of a module in the box (left, right, bottom, top)."""
    left, right, bottom, top = box
    finest = int((bottom - top) / FINEST), int((right - left) / FINEST)
    cells = [max(1, min(sizes)) for sizes in zip(scores.shape, finest, strict=True)]
    scores, chosen = (adaptive_max_pool2d(of[None].float(), cells)[0].numpy() for of in (scores, chosen))
    scores = scores.clip(min=scale.vmin)
    colours = _shaded(scale, SHADES).to_rgba(scores)
    colours[chosen > 0] = _shaded(scale, SELECTED_SHADES).to_rgba(scores)[chosen > 0]
    sheet.imshow(colours, extent=box, aspect="auto", interpolation="nearest")
    sheet.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="black", linewidth=0.8)


def _scale_of(scores: torch.Tensor) -> LogNorm:
    """A logarithmic scale for what most scores are: those of a few modules are often a hundred times lower."""
    from matplotlib.colors import LogNorm

    in_order = scores[scores > 0].sort().values
    lowest, highest = (in_order[int(share * (len(in_order) - 1))].item() for share in (0.05, 0.99))
    return LogNorm(lowest, max(highest, 2 * lowest))


def _shaded(scale: LogNorm, shades: list[str]) -> ScalarMappable:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    return ScalarMappable(scale, LinearSegmentedColormap.from_list("scores", shades))


def _draw_scales(figure: Figure, x: float, scale: LogNorm, scales: dict[str, list[str]]) -> None:
    """The bars, beside one another; numbers stand at those that have a label."""
    across, down = figure.get_size_inches()
    ends_and_middle = [scale.vmin, (scale.vmin * scale.vmax) ** 0.5, scale.vmax]
    for place, (label, shades) in enumerate(scales.items()):
        ax = figure.add_axes(((x + 0.14 * place) / across, 1 - 2.6 / down, 0.12 / across, 1.8 / down))
        ticks = ends_and_middle if label else []
        figure.colorbar(_shaded(scale, shades), ax, extend="both", label=label, ticks=ticks, format="{x:.2g}")
        ax.minorticks_off()


# --- an adapter's file -------------------------------------------------------------------------------------------


def plot_adapter(adapter: StoredAdapter, path: str | Path | None = None) -> Figure:
    """Draw where the blocks of an adapter in a folder lie (`read_adapter`): the darker, the larger its deltas there.

    Like `plot_selection`, with the root mean square of each tile's deltas for a score. A sorted block is part of many
    tiles. Where all deltas are zero, or some are not finite, all blocks are of one shade.
    """
    if not adapter.blocks:
        raise ValueError("The adapter has no blocks yet, so there is nothing to draw; train it first.")
    size = next(iter(adapter.blocks.values())).rows.shape[1]
    names = adapter.names
    shapes = [adapter.shapes[name] for name in names]  # refuses files of version 1, which have none
    count = sum(rows * cols // size**2 for rows, cols in shapes)
    if count > MOST_TILES:
        raise ValueError(f"The adapter's targets have {count:,} tiles of {size} x {size}, too many for a picture.")
    grids = [torch.zeros(2, rows // size, cols // size) for rows, cols in shapes]
    for name, grid in zip(names, grids, strict=True):
        if name in adapter.blocks:
            deltas = adapter.blocks[name].deltas
            tiles = torch.broadcast_tensors(*(side // size for side in adapter.blocks[name].entries))
            for part, values in zip(grid, (deltas.square() / size**2, torch.ones_like(deltas)), strict=True):
                part.index_put_(tiles, values, accumulate=True)
    sizes = torch.cat([grid[0].flatten() for grid in grids])
    has_sizes = bool(sizes.any() and sizes.isfinite().all())
    scores = [grid[0].sqrt() if has_sizes else grid[1].sign() for grid in grids]
    index = torch.cat([pad(grid[1].nonzero(), (1, 0), value=target).int() for target, grid in enumerate(grids)])
    title = f"{len(index)} of {len(sizes)} blocks of {size} x {size} selected"
    if adapter.config.arrangement == "sorted":
        count = sum(len(of.rows) for of in adapter.blocks.values())
        title = f"{count} sorted blocks of {size} x {size}, which have a part in {len(index)} of {len(sizes)} tiles"
    chosen = Selection(names, size, index, scores)
    return _saved(_sheet(chosen, title, {"root mean square of the delta": SELECTED_SHADES}), path)
