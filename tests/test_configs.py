"""Tests of the files in configs, but for the studies: do scripts take them, and are their numbers right?"""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainingArguments

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import finetune  # noqa: E402
from command_line import read_options  # noqa: E402

FINETUNE = [ROOT / "configs/quickstart.yaml", ROOT / "configs/qsmt.yaml"]
PAPER = sorted((ROOT / "configs/paper").glob("*.yaml"))
COMPARISON = ROOT / "configs/paper/peft-method-comparison"
SIZES = {  # hidden, feed-forward, layers, heads of keys and values, words
    "huggyllama/llama-7b": (4096, 11008, 32, 32, 32000),
    "huggyllama/llama-13b": (5120, 13824, 40, 40, 32000),
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32000),
    "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 8, 128256),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (4096, 14336, 32, 8, 128256),
}


def options_of(path: Path) -> finetune.Options:
    return read_options(["--config", str(path), "--use_cpu"], finetune.Options, TrainingArguments)[0]


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


def header_of(path: Path) -> str:
    """What stands above the options, on one line."""
    above = path.read_text(encoding="utf-8").split("\nmethods:")[0]
    return re.sub(r"\n# ?", " ", above)


@pytest.mark.parametrize("path", [*FINETUNE, *PAPER], ids=lambda path: path.stem)
def test_every_file_is_one_that_finetune_takes(path):
    argv = ["--config", str(path), "--use_cpu", "true"]
    options, args = read_options(argv, finetune.Options, TrainingArguments)
    finetune.SMTConfig(**options.smt)
    finetune.LoraConfig(**options.lora)
    assert args.learning_rate <= 1e-2  # a number, not the text that YAML makes of 9.65e-6
    assert args.logging_steps <= 25  # what watches the gradient norm sees just logged steps


# --- the paper's settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.endswith("_smt")], ids=lambda path: path.stem)
def test_methods_of_a_model_differ_in_a_few_lines(path):
    smt = yaml.safe_load(path.read_text())
    others = [other for other in PAPER if other.stem.startswith(path.stem.removesuffix("smt")) and other != path]
    for other in others:
        values = yaml.safe_load(other.read_text())
        different = {key for key in smt | values if smt.get(key) != values.get(key)}
        assert different <= {"methods", "smt", "lora", "learning_rate", "output_dir"}, other.name
    assert len(others) == 3


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_file_is_about_the_method_of_its_name(path):
    options = options_of(path)
    assert options.methods == path.stem.split("_")[1] and f"runs/{path.stem}\n" in path.read_text()


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.endswith("_smt")], ids=lambda path: path.stem)
def test_the_number_of_blocks_is_the_papers_share_of_the_models_parameters(path):
    options, header = options_of(path), header_of(path)
    model = model_of(options.model)
    total = model.num_parameters()
    [stated] = {int(number.replace(",", "")) for number in re.findall(r"of ([\d,]+) parameters", header)}
    assert stated == total
    pairs = re.findall(r"([\d.]+) %(?: of [\d,]+ parameters / 65,536)? = ([\d,]+\d)", header)
    shares = {int(number.replace(",", "")): float(share) / 100 for share, number in pairs}
    if path.stem == "llama-7b_smt":  # the paper gives blocks there, not a share
        [share] = re.findall(r"parameters = ([\d.]+) %", header)
        assert f"{100 * options.smt['num_blocks'] * 256**2 / total:.3f}" == share
    else:
        assert options.smt["num_blocks"] in shares
    for number, share in shares.items():
        assert number == round(share * total / 256**2)
    targets = [m.weight.numel() for name, m in model.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert f"{sum(targets) // 256**2:,}" in header


@pytest.mark.parametrize("path", [p for p in PAPER if p.stem.endswith("ora")], ids=lambda path: path.stem)
def test_the_adapter_has_the_share_of_the_parameters_that_the_file_states(path):
    options, header = options_of(path), header_of(path)
    model = model_of(options.model)
    total = model.num_parameters()
    trained, _ = finetune.adapted(options.methods, model, options).get_nb_trainable_parameters()
    assert f"{100 * trained / total:.2f} %" in header and f"{total:,}" in header


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.endswith("_full")], ids=lambda path: path.stem)
def test_the_memory_of_full_fine_tuning_is_reckoned_from_its_parameters(path):
    header, total = header_of(path), model_of(options_of(path).model).num_parameters()
    assert f"All {total:,} parameters" in header
    on_gpu, offloaded = 2 + 2 / 4 + 12 / 4, 2 + 2 / 4  # bytes per parameter on each of 4 GPUs
    for bytes_each in (on_gpu, offloaded, 12, 14):
        assert f" {bytes_each * total / 1e9:.0f} GB" in header


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
