"""Turns the JSON files of docs/results into the tables of docs/benchmarks.md and the pictures beside them.

    python scripts/report_benchmarks.py [folder with benchmarks.md and results/; default: docs]

A table goes between the markers `<!-- NAME -->` and `<!-- /NAME -->`, NAME being that of the JSON file. Markers
without a file stay as they are; a file named training_* or ops_* without markers is an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median, quantiles

from smt_peft.plotting import BLUE, GREY, ORANGE, SKY, VERMILION

DOCS = Path(__file__).parents[1] / "docs"
STYLES = {
    "floor": ("black", ""),
    "smt": (BLUE, "o"),
    "smt-additive": (SKY, "s"),
    "lora": (VERMILION, "^"),
    "lora-bf16": (ORANGE, "v"),
}
OTHERS = (GREY, "D")


def main(docs: Path) -> None:
    page = (docs / "benchmarks.md").read_text()
    for path in sorted([*docs.glob("results/training_*.json"), *docs.glob("results/ops_*.json")]):
        result = json.loads(path.read_text())
        table = ops_table(result) if "ops" in result else training_table(result)
        start, end = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        if not (start in page and end in page):
            raise SystemExit(f"{docs}/benchmarks.md has no place for {path.name}: add {start} and {end}.")
        before, after = page.partition(start)[0], page.partition(end)[2]
        page = f"{before}{start}\n{provenance(result)}{table}\n{end}{after}"
        if "ops" not in result:
            (draw_sweep if result["sweep"] else draw_methods)(result, path.with_suffix(".png"))
        print(path.stem)
    (docs / "benchmarks.md").write_text(page)


def provenance(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = result["load_average"]
    load = "" if load is None else f", load average before the run {load}"
    return f"`{result['command']}`\n\n{result['machine']}{load}; {versions}\n\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def training_table(result: dict) -> str:
    """One row per method, and per value of what is swept; time also in terms of the floor's and of LoRA's."""
    sweep = result["sweep"]
    head = [*([sweep] if sweep else []), "method", "trained", "step, ms (p20 - p80)", "x floor", "x LoRA", "tokens/s",
            "peak, GiB", "saved, MiB", "GFLOP", "launches", "optimizer, MiB"]  # fmt: skip
    head += [] if sweep else ["adapter, MiB", "save / load / merge, ms"]
    rows = [head, ["---"] * len(head)]
    for run in result["runs"]:
        first = [_value(run["options"][sweep])] if sweep else []
        rows += [[*first, *_row(run, method)][: len(head)] for method in run["methods"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(run: dict, method: str) -> list[str]:
    figure = run["methods"][method]
    seconds = step_seconds(run, method)
    if seconds is None:
        return [method, "out of memory", *["-"] * 11]
    low, *_, high = quantiles(figure["step_s"], n=5, method="inclusive")
    tokens = run["options"]["batch_size"] * run["options"]["tokens"]
    life = [_scaled(figure.get(key), 1e-3, 0) for key in ("save_s", "load_s", "merge_s")]
    return [
        method,
        f"{figure['trainable_parameters']:,}",
        f"{1e3 * seconds:.1f} ({1e3 * low:.1f} - {1e3 * high:.1f})",
        _times(run, method, "floor"),
        _times(run, method, "lora"),
        f"{tokens / seconds:,.0f}",
        _scaled(figure.get("peak_bytes"), 2**30),
        _scaled(figure.get("saved_bytes"), 2**20),
        _scaled(figure.get("flops"), 1e9),
        str(figure.get("launches", "-")),
        _scaled(figure.get("optimizer_bytes"), 2**20),
        _scaled(figure.get("adapter_bytes"), 2**20),
        " / ".join(life) if "save_s" in figure else "-",
    ]


def ops_table(result: dict) -> str:
    """One row per op and size: its time beside what its bytes and its FLOPs would take at the machine's own rates."""
    lines = [
        f"The machine copies {result['bytes_per_s'] / 1e9:,.1f} GB/s and multiplies "
        + ", ".join(f"{rate / 1e9:,.1f} GFLOP/s in {dtype}" for dtype, rate in result["flops_per_s"].items())
        + ".\n",
        "| op | dtype | size | error | time, ms | bytes take, ms | FLOPs take, ms | x what is allowed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op in result["ops"]:
        cells = [op["op"], op["dtype"], op["size"], f"{op['error']:.0e}"]
        cells += [f"{1e3 * op[key]:.3f}" for key in ("seconds", "bytes_s", "flops_s")]
        lines.append(f"| {' | '.join(cells)} | {op['seconds'] / max(op['bytes_s'], op['flops_s']):.2f} |")
    lines.append(f"\nSelecting 1 % of a million blocks takes {result['selection_of_a_million_blocks_s']:.2f} s.")
    return "\n".join(lines)


def step_seconds(run: dict, method: str) -> float | None:
    seconds = run["methods"].get(method, {}).get("step_s")
    return median(seconds) if seconds else None


def ratios(run: dict, method: str, other: str) -> list[float]:
    """Step time in terms of another method's, round by round: a machine that is slow for a while slows both."""
    steps = run["options"]["steps"]
    mine, theirs = (run["methods"].get(name, {}).get("step_s", []) for name in (method, other))
    rounds = range(0, min(len(mine), len(theirs)), steps)
    return [median(mine[start : start + steps]) / median(theirs[start : start + steps]) for start in rounds]


def _times(run: dict, method: str, other: str) -> str:
    quotients = ratios(run, method, other)
    return f"{median(quotients):.3f}" if quotients else "-"


def _scaled(value: float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _value(value: object) -> str:
    return f"{100 * value:g} %" if isinstance(value, float) else str(value)


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_methods(result: dict, path: Path) -> None:
    """A row per method, in turn: time of a step beside the floor's, and memory (the peak where there is one)."""
    import matplotlib.pyplot as plt

    run = result["runs"][0]
    methods = [method for method in run["methods"] if ratios(run, method, "floor")][::-1]
    memory, label = ("peak_bytes", "peak memory, GiB"), 2**30
    if not any("peak_bytes" in run["methods"][method] for method in methods):
        memory, label = ("saved_bytes", "saved for backward, MiB"), 2**20
    figure, (times, bytes_) = plt.subplots(
        1, 2, figsize=(9, 0.35 * len(methods) + 1.3), sharey=True, layout="constrained"
    )
    for row, method in enumerate(methods):
        colour, _ = STYLES.get(method, OTHERS)
        quotients = ratios(run, method, "floor")
        low, *_, high = quantiles([*quotients, median(quotients)], n=5, method="inclusive")
        times.plot([low, high], [row, row], color=colour, linewidth=3, alpha=0.5)
        times.plot(median(quotients), row, "o", color=colour)
        value = run["methods"][method].get(memory[0])
        if value is not None:
            bytes_.barh(row, value / label, color=colour)
            bytes_.text(value / label, row, f" {value / label:,.1f}", va="center", fontsize=8)
    times.axvline(1, color="black", linewidth=0.8)
    times.set_yticks(range(len(methods)), methods)
    times.set_xlabel("step time / floor (median and p20 to p80 of the rounds)")
    bytes_.set_xlabel(memory[1])
    bytes_.margins(x=0.15)
    _finish(figure, result, path)


def draw_sweep(result: dict, path: Path) -> None:
    """Against what is swept: time, FLOPs and memory of a step, each beside the floor's."""
    import matplotlib.pyplot as plt

    runs, sweep = result["runs"], result["sweep"]
    values = [run["options"][sweep] for run in runs]
    by_name = isinstance(values[0], str)
    places = range(len(values)) if by_name else values
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axes, quantity in zip(panels, ("time", "FLOPs", "saved bytes"), strict=True):
        for method in runs[0]["methods"]:
            colour, marker = STYLES.get(method, OTHERS)
            points = [(place, _in_floors(run, method, quantity)) for place, run in zip(places, runs, strict=True)]
            points = [point for point in points if point[1] is not None]  # out of memory
            label = "floor (1)" if method == "floor" else method
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
        axes.set_ylabel(f"{quantity} of a step / floor")
        axes.set_xlabel({"trainable_ratio": "budget (share of the model)"}.get(sweep, sweep.replace("_", " ")))
        if not by_name:
            axes.set_xscale("log")
        axes.set_xticks(places, [_value(value) for value in values])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _finish(figure, result, path)


def _in_floors(run: dict, method: str, quantity: str) -> float | None:
    key = {"FLOPs": "flops", "saved bytes": "saved_bytes"}.get(quantity)
    quotients = ratios(run, method, "floor")
    if not quotients:
        return None
    return run["methods"][method][key] / run["methods"]["floor"][key] if key else median(quotients)


def _finish(figure, result: dict, path: Path) -> None:
    options = result["runs"][0]["options"]
    shape = "" if result["sweep"] == "shape" else f"{options['shape']}, "
    figure.suptitle(f"{options['setting']}: {shape}{options['dtype']}, {result['machine']}", fontsize=10)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
