"""Quality per trained parameter: methods x budgets x learning rates x seeds on small real models.

    python scripts/bench_quality.py configs/study/probe.yaml --output docs/results/quality_probe.jsonl [--report]

A study is a YAML file: testbeds, targets with their budgets (trained parameters), seeds, and methods with their
learning rates. Every run is one line of the output; runs that are there already are skipped, so an interrupted study
goes on where it was. Each method's learning rate is the one with the best mean validation loss; what is reported is
the test loss of those runs, never used to choose anything. `--report` runs nothing: it prints the tables, draws the
picture beside the output, and with `--page` puts the tables between the marks `<!-- NAME -->`, `<!-- /NAME -->`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, MissConfig, ShiraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_linear_schedule_with_warmup

from smt_peft import SMTConfig, select_blocks

# name -> (model folder, training text, text whose loss should not rise), inside the folder with models and data
TESTBEDS = {
    "stories260K-lowercase": ("models/stories260K", "tinystories/train_v1_lowercase", "tinystories/valid"),
    "stories260K-gpt4": ("models/stories260K", "tinystories/train_v2_gpt4", "tinystories/valid"),
    "stories260K-gsm8k": ("models/stories260K", "math/gsm8k_train", "tinystories/valid"),
    "babyllama-lowercase": ("models/babyllama-973K-tok361", "tinystories/train_v1_lowercase", "tinystories/valid"),
    "babyllama-gpt4": ("models/babyllama-973K-tok361", "tinystories/train_v2_gpt4", "tinystories/valid"),
}
RANKED = {"lora": LoraConfig, "shira": ShiraConfig, "miss": MissConfig}
# Options of a method that are this script's; the others are those of the method's config.
OWN = ("type", "warmup_testbed", "optimizer")
HEAD = "| method | trained | learning rate | of | validation | test | old domain | seeds | CPU min | blocks |"
# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = ["#D55E00", "#0072B2", "#56B4E9", "#999999", "#009E73", "#CC79A7", "#E69F00", "#000000"]


@dataclass
class Options:
    study: str = field(metadata={"help": "YAML file that says what to run"})
    output: str = field(metadata={"help": "JSON lines, one per run; appended to"})
    shared: str = field(default="../shared", metadata={"help": "folder with models/ and data/"})
    report: bool = field(default=False, metadata={"help": "run nothing; tables and picture of what has run"})
    page: str | None = field(default=None, metadata={"help": "page to put the report into"})


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

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def main(argv: list[str]) -> None:
    positional = [] if argv[0].startswith("-") else ["--study"]
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(positional + argv)
    runs = planned(yaml.safe_load(Path(options.study).read_text()))
    output = Path(options.output)
    done = {line["key"]: line for line in map(json.loads, output.read_text().splitlines())} if output.exists() else {}
    if not options.report:
        output.parent.mkdir(parents=True, exist_ok=True)
        for run in tqdm([run for run in runs if run.key not in done], desc="runs"):
            done[run.key] = {"key": run.key, **asdict(run), **train(run, Path(options.shared))}
            with output.open("a") as file:
                file.write(json.dumps(done[run.key]) + "\n")
    lines = [done[run.key] for run in runs if run.key in done]
    text = f"{len(lines)} of {len(runs)} runs of {options.study}.\n{tables(lines)}"
    print(text)
    if options.report and lines:
        draw(lines, output.with_suffix(".png"))
    if options.page:
        put_into(Path(options.page), output.stem, text)


def planned(study: dict) -> list[Run]:
    """Every run of a study. The methods of one setting stand together, so that a partial study can be compared."""
    runs = []
    for seed, testbed, target in itertools.product(study["seeds"], study["testbeds"], study["targets"]):
        modules = json.dumps(study["targets"][target])
        for budget, (name, method) in itertools.product(study["budgets"][target], study["methods"].items()):
            settings = {key: value for key, value in method.items() if key != "learning_rates"}
            if method["type"] not in ("smt", "full", *RANKED):
                raise SystemExit(f"{name}: type {method['type']} is not one of smt, full, {', '.join(RANKED)}.")
            # Full fine-tuning is the same run at every budget.
            place = ("", "", 0) if method["type"] == "full" else (target, modules, budget)
            runs += [
                Run(testbed, *place, name, float(rate), seed, study["steps"], study["batch_size"], study["tokens"],
                    json.dumps(settings, sort_keys=True))
                for rate in method["learning_rates"]
            ]  # fmt: skip
    return list(dict.fromkeys(runs))


class Testbed:
    """A model and texts cut into rows of tokens: train, validation and test of the new domain, and the old domain."""

    def __init__(self, name: str, shared: Path, tokens: int):
        if name not in TESTBEDS:
            raise SystemExit(f"There is no testbed {name}; there are {', '.join(TESTBEDS)}.")
        model, new, old = TESTBEDS[name]
        if not (shared / model).is_dir():
            raise SystemExit(f"There is no {shared / model}; give the folder with models/ and data/ as --shared.")
        self.model = AutoModelForCausalLM.from_pretrained(shared / model)
        self.tokenizer = AutoTokenizer.from_pretrained(shared / model)
        rows = self._rows(shared / "data" / f"{new}.jsonl", tokens)
        held_out = min(len(rows) // 10, 96)
        self.test, self.validation, self.train = rows[:held_out], rows[held_out : 2 * held_out], rows[2 * held_out :]
        self.old = self._rows(shared / "data" / f"{old}.jsonl", tokens)[:held_out]
        self.base = {"test_loss": loss(self.model, self.test), "old_loss": loss(self.model, self.old)}

    def _rows(self, path: Path, tokens: int) -> torch.Tensor:
        texts = [json.loads(line) for line in path.read_text().splitlines()]
        texts = [row.get("text") or f"{row['instruction']}\n{row['output']}" for row in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for text in encoded for token in (self.tokenizer.bos_token_id, *text)]
        return torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)


load_testbed = functools.cache(Testbed)


@torch.no_grad()
def loss(model: nn.Module, rows: torch.Tensor) -> float:
    model.eval()
    return sum(len(part) * model(input_ids=part, labels=part).loss.item() for part in rows.split(32)) / len(rows)


def train(run: Run, shared: Path) -> dict:
    """Fine-tune once and measure. The order of the data depends on the seed alone, so that methods see the same."""
    testbed = load_testbed(run.testbed, shared, run.tokens)
    torch.manual_seed(run.seed)
    started, started_cpu = time.perf_counter(), time.process_time()
    settings = json.loads(run.settings)
    model = adapted(run, settings, copy.deepcopy(testbed.model))
    selection = None
    if settings["type"] == "smt" and settings.get("selection", "gradient") in ("gradient", "activation"):
        source = load_testbed(settings.get("warmup_testbed", run.testbed), shared, run.tokens)
        data = [{"input_ids": rows, "labels": rows} for rows in batches(run, source, settings["warmup_steps"])]
        selection = select_blocks(model, data, progress_bar=False).counts_by_type()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, **settings.get("optimizer", {})}
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, **options)
    schedule = get_linear_schedule_with_warmup(optimizer, run.steps // 20, run.steps)
    for rows in batches(run, testbed, run.steps):
        model.train()
        model(input_ids=rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        "trained_parameters": sum(p.numel() for p in trained),
        **{f"{rows}_loss": loss(model, getattr(testbed, rows)) for rows in ("validation", "test", "old")},
        "blocks_by_type": selection,
        "base": testbed.base,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "torch": torch.__version__,
    }


def batches(run: Run, testbed: Testbed, count: int) -> Iterator[torch.Tensor]:
    """The first batches of a seed, epoch after epoch."""
    generator = torch.Generator().manual_seed(run.seed)
    epochs = 1 + count * run.batch_size // len(testbed.train)
    order = torch.cat([torch.randperm(len(testbed.train), generator=generator) for _ in range(epochs)])
    for places in order[: count * run.batch_size].split(run.batch_size):
        yield testbed.train[places]


def adapted(run: Run, settings: dict, model: nn.Module) -> nn.Module:
    """The model with the run's adapter, the rank being the one whose number of parameters is nearest to the budget."""
    method = settings["type"]
    if method == "full":
        return model
    target_modules = json.loads(run.modules)
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
        and (target_modules == "all-linear" or name.rpartition(".")[2] in target_modules)
    ]  # fmt: skip
    per_rank = sum(len(weight) if method == "miss" else sum(weight.shape) for weight in weights)
    rank = max(1, round(run.budget / per_rank))
    common = {"target_modules": target_modules, **{key: settings[key] for key in settings if key not in OWN}}
    if method == "smt":
        patterns = sum(settings.get("num_blocks_pattern", {}).values())  # leave the other modules the rest
        blocks = max(1, round(run.budget / settings["block_size"] ** 2)) - patterns
        return get_peft_model(model, SMTConfig(num_blocks=blocks, seed=run.seed, **common))
    if method == "lora":
        common = {"lora_alpha": 2 * rank, **common}
    return get_peft_model(model, RANKED[method](r=rank, **common))


