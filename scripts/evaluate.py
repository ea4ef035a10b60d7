"""Score a model, with or without an adapter, on the paper's tasks.

    python scripts/evaluate.py --adapter runs/llama-7b_smt/smt --data LLM-Adapters/dataset --output results.json

Options can also stand in a YAML file, `--config FILE`; those beside it win. Several GPUs share the rows of each
task: `accelerate launch scripts/evaluate.py ...`. Answers are saved batch by batch, and the same command goes on
with what is left. What the model answered to each row is saved beside the scores, in the folder *.rows.
"""

import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import accelerate
import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from answering import PROTOCOLS, generate, most_likely, too_long
from command_line import in_a_line, read_options
from finetune import STDLIB, check_dtype, load_model, parse_quantization
from scores import Unfinished, answers_file, newest_weights, open_results, save, score, table
from tasks import Task, choose, load_test_rows, training_data_of
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg

import smt_peft  # registers SMT with PEFT
from smt_peft.checkpoints import local_folder
from smt_peft.files import adapter_config

FREE_TO_CHANGE = {"output", "tasks", "batch_size"}  # between a run and its continuation


@dataclass
class Options:
    """What to evaluate, and how; the defaults are LLM-Adapters' protocol."""

    data: str = HfArg(help="folder with commonsense/NAME_test.jsonl and math/NAME_test.jsonl, or NAME/test.json")
    output: str = HfArg(help="JSON file for the scores; if it exists, the tasks in it are not repeated")
    model: str | None = HfArg(
        help="model, base or merged: a folder or a name on the Hugging Face hub; else the one that the adapter names",
        default=None,
    )
    revision: str | None = HfArg(help="of the model on the hub; else the one that the adapter names", default=None)
    adapter: str | None = HfArg(help="PEFT adapter of the model: a folder or a name on the hub", default=None)
    trained_on: str | None = HfArg(
        help="training files of the model, comma-separated names or paths; their rows are left out of the tests. "
        'Needed with an adapter whose folder does not name them in training_data.json ("none" if there are none)',
        default=None,
    )
    tasks: str = HfArg(
        help='comma-separated tasks, or "commonsense" or "math" for the paper\'s', default="commonsense"
    )
    mode: Literal["generate", "text_likelihood", "label_likelihood"] = HfArg(
        help="generate: find the answer in generated text, as published scores do. For models too small for that, "
        "take the option with the highest mean log-probability per token: text_likelihood, of the option's text, for "
        'a model that has not learnt the labels; label_likelihood, of its label ("answer1"), for one that has',
        default="generate",
    )
    protocol: Literal["llm-adapters", "official"] = HfArg(
        help="whose way to generate. official: LLM-Adapters', but for what SMT's official code is known to do: a "
        "literal <s> before the prompt, a repetition penalty of 1.1, 256 new tokens, lower-case answers",
        default="llm-adapters",
    )
    limit: int = HfArg(help="rows per task, from its start; 0 for all", default=0)
    batch_size: int = HfArg(
        help="rows at a time on each device; likelihood runs all options of a row at once", default=16
    )
    dtype: str = HfArg(help='data type of the weights, such as bfloat16; "auto" for the saved one', default="auto")
    quantization: str = HfArg(
        help="options of BitsAndBytesConfig, a mapping: a base model in 4 or 8 bits", default="{}"
    )
    num_beams: int = HfArg(help="beams", default=4)
    do_sample: bool = HfArg(
        help="sample with temperature 0.1, top-p 0.75 and top-k 40. LLM-Adapters sets those three without this "
        "switch, so that they have no effect, and searches by beams alone; so does this script",
        default=False,
    )
    seed: int = HfArg(help="seed, for sampling", default=0)

    def __post_init__(self) -> None:
        self.quantization = parse_quantization(self.quantization)
        check_dtype(self.dtype)
        if not (self.model or self.adapter):
            raise ValueError("nothing to evaluate: name a --model, or an --adapter that names its base model")
        if self.protocol != "llm-adapters" and self.mode != "generate":
            raise ValueError(f"protocol {self.protocol} is a way to generate, but mode is {self.mode}; leave out one")
        if self.mode != "generate" and (self.do_sample or self.num_beams != 4):
            raise ValueError(f"mode {self.mode} generates nothing: leave out num_beams and do_sample")
        for name, least in (("limit", 0), ("batch_size", 1), ("num_beams", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least {least}")

    @property
    def training_files(self) -> list[str]:
        """The names in `trained_on`."""
        return [] if self.trained_on in (None, "none") else [name.strip() for name in self.trained_on.split(",")]


def complete(options: Options) -> list[str]:
    """Fill in what the folders of adapter and model say of base model and training data, and give notes on them."""
    notes = []
    if options.adapter:
        about = adapter_config(local_folder(options.adapter))
        named, revision = about.get("base_model_name_or_path"), about.get("revision")
        if not (options.model or named):
            raise ValueError(f"{options.adapter} does not say what its base model is; give it with --model")
        if not options.model or options.model == named:
            options.model, options.revision = named, options.revision or revision
        elif named and Path(named).resolve() != Path(options.model).resolve():  # no error: it may be a copy
            notes.append(f"{options.adapter} was made for {named}, and stands on {options.model} here")
    if options.trained_on:
        return notes
    where = (options.adapter,) if options.adapter else (options.model, options.revision)
    learnt = training_data_of(*where)
    if learnt is not None:  # and what an adapter's base model has learnt, if that was itself trained by these scripts
        learnt = dict.fromkeys([*learnt, *(training_data_of(options.model, options.revision) or [])])
        options.trained_on = ",".join(name for name in learnt if name not in STDLIB) or "none"
    elif options.adapter:
        raise ValueError(
            f"nothing says what {options.adapter} was trained on, and some training files hold test rows (all of "
            "math_data_train does); name its training files with --trained_on, or say --trained_on none"
        )
    else:
        notes.append("training data unknown: contamination was not removed (name the data with --trained_on, or none)")
    return notes


def load(options: Options, device: torch.device) -> tuple[torch.nn.Module, Any]:
    """Load the model, its adapter if there is one, and its tokenizer."""
    with in_a_line():
        tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision or "main")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # any will do: padding is masked
    model = load_model(options, options.revision or "main")
    if not options.quantization:  # else it is there already, and 8-bit weights refuse to be moved
        model = model.to(device)
    if options.adapter:
        model = peft.PeftModel.from_pretrained(model, options.adapter)
    return model.eval(), tokenizer


def rows_to_test(task: Task, options: Options) -> tuple[list[dict], list[str]]:
    """Give a task's rows, and notes that belong beside its score."""
    rows, notes = load_test_rows(task, Path(options.data), options.training_files)
    if 0 < options.limit < len(rows):
        rows, notes = rows[: options.limit], [*notes, f"only the first {options.limit} of {len(rows):,} rows"]
    if options.mode != "generate":
        for row in rows:  # refuses those without options
            task.labels(row) if options.mode == "label_likelihood" else task.texts(row)
    return rows, notes


@torch.no_grad()
def answer(
    model: torch.nn.Module, tokenizer: Any, task: Task, rows: list[dict], options: Options, so_far: Unfinished
) -> None:
    """Add to the answers so far those to the other rows: the model's prediction, and whether it is right."""
    state = PartialState()
    left = [number for number in range(len(rows)) if number not in so_far.answers]
    # Rows of like length go together, to pad little; the longest first, to run out of memory at once or never.
    left.sort(key=lambda number: -len(rows[number]["instruction"]))
    step = options.batch_size * state.num_processes
    done = {"total": len(rows), "initial": len(rows) - len(left)}
    with tqdm(**done, desc=task.name, unit="row", disable=not state.is_main_process) as bar:
        for start in range(0, len(left), step):
            began = time.perf_counter()
            numbers = left[start : start + step][state.process_index :: state.num_processes]
            batch = [rows[number] for number in numbers]
            if not batch:  # the last rows can be fewer than the processes
                given = []
            elif options.mode == "generate":
                how = PROTOCOLS[options.protocol], options.num_beams, options.do_sample
                given = generate(model, tokenizer, task, batch, *how)
            else:
                given = most_likely(model, tokenizer, task, batch, by_label=options.mode == "label_likelihood")
            for one, row in zip(given, batch, strict=True):
                one["right"] = task.is_right(one["prediction"], row["answer"])
            found = gather_object(list(zip(numbers, given, strict=True)))
            so_far.add(found, time.perf_counter() - began, write=state.is_main_process)
            bar.update(len(found))


def this_run(argv: list[str]) -> dict:
    """Describe the command, the versions and the machine."""
    modules = (smt_peft, peft, transformers, accelerate, torch)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "command": shlex.join(["scripts/evaluate.py", *argv]),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules},
        "machine": {"system": platform.platform(), "device": device, "processes": PartialState().num_processes},
    }


