"""What a selection depends on, measured without any training: the batches, the task, the criterion, the module.

    python scripts/studies/bench_selection.py --shared ../shared

Every testbed is looked at in two halves that share no row. Selections from the one half are compared with those from
the other, so that a long warm-up does not agree with itself by construction. Scores come from dense
gradients of the target weights (all linear layers), by the definitions of smt_peft.ops. Figures go into
RESULTS/selection.json, pictures of overlaps beside it; report_selection.py makes the page and the other pictures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import report_selection
import torch
from recipes import target_names
from report_selection import SCOPES
from testbeds import TESTBEDS, Options, Testbed, load_testbed
from torch import Tensor, nn
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from smt_peft.locations import kinds_of, locations_of
from smt_peft.ops import reduce_blocks
from smt_peft.plotting import plot_overlap
from smt_peft.selected import Selection
from smt_peft.selection import random_scores, select

RATIO = 0.022  # the budget: what LoRA has with rank 1 on all linear layers of stories260K
REFERENCE = "abs_mean"  # the paper's criterion
SCORES = (REFERENCE, "mean_abs", "l2")


@dataclass(frozen=True)
class Setting:
    block_size: int
    batch_size: int
    tokens: int


TEXT = Setting(block_size=4, batch_size=8, tokens=128)
SETTINGS = {
    "stories260K-lowercase": TEXT,
    "stories260K-gpt4": TEXT,
    "stories260K-gsm8k": TEXT,
    "babyllama-lowercase": TEXT,
    "minilm-banking77": Setting(block_size=16, batch_size=16, tokens=48),
}


@dataclass
class Command:
    testbeds: list[str] = HfArg(default_factory=lambda: list(SETTINGS), help="names in SETTINGS")
    counts: list[int] = HfArg(
        default_factory=lambda: [1, 2, 5, 10, 20, 50, 100, 200],
        help="batches to select from, ascending; the last is the size of a half",
    )


def main(argv: list[str]) -> None:
    command, options = HfArgumentParser((Command, Options)).parse_args_into_dataclasses(argv)
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    subjects = {name: Subject(name, Path(options.shared)) for name in command.testbeds}
    with tqdm(total=2 * command.counts[-1] * len(subjects), desc="looking", unit="batch", smoothing=0.02) as bar:
        for subject in subjects.values():
            bar.set_postfix_str(subject.name)
            subject.look(command.counts, bar)
    pairs = tasks(subjects)
    found = {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ratio": RATIO,
        "settings": {name: vars(SETTINGS[name]) for name in subjects},
        "testbeds": {name: subject.figures() for name, subject in subjects.items()},
        "tasks": {scope: {a: {b: of[a].overlap(of[b]) for b in of} for a in of} for scope, of in pairs.items() if of},
    }
    (results / "selection.json").write_text(json.dumps(found, indent=1) + "\n")
    for scope, selections in pairs.items():
        if selections:
            plot_overlap(selections, results / f"selection_tasks_{scope}.png")
    first = next(iter(subjects.values()))
    plot_overlap(first.criteria("module"), results / "selection_criteria.png")
    report_selection.main(results)


class Half:
    """Sums over the batches of one half of the data, from dense gradients of the target weights.

    Attributes:
        after: number of batches -> the sums of the reference score then, one [block rows, block columns] per target.
        scores: score -> its sums over all batches; the reference and others that were asked for.
        gradients: the summed gradient of each target.
        columns: the summed mean |x| of each target's input columns.
        x, dy: the summed mean square of each target's input and of its output's gradient.
        tokens: the summed rows of each target's input.
    """

    def __init__(self, modules: dict[str, nn.Module], block_size: int, scores: Sequence[str] = SCORES):
        self.modules, self.block_size = modules, block_size
        self.after: dict[int, list[Tensor]] = {}
        self.scores: dict[str, list[Tensor | float]] = {score: [0.0] * len(modules) for score in scores}
        self.gradients: list[Tensor | float] = [0.0] * len(modules)
        self.columns: list[Tensor | float] = [0.0] * len(modules)
        self.x, self.dy, self.tokens = ([0.0] * len(modules) for _ in range(3))

    def run(self, testbed: Testbed, batches: Iterable[dict], counts: list[int], bar: tqdm) -> Half:
        hooks = [module.register_forward_hook(self._watch(i)) for i, module in enumerate(self.modules.values())]
        model = testbed.model.train()  # as the warm-up does
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in self.modules)
        for count, batch in enumerate(batches, 1):
            model.zero_grad()
            model(**batch).loss.backward()
            for i, module in enumerate(self.modules.values()):
                self.gradients[i] += module.weight.grad
                for score, sums in self.scores.items():  # not in place, for the sake of `after`
                    sums[i] = sums[i] + reduce_blocks(module.weight.grad, self.block_size, score)
            if count in counts:
                self.after[count] = list(self.scores[REFERENCE])
            bar.update()
        for hook in hooks:
            hook.remove()
        return self

    def _watch(self, i: int):
        def keep(module: nn.Module, args: tuple, y: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            self.x[i] += x.square().mean().item()
            self.columns[i] += x.abs().mean(0)
            self.tokens[i] += len(x)
            y.register_hook(receive)

        def receive(dy: Tensor) -> None:
            self.dy[i] += dy.square().mean().item()

        return keep


class Subject:
    """A testbed with its targets, what was seen in both halves of its data, and the selections from that."""

    def __init__(self, name: str, shared: Path):
        if name not in SETTINGS:
            raise SystemExit(f"There are no settings for {name}; there are some for {', '.join(SETTINGS)}.")
        self.name, self.setting, self.source = name, SETTINGS[name], TESTBEDS[name]
        self.testbed = load_testbed(self.source, shared, self.setting.tokens)
        model, size = self.testbed.model.cpu(), self.setting.block_size  # all statistics are kept on the CPU
        names = target_names(model, "all-linear", self.testbed.modules_to_save or [])
        self.modules = {name: model.get_submodule(name) for name in names}
        self.grids = [tuple(side // size for side in module.weight.shape) for module in self.modules.values()]
        self.sizes = [rows * cols for rows, cols in self.grids]
        self.budget = round(RATIO * sum(p.numel() for p in model.parameters()) / size**2)
        self.halves: list[Half] = []

    def look(self, counts: list[int], bar: tqdm) -> None:
        per_half = counts[-1] * self.setting.batch_size
        if len(self.testbed.train) < 2 * per_half:
            raise SystemExit(f"{self.name} has {len(self.testbed.train)} rows; two halves need {2 * per_half}.")
        torch.manual_seed(0)
        rows = torch.randperm(len(self.testbed.train)).tolist()
        for half, scores in ((rows[:per_half], SCORES), (rows[per_half : 2 * per_half], [REFERENCE])):
            seen = Half(self.modules, self.setting.block_size, scores)
            self.halves.append(seen.run(self.testbed, self._batches(half), counts, bar))

    def _batches(self, rows: list[int]) -> Iterator[dict]:
        train, size = self.testbed.train, self.setting.batch_size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield self.testbed.batch(train[part] if torch.is_tensor(train) else [train[row] for row in part])

    def select(self, scores: list[Tensor], scope: str) -> Selection:
        names = list(self.modules)
        index = select(scores, [(range(len(scores)), self.budget)], scope, kinds=kinds_of(names))
        return Selection(names, self.setting.block_size, index, scores)

    def best(self, half: int, scope: str) -> Selection:
        """From all batches of a half, by the reference score."""
        return self.select(self.halves[half].scores[REFERENCE], scope)

    def criteria(self, scope: str) -> dict[str, Selection]:
        """Selections of the first half by every criterion; beside them the other half's, and a random one."""
        seen, size = self.halves[0], self.setting.block_size
        scores = dict(seen.scores)
        for score in SCORES:
            scores[f"{score}, signed"] = [reduce_blocks(gradient, size, score) for gradient in seen.gradients]
        columns = [column.view(-1, size).mean(1) for column in seen.columns]
        scores["activation"] = [c.expand(grid).clone() for c, grid in zip(columns, self.grids, strict=True)]
        scores["magnitude"] = [reduce_blocks(m.weight.detach(), size, REFERENCE) for m in self.modules.values()]
        scores[f"{REFERENCE}, other batches"] = self.halves[1].scores[REFERENCE]
        scores["random"] = random_scores(self.grids, seed=0)
        return {name: self.select(of, scope) for name, of in scores.items()}

    # --- figures ------------------------------------------------------------------------------------------------

    def figures(self) -> dict:
        criteria = {scope: self.criteria(scope) for scope in SCOPES}
        return {
            "blocks": sum(self.sizes),
            "selected": self.budget,
            "batches": {scope: self.agreement(scope) for scope in SCOPES},
            "criteria": {
                scope: {name: one.overlap(of[REFERENCE]) for name, one in of.items()} for scope, of in criteria.items()
            },
            "factors": self.factors(),
            "places": self.places(),
        }

    def agreement(self, scope: str) -> dict:
        """Overlap of the selection after some batches of a half with that of all batches of the other half."""
        all_of = [self.best(half, scope) for half in (0, 1)]
        overlap = {
            count: [self.select(self.halves[half].after[count], scope).overlap(all_of[1 - half]) for half in (0, 1)]
            for count in self.halves[0].after
        }
        first, second = (torch.bincount(one.index[:, 0], minlength=len(self.sizes)).tolist() for one in all_of)
        by_module = sum(a * b / size for a, b, size in zip(first, second, self.sizes, strict=True)) / self.budget
        return {"overlap": overlap, "random": self.budget / sum(self.sizes), "random_in_modules": by_module}

    def factors(self) -> dict[str, dict[str, float]]:
        """Per module type, what makes its scores large, from the first half.

        mean |g| = rms x * rms dy * sqrt(tokens) * coherence: the coherence is 0.8 where the outer products dy x^T of
        the tokens are independent and g is Gaussian. best |g|, the mean over the type's best blocks (a share RATIO
        of them), = mean |g| * peak.
        """
        seen, count = self.halves[0], max(self.halves[0].after)
        chosen = torch.bincount(self.best(0, "model").index[:, 0], minlength=len(self.sizes)).tolist()
        found = {}
        for kind, targets in self.kinds().items():
            x, dy = (math.sqrt(fmean(of[i] for i in targets) / count) for of in (seen.x, seen.dy))
            weights = torch.cat([list(self.modules.values())[i].weight.detach().flatten() for i in targets])
            scores = torch.cat([seen.scores[REFERENCE][i].flatten() for i in targets]) / count
            best = scores.topk(max(1, round(RATIO * len(scores)))).values
            tokens, mean = seen.tokens[targets[0]] / count, scores.mean().item()
            found[kind] = {
                "x": x,
                "dy": dy,
                "coherence": mean / (x * dy * math.sqrt(tokens)),
                "mean |g|": mean,
                "peak": best.mean().item() / mean,
                "best |g|": best.mean().item(),
                "share of score in best": (best.sum() / scores.sum()).item(),
                "w": weights.square().mean().sqrt().item(),
                "candidates": len(scores) / sum(self.sizes),
                "selected": sum(chosen[i] for i in targets) / self.budget,
            }
        return found

    def kinds(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, location in enumerate(locations_of([*self.modules])):
            found.setdefault(location.kind, []).append(i)
        return found

    def places(self) -> dict[str, list[float]]:
        """Module type -> share of the whole model's selection in each layer."""
        chosen = torch.bincount(self.best(0, "model").index[:, 0], minlength=len(self.sizes)).tolist()
        return {kind: [chosen[i] / self.budget for i in targets] for kind, targets in self.kinds().items()}


def tasks(subjects: dict[str, Subject]) -> dict[str, dict[str, Selection]]:
    """Scope -> selections on the tasks of the first model that has several, each from both halves of its data."""
    models = [subject.source.model for subject in subjects.values()]
    shared = [subject for subject in subjects.values() if models.count(subject.source.model) > 1]
    return {
        scope: {
            f"{one.name.partition('-')[2]}, {'first' if half == 0 else 'other'} half": one.best(half, scope)
            for one in shared
            if one.source.model == shared[0].source.model
            for half in (0, 1)
        }
        for scope in SCOPES
    }


if __name__ == "__main__":
    main(sys.argv[1:])