# --- report ----------------------------------------------------------------------------------------------------------


def best_runs(lines: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """(testbed, target, budget) -> method -> its runs (one per seed) at the learning rate of the best validation."""
    rates: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        rates[place_of(line)][line["method"]][line["learning_rate"]].append(line)
    return {
        place: {method: min(of.values(), key=lambda runs: mean(runs, "validation_loss")) for method, of in one.items()}
        for place, one in rates.items()
    }


def place_of(line: dict) -> tuple[str, str, int]:
    return line["testbed"], line["target"], line["budget"]


def mean(runs: list[dict], value: str) -> float:
    return statistics.fmean(run[value] for run in runs)


def tables(lines: list[dict]) -> str:
    """A table per testbed, target and budget, best method first."""
    tried = defaultdict(set)
    for line in lines:
        tried[(*place_of(line), line["method"])].add(line["learning_rate"])
    text = []
    for (testbed, target, budget), methods in best_runs(lines).items():
        where = f"{target}, about {budget:,} trained parameters" if target else "everything trained"
        base = "test {test_loss:.3f}, old domain {old_loss:.3f}".format(**next(iter(methods.values()))[0]["base"])
        text += [f"\n**{testbed}, {where}** (before: {base})\n", HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
        for method, runs in sorted(methods.items(), key=lambda item: mean(item[1], "test_loss")):
            spread = f" ± {statistics.stdev(run['test_loss'] for run in runs):.3f}" if len(runs) > 1 else ""
            grid = " ".join(f"{rate:g}" for rate in sorted(tried[testbed, target, budget, method]))
            blocks = " ".join(f"{name} {count}" for name, count in (runs[0]["blocks_by_type"] or {}).items() if count)
            text.append(
                f"| {method} | {runs[0]['trained_parameters']:,} | {runs[0]['learning_rate']:g} | {grid} "
                f"| {mean(runs, 'validation_loss'):.3f} | {mean(runs, 'test_loss'):.3f}{spread} "
                f"| {mean(runs, 'old_loss'):.3f} | {len(runs)} | {mean(runs, 'cpu_seconds') / 60:.1f} | {blocks} |"
            )
    return "\n".join(text)


def draw(lines: list[dict], path: Path) -> None:
    """What was learnt against what was forgotten: a point per run, filled at the method's best learning rate."""
    from matplotlib.figure import Figure

    places = best_runs(lines)
    panels = {place: {**places.get((place[0], "", 0), {}), **best} for place, best in places.items() if place[1]}
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
    for ax, (place, best) in zip(axes, panels.items(), strict=True):
        for method, colour, marker in zip(best, itertools.cycle(COLOURS), itertools.cycle("os^vDPX*")):
            runs = [run for run in lines if run["method"] == method and place_of(run) in (place, (place[0], "", 0))]
            label = f"{method}: {mean(best[method], 'test_loss'):.3f}"
            for which, style in ((runs, {"mfc": "none"}), (best[method], {"label": label})):
                x, y = ([run[f"{text}_loss"] for run in which] for text in ("test", "old"))
                ax.plot(x, y, marker, color=colour, markersize=8, **style)
        ax.set(xlabel="test loss, new domain", title=f"{place[0]}\n{place[1]}, {place[2]:,} parameters")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.axes[0].set_ylabel("loss, old domain")
    figure.savefig(path, dpi=120)


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between the page's markers."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text().partition(start)
    if not (found and end in rest):
        raise SystemExit(f"{page} has no place for {name}: add {start} and {end}.")
    page.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