def main(argv: list[str]) -> dict:
    """Evaluate what is not yet in the output file, print the table, and give the results."""
    [options] = read_options(argv, Options)
    state = PartialState(cpu=not torch.accelerator.is_available())  # else processes on CPUs do not see each other
    output, run = Path(options.output), this_run(argv)
    with in_a_line():  # whatever is wrong with the data shows before the model is loaded
        notes = complete(options) if state.is_main_process else None  # the hub may not answer each of them alike
        options, notes = broadcast_object_list([options, notes])
        settings = {name: value for name, value in asdict(options).items() if name not in FREE_TO_CHANGE}
        settings["weights_written"] = [newest_weights(folder) for folder in (options.model, options.adapter) if folder]
        # The main process alone reads: others may not see its disk.
        results = open_results(output, settings) | {"notes": notes} if state.is_main_process else {}
        [results] = broadcast_object_list([results])
        tasks = [task for task in choose(options.tasks) if task.name not in results["tasks"]]
        todo = {task: rows_to_test(task, options) for task in tasks}
        files = {task: answers_file(output, task.name, ".unfinished") for task in todo}
        kept = []
        if state.is_main_process:
            kept = [Unfinished(files[task], rows, settings, run) for task, (rows, _) in todo.items()]
        [kept] = broadcast_object_list([kept])
        so_far = dict(zip(todo, kept, strict=True))
    if todo:
        if state.is_main_process and notes:  # hours before the table says them again
            print(*notes, sep="\n")
        transformers.set_seed(options.seed + state.process_index)
        model, tokenizer = load(options, state.device)
    for task, (rows, about) in todo.items():
        if longer := too_long(model, tokenizer, rows, PROTOCOLS[options.protocol]):
            about = [*about, *longer]
            state.print(f"{task.name}: {longer[0]}")  # where positions are learnt, what comes next is an IndexError
        answer(model, tokenizer, task, rows, options, so_far[task])
        results["tasks"][task.name] = score(so_far[task].in_order(), so_far[task].seconds, about)
        for one in so_far[task].runs:
            if one not in results["runs"]:
                results["runs"].append(one)
        if state.is_main_process:
            results = save(results, task.name, so_far[task], output)
    if state.is_main_process:
        print(table(results))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
    PartialState().destroy_process_group()  # else PyTorch warns
