"""Score a model, with or without an adapter, on the paper's tasks.

    python scripts/evaluate.py --model MODEL --adapter ADAPTER --trained_on NAME --data DATA --output results.json

Options can also stand in a YAML file, given first; those after it win. Several GPUs share the rows of each task:
`accelerate launch scripts/evaluate.py ...`. A task's score is saved as soon as it is done, and the same command goes
on with the tasks that are left. What the model answered to each row is saved beside the scores, in the folder *.rows.
"""

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import accelerate
import peft
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from tasks import Task, choose, load_test_rows, prompt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import smt_peft  # registers SMT with PEFT

SAMPLING = {"do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 40}
FREE_TO_CHANGE = {"output", "tasks", "batch_size"}  # between a run and its continuation


def _help(text: str, **default: Any) -> Any:
    return field(metadata={"help": text}, **default)


@dataclass
class Options:
    """What to evaluate, and how; the defaults are the paper's protocol."""

    model: str = _help("model, base or merged: a folder or a name on the Hugging Face hub")
    data: str = _help("folder with commonsense/NAME_test.jsonl and math/NAME_test.jsonl, or NAME/test.json")
    output: str = _help("JSON file for the scores; if it exists, the tasks in it are not repeated")
    adapter: str | None = _help("folder of a PEFT adapter for the model", default=None)
    trained_on: str | None = _help(
        "training files of the model, comma-separated names or paths; their rows are left out of the tests. Needed "
        'with an adapter ("none" if there are none)',
        default=None,
    )
    tasks: str = _help('comma-separated tasks, or "commonsense" or "math" for the paper\'s', default="commonsense")
    mode: Literal["generate", "likelihood"] = _help(
        "find the answer in generated text, or (for models too small for that) take the option with the highest mean "
        "log-probability per token",
        default="generate",
    )
    limit: int = _help("rows per task, from its start; 0 for all", default=0)
    batch_size: int = _help("rows at a time on each device; likelihood runs all options of a row at once", default=16)
    dtype: str = _help('data type of the weights, such as bfloat16; "auto" for the saved one', default="auto")
    num_beams: int = _help("beams", default=4)
    do_sample: bool = _help(
        "sample with temperature 0.1, top-p 0.75 and top-k 40. LLM-Adapters sets those three without this switch, so "
        "that they have no effect, and searches by beams alone; so does this script",
        default=False,
    )
    seed: int = _help("seed, for sampling", default=0)

    def __post_init__(self) -> None:
        if self.adapter and not self.trained_on:
            raise ValueError(
                f"nothing says what {self.adapter} was trained on, and some training files hold test rows (all of "
                "math_data_train does); name its training files with --trained_on, or say --trained_on none"
            )
        if self.limit < 0 or self.batch_size < 1:
            raise ValueError(f"limit {self.limit} must be at least 0, and batch_size {self.batch_size} at least 1")

    @property
    def training_files(self) -> list[str]:
        """The names in `trained_on`."""
        return [] if self.trained_on in (None, "none") else [name.strip() for name in self.trained_on.split(",")]


def parse(argv: list[str]) -> Options:
    """Read the options from a command line, on which a YAML file with further ones can come first."""
    if argv and argv[0].endswith((".yaml", ".yml")):
        saved = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}
        given = {f"--{name}": str(value) for name, value in saved.items() if value is not None}
        argv = [part for pair in given.items() for part in pair] + argv[1:]
    return HfArgumentParser(Options).parse_args_into_dataclasses(argv)[0]


