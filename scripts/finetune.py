"""Fine-tune a language model with Sparse Matrix Tuning, from the warm-up to a checked adapter; beside it, LoRA.

    python scripts/finetune.py --config configs/quickstart.yaml [--key value ...]

Options are those of `Options` below and of TrainingArguments, in the YAML file or after it; `--smt.num_blocks 40` sets
one entry of a mapping. For several processes: `accelerate launch scripts/finetune.py ...`. The adapters and the
numbers go to `output_dir`; `scripts/merge.py` makes a plain model of an adapter.
"""

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from stdlib_text import documentation, source_code
from tasks import prompt
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from smt_peft import SMTConfig, SMTWarmupCallback
from smt_peft.plotting import plot_selection

STDLIB = {"stdlib-source": source_code, "stdlib-documentation": documentation}


def _help(text: str, **default: Any) -> Any:
    return field(metadata={"help": text}, **default)


@dataclass
class Options:
    """What to train, and on what; how to train is in TrainingArguments."""

    model: str = _help("model: a folder or a name on the Hugging Face hub")
    data: str = _help(
        "what to learn: stdlib-source, stdlib-documentation, a .jsonl file or a dataset on the hub. A row has `text`, "
        "or `instruction`, perhaps `input`, and `output`, and then just the output is learnt"
    )
    old_data: str | None = _help("what not to forget: like data, but only evaluated", default=None)
    methods: str = _help("smt, lora, full, or one after the other: smt,lora", default="smt")
    smt: str = _help("options of SMTConfig, a mapping", default="{}")
    lora: str = _help("options of LoraConfig, a mapping", default="{}")
    lora_learning_rate: float | None = _help("learning_rate for LoRA, if another", default=None)
    quantization: str = _help("options of BitsAndBytesConfig, a mapping: a base model in 4 or 8 bits", default="{}")
    max_length: int = _help("tokens per row", default=512)
    eval_rows: int = _help("rows of each domain that are held out, to evaluate on", default=128)
    prompt: str = _help("text to continue, before and after", default="def ")
    dtype: str = _help('data type of the weights, such as bfloat16; "auto" for the saved one', default="auto")

    def __post_init__(self) -> None:
        self.smt, self.lora = yaml.safe_load(self.smt), yaml.safe_load(self.lora)
        self.quantization = yaml.safe_load(self.quantization)
        if set(self.methods.split(",")) - {"smt", "lora", "full"}:
            raise SystemExit(f"methods is {self.methods!r}; it can be smt, lora, full, or several, as in smt,lora")


def parse(argv: list[str]) -> tuple[Options, TrainingArguments]:
    """Read the YAML file, if the command line starts with --config, and then the rest of the command line."""
    values, given = {}, []
    if argv[:1] == ["--config"]:
        values, argv = yaml.safe_load(Path(argv[1]).read_text(encoding="utf-8")), argv[2:]
    words = iter(argv)
    for word in words:
        if word.startswith(("--smt.", "--lora.")):
            mapping, key = word[2:].split(".", 1)
            values.setdefault(mapping, {})[key] = yaml.safe_load(next(words, ""))
        else:
            given.append(word)
    from_file = [(f"--{key}", json.dumps(v) if isinstance(v, dict) else str(v)) for key, v in values.items()]
    parser = HfArgumentParser((Options, TrainingArguments), allow_abbrev=False)
    return parser.parse_args_into_dataclasses([word for pair in from_file for word in pair] + given)


