"""The page and the pictures of bench_selection.py, from the figures that it writes.

    python scripts/studies/report_selection.py [folder]

FOLDER/selection.md is written whole: what FOLDER/notes/selection.md says, tables and pictures.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from smt_peft.plotting import COLOURS, MARKERS

FACTORS = {"x": "rms $x$", "dy": "rms $dY$", "coherence": "coherence", "peak": "peak", "best |g|": "best\nscores"}
ABREAST = 3  # panels
SCOPES = {"model": "whole model", "module": "per module"}


def main(folder: Path) -> None:
    found = json.loads((folder / "selection.json").read_text())
    testbeds, models = found["testbeds"], {}
    for name in testbeds:
        models.setdefault(name.partition("-")[0], name)  # the first testbed of each model
    draw_batches(testbeds, SCOPES, folder / "selection_batches.png")
    draw_factors({name: testbeds[name] for name in models.values()}, folder / "selection_factors.png")
    draw_places(testbeds, folder / "selection_places.png")
    titles = {"batches": "Agreement with the selection of other batches"}
    titles |= {f"tasks_{scope}": f"Blocks in common between tasks, {SCOPES[scope]}" for scope in found["tasks"]}
    titles |= {
        "criteria": f"Blocks in common between criteria, per module, {next(iter(testbeds))}",
        "factors": "What makes the scores of a module type large",
        "places": "Where the blocks of the whole model's ranking are",
    }
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    notes, tables = folder / "notes/selection.md", report(testbeds, SCOPES)
    parts = ["# What selections depend on", f"[selection.json](selection.json), {versions}. Made by"]
    parts += [f"    {found['command']}\n    python scripts/studies/report_selection.py"]
    parts += [notes.read_text().strip()] if notes.exists() else []
    for name, title in titles.items():
        parts += [f"![{title}](selection_{name}.png)", *([tables[name]] if name in tables else [])]
    (folder / "selection.md").write_text("\n\n".join(parts) + "\n")
    print(f"{folder / 'selection.md'} and {len(titles)} pictures beside it")


def draw_batches(testbeds: dict[str, dict], scopes: dict[str, str], path: Path) -> None:
    """How well the selection after some batches agrees with that of other batches, a panel per scope."""
    figure = Figure(figsize=(4.6 * len(scopes), 4.2), layout="constrained")
    axes = figure.subplots(1, len(scopes), sharey=True, squeeze=False)[0]
    for ax, (scope, title) in zip(axes, scopes.items(), strict=True):
        for (name, figures), colour, marker in zip(testbeds.items(), cycle(COLOURS), cycle(MARKERS)):
            here = figures["batches"][scope]
            counts = [*map(int, here["overlap"])]
            pairs = [[100 * share for share in pair] for pair in here["overlap"].values()]
            ax.fill_between(counts, *map(list, zip(*map(sorted, pairs), strict=True)), color=colour, alpha=0.2, lw=0)
            ax.plot(counts, [fmean(pair) for pair in pairs], "-", color=colour, marker=marker, label=name)
            ax.plot(counts[-1] * 1.25, 100 * here["random_in_modules"], "_", color=colour, markersize=12, mew=2.5)
        chance = [100 * figures["batches"][scope]["random"] for figures in testbeds.values()]
        ax.axhspan(min(chance) - 0.5, max(chance) + 0.5, color="black", alpha=0.25, lw=0, label="random blocks")
        ax.set(xscale="log", title=title, xlabel="batches of the warm-up", ylim=(0, 100))
        ax.set_xticks(counts, counts)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3)
    axes[0].plot([], [], "_", color="black", markersize=12, mew=2.5, label="random, as many in each module")
    axes[0].set_ylabel(f"% of blocks in common with the\nselection of {counts[-1]} other batches")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def draw_factors(testbeds: dict[str, dict], path: Path) -> None:
    """What makes a module type's best scores large or small beside V's, a panel per testbed."""
    figure = Figure(figsize=(4.6 * len(testbeds), 5.2), layout="constrained")
    axes = figure.subplots(1, len(testbeds), sharey=True, squeeze=False)[0]
    for ax, (name, figures) in zip(axes, testbeds.items(), strict=True):
        factors = figures["factors"]
        value = next(kind for kind in factors if kind in ("v_proj", "value"))
        for place, (kind, colour, marker) in enumerate(zip(factors, cycle(COLOURS), cycle(MARKERS))):
            own, aside = factors[kind], 0.11 * (place - (len(factors) - 1) / 2)  # or equal types would hide each other
            *ratios, product = [own[factor] / factors[value][factor] for factor in FACTORS]
            label = f"{kind}: {100 * own['selected']:.0f} %"
            ax.plot([aside + x for x in range(4)], ratios, ":", color=colour, marker=marker, markersize=6, lw=0.6)
            ax.plot(4 + aside, product, color=colour, marker=marker, markersize=8, label=label, ls="", mec="black")
        for x in range(4):
            ax.axvline(x + 0.5, color="black", lw=0.8 if x == 3 else 0.2)
        ax.set(yscale="log", title=name, xlim=(-0.5, 4.5))
        ax.set_xticks(range(5), FACTORS.values())
        ax.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"])
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3, axis="y")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2, "frameon": False}
        ax.legend(**below, title="share of the selection", columnspacing=1)
    axes[0].set_ylabel("times V's")
    figure.savefig(path, dpi=120)


def draw_places(testbeds: dict[str, dict], path: Path) -> None:
    """Where the blocks of the whole model's ranking are: module types x layers, a panel per testbed."""
    abreast = min(ABREAST, len(testbeds))
    down = -(-len(testbeds) // abreast)
    figure = Figure(figsize=(3.6 * abreast, 3.1 * down), layout="constrained")
    panels = figure.subplots(down, abreast, squeeze=False).flat
    for ax, (name, figures) in zip(panels, testbeds.items(), strict=False):
        draw_matrix(ax, {kind: [100 * share for share in of] for kind, of in figures["places"].items()})
        ax.set(title=name, xlabel="layer")
    for ax in panels[len(testbeds) :]:
        ax.set_axis_off()
    figure.savefig(path, dpi=100)


def draw_matrix(ax: Axes, rows: dict[str, list[float]]) -> None:
    """Percentages as shades of grey, with their numbers where they are not zero."""
    shades = list(rows.values())
    most = max(map(max, shades))
    ax.imshow(shades, cmap="Greys", vmin=0, vmax=most, aspect="auto")
    for row, line in enumerate(shades):
        for column, share in enumerate(line):
            text = f"{share:.0f}" if share >= 0.95 else f"{share:.1f}" if share >= 0.05 else "" if share == 0 else "0+"
            colour = "white" if share > most / 2 else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(len(shades[0])))
    ax.set_yticks(range(len(rows)), rows)