def load(options: Options, device: torch.device) -> tuple[torch.nn.Module, Any]:
    """Load the model, its adapter if there is one, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # any will do: padding is masked
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    if options.adapter:
        model = peft.PeftModel.from_pretrained(model, options.adapter)
    return model.to(device).eval(), tokenizer


def generate(model: torch.nn.Module, tokenizer: Any, task: Task, rows: list[dict], options: Options) -> list[dict]:
    """Let the model answer the rows in its own words, and find the answers in them."""
    prompts = [prompt(row["instruction"]) for row in rows]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=task.new_tokens,
        num_beams=options.num_beams,
        pad_token_id=tokenizer.pad_token_id,
        **(SAMPLING if options.do_sample else {"do_sample": False}),
    )
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [{"prediction": task.extract(text), "text": text} for text in texts]


def most_likely(model: torch.nn.Module, tokenizer: Any, task: Task, rows: list[dict]) -> list[dict]:
    """Take for each row the option that the model finds most likely."""
    options = [task.options(row) for row in rows]
    contexts = [prompt(row["instruction"]) + task.lead for row in rows]
    pairs = [(context, text) for context, few in zip(contexts, options, strict=True) for text in few.values()]
    values = iter(mean_log_probs(model, tokenizer, pairs))
    scores = [{word: next(values) for word in few} for few in options]
    return [{"prediction": max(few, key=few.get), "scores": few} for few in scores]


def mean_log_probs(model: torch.nn.Module, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """Give the mean log-probability per token of each pair's second text, after its first; all in one batch."""
    whole = tokenizer([context + text for context, text in pairs])["input_ids"]
    contexts = tokenizer([context for context, _ in pairs])["input_ids"]
    # Where a token spans the end of the context, it belongs to the text.
    starts = torch.tensor([_shared(*both) for both in zip(whole, contexts, strict=True)], device=model.device)
    padded = tokenizer.pad({"input_ids": whole}, padding_side="right", return_tensors="pt").to(model.device)
    tokens, mask = padded["input_ids"], padded["attention_mask"]
    # The logits before the shortest context's end are not needed; over a large vocabulary they would fill the memory.
    first, length = int(starts.min()), tokens.shape[1]
    logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=length - first + 1).logits[:, :-1]
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[:, first:, None]).squeeze(-1)
    scored = mask[:, first:].bool() & (torch.arange(first, length, device=model.device) >= starts[:, None])
    means = log_probs.where(scored, 0).sum(1) / scored.sum(1)
    if not means.isfinite().all():
        raise ValueError(f"a log-probability is {means.min():g}: the model overflows; try --dtype float32")
    return means.tolist()


def _shared(first: list[int], second: list[int]) -> int:
    """Count the tokens that two texts start with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@torch.no_grad()
def answers(model: torch.nn.Module, tokenizer: Any, task: Task, rows: list[dict], options: Options) -> list[dict]:
    """Give for each row the model's prediction and whether it is right; the processes share the rows."""
    state = PartialState()
    # Rows of like length go together, to pad little; the longest first, to run out of memory at once or never.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["instruction"]))
    order = order[state.process_index :: state.num_processes]
    found = []
    with tqdm(total=len(order), desc=task.name, unit="row", disable=not state.is_main_process) as bar:
        for start in range(0, len(order), options.batch_size):
            indices = order[start : start + options.batch_size]
            batch = [rows[index] for index in indices]
            if options.mode == "generate":
                given = generate(model, tokenizer, task, batch, options)
            else:
                given = most_likely(model, tokenizer, task, batch)
            found += zip(indices, given, strict=True)
            bar.update(len(batch))
    predictions = [given for _, given in sorted(gather_object(found), key=lambda pair: pair[0])]
    for prediction, row in zip(predictions, rows, strict=True):
        prediction["right"] = task.is_right(prediction["prediction"], row["answer"])
    return predictions


def too_long(model: torch.nn.Module, tokenizer: Any, rows: list[dict]) -> list[str]:
    """Give a note if some prompts are longer than the texts the model was made for."""
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    lengths = [len(tokens) for tokens in tokenizer([prompt(row["instruction"]) for row in rows])["input_ids"]]
    count = sum(length > context for length in lengths)
    return [f"{count:,} of its prompts are longer than the model's context of {context:,} tokens"] if count else []


def score(given: list[dict], seconds: float, notes: list[str]) -> dict:
    """Sum up a task: its accuracy in percent with the binomial standard error, and what to know about it."""
    share = sum(one["right"] for one in given) / len(given)
    error = (share * (1 - share) / len(given)) ** 0.5
    numbers = {"accuracy": 100 * share, "standard_error": 100 * error, "rows": len(given)}
    return numbers | {"seconds": round(seconds, 1), "notes": notes}