def load_rows(name: str, eval_rows: int) -> tuple[datasets.Dataset, ...]:
    """Give a domain's rows to train on, and those that are held out."""
    if name in STDLIB:  # divided by module
        return tuple(datasets.Dataset.from_dict({"text": list(STDLIB[name](split))}) for split in ("train", "test"))
    where = {"path": "json", "data_files": name} if name.endswith((".jsonl", ".json")) else {"path": name}
    rows = datasets.load_dataset(**where, split="train")
    return tuple(rows.train_test_split(min(eval_rows, len(rows) // 2), seed=0).values())


def encode(rows: datasets.Dataset, tokenizer: Any, length: int) -> datasets.Dataset:
    """Turn rows into tokens and labels: plain text joined and cut to `length`, or an instruction and its answer."""

    def pack(batch: dict) -> dict:
        texts = tokenizer(batch["text"], verbose=False)["input_ids"]
        tokens = [token for text in texts for token in (*text, tokenizer.eos_token_id)]
        cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut, "labels": cut}

    def answer(row: dict) -> dict:
        question = prompt("\n\n".join(filter(None, [row["instruction"], row.get("input")])))
        start = len(tokenizer(question)["input_ids"])
        tokens = [*tokenizer(question + row["output"].strip())["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": tokens[:length], "labels": ([-100] * start + tokens[start:])[:length]}

    if "text" in rows.column_names:
        rows = rows.map(pack, batched=True, remove_columns=rows.column_names)
    elif {"instruction", "output"} <= set(rows.column_names):
        rows = rows.map(answer, remove_columns=rows.column_names).filter(lambda row: max(row["labels"]) >= 0)
    else:
        raise SystemExit(f"the data has the columns {rows.column_names}; it needs text, or instruction and output")
    if not len(rows):
        raise SystemExit(f"max_length={length} leaves no row: texts are shorter, or prompts longer; set another")
    return rows


def load_model(options: Options) -> torch.nn.Module:
    quantized = {"quantization_config": BitsAndBytesConfig(**options.quantization)} if options.quantization else {}
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, **quantized)


def fine_tune(method: str, options: Options, args: TrainingArguments, tokenizer: Any, train: Any, test: dict) -> dict:
    """Train one adapter, or all weights, save, check, and give the numbers."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir, method))
    args.eval_on_start = True  # Trainer.evaluate() before train() would leave the model out of DDP
    transformers.set_seed(args.seed)
    warmup, model = SMTWarmupCallback(), load_model(options)
    if method == "smt":
        model = get_peft_model(model, SMTConfig(task_type="CAUSAL_LM", **options.smt))
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options.lora))
        args.learning_rate = options.lora_learning_rate or args.learning_rate
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),  # pads input_ids and labels
        processing_class=tokenizer,
        callbacks=[warmup] if method == "smt" else [],
    )
    run = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    after = trainer.evaluate()
    trainer.save_model()
    if warmup.selection and trainer.is_world_process_zero():
        plot_selection(warmup.selection, Path(args.output_dir, "selection.png"))
    trainer.accelerator.wait_for_everyone()
    parameters = (getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    numbers = {"parameters": sum(parameters), "seconds": run["train_runtime"]}
    before = {key: value for entry in reversed(trainer.state.log_history) for key, value in entry.items()}
    numbers["losses"] = {name: [before[f"eval_{name}_loss"], after[f"eval_{name}_loss"]] for name in test}
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return numbers | check(trained, options, args.output_dir, tokenizer)


@torch.no_grad()
def check(trained: torch.nn.Module, options: Options, saved: str, tokenizer: Any) -> dict:
    """Compare the trained model with what was saved, loaded and then merged; write text before and after."""
    inputs = dict(tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(trained.device))
    logits = trained.eval()(**inputs).logits
    base = load_model(options).to(trained.device)
    wanted = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": 1.15}
    outputs = [base.generate(**inputs, **wanted)[0], trained.generate(**inputs, **wanted)[0]]
    if isinstance(trained, PeftModel):
        reloaded = PeftModel.from_pretrained(base, saved)
        errors = {"reloaded": (reloaded(**inputs).logits - logits).abs().max().item()}
        errors["merged"] = (reloaded.merge_and_unload()(**inputs).logits - logits).abs().max().item()
    else:
        reloaded = AutoModelForCausalLM.from_pretrained(saved, dtype=trained.dtype).to(trained.device)
        errors = {"reloaded": (reloaded(**inputs).logits - logits).abs().max().item()}
    if options.quantization:  # merging rounds to the grid of the quantised weight
        print(f"logits of the merged model differ by {errors.pop('merged', 0.0):.3g}")
    if max(errors.values()) > torch.finfo(trained.dtype).eps ** 0.5 * logits.abs().max():
        raise RuntimeError(f"the logits of {saved} are off those of the trained model by {errors}")
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return {"logits_off_by": errors, "text_before": texts[0], "text_after": texts[1]}


def report(results: dict) -> str:
    """Lay out the results: the texts, the checks, and a table of the losses."""
    domains = next(iter(results.values()))["losses"]
    table = [f"{'':6}{'parameters':>12}{'seconds':>9}" + "".join(f"{f'loss, {Path(d).stem}':>30}" for d in domains)]
    lines = []
    for method, one in results.items():
        losses = "".join(f"{f'{before:.3f} -> {after:.3f}':>30}" for before, after in one["losses"].values())
        table.append(f"{method:6}{one['parameters']:>12,}{one['seconds']:>9.1f}{losses}")
        lines += [f"--- before {method}", one["text_before"], f"--- after {method}", one["text_after"]]
        lines += [f"--- logits differ from the trained model's by {one['logits_off_by']}", ""]
    return "\n".join(lines + table)


def main(argv: list[str]) -> None:
    options, args = parse(argv)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # any will do: padding is masked
    with args.main_process_first():
        parts = {name: load_rows(name, options.eval_rows) for name in filter(None, [options.data, options.old_data])}
        train = encode(parts[options.data][0], tokenizer, options.max_length)
        test = {name: encode(rows, tokenizer, options.max_length) for name, (_, rows) in parts.items()}
        test = {name: rows.shuffle(0).take(min(options.eval_rows, len(rows))) for name, rows in test.items()}
    results = {m: fine_tune(m, options, args, tokenizer, train, test) for m in options.methods.split(",")}
    if args.process_index == 0:
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        print(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
