"""A page of tables and a picture for each quality study, from what bench_quality.py has written.

    python scripts/studies/report_quality.py configs/study/*.yaml --page docs/experiments.md

RESULTS/quality_STUDY.md is written whole: what RESULTS/notes/STUDY.md says, the picture and the tables. With --page,
RESULTS/quality_overview.md is, too, where all studies that this page links are given. Studies that are not complete
are reported as far as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import yaml
from bench_quality import planned
from quality_pictures import draw, draw_overview
from quality_results import (
    Against,
    Frames,
    Result,
    Results,
    against_lora,
    forgets_more,
    frames,
    reference_of,
    results_of,
    runs_of,
)

EXPLAINED = Path(__file__).parents[2] / "docs/experiments.md"
OVERVIEW = "quality_overview"
READING = """\
Test loss in nats; for encoders, too, because accuracy is coarse (the tables of the studies have it). Each row is one
testbed, its target modules and its trained parameters. *Paper's SMT* has one ranking of the whole model; empty where
it was not tried. *Best SMT* is the one with the least validation loss of all its recipes that have as many seeds as
LoRA. *Old domain at equal loss* is what more it forgets than LoRA at learning rates where both reach the same test
loss (first seed); empty where the losses that the two reach do not overlap, or nothing is there to forget."""
NAMES = {
    "test_loss": "test",
    "test_accuracy": "accuracy",
    "old_loss": "old domain",
    "answers_loss": "own answers",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="YAML files of the studies")
    parser.add_argument("--results", default="docs/results", type=Path, help="folder of the JSON lines and the pages")
    parser.add_argument("--page", type=Path, help="page with links to all studies")
    options = parser.parse_args(argv)
    linked = set(re.findall(r"/quality_(\w+)\.md\)", options.page.read_text())) if options.page else set()
    reported = {}
    for path in options.studies:
        lines = options.results / f"quality_{path.stem}.jsonl"
        if not lines.exists():
            print(f"{path}: nothing has run")
            continue
        study = yaml.safe_load(path.read_text())
        every = [json.loads(line) for line in lines.read_text().splitlines()]
        runs = runs_of(study, every)
        results = results_of(study, runs)
        notes = options.results / "notes" / f"{path.stem}.md"
        parts = [head(study, path, runs, lines), notes.read_text().strip() if notes.exists() else ""]
        parts += section(study, results, lines.with_suffix(".png"))
        lines.with_suffix(".md").write_text("\n\n".join(filter(None, parts)) + "\n")
        reported[path.stem] = study, results
        left_out = f", {len(every) - len(runs)} more that the study does not ask for" * (len(every) > len(runs))
        print(f"{path}: {len(runs)} runs{left_out}")
    if not options.page:
        return
    if missing := linked - {*reported, "overview"}:
        print(f"The overview stays as it is, because {options.page} links {', '.join(sorted(missing))}, too.")
    elif against := against_lora([*reported.values()]):
        draw_overview(against, options.results / f"{OVERVIEW}.png")
        page = options.results / f"{OVERVIEW}.md"
        measured = f"[How it is measured]({os.path.relpath(EXPLAINED, page.parent)}#how-it-is-measured)."
        parts = ["# SMT beside LoRA", f"{READING} {measured}", f"![overview]({OVERVIEW}.png)", overview(against)]
        page.write_text("\n\n".join(parts) + "\n")


def head(study: dict, path: Path, runs: list[dict], lines: Path) -> str:
    """A page's title, what it was made from and how, and how much of the study has run."""
    plan = planned(study)
    count = len(plan) + len({replace(run, learning_rate=0.0) for run in plan}) * (len(study["seeds"]) - 1)
    versions = " and ".join(sorted({run["torch"] for run in runs}))
    done = f"{len(runs)} of {count} runs" + f", torch {versions}" * bool(runs)
    unfinished = " **Not complete: what follows will change.**" * (len(runs) < count)
    return (
        f"# {path.stem}\n\n"
        f"[{path.name}]({os.path.relpath(path, lines.parent)}), {done}: [{lines.name}]({lines.name}).{unfinished}\n"
        f"[How it is measured]({os.path.relpath(EXPLAINED, lines.parent)}#how-it-is-measured). Made by\n\n"
        f"    python scripts/studies/bench_quality.py {path} --shared ../shared\n"
        f"    python scripts/studies/report_quality.py {path}"
    )