def average(scores: dict[str, dict]) -> dict:
    """Give the mean of the tasks' accuracies, each task counting the same, and its standard error."""
    count = len(scores)
    return {
        "accuracy": sum(one["accuracy"] for one in scores.values()) / count,
        "standard_error": sum(one["standard_error"] ** 2 for one in scores.values()) ** 0.5 / count,
        "tasks": count,
    }


def open_results(options: Options) -> dict:
    """Give the results so far: those in the output file, if it was made with the same settings, or empty ones."""
    settings = {name: value for name, value in asdict(options).items() if name not in FREE_TO_CHANGE}
    folders = [Path(folder) for folder in (options.model, options.adapter) if folder]
    settings["weights_written"] = [_newest_weights(folder) for folder in folders]
    path = Path(options.output)
    if not path.exists():
        return {"settings": settings, "runs": [], "tasks": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} {results['settings'].get(name)!r} (now {value!r})"
        for name, value in settings.items()
        if results["settings"].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} has scores made with {', '.join(changed)}; name another file with --output, or delete this one"
        )
    return results


def _newest_weights(folder: Path) -> str | None:
    """Tell when a folder's weights were last written, so that scores are not taken for those of newer weights."""
    times = [path.stat().st_mtime for path in folder.glob("*.safetensors")]
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(max(times))) if times else None


def save(results: dict, name: str, given: list[dict], path: Path) -> None:
    """Write the answers to one task's rows, and then the results, so that neither is ever half written."""
    rows = path.with_suffix(".rows") / f"{name}.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    texts = {rows: "".join(json.dumps(one) + "\n" for one in given), path: json.dumps(results, indent=2) + "\n"}
    for file, text in texts.items():
        partial = file.with_name(file.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


def this_run(argv: list[str]) -> dict:
    """Describe the command, the versions and the machine."""
    modules = (smt_peft, peft, transformers, accelerate, torch)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "command": shlex.join(["scripts/evaluate.py", *argv]),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules},
        "machine": {"system": platform.platform(), "device": device, "processes": PartialState().num_processes},
    }


def table(results: dict) -> str:
    """Lay out the scores as a table."""
    lines = [f"{'task':15}{'rows':>7}{'accuracy %':>12}{'± s.e.':>8}"]
    for name, one in [*results["tasks"].items(), ("average", {"rows": "", "notes": []} | results["average"])]:
        numbers = f"{one['rows']:>7}{one['accuracy']:>12.2f}{one['standard_error']:>8.2f}"
        lines.append(f"{name:15}{numbers}  {'; '.join(one['notes'])}".rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> dict:
    """Evaluate what is not yet in the output file, print the table, and give the results."""
    options = parse(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())  # else processes on CPUs do not see each other
    results = open_results(options)
    todo = [task for task in choose(options.tasks) if task.name not in results["tasks"]]
    # Whatever is wrong with the data shows before the model is loaded.
    data = {task.name: load_test_rows(task, Path(options.data), options.training_files) for task in todo}
    for task in todo if options.mode == "likelihood" else []:
        task.options(data[task.name][0][0])
    if todo:
        transformers.set_seed(options.seed + state.process_index)
        model, tokenizer = load(options, state.device)
        results["runs"].append(this_run(argv))
    for task in todo:
        rows, notes = data[task.name]
        if 0 < options.limit < len(rows):
            rows, notes = rows[: options.limit], [*notes, f"only the first {options.limit} of {len(rows):,} rows"]
        start = time.perf_counter()
        given = answers(model, tokenizer, task, rows, options)
        notes = [*notes, *too_long(model, tokenizer, rows)]
        results["tasks"][task.name] = score(given, time.perf_counter() - start, notes)
        results["average"] = average(results["tasks"])
        results["seconds"] = round(sum(one["seconds"] for one in results["tasks"].values()), 1)
        if state.is_main_process:
            save(results, task.name, given, Path(options.output))
    if state.is_main_process:
        print(table(results))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
    PartialState().destroy_process_group()  # else PyTorch warns
