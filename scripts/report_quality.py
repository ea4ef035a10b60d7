"""Tables and a picture of each quality study, from what scripts/bench_quality.py has written.

    python scripts/report_quality.py configs/study/*.yaml --results docs/results --page docs/experiments.md

A study's text goes between the page's markers `<!-- quality_STUDY -->` and `<!-- /quality_STUDY -->`, its picture
beside its JSON lines. The learning rate of a method is the one with the least validation loss on the first seed;
figures are means over the seeds that ran with it. Studies that are not complete are reported as far as they are.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy
import yaml
from bench_quality import best_with_seeds, planned, validation_of
from quality_pictures import draw, draw_overview
from transformers import HfArgumentParser

OVERVIEW = "quality_overview"
LORA, PAPER = "LoRA", "SMT, whole model"  # names that studies give to LoRA and to the paper's recipe
NAMES = {"test_loss": "test", "test_accuracy": "accuracy", "old_loss": "old domain"}


@dataclass
class Options:
    studies: list[str] = field(metadata={"help": "YAML files of the studies"})
    results: str = field(default="docs/results", metadata={"help": "folder of the JSON lines, and for the pictures"})
    page: str = field(default="docs/experiments.md", metadata={"help": "page to put tables and pictures into"})


@dataclass(frozen=True, order=True)
class Place:
    """What methods are compared in: each trains about `budget` parameters of the target."""

    testbed: str
    target: str
    budget: int

    def has(self, line: dict) -> bool:
        """Whether a run belongs here; full fine-tuning has no target, and it and whole target weights no budget."""
        in_target = line["testbed"] == self.testbed and line["target"] in ("", self.target)
        return in_target and line["budget"] in (0, self.budget)

    def __str__(self) -> str:
        return f"{self.testbed}, {self.target}, about {self.budget:,} parameters"


@dataclass
class Result:
    """A method in a place.

    Attributes:
        runs: those with the best learning rate, one per seed.
        tried: those with the first seed, one per learning rate.
    """

    runs: list[dict]
    tried: list[dict]

    def values(self, key: str) -> list[float]:
        return [run[key] for run in self.runs]

    def mean(self, key: str) -> float:
        return fmean(self.values(key))

    @property
    def rate(self) -> float:
        return self.runs[0]["learning_rate"]

    @property
    def measure(self) -> str:
        """What is compared: the accuracy of a classifier, the loss of a language model."""
        return "test_accuracy" if "test_accuracy" in self.runs[0] else "test_loss"

    def minus(self, other: Result, key: str) -> list[float]:
        """Differences to another method, one per seed that both have run with."""
        theirs = {run["seed"]: run[key] for run in other.runs}
        return [run[key] - theirs[run["seed"]] for run in self.runs if run["seed"] in theirs]


Results = dict[Place, dict[str, Result]]  # place -> method -> result, in the study's order
# What stands in one table, or in one panel: title -> row -> its result and that of the method to compare with.
Frames = dict[str, dict[str, tuple[Result, Result | None]]]
# Where both were tuned: LoRA, the paper's SMT, and the SMT that validation prefers, with its name.
Against = dict[Place, tuple[Result, Result, str, Result]]


def main(argv: list[str]) -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(["--studies", *argv])
    page = Path(options.page)
    text, jobs, lora_beside_smt = page.read_text(), [], {}
    for path in map(Path, options.studies):
        lines = Path(options.results) / f"quality_{path.stem}.jsonl"
        if lines.exists():
            put_into(text, lines.stem, "", page)  # refuses before any work
            jobs.append((path, lines))
        else:
            print(f"{path}: nothing has run")
    for path, lines in jobs:
        study = yaml.safe_load(path.read_text())
        every = [json.loads(line) for line in lines.read_text().splitlines()]
        runs = runs_of(study, every)
        results = results_of(study, runs)
        body = [provenance(study, path, runs), *section(study, results, lines.with_suffix(".png"), page)]
        text = put_into(text, lines.stem, "\n\n".join(body), page)
        lora_beside_smt |= against_lora(study, results)
        left_out = f", {len(every) - len(runs)} more that the study does not ask for" * (len(every) > len(runs))
        print(f"{path}: {len(runs)} runs{left_out}")
    on_page = set(re.findall(r"<!-- (quality_\w+) -->", text))
    if on_page - {lines.stem for _, lines in jobs} - {OVERVIEW}:
        print(f"{page}: the overview stays as it is, because it needs all the studies that the page has")
    elif lora_beside_smt and OVERVIEW in on_page:
        lora_beside_smt = {place: lora_beside_smt[place] for place in sorted(lora_beside_smt)}
        picture = Path(options.results) / f"{OVERVIEW}.png"
        draw_overview(lora_beside_smt, picture)
        text = put_into(text, OVERVIEW, f"{link(picture, page)}\n\n{overview(lora_beside_smt)}", page)
    page.write_text(text)


def section(study: dict, results: Results, picture: Path, page: Path) -> list[str]:
    """A study's picture, which this draws, its caption and tables; nothing where nothing has run."""
    if not results:
        return []
    in_frames = frames(study, results)
    caption = draw(study, results, in_frames, picture)
    return [link(picture, page), caption, tables(study, in_frames)]


def link(picture: Path, page: Path) -> str:
    return f"![{picture.stem.removeprefix('quality_')}]({os.path.relpath(picture, page.parent)})"