# --- tables ----------------------------------------------------------------------------------------------------------


def report(testbeds: dict[str, dict], scopes: dict[str, str]) -> dict[str, str]:
    """Tables in Markdown, by the name of the picture that shows the same."""
    factors = "\n\n".join(factors_table(name, figures["factors"]) for name, figures in testbeds.items())
    return {"batches": agreement_table(testbeds, scopes), "criteria": criteria_table(testbeds), "factors": factors}


def agreement_table(testbeds: dict[str, dict], scopes: dict[str, str]) -> str:
    counts = list(next(iter(testbeds.values()))["batches"]["model"]["overlap"])
    rows = []
    for name, figures in testbeds.items():
        for scope, title in scopes.items():
            here = figures["batches"][scope]
            shares = [*(fmean(pair) for pair in here["overlap"].values()), here["random"], here["random_in_modules"]]
            rows.append([name, title, *map(percent, shares)])
    title = f"Blocks in common with the selection of {counts[-1]} other batches, %, after so many batches"
    return table(title, ["testbed", "scope", *map(str, counts), "random", "random, as many in each module"], rows)


def criteria_table(testbeds: dict[str, dict]) -> str:
    reference, *others = next(iter(testbeds.values()))["criteria"]["module"]
    rows = [
        [name, *(" / ".join(percent(figures["criteria"][scope][name]) for scope in ("module", "model"))
                 for figures in testbeds.values())]
        for name in others
    ]  # fmt: skip
    title = f"Blocks in common with the selection by {reference}, %: per module / whole model"
    return table(title, ["criterion", *testbeds], rows)


def factors_table(testbed: str, factors: dict[str, dict[str, float]]) -> str:
    numbers = {
        "rms x": "x",
        "rms dY": "dy",
        "coherence": "coherence",
        "mean score": "mean |g|",
        "peak": "peak",
        "rms w": "w",
    }
    shares = {
        "score in best blocks": "share of score in best",
        "of all blocks": "candidates",
        "of the selection": "selected",
    }
    rows = [
        [kind, *(f"{own[key]:.3g}" for key in numbers.values()), *(percent(own[key]) for key in shares.values())]
        for kind, own in factors.items()
    ]
    return table(testbed, ["module type", *numbers, *(f"{name}, %" for name in shares)], rows)


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/results"), help="default: docs/results")
    main(parser.parse_args().folder)
