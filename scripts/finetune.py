"""Fine-tune a language model with Sparse Matrix Tuning, from the warm-up to a checked adapter; beside it, LoRA.

    python scripts/finetune.py --config configs/quickstart.yaml [--key value ...]

Options are those of `Options` below and of TrainingArguments, in the YAML file or beside it, where they win;
`--smt.num_blocks 40` sets one entry of a mapping. For several processes: `accelerate launch scripts/finetune.py ...`.

`output_dir` gets the numbers (results.json), the losses of training (losses.png), and a folder per method with its
adapter or weights, the name of their training data (for scripts/evaluate.py) and, for SMT, pictures of where the
selected blocks are (selection.png, and after a warm-up shares.png). `smt-peft merge` makes a plain model of an
adapter.
"""

import contextlib
import copy
import inspect
import json
import re
import sys
import textwrap
import warnings
from dataclasses import dataclass, fields
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from command_line import in_a_line, parse, read_options
from datasets.exceptions import DatasetsError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from scores import write_whole
from stdlib_text import documentation, questions, source_code
from tasks import TRAINING_DATA, prompt, training_data, training_data_of
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EvalPrediction,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.hf_argparser import HfArg
from transformers.initialization import meta_device_safe_creation_ops
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_bitsandbytes_available

from smt_peft import Selection, SMTConfig, SMTMonitorCallback, SMTWarmupCallback
from smt_peft.files import read_adapter, read_json
from smt_peft.plotting import plot_adapter, plot_losses, plot_selection, plot_shares

METHODS = ("smt", "lora", "dora", "full")
STDLIB = {  # rows that any Python has, by split
    "stdlib-source": lambda split: ({"text": text} for text in source_code(split)),
    "stdlib-documentation": lambda split: ({"text": text} for text in documentation(split)),
    "stdlib-questions": questions,
}
SHOWN = 3  # of the questions that are asked
PER_TOKEN = "token_loss"  # ends so that Trainer knows that less is better
# How arguments of Trainer begin that change no number.
OF_NO_RESULT = (
    "output_dir",
    "resume",
    "log",
    "save",
    "report_to",
    "disable_tqdm",
    "run_name",
    "push_to",
    "hub",
    "local",
)
# How settings begin that a checkpoint holds itself, so that others would be said of the result and not be used.
KEPT = ("options", "seed", "learning_rate", "weight_decay", "adam", "optim")
LEAST_NEW_TOKENS = 60  # of an answer; as many as that of the right one, if that is longer


