"""Pictures of the quality study for scripts/studies/report_quality.py.

A study says `x_axis: learning_rate` where the learning rates are the question; else its budgets are drawn, if there
are several, or its methods one below the other; such a function gives the figure and a caption. One overview is of all
studies.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from quality_results import Against, Frames, Result, Results, spread

from smt_peft.plotting import BLUE, GREEN, GREY, MARKERS, ORANGE, PURPLE, SKY, VERMILION

# Kind -> its dash, and the colours and markers of its methods, in turn. No two kinds share a colour, and no two of
# these methods a marker; so a picture can be read without its colours, too.
STYLES = {
    "smt": ("-", [(BLUE, "o"), (SKY, "s"), (GREEN, "D")]),
    "sorted": ((0, (6, 1)), [("#8c564b", "h"), ("#c49c94", "p")]),
    "lora": ("--", [(VERMILION, "^"), (ORANGE, "v")]),
    "miss": ("-.", [(PURPLE, "<")]),
    "shira": ((0, (5, 1, 1, 1, 1, 1)), [(GREY, "X")]),
    "dense": ((0, (1, 3)), [("#555555", "P")]),
    "full": (":", [("#000000", "*")]),
}
SHADES = {"sorted": "copper"}  # where a kind has more methods than looks; else viridis
REFERENCE, OTHERS = (VERMILION, "D"), (BLUE, "o")
NARROWEST = 0.02  # nats, or 2 points of accuracy: on a shorter axis noise would look like a difference


def draw(study: dict, results: Results, frames: Frames, path: Path) -> str:
    """Draw what the study is about; returns the caption."""
    if study.get("x_axis", "learning_rate") != "learning_rate":
        raise SystemExit(f"x_axis {study['x_axis']} is not learning_rate; leave it out to draw budgets or methods.")
    if "x_axis" in study:
        figure, caption = draw_rates(study, results)
    elif max(map(len, study["budgets"].values())) > 1:
        figure, caption = draw_budgets(study, results)
    else:
        figure, caption = draw_seeds(frames)
    save(figure, path)
    return caption


def draw_overview(against: Against, path: Path) -> None:
    """How far SMT is from LoRA in test loss, a row per place: on the left SMT is better."""
    figure = Figure(figsize=(7.5, 1.2 + 0.34 * len(against)), layout="constrained")
    axes = figure.subplots()
    papers = {row: (lora, paper) for row, (lora, paper, *_) in enumerate(against.values()) if paper is not None}
    bests = {row: (lora, best) for row, (lora, *_, best) in enumerate(against.values())}
    for pairs, aside, (colour, marker), label in (
        (papers, -0.12, OTHERS, "SMT as in the paper"),
        (bests, 0.12, (GREEN, "s"), "the best SMT by validation"),
    ):
        far = [result.minus(lora, "test_loss") for lora, result in pairs.values()]
        look = {"fmt": marker, "color": colour, "capsize": 3, "label": label}
        axes.errorbar([*map(fmean, far)], [row + aside for row in pairs], xerr=[*map(spread, far)], **look)
    axes.axvline(0, color=REFERENCE[0], linewidth=1.2)
    axes.set_yticks(
        range(len(against)), [f"{place.testbed}\n{place.target}, {place.budget:,}" for place in against], fontsize=8
    )
    axes.set_ylim(len(against) - 0.4, -0.6)  # the first place above
    axes.set_xscale("symlog", linthresh=0.1)
    axes.margins(x=0.02)
    axes.set_xticks([-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5], ["-0.1", "-0.05", "0", "0.05", "0.1", "0.2", "0.5"])
    axes.set_xlabel("test loss of SMT - test loss of LoRA (left: SMT is better)")
    figure.legend(loc="outside upper center", frameon=False, ncols=2)
    save(figure, path)


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
                dash = {key: look[key] for key in ("color", "linestyle")}
                axes.axhline(found[0].mean(found[0].measure), label=method, **dash)
            elif found:
                aside = 1.02 ** (place - len(study["methods"]) / 2)  # so that error bars do not hide each other
                x = [aside * result.mean("trained_parameters") for result in found]
                y = [result.mean(result.measure) for result in found]
                bars = [spread(result.values(result.measure)) for result in found]
                axes.errorbar(x, y, bars, capsize=2, label=method, **look)
        axes.set(xscale="log", xlabel="trained parameters", title=", ".join(panel))
        low, high = axes.get_xlim()  # of one budget alone it would spread what lies aside
        axes.set_xlim(min(low, min(here) / 2), max(high, max(here) * 2))
        axes.set_xticks([*here], [f"{budget:,}" for budget in here])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel(measured(results))
    add_legend(figure, study)
    return figure, means(all_of(results))


def draw_rates(study: dict, results: Results) -> tuple[Figure, str]:
    """Above: what was forgotten against what was learnt; below: quality against learning rate. A column per place."""
    remembers = all("old_loss" in result.runs[0] for result in all_of(results))
    legend = max(1.8, 0.5 + 0.08 * max(map(len, study["methods"])))
    figure = Figure(figsize=(legend + 3.4 * len(results), 4 + 3.2 * remembers), layout="constrained")
    share = "row" if len(study["testbeds"]) == 1 else "none"  # losses of different texts are far apart
    panels = figure.subplots(1 + remembers, len(results), squeeze=False, sharex=share, sharey=share)
    for column, (place, methods) in zip(panels.T, results.items(), strict=True):
        column[0].set_title(f"{place.testbed}\n{place.target}, about {place.budget:,} parameters", fontsize=10)
        for method, result in methods.items():
            look = styles(study)[method] | {"label": method}
            join_rates(column[-1], result, "learning_rate", result.measure, look)
            if remembers:
                join_rates(column[0], result, "test_loss", "old_loss", look)
        if remembers:
            base = result.runs[0]["base"]
            before = f"before training {base['test_loss']:.2f}; old domain {base['old_loss']:.2f}"
            column[0].set_xlabel(f"test loss, new domain\n({before})", fontsize=9)
    for axes in panels[-1]:
        label_rates(axes)
    panels[-1, 0].set_ylabel(measured(results))
    if remembers:
        panels[0, 0].set_ylabel("loss, old domain")
    add_legend(figure, study)
    above = " Above, left is better learnt, down less forgotten." * remembers
    seeds = ", mean over the seeds, bars: ± the standard deviation" * several_seeds(all_of(results))
    return figure, (
        "A line joins the learning rates of a method with the first seed; filled: the one that validation "
        f"chose{seeds}.{above} Runs that end with a greater test loss than before training are left out."
    )


def join_rates(axes: Axes, result: Result, x: str, y: str, look: dict) -> None:
    """A line over the runs that have learnt anything, by learning rate, and a filled marker for the best."""
    runs = sorted(filter(has_learnt, result.tried), key=lambda run: run["learning_rate"])
    axes.plot([run[x] for run in runs], [run[y] for run in runs], mfc="white", **look)
    if all(map(has_learnt, result.runs)):
        bars = {"xerr": spread(result.values(x)), "yerr": spread(result.values(y)), "capsize": 2}
        axes.errorbar(result.mean(x), result.mean(y), **bars, **look | {"label": None, "markersize": 7})


def has_learnt(run: dict) -> bool:
    return run["test_loss"] <= run["base"]["test_loss"]


def draw_seeds(frames: Frames) -> tuple[Figure, str]:
    """Methods one below the other: a panel per frame, at most three abreast, or two in several rows."""
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame))[::-1]
    every = [result for frame in frames.values() for result, _ in frame.values()]
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
            if len(seeds) > 1:
                axes.plot(seeds, [row + 0.25] * len(seeds), "o", color=colour, mfc="none", markersize=3.5)
        references = {id(reference): reference for _, reference in frame.values()}
        if len(references) == 1 and reference:
            axes.axvline(reference.mean(reference.measure), color=REFERENCE[0], linewidth=0.8, alpha=0.6)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(axis_name(result))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axes in grid[len(frames) :]:
        axes.set_visible(False)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(-0.6, len(names) - 0.4)
    circles = " Small circles: the seeds." * several_seeds(every)
    return figure, f"{means(every)}{circles} Diamonds: what the others are compared with."


# --- parts of all pictures -------------------------------------------------------------------------------------------


def styles(study: dict) -> dict[str, dict]:
    """Colour, marker and dash of each method: methods of a kind are alike, the first is the same in every study.

    A kind is a type, but for SMT's sorted blocks. Where one has more methods than looks, they go from dark to light.
    """
    kinds = {
        name: "sorted" if method.get("arrangement") == "sorted" else method["type"]
        for name, method in study["methods"].items()
    }
    found = {}
    for kind, (dash, looks) in STYLES.items():
        methods = [name for name in kinds if kinds[name] == kind]
        if len(methods) > len(looks):
            shades = colormaps[SHADES.get(kind, "viridis")]
            looks = list(zip([to_hex(shades(place / len(methods))) for place in range(len(methods))], cycle(MARKERS)))
        for name, (colour, marker) in zip(methods, looks, strict=False):
            found[name] = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.2}
    return {name: found[name] for name in kinds}


def all_of(results: Results) -> list[Result]:
    return [result for methods in results.values() for result in methods.values()]


def several_seeds(results: Iterable[Result]) -> bool:
    return any(len(result.runs) > 1 for result in results)


def means(results: Iterable[Result]) -> str:
    """What a marker stands for, and what a bar, where there are any."""
    if several_seeds(results):
        return "Mean over the seeds, each at the method's best learning rate; bars: ± the standard deviation."
    return "One seed, each method at its best learning rate."


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        widen(axes)
    figure.savefig(path, dpi=110)


def widen(axes: Axes) -> None:
    """Keep noise small: no axis is shorter than NARROWEST."""
    for name, scale in (("x", axes.get_xscale()), ("y", axes.get_yscale())):
        low, high = sorted(getattr(axes, f"get_{name}lim")())
        if scale == "linear" and high - low < NARROWEST:
            middle = (low + high) / 2
            axes.set(**{f"{name}lim": (middle - NARROWEST / 2, middle + NARROWEST / 2)})


def label_rates(axes: Axes) -> None:
    """A logarithmic axis with few enough numbers to stand apart."""
    axes.set(xscale="log", xlabel="learning rate")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high < 10 * low else (1, 3) if high < 100 * low else (1,))
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def axis_name(result: Result) -> str:
    return result.measure.replace("_", " ")


def measured(results: Results) -> str:
    """The axis that all panels share: a study's testbeds are either all classifiers or none."""
    return axis_name(all_of(results)[0])


def add_legend(figure: Figure, study: dict) -> None:
    """One for all panels, to their right, in the study's order."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [name for name in study["methods"] if name in handles]
    look = {"loc": "outside right center", "frameon": False, "fontsize": 9, "handlelength": 3.2}
    figure.legend([handles[name] for name in names], names, **look)