def put_into(text: str, name: str, body: str, page: Path) -> str:
    """The page's text with `body` between its markers."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    if end not in rest:
        raise SystemExit(f"{page} has no place for {name}: add {start} and {end}.")
    return f"{before}{start}\n{body}\n{end}{rest.partition(end)[2]}"


# --- results ---------------------------------------------------------------------------------------------------------


def runs_of(study: dict, lines: list[dict]) -> list[dict]:
    """The runs that the study asks for, in its order."""
    by_key = {line["key"]: line for line in lines}
    tried = [run for run in planned(study) if run.key in by_key]
    asked = [*tried, *best_with_seeds(tried, study["seeds"][1:], by_key)]
    return [by_key[run.key] for run in asked if run.key in by_key]


def results_of(study: dict, runs: list[dict]) -> Results:
    """Every method in every place, as far as it has run with the first seed."""
    results: Results = {}
    for testbed, target in itertools.product(study["testbeds"], study["targets"]):
        for place in (Place(testbed, target, budget) for budget in study["budgets"][target]):
            for method in study["methods"]:
                here = [run for run in runs if run["method"] == method and place.has(run)]
                tried = [run for run in here if run["seed"] == study["seeds"][0]]
                if tried:
                    rate = min(tried, key=validation_of)["learning_rate"]
                    best = [run for run in here if run["learning_rate"] == rate]
                    results.setdefault(place, {})[method] = Result(best, tried)
    # What has no budget is at home in every place, but begins none.
    begun = {place: of for place, of in results.items() if any(one.runs[0]["budget"] for one in of.values())}
    return begun or results


def reference_of(study: dict) -> str:
    """The method that the others are compared with: plain LoRA, or the study's first."""
    plain = (name for name, method in study["methods"].items() if {*method} == {"type", "learning_rates"})
    lora = (name for name in plain if study["methods"][name]["type"] == "lora")
    return next(lora, next(iter(study["methods"])))


def frames(study: dict, results: Results) -> Frames:
    """A frame is a place, or a testbed where more targets than methods stand against each other."""
    by_target = len(study["targets"]) > len(study["methods"])
    found: Frames = {}
    for place, methods in results.items():
        frame = found.setdefault(place.testbed if by_target else str(place), {})
        for method, result in methods.items():
            row = f"{place.target}: {method}" if by_target and result.runs[0]["target"] else method
            frame[row] = result, methods.get(reference_of(study))
    return found


def against_lora(study: dict, results: Results) -> Against:
    """The places of a study where LoRA and SMT were both tuned."""
    found = {}
    for place, methods in results.items():
        blocks = {name: result for name, result in methods.items() if study["methods"][name]["type"] == "smt"}
        if LORA in methods and PAPER in blocks:
            best = min(blocks, key=lambda name: blocks[name].mean("validation_loss"))
            found[place] = methods[LORA], blocks[PAPER], best, blocks[best]
    return found


# --- text ------------------------------------------------------------------------------------------------------------


def provenance(study: dict, path: Path, runs: list[dict]) -> str:
    plan = planned(study)
    count = len(plan) + len({replace(run, learning_rate=0.0) for run in plan}) * (len(study["seeds"]) - 1)
    versions = " and ".join(sorted({run["torch"] for run in runs}))
    with_versions = f"; torch {versions}" if runs else ""
    return f"`python scripts/bench_quality.py {path}`: {len(runs)} of {count} runs{with_versions}."


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
        differences = [shown(one.minus(lora, "test_loss"), "test_loss", "+") for one in (paper, best)]
        loss, more = shown(lora.values("test_loss"), "test_loss"), shown(forgets_more(best, lora), "old_loss", "+")
        name, seeds = name.removeprefix("SMT, "), str(len(best.runs))
        where = f"{place.testbed}, {place.target}, {place.budget:,}"
        rows.append([where, loss, differences[0], name, differences[1], seeds, more])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def forgets_more(result: Result, lora: Result) -> list[float]:
    """The loss on the old domain minus LoRA's at equal test loss, with the first seed: mean over the losses that both
    reach at learning rates up to their best, with straight lines between; nothing where they reach none in common."""
    curves = []
    for tried, rate in ((result.tried, result.rate), (lora.tried, lora.rate)):
        runs = [run for run in tried if run["learning_rate"] <= rate and "old_loss" in run]
        curves.append(sorted((run["test_loss"], run["old_loss"]) for run in runs))
    if not all(curves):
        return []
    (mine_at, mine), (theirs_at, theirs) = (zip(*curve, strict=True) for curve in curves)
    low, high = max(mine_at[0], theirs_at[0]), min(mine_at[-1], theirs_at[-1])
    losses = numpy.linspace(low, high, 50)
    difference = numpy.interp(losses, mine_at, mine) - numpy.interp(losses, theirs_at, theirs)
    return [difference.mean()] if low < high else []


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
    if "old_loss" in run:
        row["old domain"] = shown(result.values("old_loss"), "old_loss")
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
    """The best learning rate and, where several were tried, all of them; a star where the best is at an end."""
    grid = sorted(run["learning_rate"] for run in result.tried)
    if len(grid) == 1:
        return f"{result.rate:g}"
    star = "*" if result.rate in (grid[0], grid[-1]) else ""
    return f"{result.rate:g}{star} of {' '.join(f'{rate:g}' for rate in grid)}"


if __name__ == "__main__":
    main(sys.argv[1:])