@dataclass
class Options:
    """What to train, and on what; how to train is in TrainingArguments."""

    model: str = HfArg(help="model: a folder or a name on the Hugging Face hub")
    data: str = HfArg(
        help="what to learn: stdlib-source, stdlib-documentation, stdlib-questions, a .jsonl or .txt file, a dataset "
        "on the hub. A row has `instruction`, perhaps `input`, and `output`, of which just the output is learnt, or "
        "`text`; in a .txt file a row is a paragraph"
    )
    old_data: str | None = HfArg(help="what not to forget: like data, but only evaluated", default=None)
    methods: str = HfArg(
        help="smt, lora, dora, full, or one after the other: smt,lora. Each has a folder of its own in output_dir, "
        "and --resume_from_checkpoint true goes on from the last checkpoint there, with the learning rate, seed and "
        "adapter options that it has; what was finished with the same settings is left alone",
        default="smt",
    )
    smt: str = HfArg(
        help="options of SMTConfig, a mapping: {target_modules: [q_proj, v_proj], num_blocks: 40}. A budget on the "
        "command line (--smt.num_blocks or --smt.trainable_ratio) takes the place of the file's, whichever of the two "
        "that is",
        default="{}",
    )
    lora: str = HfArg(help="options of LoraConfig, a mapping; for dora, too", default="{}")
    lora_learning_rate: float | None = HfArg(help="learning_rate for lora and dora, if another", default=None)
    quantization: str = HfArg(
        help="options of BitsAndBytesConfig, a mapping: a base model in 4 or 8 bits", default="{}"
    )
    max_length: int = HfArg(help="tokens per row", default=512)
    eval_rows: int = HfArg(
        help="rows of each domain that are held out, to evaluate on; half of a small one", default=128
    )
    prompt: str | None = HfArg(
        help="text to continue, before and after; else the start of a held-out row, or the instructions of some",
        default=None,
    )
    questions: int = HfArg(
        help=f"how many held-out instructions; the first {SHOWN} are shown, and of more those counted whose answers "
        "have the right one in them. Of several processes one alone asks the base model: --ddp_timeout for very many",
        default=SHOWN,
    )
    dtype: str = HfArg(help='data type of the weights, such as bfloat16; "auto" for the saved one', default="auto")

    def __post_init__(self) -> None:
        self.smt, self.lora = parse(self.smt), parse(self.lora)
        self.quantization = parse_quantization(self.quantization)
        if set(self.methods.split(",")) - set(METHODS):
            raise SystemExit(f"methods is {self.methods!r}; it can be {', '.join(METHODS)}, or several: smt,lora")
        for method in self.methods.split(","):
            try:
                config_of(method, self)
            except (TypeError, ValueError) as error:
                raise SystemExit(f"options of {method}: {error}") from None
        if self.quantization and "full" in self.methods.split(","):
            raise SystemExit(
                "quantization is given, but weights in 4 or 8 bits cannot be trained whole: leave out full"
            )
        check_dtype(self.dtype)
        if self.eval_rows < 1:
            raise SystemExit(f"eval_rows is {self.eval_rows}; losses before and after need a row at least: 1 or more")
        if self.max_length < 1:
            raise SystemExit(f"max_length is {self.max_length}; a row has a token at least: 1 or more")
        if self.questions < 1:
            raise SystemExit(f"questions is {self.questions}; what is saved is checked with the first: 1 or more")


def check_dtype(dtype: str) -> None:
    """End with an error where the weights' data type is none."""
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise SystemExit(f"dtype is {dtype!r}; it can be auto, float32, bfloat16 or float16")


