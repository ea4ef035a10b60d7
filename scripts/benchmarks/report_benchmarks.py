"""Turns the JSON files of docs/results into tables and pictures.

    python scripts/benchmarks/report_benchmarks.py [folder with benchmarks.md and results/]
    python scripts/benchmarks/report_benchmarks.py --summary [folder with JSON files]

The first puts every file's table into results/benchmarks.md, and, without some columns, into benchmarks.md where that
has the markers `<!-- NAME -->` and `<!-- /NAME -->` of the file's name, and draws the sweeps whose picture,
results/NAME.png, that shows. The second prints one short table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

DOCS = Path(__file__).parents[2] / "docs"
# columns of the long tables alone
LONG = ("waited for, ms", "device, ms", "launches", "GFLOP", "optimizer, MiB", "first step, s")
GOALS = [  # setting, what is compared, with which method's, at most
    ("peft", "device_s", "floor", 1.03),
    ("peft", "step_s", "floor", 1.05),
    ("peft", "step_s", "lora", 0.90),
    ("peft", "captured_s", "floor", 1.05),
    ("peft", "captured_s", "lora", 0.90),
    ("peft", "peak_bytes", "lora", 1.0),
    ("peft", "host", "lora", 1.0),
    ("linear", "step_s", "lora", 0.85),
    ("linear", "captured_s", "lora", 0.85),
    ("compile", "step_s", "floor", 1.03),
    ("compile", "captured_s", "floor", 1.03),
    ("host", "host", "lora", 1.0),
    ("host-gpu", "host", "lora", 1.0),
]


def main(docs: Path) -> None:
    page, whole = (docs / "benchmarks.md").read_text(), []
    for path, result in read(docs / "results"):
        start, end = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        whole.append(f"## {path.stem}\n\n{provenance(result)}{table(result)}\n")
        if start in page and end in page:
            before, after = page.partition(start)[0], page.partition(end)[2]
            page = f"{before}{start}\n{provenance(result)}{table(result, LONG)}\n{end}{after}"
        if f"{path.stem}.png" in page:
            draw_sweep(result, path.with_suffix(".png"))
        print(path.stem)
    (docs / "benchmarks.md").write_text(page)
    made_by = "Made by `scripts/benchmarks/report_benchmarks.py`; [what they mean](../benchmarks.md)."
    (docs / "results/benchmarks.md").write_text(f"# All measurements\n\n{made_by}\n\n" + "\n".join(whole))


def read(folder: Path) -> list[tuple[Path, dict]]:
    paths = [path for kind in ("training", "ops", "inference") for path in sorted(folder.glob(f"{kind}*.json"))]
    return [(path, json.loads(path.read_text())) for path in paths]


def table(result: dict, leave_out: Sequence[str] = ()) -> str:
    if "ops" in result:
        return ops_table(result)
    if "speeds" in result:
        return inference_table(result)
    more = f"\n\n{host_table(result)}" if result["sweep"] == "target_modules" else ""
    return training_table(result, leave_out) + more


def provenance(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = result["load_average"]
    load = "" if load is None else f", load average before the run {load}"
    commit = f"; commit {result['commit']}" if result.get("commit") else ""
    return f"`{result['command']}`\n\n{result['machine']}{load}; {versions}{commit}\n\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def training_table(result: dict, leave_out: Sequence[str] = ()) -> str:
    """One row per method, and per value of what is swept; times also in terms of the floor's and of LoRA's."""
    sweep = result["sweep"]
    rows = []
    for run in result["runs"]:
        first = {sweep: _value(run["options"][sweep])} if sweep else {}
        rows += [{**first, **_row(run, method, leave_out)} for method in run["methods"]]
    return markdown(rows)


def markdown(rows: list[dict]) -> str:
    """A table of what is there: columns that no row fills are left out."""
    columns = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in columns if any(row.get(name) not in (None, "-") for row in rows)]
    lines = [columns, ["---"] * len(columns), *[[str(row.get(name) or "-") for name in columns] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(run: dict, method: str, leave_out: Sequence[str]) -> dict:
    figure = run["methods"][method]
    options = run["options"]
    steps = figure.get("step_s") or []
    low, high = _spread(steps) if steps else (0, 0)
    cells = {
        "method": method,
        "trained": f"{figure['trainable_parameters']:,}" if "trainable_parameters" in figure else "-",
        "step, ms (p20 - p80)": f"{1e3 * median(steps):.1f} ({1e3 * low:.1f} - {1e3 * high:.1f})" if steps else "-",
        "x floor": _times(run, method, "floor"),
        "x LoRA": _times(run, method, "lora"),
        "waited for, ms": _scaled(value(run, method, "synced_s"), 1e-3, 1),
        "device, ms": _scaled(figure.get("device_s"), 1e-3),
        "device x floor": _times(run, method, "floor", "device_s"),
        "captured, ms": _scaled(value(run, method, "captured_s"), 1e-3, 1),
        "captured x floor": _times(run, method, "floor", "captured_s"),
        "host, ms": _scaled(value(run, method, "host_s"), 1e-3, 1),
        "launches": figure.get("launches"),
        "peak, GiB": _scaled(figure.get("peak_bytes"), 2**30),
        "saved, MiB": _scaled(figure.get("saved_bytes"), 2**20),
        "GFLOP": _scaled(figure.get("flops"), 1e9),
        "optimizer, MiB": _scaled(figure.get("optimizer_bytes"), 2**20),
        "tokens/s": f"{options['batch_size'] * options['tokens'] / median(steps):,.0f}" if steps else "-",
        "first step, s": _scaled(figure.get("first_step_s"), 1),
        "graphs / breaks": f"{figure['graphs']} / {figure['graph_breaks']}" if "graphs" in figure else "-",
        "note": figure.get("note"),
    }
    return {name: cell for name, cell in cells.items() if name not in leave_out}


def _spread(figures: list[float]) -> tuple[float, float]:
    """Of rounds: their 20th and 80th percentiles."""
    low, *_, high = quantiles(figures, n=5, method="inclusive") if figures[1:] else 4 * figures
    return low, high


def host_table(result: dict) -> str:
    """Where the host's time goes: microseconds beyond the floor's per adapted layer and step, by place in the code.

    From the least of the steps. The profiler slows Python down: its shares are scaled to the time without it.
    """
    rows = []
    for run in result["runs"]:
        if "host_profile" not in run or host_ratio(run) is None:  # stopped early, or not of all three methods
            continue
        layers = run["adapted_layers"]
        added, places = {}, {}
        for method in ("smt", "lora"):
            added[method] = 1e6 * _host_adds(run, method) / layers
            floor, own = (run["host_profile"][name] for name in ("floor", method))
            beyond = {name: seconds - floor.get(name, 0) for name, seconds in own.items()}
            scale = added[method] / sum(beyond.values())
            places[method] = {name: scale * seconds for name, seconds in beyond.items()}
        first = {"targets": _value(run["options"]["target_modules"])}
        whole = {"SMT, us": f"{added['smt']:.0f}", "LoRA, us": f"{added['lora']:.0f}"}
        rows.append({**first, "where": "all", **whole, "x LoRA": f"{added['smt'] / added['lora']:.2f}"})
        for name in sorted(set().union(*places.values()), key=lambda name: -places["smt"].get(name, 0)):
            smt, lora = (places[method].get(name, 0) for method in ("smt", "lora"))
            if max(smt, lora) > 0.02 * added["lora"]:
                rows.append({**first, "where": name, "SMT, us": f"{smt:.0f}", "LoRA, us": f"{lora:.0f}"})
    return markdown(rows)


def inference_table(result: dict) -> str:
    """Tokens per second by method and batch, and what an adapter's life on disk and in memory costs."""
    speeds = []
    for row in result["speeds"]:
        base = next((r for r in result["speeds"] if (r["method"], r["batch"]) == ("base", row["batch"])), row)
        speeds.append({
            "batch": row["batch"],
            "method": row["method"],
            "prompt, tokens/s": f"{row['prefill_tokens_per_s']:,.0f}",
            "new tokens/s": f"{row['decode_tokens_per_s']:,.1f}",
            "x base model": f"{row['decode_tokens_per_s'] / base['decode_tokens_per_s']:.3f}",
        })  # fmt: skip
    lives = [
        {"adapter": name, "MiB": _scaled(life["bytes"], 2**20),
         **{f"{verb}, ms": _scaled(life[f"{verb}_s"], 1e-3, 1) for verb in result["verbs"]}}
        for name, life in result["adapters"].items()
    ]  # fmt: skip
    return "\n\n".join(markdown(rows) for rows in (speeds, lives) if rows)


