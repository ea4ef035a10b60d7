"""What the runs of a quality study say: methods in places, each at its best learning rate.

The learning rate of a method is the one with the least validation loss on the first seed; figures are those of the
seeds that ran with it. A study that is not complete is read as far as it is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy
from bench_quality import best_with_seeds, planned, validation_of

LORA, PAPER = "LoRA", "SMT, whole model"  # names that studies give to LoRA and to the paper's recipe
BLOCKS = ("SMT, ", "sorted", "tiles", "random tiles", "blocks of ")  # how names of SMT's recipes begin


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
# LoRA, the paper's SMT, and the SMT that validation prefers, with its name, where all of them were tuned.
Against = dict[Place, tuple[Result, Result | None, str, Result]]


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


def against_lora(studies: list[tuple[dict, Results]]) -> Against:
    """The places where LoRA and SMT were tuned: LoRA, the paper's SMT if it was, and the name and the result of the
    best SMT of all studies that were trained alike; of trainings that were not, the kind with more seeds.

    What ran with fewer seeds than LoRA is left out: it was not compared yet.
    """
    tuned: dict[tuple, dict[str, Result]] = {}
    for study, results in studies:
        for place, methods in results.items():
            here = tuned.setdefault((place, study["steps"], study["batch_size"], study["tokens"]), {})
            for name, result in methods.items():
                seeds = len(here[name].runs) if name in here else 0
                if (name == LORA or name.startswith(BLOCKS)) and len(result.runs) > seeds:
                    here[name] = result
    found = {}
    for (place, *_), methods in sorted(tuned.items()):
        lora = methods.pop(LORA, None)
        blocks = [name for name, result in methods.items() if lora and _as_large(lora, result)]
        if blocks and (place not in found or len(lora.runs) > len(found[place][0].runs)):
            best = min(blocks, key=lambda name: methods[name].mean("validation_loss"))
            found[place] = lora, methods[PAPER] if PAPER in blocks else None, best, methods[best]
    return found


def _as_large(lora: Result, result: Result) -> bool:
    """Whether a method has LoRA's seeds, and its parameters within a tenth: rank 1 may be above a budget."""
    one, other = (of.runs[0]["trained_parameters"] for of in (lora, result))
    return len(result.runs) >= len(lora.runs) and abs(one - other) <= 0.1 * other


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


def spread(values: list[float]) -> float:
    """Sample standard deviation over the seeds, 0 where there is one."""
    return stdev(values) if len(values) > 1 else 0.0
