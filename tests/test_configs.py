"""Tests of the files in configs, but for the studies: do scripts take them, and are their numbers right?"""

import json
import re
from pathlib import Path

import finetune
import pytest
import torch
import yaml
from command_line import read_options
from peft import PeftConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainingArguments

ROOT = Path(__file__).parents[1]

FINETUNE = [ROOT / f"configs/{name}.yaml" for name in ("quickstart", "quickstart_smollm2", "qsmt")]
PAPER = sorted((ROOT / "configs/paper").glob("*.yaml"))
README = ROOT / "configs/paper/README.md"
MODELS, MEMORY, CHECKPOINT = README.read_text().split("\n## ")
COMPARISON = ROOT / "configs/paper/peft-method-comparison"
SIZES = {  # hidden, feed-forward, layers, heads of keys and values, words
    "huggyllama/llama-7b": (4096, 11008, 32, 32, 32000),
    "huggyllama/llama-13b": (5120, 13824, 40, 40, 32000),
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32000),
    "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 8, 128256),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (4096, 14336, 32, 8, 128256),
}


def options_of(path: Path, *words: str) -> tuple[finetune.Options, TrainingArguments]:
    return read_options(["--config", str(path), "--use_cpu", "true", *words], finetune.Options, TrainingArguments)


def rows_of(section: str) -> dict[str, list[str]]:
    """The table of a section of the paper's README: model -> its cells."""
    rows = re.findall(r"^\| `(\S+/\S+)` \| (.*) \|$", section, re.MULTILINE)
    return {model: cells.split(" | ") for model, cells in rows}


def model_of(name: str) -> torch.nn.Module:
    """The model as it is called on the hub, without memory for its weights."""
    hidden, feed_forward, layers, heads, words = SIZES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=heads,
        vocab_size=words,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("path", [*FINETUNE, *PAPER], ids=lambda path: path.stem)
def test_every_file_is_one_that_finetune_takes(path):
    _, args = options_of(path, *([] if path in FINETUNE else ["--model", "m"]))
    assert 0 < args.learning_rate < 1  # a number, not the text that YAML makes of 9.65e-6
    assert args.logging_steps <= 25  # what watches the gradient norm sees just logged steps


# --- the paper's settings --------------------------------------------------------------------------------------------


def test_methods_share_what_is_not_their_own():
    assert [path.stem for path in PAPER] == ["dora", "full", "lora", "smt"]
    first, *others = (path.read_text().split("\n\n") for path in PAPER)
    assert all(len(parts) == 2 and parts[1] == first[1] for parts in (first, *others))
    for path, (own, _) in zip(PAPER, (first, *others), strict=True):
        values = yaml.safe_load(own)
        assert values["methods"] == path.stem and values.keys() <= {"methods", "learning_rate", "smt", "lora"}


def test_the_command_is_that_of_the_first_row():
    command = re.search(r"--config \S+/smt.yaml(.*?)```", MODELS, re.DOTALL)[1].replace("\\\n", "").split()
    options, _ = options_of(README.parent / "smt.yaml", *command)
    assert options.model == next(iter(rows_of(MODELS)))
    assert f"--smt.num_blocks {options.smt['num_blocks']}`" in rows_of(MODELS)[options.model][2]


@pytest.mark.parametrize("name", SIZES)
def test_options_of_a_model_train_the_share_of_its_parameters_that_its_row_states(name):
    parameters, blocks, *cells = rows_of(MODELS)[name]
    model = model_of(name)
    total = model.num_parameters()
    assert parameters == f"{total:,}"
    targets = [m.weight.numel() for key, m in model.named_modules() if key.endswith(("q_proj", "k_proj", "v_proj"))]
    assert blocks == f"{sum(targets) // 256**2:,}"
    for method, cell in zip(("smt", "lora", "dora"), cells, strict=True):
        words, share = re.fullmatch(r"(?:`(.*)` )?\(?([\d.]+) %\)?", cell).groups()
        options, _ = options_of(README.parent / f"{method}.yaml", "--model", name, *(words or "").split())
        if method == "smt":
            assert abs(options.smt["num_blocks"] - float(share) / 100 * total / 256**2) < 1
            trained = options.smt["num_blocks"] * options.smt["block_size"] ** 2
        else:
            assert options.lora["lora_alpha"] == 2 * options.lora["r"]
            trained, _ = finetune.adapted(method, model, options).get_nb_trainable_parameters()
            model = model_of(name)
        assert f"{100 * trained / total:.{len(share.partition('.')[2])}f}" == share