def load_rows(name: str, eval_rows: int) -> tuple[datasets.Dataset, ...]:
    """Give a domain's rows to train on, and those that are held out."""
    if name in STDLIB:  # divided by module
        return tuple(datasets.Dataset.from_list(list(STDLIB[name](split))) for split in ("train", "test"))
    where = {
        ".jsonl": {"path": "json", "data_files": name},
        ".json": {"path": "json", "data_files": name},
        ".txt": {"path": "text", "data_files": name, "sample_by": "paragraph"},
    }.get(Path(name).suffix, {"path": name})
    if Path(name).is_file() and where["path"] == name:
        raise SystemExit(f"{name} is no .jsonl, .json or .txt file, and no other is read")
    try:
        rows = datasets.load_dataset(**where, split="train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise SystemExit(f"data: {name}: {error} {error.__cause__ or ''}".rstrip()) from error
    if len(rows) < 2:
        raise SystemExit(f"{name} has {len(rows)} row; one is held out to evaluate on, so two are the least")
    columns = ["instruction", "output"] if is_labelled(rows) else ["text"]
    if not set(columns) <= set(rows.column_names):
        raise SystemExit(f"{name} has the columns {rows.column_names}; it needs instruction and output, or text")
    for column in [*columns, *({"input"} & set(rows.column_names) if is_labelled(rows) else ())]:
        may_be = str if column in columns else (str, NoneType)
        if row := next((row for row, value in enumerate(rows[column], 1) if not isinstance(value, may_be)), None):
            raise SystemExit(f"{name}: row {row} has {rows[row - 1][column]!r} as its {column}, which is no text")
    return tuple(rows.train_test_split(min(eval_rows, len(rows) // 2), seed=0).values())


def without_held_out(train: datasets.Dataset, test: datasets.Dataset) -> datasets.Dataset:
    """Give the rows to train on that do not repeat what a held-out one asks or says."""
    ask = question if is_labelled(train) else itemgetter("text")
    asked = set(map(ask, test))
    return train.filter(lambda row: ask(row) not in asked)


def is_labelled(rows: datasets.Dataset) -> bool:
    """Whether rows are instructions and their answers; else they are texts."""
    return {"instruction", "output"} <= set(rows.column_names)


def question(row: dict) -> str:
    return "\n\n".join(filter(None, [row["instruction"], row.get("input")]))


def by_row(batch: dict) -> list[dict]:
    """Turn a dictionary of columns into one per row."""
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def encode(rows: datasets.Dataset, tokenizer: Any, length: int) -> datasets.Dataset:
    """Turn rows into tokens and labels: plain text joined and cut to `length`, or an instruction and its answer."""

    def pack(batch: dict) -> dict:
        texts = tokenizer(batch["text"], verbose=False)["input_ids"]
        tokens = [token for text in texts for token in (*text, tokenizer.eos_token_id)]
        cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut, "labels": cut}

    before, after = prompt("\0").split("\0")  # as texts: datasets keeps tokens, and sees when a text is another

    def answer(batch: dict) -> dict:
        asked = [before + question(row) + after for row in by_row(batch)]
        # Outer white space of the answer goes: a line break at its start can fuse with the prompt's last one into a
        # token that the prompt alone, as in a test, does not end with.
        whole = [text + output.strip() for text, output in zip(asked, batch["output"], strict=True)]
        starts = map(len, tokenizer(asked, verbose=False)["input_ids"])
        whole = [[*tokens, tokenizer.eos_token_id] for tokens in tokenizer(whole, verbose=False)["input_ids"]]
        labels = [[-100] * start + tokens[start:] for start, tokens in zip(starts, whole, strict=True)]
        return {"input_ids": [row[:length] for row in whole], "labels": [row[:length] for row in labels]}

    if is_labelled(rows):
        rows = rows.map(answer, batched=True, remove_columns=rows.column_names)
        rows = rows.filter(lambda row: max(row["labels"]) >= 0)
    else:
        rows = rows.map(pack, batched=True, remove_columns=rows.column_names)
    if not len(rows):
        raise SystemExit(f"max_length={length} leaves no row: texts are shorter, or prompts longer; set another")
    return rows


def say_what_is_cut(rows: datasets.Dataset, encoded: datasets.Dataset, tokenizer: Any, length: int) -> None:
    """Say how many instructions were too long for `length`."""
    if not is_labelled(rows):
        return
    cut = sum(tokens[-1] != tokenizer.eos_token_id for tokens in encoded["input_ids"])
    lost = len(rows) - len(encoded)
    if cut + lost:
        print(
            f"{cut + lost:,} of {len(rows):,} rows have more tokens than max_length={length}: {lost:,} are left out, "
            f"whose prompts alone have as many; of {cut:,} the end of the answer is cut off"
        )


def prompts_of(rows: datasets.Dataset, options: Options, tokenizer: Any) -> list[dict]:
    """Give the texts that the model is to continue, before and after: where rows are labelled, with what is right."""
    if options.prompt:
        return [{"prompt": options.prompt}]
    rows = rows.shuffle(0)
    if not is_labelled(rows):
        first = next((text for text in rows["text"] if text.strip()), tokenizer.eos_token)
        tokens = tokenizer(first, verbose=False)["input_ids"][:16]
        return [{"prompt": tokenizer.decode(tokens, skip_special_tokens=True)}]
    asked = [{"prompt": prompt(question(row)), "question": question(row), "right": row["output"]} for row in rows]

    def is_short(each: dict, *keys: str) -> bool:  # as what is trained on; longer ones may not fit the model
        tokens = tokenizer("".join(each[key] for key in keys), verbose=False)["input_ids"]
        return len(tokens) < options.max_length

    fit = list(islice((each for each in asked if is_short(each, "prompt", "right")), options.questions))
    return fit or list(islice((each for each in asked if is_short(each, "prompt")), options.questions))


def parse_quantization(text: str) -> dict:
    """Give the options of BitsAndBytesConfig that a text of YAML has, which would pass over what it does not know."""
    given = parse(text) or {}
    if not isinstance(given, dict):
        raise SystemExit(f"quantization is {text!r}; it is a mapping, such as {{load_in_4bit: true}}")
    if unknown := given.keys() - inspect.signature(BitsAndBytesConfig).parameters.keys():
        raise SystemExit(f"quantization has {unknown.pop()!r}, no option of BitsAndBytesConfig; load_in_4bit is one")
    if given and not is_bitsandbytes_available():
        raise SystemExit("quantization is given, but bitsandbytes is not installed: pip install bitsandbytes")
    return given


def load_model(options: Options, revision: str = "main") -> torch.nn.Module:
    quantized = {"quantization_config": BitsAndBytesConfig(**options.quantization)} if options.quantization else {}
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, revision=revision, **quantized)


def config_of(method: str, options: Options) -> PeftConfig | None:
    """Give the config of a method's adapter; full has none."""
    if method == "full":
        return None
    if method == "smt":
        return SMTConfig(task_type="CAUSAL_LM", **options.smt)
    return LoraConfig(task_type="CAUSAL_LM", **options.lora, **({"use_dora": True} if method == "dora" else {}))


def adapted(method: str, model: torch.nn.Module, options: Options) -> torch.nn.Module:
    """Give the model with the method's adapter; with every parameter to train, if the method is full."""
    config = config_of(method, options)
    return get_peft_model(model, config) if config else model


def check_adapters(methods: list[str], options: Options) -> None:
    """End with an error where a method's options do not fit the model, before any work is done."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    for method in methods:
        if method != "smt" or options.smt.get("selection") != "magnitude":  # which reads the weights
            try:
                adapted(method, copy.deepcopy(model), options)
            except (TypeError, ValueError) as error:
                raise SystemExit(f"options of {method}: {error}") from error


class Progress(ProgressCallback):
    """One bar per training, with the last loss, and a line per evaluation on the way."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"Training {Path(args.output_dir).name}")

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        pass

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith(f"_{PER_TOKEN}"):
                domain = name.removeprefix("eval_").removesuffix(f"_{PER_TOKEN}")
                self.training_bar.write(f"Step {state.global_step}: {domain} has loss {value:.3f}")


def token_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Give each row's sum of losses and number of tokens, [rows, 2]; Trainer's mean is over batches of any length."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), labels, reduction="none")
    return torch.stack([losses.sum(1), (labels >= 0).sum(1)], dim=1)


def loss_per_token(of_rows: EvalPrediction) -> dict[str, float]:
    losses, tokens = of_rows.predictions.sum(0)
    return {PER_TOKEN: float(losses / tokens)}


class TrainingDataNote(TrainerCallback):
    """Names the training data beside the weights, in every checkpoint, so that tests on these rows are noticed; and
    how many rows were learnt, and how, so that a run that goes on holds out the same and says the same of itself."""

    def __init__(self, options: Options, rows: int, settings: dict):
        earlier = training_data_of(options.model) or []
        note = {"train": list(dict.fromkeys([*earlier, options.data])), "rows": rows, "settings": settings}
        self.text = json.dumps(note) + "\n"

    def write(self, folder: str | Path) -> None:
        write_whole(Path(folder, TRAINING_DATA), self.text)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.write(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))


def fine_tune(
    method: str,
    options: Options,
    args: TrainingArguments,
    tokenizer: Any,
    train: Any,
    test: dict,
    prompts: list[dict],
) -> tuple[dict, torch.Tensor]:
    """Train one adapter, or all weights, and save; give the numbers, and the trained model's logits for a prompt."""
    transformers.set_seed(args.seed)
    warmup, note = SMTWarmupCallback(), TrainingDataNote(options, len(train), settings_of(method, options, args))
    model = adapted(method, load_model(options), options)
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),  # pads input_ids and labels
        compute_metrics=loss_per_token,
        preprocess_logits_for_metrics=token_losses,
        processing_class=tokenizer,
        callbacks=[note, warmup, SMTMonitorCallback()] if method == "smt" else [note],
    )
    keeps_digits = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # which train float32 copies
    if method == "full" and model.dtype.itemsize < 4 and not keeps_digits and trainer.is_world_process_zero():
        warnings.warn(
            f"full trains weights of {str(model.dtype).removeprefix('torch.')}, where most updates are less than half "
            "of a weight's last digit and are lost: --dtype float32 --bf16 true keeps them",
            stacklevel=2,
        )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress())
    run = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    logged = [item for entry in trainer.state.log_history for item in entry.items()]
    evaluating = sum(value for key, value in logged if key.startswith("eval_") and key.endswith("_runtime"))
    trainer.save_model()  # before an evaluation that may fail, or cast the model
    if trainer.is_world_process_zero():
        note.write(args.output_dir)
        if method == "smt":
            draw_blocks(args.output_dir, warmup.selection)
    after = trainer.evaluate()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    parameters = (getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    # A run that was resumed does not know how long it took before.
    numbers = {"settings": settings_of(method, options, args), "parameters": sum(parameters)}
    numbers["seconds"] = None if args.resume_from_checkpoint else run["train_runtime"] - evaluating
    before = dict(reversed(logged))
    numbers["losses"] = {name: [at[f"eval_{name}_{PER_TOKEN}"] for at in (before, after)] for name in test}
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    numbers["after"] = continued(trained, tokenizer, prompts, args)
    logits = logits_of(trained, tokenizer, prompts[0]["prompt"])
    trainer.accelerator.free_memory()  # ends DeepSpeed's engine, which else outlives the trainer
    return numbers, logits


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokenizer: Any, text: str) -> torch.Tensor:
    """Give the logits for a text on the CPU, in the model's data type, or the coarser one of FSDP's computations."""
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    logits = model.eval()(**inputs).logits
    return logits.to("cpu", max(logits.dtype, model.dtype, key=lambda dtype: torch.finfo(dtype).eps))


