"""Quality per trained parameter: methods x budgets x learning rates x seeds on small real models.

    python scripts/bench_quality.py configs/study/probe.yaml --shared ../shared --output docs/results/quality_probe.jsonl
    python scripts/bench_quality.py configs/study/probe.yaml --output docs/results/quality_probe.jsonl --report

A study is a YAML file: testbeds, targets, budgets (trained parameters), seeds, and methods with their learning rates.
Every run is one line of the output; runs that are there already are skipped, so an interrupted study goes on where it
was. Each method's learning rate is the one with the best mean validation loss; what is reported is the test loss of
those runs, never used to choose anything. `--report` prints the tables without running.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
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


@dataclass
class Options:
    study: str = field(metadata={"help": "YAML file that says what to run"})
    output: str = field(metadata={"help": "JSON lines, one per run; appended to"})
    shared: str = field(default="../shared", metadata={"help": "folder with models/ and data/"})
    report: bool = field(default=False, metadata={"help": "only print the tables of what has run"})


@dataclass(frozen=True)
class Run:
    """One training: everything that its result depends on."""

    testbed: str
    target: str
    budget: int
    method: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    tokens: int
    settings: str  # the method's own options as JSON

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def main() -> None:
    parser = HfArgumentParser(Options)
    positional = [] if sys.argv[1:2] and sys.argv[1].startswith("-") else ["--study"]
    (options,) = parser.parse_args_into_dataclasses(positional + sys.argv[1:])
    study = yaml.safe_load(Path(options.study).read_text())
    output = Path(options.output)
    done = {line["key"]: line for line in map(json.loads, output.read_text().splitlines())} if output.exists() else {}
    runs = planned(study)
    if not options.report:
        output.parent.mkdir(parents=True, exist_ok=True)
        testbeds: dict[str, Testbed] = {}
        for run in tqdm([run for run in runs if run.key not in done], desc="runs"):
            if run.testbed not in testbeds:
                testbeds = {run.testbed: Testbed(run.testbed, Path(options.shared), run.tokens)}
            line = {"key": run.key, **asdict(run), **train(run, testbeds[run.testbed], study["targets"][run.target])}
            with output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            done[run.key] = line
    print(report([done[run.key] for run in runs if run.key in done]))


def planned(study: dict) -> list[Run]:
    """Every run of a study; the methods of one setting stand together, so that a partial study can be compared."""
    runs = []
    for testbed, target, budget, seed in itertools.product(
        study["testbeds"], study["targets"], study["budgets"], study["seeds"]
    ):
        for name, method in study["methods"].items():
            own = {key: value for key, value in method.items() if key not in ("learning_rates", "targets")}
            if target not in method.get("targets", [target]):
                continue
            for rate in method["learning_rates"]:
                runs.append(
                    Run(testbed, target, 0 if own["type"] == "full" else budget, name, float(rate), seed,
                        study["steps"], study["batch_size"], study["tokens"], json.dumps(own, sort_keys=True))
                )  # fmt: skip
    return list(dict.fromkeys(runs))  # full fine-tuning is the same run at every budget


class Testbed:
    """A model and texts cut into rows of tokens: train, validation and test of the new domain, and the old domain."""

    def __init__(self, name: str, shared: Path, tokens: int):
        model, new, old = TESTBEDS[name]
        if not (shared / model).is_dir():
            raise SystemExit(f"There is no {shared / model}; give the folder with models/ and data/ as --shared.")
        self.model = AutoModelForCausalLM.from_pretrained(shared / model)
        self.tokenizer = AutoTokenizer.from_pretrained(shared / model)
        rows = self._rows(shared / "data" / f"{new}.jsonl", tokens)
        held_out = min(len(rows) // 10, 96)
        self.test, self.validation, self.train = rows[:held_out], rows[held_out : 2 * held_out], rows[2 * held_out :]
        self.old = self._rows(shared / "data" / f"{old}.jsonl", tokens)[:held_out]

    def _rows(self, path: Path, tokens: int) -> torch.Tensor:
        texts = [json.loads(line) for line in path.read_text().splitlines()]
        texts = [row.get("text") or f"{row['instruction']}\n{row['output']}" for row in texts]
        ids = [
            token
            for text in texts
            for token in [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        ]
        return torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)

    @torch.no_grad()
    def loss(self, model: nn.Module, rows: torch.Tensor) -> float:
        model.eval()
        return statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in rows.split(32))


def train(run: Run, testbed: Testbed, target_modules: list[str] | str) -> dict:
    """Fine-tune once and measure. The order of the data depends on the seed alone, so that methods see the same."""
    torch.manual_seed(run.seed)
    started = time.perf_counter()
    settings = json.loads(run.settings)
    model, selection = adapted(run, settings, copy.deepcopy(testbed.model), target_modules, testbed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
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
        "validation_loss": testbed.loss(model, testbed.validation),
        "test_loss": testbed.loss(model, testbed.test),
        "old_loss": testbed.loss(model, testbed.old),
        "blocks_by_type": selection,
        "seconds": round(time.perf_counter() - started, 1),
    }


def batches(run: Run, testbed: Testbed, count: int):
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.cat(
        [
            torch.randperm(len(testbed.train), generator=generator)
            for _ in range(1 + count * run.batch_size // len(testbed.train))
        ]
    )
    for step in range(count):
        yield testbed.train[order[step * run.batch_size : (step + 1) * run.batch_size]]


def adapted(run: Run, settings: dict, model: nn.Module, target_modules, testbed: Testbed):
    """The model with the run's adapter, and where its blocks are."""
    method = settings.pop("type")
    if method == "full":
        return model, None
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
        and (target_modules == "all-linear" or name.rpartition(".")[2] in target_modules)
    ]  # fmt: skip
    rank = max(1, round(run.budget / sum(sum(weight.shape) for weight in weights)))
    common = {"target_modules": target_modules, **settings}
    if method == "smt":
        config = SMTConfig(num_blocks=max(1, round(run.budget / settings["block_size"] ** 2)), seed=run.seed, **common)
        model = get_peft_model(model, config)
        selection = None
        if config.selection in ("gradient", "activation"):
            data = [{"input_ids": rows, "labels": rows} for rows in batches(run, testbed, config.warmup_steps)]
            selection = select_blocks(model, data, progress_bar=False).counts_by_type()
        return model, selection
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **common)), None
    if method == "shira":
        return get_peft_model(model, ShiraConfig(r=rank, **common)), None
    if method == "miss":
        rank = max(1, round(run.budget / sum(len(weight) for weight in weights)))
        return get_peft_model(model, MissConfig(r=rank, **common)), None
    raise SystemExit(f"type: {method} is not one of smt, lora, shira, miss, full.")