def test_the_papers_other_budgets_are_its_shares_of_the_parameters():
    [budgets] = re.findall(r"Its other budgets are,(.*?)\. None", MODELS, re.DOTALL)
    for name, text in re.findall(r"of\s`([^`]+)`([^;]*)", budgets):
        shares = re.findall(r"([\d.]+) % = ([\d,]*\d)", text)
        assert shares
        for share, number in shares:
            assert int(number.replace(",", "")) == round(float(share) / 100 * model_of(name).num_parameters() / 256**2)


@pytest.mark.parametrize("name", SIZES)
def test_memory_is_reckoned_from_the_models_dimensions(name):
    hidden, feed_forward, layers, heads, _ = SIZES[name]
    kept = 2 * (9 * hidden + hidden + 2 * 128 * heads + 4 * feed_forward) * layers * 16 * 512
    per_parameter = (2 + 2 / 4 + 12 / 4, 2 + 2 / 4, 12, 14)
    total = model_of(name).num_parameters()
    assert rows_of(MEMORY)[name] == [f"{size / 1e9:.0f} GB" for size in (kept, *(b * total for b in per_parameter))]


@pytest.mark.parametrize("method", ["smt", "full"])
def test_the_official_choice_of_a_checkpoint_keeps_the_one_with_the_lowest_loss(method, tmp_path):
    """On few rows, by steps that are too long."""
    rows = [{"instruction": f"Add 1 to {n}.", "output": f"It is {n + 1}."} for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = re.search(r"```bash\n(.*)```", CHECKPOINT, re.DOTALL)[1].replace("\\\n", "").split()
    files = ["--model", str(ROOT / "scripts/tiny_llama"), "--data", f"{tmp_path}/rows.json"]
    small = "--smt.num_blocks 20 --smt.block_size 16 --smt.warmup_steps 2 --eval_rows 4 --eval_steps 1 --save_steps 1"
    small += " --per_device_train_batch_size 4 --dtype float32 --bf16 false --max_steps 5"
    small += " --optim sgd --learning_rate 10 --lr_scheduler_type constant --use_cpu true"
    config = ["--config", str(README.parent / f"{method}.yaml")]
    finetune.main([*config, *files, *words, *small.split(), "--output_dir", f"{tmp_path}/out"])
    [[_, after]] = json.loads((tmp_path / "out/results.json").read_text())[method]["losses"].values()
    log = json.loads((tmp_path / f"out/{method}/trainer_state.json").read_text())["log_history"]
    losses = [value for entry in log if entry["step"] > 0 for key, value in entry.items() if key.endswith("json_loss")]
    assert after == pytest.approx(min(losses)) and losses[-2] > min(losses)


# --- PEFT's method comparison ----------------------------------------------------------------------------------------


def test_the_experiment_for_pefts_comparison_trains_what_lora_of_rank_32_does():
    [folder] = (COMPARISON / "smt").iterdir()
    config = PeftConfig.from_pretrained(str(folder))
    lora = 28 * 32 * ((3072 + 3072) + (3072 + 1024))  # q and v of 28 layers of Llama-3.2-3B
    assert isinstance(config, finetune.SMTConfig) and config.num_blocks * config.block_size**2 == lora


def test_the_warm_up_for_pefts_comparison_runs_with_the_loss_of_its_training_loop():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "scripts/tiny_llama")
    tokenizer.pad_token = tokenizer.eos_token  # as there
    base = AutoModelForCausalLM.from_pretrained(ROOT / "scripts/tiny_llama")
    model = get_peft_model(base, finetune.SMTConfig(num_blocks=5, block_size=16, warmup_steps=2))
    texts = [["import os", "def first(items):\n    return items[0]"], ["x = 1", "y = 2"]]
    batches = [dict(tokenizer(few, return_token_type_ids=False)) for few in texts]
    [snippet] = re.findall(r"```python\n(.*?)```", (COMPARISON / "README.md").read_text(), re.DOTALL)
    here = {"model": model, "tokenizer": tokenizer, "iterator_train": batches}
    whole = AutoModelForCausalLM.from_config(base.config)
    exec(snippet, here | {"model": whole})  # full fine-tuning, which has nothing to warm up
    exec(snippet, here)
    assert model.base_model.model.smt_bank["default"].is_selected

    # What run.py does with a batch, in other words: the first end of text after each row is learnt, and the sum over
    # all labels is divided by the number of tokens without padding.
    padded = tokenizer.pad(dict(batches[0]), return_tensors="pt")
    lengths = padded["attention_mask"].sum(1)
    logits = model(**padded).logits
    losses = [
        cross_entropy(row[:-1][:length], ids[1:][:length], reduction="sum")
        for row, ids, length in zip(logits, padded["input_ids"], lengths, strict=True)
    ]
    torch.testing.assert_close(here["smt_loss"](model, batches[0]), sum(losses) / lengths.sum())