def continued(model: torch.nn.Module, tokenizer: Any, prompts: list[dict], args: TrainingArguments) -> list[str]:
    """Let the model continue the prompts, each by the likeliest tokens."""
    penalty = 1.0 if "right" in prompts[0] else 1.15  # an answer may well repeat words of its question
    answers, size = [], args.per_device_eval_batch_size
    right = tokenizer([each["right"] for each in prompts if "right" in each] or [""])["input_ids"]
    most = max(LEAST_NEW_TOKENS, *map(len, right))
    is_silent = len(prompts) <= size or args.process_index > 0
    for start in tqdm(range(0, len(prompts), size), "Answering", disable=is_silent):
        texts = [each["prompt"] for each in prompts[start : start + size]]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
        tokens = model.eval().generate(
            **inputs.to(model.device), max_new_tokens=most, do_sample=False, repetition_penalty=penalty
        )
        answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def check(
    logits: torch.Tensor, options: Options, args: TrainingArguments, tokenizer: Any, prompts: list[dict]
) -> dict:
    """Compare the trained model's logits with those of what was saved, loaded and then merged; once, let the base
    model continue the prompts, too. One model is in memory at a time."""
    text = prompts[0]["prompt"]
    saved = args.output_dir
    model = load_model(options).to(args.device)
    if "before" not in prompts[0]:
        for each, before in zip(prompts, continued(model, tokenizer, prompts, args), strict=True):
            each["before"] = before
    if Path(saved, CONFIG_NAME).is_file():
        model = PeftModel.from_pretrained(model, saved)
        others = {"reloaded": logits_of(model, tokenizer, text)}
        others["merged"] = logits_of(model.merge_and_unload(), tokenizer, text)
    else:
        del model
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=logits.dtype).to(args.device)
        others = {"reloaded": logits_of(model, tokenizer, text)}
    errors = {name: (other - logits).abs().max().item() for name, other in others.items()}
    if options.quantization:  # merging rounds to the grid of the quantised weight
        print(f"logits of the merged model differ by {errors.pop('merged', 0.0):.3g}")
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max().item()
    if not all(error <= tolerance for error in errors.values()):  # NaN is off, too
        raise RuntimeError(f"the logits of {saved} are off those of the trained model by {errors}; do not use it")
    return {"prompts": prompts, "logits_off_by": errors}