def report(lines: list[dict]) -> str:
    """A table per testbed, target and budget: each method at its best learning rate, test loss with its spread."""
    groups: dict[tuple, dict[str, dict[float, list[dict]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for line in lines:
        groups[line["testbed"], line["target"], line["budget"]][line["method"]][line["learning_rate"]].append(line)
    text = []
    for (testbed, target, budget), methods in groups.items():
        text += [f"\n**{testbed}, {target}, {budget:,} trained parameters**\n" if budget else f"\n**{testbed}, full fine-tuning**\n",
                 "| method | trained | learning rate | validation | test | old domain | seeds | blocks |",
                 "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        rows = []
        for method, rates in methods.items():
            best = min(rates, key=lambda rate: statistics.fmean(run["validation_loss"] for run in rates[rate]))
            edge = " (edge of the grid)" if best in (min(rates), max(rates)) and len(rates) > 1 else ""
            runs = rates[best]
            means = [
                statistics.fmean(run[loss] for run in runs) for loss in ("validation_loss", "test_loss", "old_loss")
            ]
            spread = f" ± {statistics.stdev(run['test_loss'] for run in runs):.3f}" if len(runs) > 1 else ""
            blocks = " ".join(f"{name} {count}" for name, count in (runs[0]["blocks_by_type"] or {}).items() if count)
            rows.append((means[1], f"| {method} | {runs[0]['trained_parameters']:,} | {best:g}{edge} | {means[0]:.3f} "
                         f"| {means[1]:.3f}{spread} | {means[2]:.3f} | {len(runs)} | {blocks} |"))  # fmt: skip
        text += [row for _, row in sorted(rows)]
    return "\n".join(text)


if __name__ == "__main__":
    main()
