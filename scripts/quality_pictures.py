"""Pictures of the quality study for scripts/report_quality.py.

A study says `x_axis: learning_rate` where the learning rates are the question; else its budgets are drawn, if there
are several, or its methods one below the other. Every function gives the figure and a caption.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from report_quality import Frames, Result, Results

# Okabe and Ito's colours, which colour-blind people can tell apart; the marker says the same once more.
STYLES = {
    "lora": [("#D55E00", "^"), ("#E69F00", "v"), ("#CC79A7", "P")],
    "smt": [("#0072B2", "o"), ("#56B4E9", "s"), ("#CC79A7", "p"), ("#E69F00", "h")],
    "miss": [("#009E73", "D")],
    "shira": [("#777777", "X")],
    "dense": [("#000000", "d")],
    "full": [("#000000", "*")],
}
MARKERS = "osphDvP^X*"
REFERENCE, OTHERS = ("#D55E00", "D"), ("#0072B2", "o")
BARS = "Mean over the seeds, each at the method's best learning rate; bars: ± the standard deviation."


def draw(study: dict, results: Results, frames: Frames, path: Path) -> str:
    """Draw what the study is about; returns the caption."""
    if "x_axis" in study:
        figure, caption = draw_rates(study, results)
    elif max(map(len, study["budgets"].values())) > 1:
        figure, caption = draw_budgets(study, results)
    else:
        figure, caption = draw_seeds(frames)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    return caption


def draw_budgets(study: dict, results: Results) -> tuple[Figure, str]:
    """Quality against budget: a panel per testbed and target."""
    panels = list(dict.fromkeys((place.testbed, place.target) for place in results))
    figure = Figure(figsize=(1.8 + 4 * len(panels), 4.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=len(study["testbeds"]) == 1).flat
    for axes, panel in zip(grid, panels, strict=True):
        here = {place.budget: methods for place, methods in results.items() if (place.testbed, place.target) == panel}
        for place, (method, look) in enumerate(styles(study).items()):
            found = [methods[method] for methods in here.values() if method in methods]
            if found and study["methods"][method]["type"] == "full":
                axes.axhline(found[0].mean(found[0].measure), color=look["color"], linestyle="--", label=method)
            elif found:
                aside = 1.02 ** (place - len(study["methods"]) / 2)  # so that error bars do not hide each other
                x = [aside * result.mean("trained_parameters") for result in found]
                y = [result.mean(result.measure) for result in found]
                bars = [spread(result.values(result.measure)) for result in found]
                axes.errorbar(x, y, bars, capsize=2, linewidth=1.2, label=method, **look)
        axes.set(xscale="log", xlabel="trained parameters", title=", ".join(panel))
        axes.set_xticks([*here], [f"{budget:,}" for budget in here])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel(measured(results))
    add_legend(figure, study)
    return figure, BARS


def draw_rates(study: dict, results: Results) -> tuple[Figure, str]:
    """Above: what was forgotten against what was learnt; below: quality against learning rate. A column per place."""
    remembers = all("old_loss" in result.runs[0] for methods in results.values() for result in methods.values())
    figure = Figure(figsize=(1.8 + 3.4 * len(results), 4 + 3.2 * remembers), layout="constrained")
    panels = figure.subplots(1 + remembers, len(results), squeeze=False, sharex="row", sharey="row")
    for column, (place, methods) in zip(panels.T, results.items(), strict=True):
        column[0].set_title(f"{place.testbed}\n{place.target}, about {place.budget:,} parameters", fontsize=10)
        for method, result in methods.items():
            look = styles(study)[method] | {"label": method}
            join_rates(column[-1], result, "learning_rate", result.measure, look)
            if remembers:
                join_rates(column[0], result, "test_loss", "old_loss", look)
        column[-1].set(xscale="log", xlabel="learning rate")
        rates = sorted({run["learning_rate"] for of in methods.values() for run in of.tried})
        if len(rates) <= 4:
            column[-1].set_xticks(rates, [f"{rate:g}" for rate in rates])
        column[-1].xaxis.set_minor_formatter(NullFormatter())
        if remembers:
            base = result.runs[0]["base"]
            column[0].plot(base["test_loss"], base["old_loss"], "k+", markersize=10)
            column[0].set_xlabel("test loss, new domain")
    panels[-1, 0].set_ylabel(measured(results))
    if remembers:
        panels[0, 0].set_ylabel("loss, old domain")
    add_legend(figure, study)
    above = " Above, left is better learnt, down less forgotten; the cross is the model before training." * remembers
    return figure, (
        "A line joins the learning rates of a method with the first seed; filled: the one that validation chose, mean "
        f"over the seeds, bars: ± the standard deviation.{above} Runs that end with a greater test loss than before "
        "training are left out."
    )


def join_rates(axes: Axes, result: Result, x: str, y: str, look: dict) -> None:
    """A line over the runs that have learnt anything, by learning rate, and a filled marker for the best."""
    runs = sorted(filter(has_learnt, result.tried), key=lambda run: run["learning_rate"])
    axes.plot([run[x] for run in runs], [run[y] for run in runs], mfc="white", linewidth=1.2, markersize=6, **look)
    if all(map(has_learnt, result.runs)):
        bars = {"xerr": spread(result.values(x)), "yerr": spread(result.values(y)), "capsize": 2}
        axes.errorbar(result.mean(x), result.mean(y), markersize=7, **bars, **look | {"label": None})


def has_learnt(run: dict) -> bool:
    return run["test_loss"] <= run["base"]["test_loss"]


def draw_seeds(frames: Frames) -> tuple[Figure, str]:
    """Methods one below the other: a panel per frame, at most three abreast, or two in several rows."""
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame))[::-1]
    columns = len(frames) if len(frames) <= 3 else 2
    rows = -(-len(frames) // columns)
    size = (0.3 + 0.07 * max(map(len, names)) + 3.6 * columns, rows * (1 + 0.28 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, (title, frame) in zip(grid, frames.items(), strict=False):
        for name, (result, reference) in frame.items():
            row, seeds = names.index(name), result.values(result.measure)
            colour, marker = REFERENCE if result is reference else OTHERS
            look = {"fmt": marker, "color": colour, "capsize": 3, "markersize": 6}
            axes.errorbar(result.mean(result.measure), row, xerr=spread(seeds), **look)
            axes.plot(seeds, [row + 0.25] * len(seeds), "o", color=colour, mfc="none", markersize=3.5)
        references = {id(reference): reference for _, reference in frame.values()}
        if len(references) == 1 and reference:
            axes.axvline(reference.mean(reference.measure), color=REFERENCE[0], linewidth=0.8, alpha=0.6)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(axis_name(result))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in grid[len(frames) :]:
        axes.set_visible(False)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(-0.6, len(names) - 0.4)
    return figure, f"{BARS} Small circles: the seeds. Diamonds: what the others are compared with."


# --- parts of all pictures -------------------------------------------------------------------------------------------


def styles(study: dict) -> dict[str, dict[str, str]]:
    """Colour and marker of each method: methods of a type are alike, the first of it is the same in every study.

    Where a type has more methods than looks, they go from dark to light instead.
    """
    of_type = {}
    for type_, looks in STYLES.items():
        count = sum(method["type"] == type_ for method in study["methods"].values())
        shades = [to_hex(colormaps["viridis"](place / count)) for place in range(count)]
        of_type[type_] = iter(looks if count <= len(looks) else zip(shades, itertools.cycle(MARKERS)))
    pairs = {name: next(of_type[method["type"]]) for name, method in study["methods"].items()}
    return {name: {"color": colour, "marker": marker} for name, (colour, marker) in pairs.items()}


def spread(values: list[float]) -> float:
    """Sample standard deviation over the seeds, 0 where there is one."""
    return stdev(values) if len(values) > 1 else 0.0


def axis_name(result: Result) -> str:
    return result.measure.replace("_", " ")


def measured(results: Results) -> str:
    """The axis that all panels share: a study's testbeds are either all classifiers or none."""
    return axis_name(next(iter(next(iter(results.values())).values())))


def add_legend(figure: Figure, study: dict) -> None:
    """One for all panels, to their right, in the study's order."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [name for name in study["methods"] if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside right center", frameon=False, fontsize=9)