def is_right(question: dict, answer: str) -> bool:
    """Whether an answer has the right one in it as whole words, whatever else it says."""
    right = question["right"].strip()
    alone = rf"(?<!\w)(?<!\d[.,]){re.escape(right)}(?!\w|[.,]\d)"
    return re.search(alone, answer, re.ASCII) is not None if right else not answer.strip()


def report(results: dict, output_dir: str) -> str:
    """Lay out the results: what was continued before and after, the checks, and a table of the losses."""
    prompts = next(iter(results.values()))["prompts"]
    texts = {"before": [each["before"] for each in prompts]}
    texts |= {f"after {method}": one["after"] for method, one in results.items()}
    lines = []
    for number, each in enumerate(prompts[:SHOWN]):
        if "right" in each:
            lines.append(textwrap.shorten(each["question"], 110, placeholder=" ..."))
            answers = {"right": each["right"]} | {name: text[number] for name, text in texts.items()}
            lines += [f"  {name:12}{textwrap.shorten(text, 96, placeholder=' ...')}" for name, text in answers.items()]
        else:
            lines += [f"--- {name}\n{each['prompt']}{text[number]}" for name, text in texts.items()]
        lines.append("")
    if prompts[SHOWN:]:
        counts = [f"{sum(map(is_right, prompts, answers))} {name}" for name, answers in texts.items()]
        lines += [f"Right, of {len(prompts)} answers: {', '.join(counts)}", ""]
    for method, one in results.items():
        errors = ", ".join(f"{name} {error:.1g}" for name, error in one["logits_off_by"].items())
        lines.append(f"Logits of {method} differ from the trained model's by: {errors}")
    lines += [f"Adapters, numbers and pictures are in {output_dir}", ""]
    domains = "".join(f"{f'loss, {Path(domain).stem}':>30}" for domain in next(iter(results.values()))["losses"])
    lines.append(f"{'':6}{'parameters':>12}{'seconds':>9}{domains}")
    for method, one in results.items():
        losses = "".join(f"{f'{before:.3f} -> {after:.3f}':>30}" for before, after in one["losses"].values())
        seconds = "-" if one["seconds"] is None else f"{one['seconds']:.1f}"
        lines.append(f"{method:6}{one['parameters']:>12,}{seconds:>9}{losses}")
    return "\n".join(lines)