def ops_table(result: dict) -> str:
    """One row per op and size: its time beside what its bytes and its FLOPs would take at the machine's own rates."""
    rates = ", ".join(f"{rate / 1e9:,.1f} GFLOP/s in {dtype}" for dtype, rate in result["flops_per_s"].items())
    parts = [f"The machine copies {result['bytes_per_s'] / 1e9:,.1f} GB/s and multiplies {rates}."]
    if "launch_s" in result:
        parts[0] += f" A call that does nearly nothing takes it {1e3 * result['launch_s']:.4f} ms."
    rows = []
    for op in result["ops"]:
        row = {"op": op["op"], "dtype": op["dtype"], "size": op["size"], "error": f"{op['error']:.0e}"}
        row["time, ms"] = f"{1e3 * op['seconds']:.3f}" if "seconds" in op else "wrong, not timed"
        if "seconds" in op:
            row |= {f"{what} take, ms": f"{1e3 * op[f'{what.lower()}_s']:.3f}" for what in ("bytes", "FLOPs")}
            row["x what is allowed"] = f"{op['seconds'] / max(op['bytes_s'], op['flops_s']):.2f}"
        rows.append(row)
    parts += [markdown(rows)] if rows else []
    if "selection_of_a_million_blocks_s" in result:  # a run that was stopped has none
        parts.append(f"Selecting 1 % of a million blocks takes {result['selection_of_a_million_blocks_s']:.2f} s.")
    return "\n\n".join(parts)


