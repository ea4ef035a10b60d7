"""Quality per trained parameter: methods x budgets x learning rates x seeds on small real models.

    python scripts/studies/bench_quality.py configs/study/methods.yaml [more studies] --shared ../shared

A study is a YAML file: testbeds, targets with their budgets (trained parameters), seeds, and methods with their
learning rates (see `Recipe` in recipes.py for what a method can be). A testbed is a name in testbeds.py, or one of the
study's `own_testbeds`, with the fields of `Source`: any model and any JSON lines. All learning rates run with the
first seed; the one with the best validation loss runs with the others, too. What is reported is the test loss of
those, never used to choose anything. Every run is one line of RESULTS/quality_STUDY.jsonl; runs that are there already
are skipped, so an interrupted study goes on where it was. A GPU is used where there is one; with --compile layers are
one graph each way, which spares the host (small models on a GPU wait for it). report_quality.py makes tables and
pictures of the results.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import recipes
import torch
import yaml
from recipes import Recipe
from testbeds import TESTBEDS, Options, Source, Testbed, load_testbed, measure_all
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser, get_linear_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Run:
    """One training: everything that its result depends on."""

    testbed: str
    target: str
    modules: str  # the target's modules as JSON
    budget: int
    method: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    tokens: int
    settings: str  # the method's options as JSON
    source: str = ""  # of a testbed of the study's own, as JSON

    @property
    def line(self) -> dict:
        """What a line of results says of it; that of a known testbed has no source."""
        return {name: value for name, value in asdict(self).items() if name != "source" or value}

    @property
    def key(self) -> str:
        return json.dumps(self.line, sort_keys=True)


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(Options)
    parser.add_argument("studies", nargs="+", type=Path, help="YAML files that say what to run")
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer, for a GPU")
    options, command = parser.parse_args_into_dataclasses(argv)
    studies = {path: yaml.safe_load(path.read_text()) for path in command.studies}
    tuning = {path: planned(study) for path, study in studies.items()}  # refuses bad ones before any work
    for path, study in studies.items():
        results = Results(Path(options.results) / f"quality_{path.stem}.jsonl", command.compile)
        shared, known = Path(options.shared), sources(study)
        results.fill(tuning[path], f"{path.stem}, all learning rates", known, shared)
        others = best_with_seeds(tuning[path], study["seeds"][1:], results.of)
        results.fill(others, f"{path.stem}, other seeds", known, shared)
        print(f"{path}: {results.path}")


class Results:
    """The file of a study: a line per run."""

    def __init__(self, path: Path, compiled: bool):
        self.path, self.compiled = path, compiled
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self.of = {line["key"]: line for line in lines}
        if any(line.get("compiled", False) != compiled for line in self.of.values()):
            raise SystemExit(f"{path} has runs {'without' if compiled else 'with'} --compile; name other --results")

    def fill(self, runs: list[Run], name: str, known: dict[str, Source], shared: Path) -> None:
        """Train what is missing."""
        for run in tqdm([run for run in runs if run.key not in self.of], desc=name, unit="run"):
            self.of[run.key] = {"key": run.key, **run.line, **train(run, known, shared, self.compiled)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.of[run.key]) + "\n")


def best_with_seeds(runs: list[Run], seeds: list[int], lines: dict[str, dict]) -> list[Run]:
    """For each method and setting the run with the least validation loss, with other seeds.

    Args:
        lines: what the runs left, by their keys.
    """
    best: dict[Run, Run] = {}
    for run in runs:
        setting = replace(run, learning_rate=0.0)
        best[setting] = min(best.get(setting, run), run, key=lambda one: validation_of(lines[one.key]))
    return [replace(run, seed=seed) for seed in seeds for run in best.values()]


def validation_of(line: dict) -> float:
    """What learning rates are compared by; a run that diverged is never the best."""
    return math.inf if math.isnan(line["validation_loss"]) else line["validation_loss"]


def sources(study: dict) -> dict[str, Source]:
    own = {name: Source(**source) for name, source in study.get("own_testbeds", {}).items()}
    return {**TESTBEDS, **own}


def planned(study: dict) -> list[Run]:
    """Every run with the first seed. The methods of one setting stand together, so that a part can be compared."""
    runs = []
    known, own = sources(study), study.get("own_testbeds", {})
    for name in set(study["testbeds"]) - set(known):
        raise SystemExit(f"There is no testbed {name}; there are {', '.join(known)}.")
    for testbed, target in itertools.product(study["testbeds"], study["targets"]):
        modules = json.dumps(study["targets"][target])
        for budget, (name, method) in itertools.product(study["budgets"][target], study["methods"].items()):
            settings = {key: value for key, value in method.items() if key != "learning_rates"}
            warmup_testbed = Recipe.parse(settings).warmup_testbed or testbed
            if warmup_testbed not in known:
                raise SystemExit(f"There is no testbed {warmup_testbed}; there are {', '.join(known)}.")
            # Full fine-tuning is the same run at every budget and target, the target weights whole at every budget.
            place = {"full": ("", "", 0), "dense": (target, modules, 0)}.get(method["type"], (target, modules, budget))
            rest = (study["steps"], study["batch_size"], study["tokens"], json.dumps(settings, sort_keys=True))
            rest += (json.dumps(own[testbed], sort_keys=True) if testbed in own else "",)
            rates = map(float, method["learning_rates"])
            runs += [Run(testbed, *place, name, rate, study["seeds"][0], *rest) for rate in rates]
    return list(dict.fromkeys(runs))


def train(run: Run, known: dict[str, Source], shared: Path, compiled: bool = False) -> dict:
    """Fine-tune once and measure. The order of the data depends on the seed alone, so that methods see the same."""
    testbed = load_testbed(known[run.testbed], shared, run.tokens)
    recipe = Recipe.parse(json.loads(run.settings))
    warmup_testbed = load_testbed(known[recipe.warmup_testbed or run.testbed], shared, run.tokens)
    torch.manual_seed(run.seed)  # after loading, which may draw random numbers
    started, started_cpu = time.perf_counter(), time.process_time()

    def prepared(model: nn.Module, step: int):
        model = recipes.adapted(recipe, model, run.modules or "[]", run.budget, run.seed, testbed.modules_to_save)
        with testbed.autocast(), torch.compiler.set_stance("force_eager"):
            chosen = recipes.warm_up(recipe, model, lambda count: batches(run, warmup_testbed, count))
        heads, head_rate = testbed.modules_to_save, testbed.head_learning_rate
        optimizer = recipes.make_optimizer(recipe, model, run.learning_rate, heads, head_rate)
        start, end = (mark - step for mark in recipe.part_of(step, run.steps))  # the schedule's, from here
        if compiled:
            compile_layers(model)
        return model, chosen, optimizer, get_linear_schedule_with_warmup(optimizer, start + run.steps // 20, end)

    model, selection, optimizer, schedule = prepared(copy.deepcopy(testbed.model), 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = []
    for step, batch in enumerate(batches(run, testbed, run.steps)):
        if recipe.restart and step in recipe.restart["steps"]:
            plain = model.merge_and_unload() if recipe.restart["keep"] else model.unload()
            model, selection, optimizer, schedule = prepared(plain, step)
        model.train()
        with testbed.autocast():
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())  # no look at it, for which a GPU would have to be waited for
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    losses = torch.stack(losses).tolist()
    tenth = max(1, run.steps // 10)
    with torch.compiler.set_stance("force_eager"):  # no other graphs for a few batches of other shapes
        measured = measure_all(testbed, model, ("validation", "test", "old", "answers"))
    return {
        "trained_parameters": trained,
        **measured,
        "train_loss": [
            round(sum(losses[i : i + tenth]) / len(losses[i : i + tenth]), 4) for i in range(0, run.steps, tenth)
        ],
        "blocks_by_type": selection and selection.counts_by_type(),
        "base": testbed.base,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "torch": torch.__version__,
        **({"compiled": True} if compiled else {}),
    }


def compile_layers(model: nn.Module) -> None:
    """Compile the model's layers, for rows of any length. Those that are alike share a graph."""
    model.config.use_cache = False  # else no two are: each writes into a place of its own
    torch._dynamo.config.recompile_limit = 64  # for all methods: they run the same decoder layer
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def batches(run: Run, testbed: Testbed, count: int) -> list[dict[str, torch.Tensor]]:
    """The first batches of a seed, epoch after epoch."""
    generator = torch.Generator().manual_seed(run.seed)
    epochs = 1 + count * run.batch_size // len(testbed.train)
    order = torch.cat([torch.randperm(len(testbed.train), generator=generator) for _ in range(epochs)])
    places = order[: count * run.batch_size].split(run.batch_size)
    if torch.is_tensor(testbed.train):
        return [testbed.batch(testbed.train[part]) for part in places]
    return [testbed.batch([testbed.train[place] for place in part]) for part in places]


if __name__ == "__main__":
    main(sys.argv[1:])