def write(results: dict, args: TrainingArguments) -> None:
    """Add to what other launches into this folder have written of other methods."""
    if args.process_index == 0:
        write_whole(results_file(args), json.dumps({**read_results(args), **results}, indent=2))


def read_results(args: TrainingArguments) -> dict:
    file = results_file(args)
    return read_json(file) if file.is_file() else {}


def results_file(args: TrainingArguments) -> Path:
    return Path(args.output_dir, "results.json")


def draw_blocks(adapter: str, selection: Selection | None) -> None:
    """Draw where the selected blocks are, with their scores; with their deltas if no warm-up of this run gave any."""
    with contextlib.suppress(ImportError):  # without matplotlib, no picture
        if selection is None:
            try:
                plot_adapter(read_adapter(adapter), Path(adapter, "selection.png"))
            except ValueError as error:  # very many blocks
                print(f"No picture of the blocks: {error}")
        else:
            plot_selection(selection, Path(adapter, "selection.png"))
            plot_shares(selection, Path(adapter, "shares.png"))


def draw_losses(output_dir: str, methods: list[str]) -> None:
    """Draw every method's training loss, where it was logged (`logging_steps`)."""
    states = {method: Path(output_dir, method, TRAINER_STATE_NAME) for method in methods}
    logs = {method: json.loads(state.read_text(encoding="utf-8"))["log_history"] for method, state in states.items()}
    logs = {method: log for method, log in logs.items() if any("loss" in entry for entry in log)}
    if logs:
        with contextlib.suppress(ImportError):  # without matplotlib, no picture
            plot_losses(logs, path=Path(output_dir, "losses.png"))


def is_same(data: str, other: str) -> bool:
    """Whether two names of data are one, or of one file."""
    return data == other or (Path(data).exists() and Path(other).exists() and Path(data).samefile(other))