def section(study: dict, results: Results, picture: Path) -> list[str]:
    """A study's picture, which this draws, its caption and tables; nothing where nothing has run."""
    if not results:
        return []
    in_frames = frames(study, results)
    caption = draw(study, results, in_frames, picture)
    return [f"![{picture.stem.removeprefix('quality_')}]({picture.name})", caption, tables(study, in_frames)]


def tables(study: dict, in_frames: Frames) -> str:
    text = []
    for title, frame in in_frames.items():
        rows = [{"method": name, **cells(study, *pair)} for name, pair in frame.items()]
        head = list(dict.fromkeys(itertools.chain(*rows)))
        base = next(iter(frame.values()))[0].runs[0]["base"]
        before = ", ".join(f"{NAMES[key]} {shown([value], key)}" for key, value in base.items())
        body = [head, ["---"] * len(head), *([row.get(column, "") for column in head] for row in rows)]
        text += [f"**{title}** (before: {before})", "\n".join(f"| {' | '.join(row)} |" for row in body)]
    return "\n\n".join(text)


def overview(against: Against) -> str:
    """One row per place: how far SMT is from LoRA in test loss, and in forgetting."""
    head = ["testbed, parameters", "LoRA", "paper's SMT - LoRA", "best SMT", "best SMT - LoRA"]
    head += ["seeds", "old domain at equal loss"]
    rows = [head, ["---"] * len(head)]
    for place, (lora, paper, name, best) in against.items():
        differences = [one and shown(one.minus(lora, "test_loss"), "test_loss", "+") for one in (paper, best)]
        loss, more = shown(lora.values("test_loss"), "test_loss"), shown(forgets_more(best, lora), "old_loss", "+")
        name, seeds = name.removeprefix("SMT, "), str(len(best.runs))
        where = f"{place.testbed}, {place.target}, {place.budget:,}"
        rows.append([where, loss, differences[0] or "", name, differences[1], seeds, more])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(study: dict, result: Result, reference: Result | None) -> dict[str, str]:
    """A row of a table, by column."""
    run, measure = result.runs[0], result.measure
    row = {"trained": f"{run['trained_parameters']:,}", "learning rate": rate_and_grid(result)}
    row["validation"] = shown([result.mean("validation_loss")], "validation_loss")
    row["test"] = shown(result.values("test_loss"), "test_loss")
    if measure == "test_accuracy":
        row["accuracy"] = shown(result.values(measure), measure)
    if reference:
        differences = result.minus(reference, measure) if result is not reference else []
        row[f"- {reference_of(study)}"] = shown(differences, measure, "+")
    for key in ("old_loss", "answers_loss"):
        if key in run:
            row[NAMES[key]] = shown(result.values(key), key)
    row |= {"seeds": str(len(result.runs)), "CPU min": f"{result.mean('cpu_seconds') / 60:.1f}"}
    if run["blocks_by_type"]:
        row["blocks, first seed"] = ", ".join(f"{name} {n}" for name, n in run["blocks_by_type"].items() if n)
    return row


def shown(values: list[float], key: str, sign: str = "") -> str:
    """Mean, and the sample standard deviation where there are several."""
    if not values:
        return ""
    scale, digits, unit = (100, 1, " points" if sign else " %") if key == "test_accuracy" else (1, 3, "")
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * fmean(values):{sign}.{digits}f}{spread}{unit}"


def rate_and_grid(result: Result) -> str:
    """The best learning rate and, where several were tried, all of them; a star where it has not one on both sides."""
    grid = sorted(run["learning_rate"] for run in result.tried)
    star = "*" if result.rate in (grid[0], grid[-1]) else ""
    if len(grid) == 1:
        return f"{result.rate:g}{star}"
    return f"{result.rate:g}{star} of {' '.join(f'{rate:g}' for rate in grid)}"


if __name__ == "__main__":
    main(sys.argv[1:])