def summary(folder: Path) -> str:
    """The figures that matter most, of all files, and how they stand to what is aimed at."""
    results = {path.stem.removeprefix("training_"): result for path, result in read(folder)}
    rows, goals = [], []
    for setting, result in results.items():
        for run in result.get("runs", []):
            point = f" {_value(run['options'][result['sweep']])}" if result["sweep"] else ""
            for method in run["methods"]:
                if method != "floor" or not point:
                    rows.append({"setting": setting + point, **_row(run, method, LONG)})
    for setting, quantity, other, limit in GOALS:
        for run in results.get(setting, {}).get("runs", []):
            ratio = host_ratio(run) if quantity == "host" else median(ratios(run, "smt", other, quantity) or [0])
            if ratio:
                what = f"{quantity.removesuffix('_s').removesuffix('_bytes')} {ratio:.3f} x {other}'s"
                goals.append(f"{'reached' if ratio <= limit else 'MISSED '} {setting}: {what}, at most {limit}")
    others = [table(result) for result in results.values() if "runs" not in result]
    return "\n\n".join(part for part in (*others, markdown(rows) if rows else "", "\n".join(goals)) if part)


# --- figures ---------------------------------------------------------------------------------------------------------


def value(run: dict, method: str, quantity: str) -> float | None:
    """A quantity of a method; the median where there is one figure per round."""
    found = run["methods"].get(method, {}).get(quantity)
    return (median(found) if found else None) if isinstance(found, list) else found