def arguments_of(method: str, options: Options, args: TrainingArguments) -> TrainingArguments:
    """Give a method's own arguments: its folder, its learning rate, its last checkpoint."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir, method))
    args.eval_on_start = True  # Trainer.evaluate() before train() would leave the model out of DDP
    if method in ("lora", "dora"):
        args.learning_rate = options.lora_learning_rate or args.learning_rate
    # Its state is the last file of a checkpoint: one without was interrupted.
    states = Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    steps = {int(step): state.parent for state in states if (step := state.parent.name.rpartition("-")[2]).isdigit()}
    [last] = broadcast_object_list([steps[max(steps)] if steps else None])  # of a disk that others may not see
    how = (args.resume_from_checkpoint or "false").lower()
    if how not in ("true", "false") and not Path(args.resume_from_checkpoint, TRAINER_STATE_NAME).is_file():
        raise SystemExit(
            f"resume_from_checkpoint is {args.resume_from_checkpoint!r}; it can be true, false, or a checkpoint "
            f"with its {TRAINER_STATE_NAME}"
        )
    checkpoint = {"true": last, "false": None}.get(how, args.resume_from_checkpoint)
    for folder in filter(None, [checkpoint, args.output_dir]):
        learnt = training_data(folder)
        if learnt and not any(is_same(options.data, name) for name in learnt):
            way_out = f"go on with --data {learnt[-1]}, or name another" if checkpoint else "name another"
            raise SystemExit(f"{folder} holds what learnt {learnt[-1]}; {way_out} output_dir")
    if how == "true" and not last and args.process_index == 0:
        print(f"There is no checkpoint in {args.output_dir}: training starts at its first step.")
    if how == "false" and last:
        raise SystemExit(
            f"{last} is of an earlier run: go on with it by --resume_from_checkpoint true, or name another output_dir"
        )
    if how in ("true", "false"):
        args.resume_from_checkpoint = last and str(last)
    return args


def settings_of(method: str, options: Options, args: TrainingArguments) -> dict:
    """Give what a result depends on."""
    own = {"smt": options.smt, "full": {}}.get(method, options.lora)
    names = "model", "data", "old_data", "quantization", "max_length", "eval_rows", "prompt", "questions", "dtype"
    given = {name: getattr(options, name) for name in names} | {"options": own, "processes": args.world_size}
    default = {each.name: each.default for each in fields(args)}  # another instance would undo DeepSpeed's set-up
    changed = {name: value for name, value in args.to_dict().items() if value != default.get(name)}
    changed = {name: value for name, value in changed.items() if not name.startswith(OF_NO_RESULT)}
    return json.loads(json.dumps(given | changed, default=str))


def is_finished(numbers: dict, settings: dict) -> bool:
    """Whether earlier numbers are all there, and of these settings. Trainer would go on by a step from a last one."""
    return "logits_off_by" in numbers and numbers.get("settings") == settings


def check_goes_on(checkpoint: str | None, rows: int, settings: dict) -> None:
    """End with an error where a run would go on with other rows, of which some that are held out now may have been
    learnt, or with settings in whose place the checkpoint has its own."""
    note = Path(checkpoint or "", TRAINING_DATA)
    said = read_json(note) if checkpoint and note.is_file() else {}
    learnt, earlier = said.get("rows", rows), said.get("settings", settings)
    for name in sorted(name for name in earlier | settings if name.startswith(KEPT)):
        if earlier.get(name) != settings.get(name):
            what = "its adapter's options" if name == "options" else name
            raise SystemExit(
                f"{checkpoint} was trained with {what} {earlier.get(name, 'at its default')}, now it is "
                f"{settings.get(name, 'at its default')}: go on with the same, or name another output_dir"
            )
    if learnt != rows:
        raise SystemExit(
            f"{checkpoint} has learnt from {learnt:,} rows, and there are {rows:,} now: go on with the same data, "
            "eval_rows and max_length, or name another output_dir"
        )


def main(argv: list[str]) -> None:
    options, args = read_options(argv, Options, TrainingArguments)
    methods = options.methods.split(",")
    if args.deepspeed_plugin and methods[1:]:
        raise SystemExit(f"methods is {options.methods!r}, but DeepSpeed takes one per launch; launch once for each")
    zero = args.deepspeed_plugin
    if "full" in methods and zero and zero.zero_stage == 3 and not zero.zero3_save_16bit_model:
        raise SystemExit("full under ZeRO-3 saves no model without zero3_save_16bit_model: true in its config")
    if methods[1:] and (args.resume_from_checkpoint or "true").lower() not in ("true", "false"):
        raise SystemExit(
            f"methods is {options.methods!r}, but {args.resume_from_checkpoint} is of one; true takes each one's last"
        )
    if Path(options.model, CONFIG_NAME).is_file():
        raise SystemExit(
            f"{options.model} is an adapter; train what `smt-peft merge {options.model} --out FOLDER` makes"
        )
    with in_a_line():
        if "settings" in read_results(args):
            raise SystemExit(f"{results_file(args)} holds scores of evaluate.py; name another output_dir")
    if args.metric_for_best_model in ("loss", "eval_loss"):  # of load_best_model_at_end; losses are logged by domain
        args.metric_for_best_model = f"eval_{options.data}_{PER_TOKEN}"
    domains = [name for name in (options.data, options.old_data) if name]
    metrics = [f"eval_{name}_{metric}" for name in domains for metric in (PER_TOKEN, "loss")]
    if args.metric_for_best_model and f"eval_{args.metric_for_best_model.removeprefix('eval_')}" not in metrics:
        raise SystemExit(f"metric_for_best_model is {args.metric_for_best_model!r}; it can be {', '.join(metrics)}")
    if "smt" in methods:
        options.smt = {"seed": args.seed} | options.smt  # of random blocks, as of LoRA's first values
    with in_a_line():
        own_arguments = {method: arguments_of(method, options, args) for method in methods}
    datasets.disable_progress_bars()
    # PEFT's own question to Transformers; nothing that a user could change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    with in_a_line():
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        if not args.deepspeed_plugin:  # which would share out the empty model
            check_adapters(methods, options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # any will do: padding is masked
    with args.main_process_first():
        parts = {name: load_rows(name, options.eval_rows) for name in domains}
        rows = without_held_out(*parts[options.data])
        train = encode(rows, tokenizer, options.max_length)
        if args.process_index == 0:
            if repeated := len(parts[options.data][0]) - len(rows):
                print(f"{repeated:,} rows of {options.data} repeat held-out ones, and are not trained on")
            say_what_is_cut(rows, train, tokenizer, options.max_length)
        test = {name: encode(rows, tokenizer, options.max_length) for name, (_, rows) in parts.items()}
        test = {name: rows.shuffle(0).take(min(options.eval_rows, len(rows))) for name, rows in test.items()}
    with in_a_line():
        for method, own in own_arguments.items():
            check_goes_on(own.resume_from_checkpoint, len(train), settings_of(method, options, own))
    prompts = prompts_of(parts[options.data][1], options, tokenizer)
    [earlier], results = broadcast_object_list([read_results(args)]), {}
    for method in methods:
        own = own_arguments[method]
        is_last = (args.resume_from_checkpoint or "").lower() == "true"  # no checkpoint that is named, to go back to
        if is_last and is_finished(earlier.get(method, {}), settings_of(method, options, own)):
            results[method] = earlier[method]
            if args.process_index == 0:
                print(f"{method} was finished earlier with these settings: its adapter and numbers stand.")
            continue
        results[method], logits = fine_tune(method, options, own, tokenizer, train, test, prompts)
        write(results, args)  # at once: the check loads models, and may run out of memory
        clear_device_cache(garbage_collection=True)  # the model and the optimizer, which are in cycles
        unset_hf_deepspeed_config()  # else ZeRO-3 would load each model of the check in pieces
        if args.process_index == 0:  # whose disk has what was saved
            results[method] |= check(logits, options, own, tokenizer, prompts)
            write(results, args)
        args.distributed_state.wait_for_everyone()
    if args.process_index == 0:
        draw_losses(args.output_dir, methods)
        print(report(results, args.output_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