def ratios(run: dict, method: str, other: str, quantity: str = "step_s") -> list[float]:
    """A quantity in terms of another method's, round by round: a machine that is slow for a while slows both."""
    found = (run["methods"].get(name, {}).get(quantity) or [] for name in (method, other))
    mine, theirs = (values if isinstance(values, list) else [values] for values in found)
    return [a / b for a, b in zip(mine, theirs, strict=False)]


def host_ratio(run: dict) -> float | None:
    """The host's time that SMT adds to the floor's in a step, in terms of what LoRA adds."""
    if not all(run["methods"].get(method, {}).get("step_s") for method in ("floor", "smt", "lora")):
        return None
    return _host_adds(run, "smt") / _host_adds(run, "lora")


def _host_adds(run: dict, method: str) -> float:
    mine, floor = (run["methods"][name] for name in (method, "floor"))
    return min(mine["host_s"] or mine["step_s"]) - min(floor["host_s"] or floor["step_s"])


def _times(run: dict, method: str, other: str, quantity: str = "step_s") -> str:
    # A time that is waited for stands in where there is none back to back.
    quotients = ratios(run, method, other, quantity)
    if not quotients and quantity == "step_s":
        quotients = ratios(run, method, other, "synced_s")
    return f"{median(quotients):.3f}" if quotients else "-"


def _scaled(value: float | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _value(value: object) -> str:
    if isinstance(value, list):
        return "q, v" if len(value) == 2 else "all linear"
    return f"{100 * value:g} %" if isinstance(value, float) else str(value)


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_sweep(result: dict, path: Path) -> None:
    """Against what is swept: times and memory of a step, or on a CPU FLOPs and saved bytes, beside the floor's."""
    import matplotlib.pyplot as plt

    runs, sweep = result["runs"], result["sweep"]
    values = [run["options"][sweep] for run in runs]
    by_name = isinstance(values[0], (str, list))
    places = range(len(values)) if by_name else values
    quantities = {"step_s": "time", "flops": "FLOPs", "saved_bytes": "saved bytes"}
    if any(value(run, "smt", "device_s") for run in runs):
        quantities = {"step_s": "time", "device_s": "device time", "peak_bytes": "peak memory"}
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axes, (quantity, label) in zip(panels, quantities.items(), strict=True):
        for method in runs[0]["methods"]:
            colour, marker = _style(method)
            points = [(place, ratios(run, method, "floor", quantity)) for place, run in zip(places, runs, strict=True)]
            points = [(place, median(quotients)) for place, quotients in points if quotients]  # else: out of memory
            name = "floor (1)" if method == "floor" else method
            axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, color=colour, label=name)
        axes.set_ylabel(f"{label} of a step / floor")
        axes.set_xlabel({"trainable_ratio": "budget (share of the model)"}.get(sweep, sweep.replace("_", " ")))
        if not by_name:
            axes.set_xscale("log")
        axes.set_xticks(places, [_value(point) for point in values])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _finish(figure, result, path)


def _style(method: str) -> tuple[str, str]:
    from smt_peft.plotting import BLUE, GREY, ORANGE, VERMILION  # slow to import, and tables need it not

    styles = {"floor": ("black", ""), "smt": (BLUE, "o"), "lora": (VERMILION, "^"), "lora-bf16": (ORANGE, "v")}
    return styles.get(method, (GREY, "D"))


def _finish(figure, result: dict, path: Path) -> None:
    options = result["runs"][0]["options"]
    shape = "" if result["sweep"] == "shape" else f"{options['shape']}, "
    figure.suptitle(
        f"{path.stem.removeprefix('training_')}: {shape}{options['dtype']}, {result['machine']}", fontsize=10
    )
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="default: docs, with --summary docs/results")
    parser.add_argument("--summary", action="store_true")
    command = parser.parse_args()
    if command.summary:
        print(summary(command.folder or DOCS / "results"))
    else:
        main(command.folder or DOCS)
