"""Tests of scripts/plan.py: against what autograd saves on the CPU, and against peaks measured on a GPU."""

import json
from pathlib import Path
from textwrap import indent

import plan
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

from smt_peft import SMTConfig

QV, LINEAR = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = {"model": "llama-3.2-3b", "num_blocks": 140, "block_size": 256, "batch_size": 4, "tokens": 768}
PAPER = {"model": "llama-2-7b", "num_blocks": 888, "batch_size": 2, "tokens": 1024, "checkpointing": "non-reentrant"}
RESULTS = Path(__file__).parents[1] / "docs/results"
MEASURED = [  # a file of bench_training.py on a GPU, what plan.py needs to know of it, and its method
    *[("peft", {**PEFT, "target_modules": QV}, method) for method in ("smt", "lora")],
    ("peft-baselines", {**PEFT, "target_modules": QV}, "full"),
    *[("linear", {**PEFT, "target_modules": LINEAR, "num_blocks": 742}, method) for method in ("smt", "lora")],
    *[("7b-paper", PAPER, method) for method in ("smt", "lora", "full")],
]


def planned(**options) -> tuple[plan.Model, dict]:
    model = plan.read_model(options := plan.Options(**options))
    return model, plan.plan(model, options)


def peak_of(file: str, method: str) -> int:
    return json.loads((RESULTS / f"training_{file}.json").read_text())["runs"][0]["methods"][method]["peak_bytes"]


@pytest.mark.parametrize(("file", "setting", "method"), MEASURED)
def test_peaks_are_those_measured_on_a_gpu(file, setting, method):
    """Of training: the benchmark had no warm-up."""
    totals = [total for name, total in planned(**setting, method=method)[1]["total"].items() if name != "warm-up"]
    assert max(totals) == pytest.approx(peak_of(file, method), rel=0.02)


def test_the_floor_is_the_one_measured_on_a_gpu():
    """The frozen model, with gradients to the outputs of the lowest targets."""
    kinds = planned(**PEFT, target_modules=QV)[1]["bytes"]["loss"]
    floor = sum(kinds[kind] for kind in ("weights", "activations", "logits and loss"))
    assert floor == pytest.approx(peak_of("peft", "floor"), rel=0.02)


@pytest.fixture
def tiny(tmp_path):
    """A folder with the config of a tiny LLaMA in which no size is another one's, but where they must be."""
    sizes = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 4, "num_attention_heads": 6}
    config = plan.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=320, use_cache=False)
    config.save_pretrained(tmp_path)
    return str(tmp_path), config


def saved_bytes(model: nn.Module, batch: torch.Tensor) -> int:
    """Of the distinct storages, other than parameters, that a forward keeps for its backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=batch, labels=batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("targets", [QV, LINEAR], ids=["q, v", "all linear"])
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["smt", "lora", "full"])
def test_activations_are_what_autograd_saves(tiny, method, dtype, checkpointing, targets):
    folder, config = tiny
    common = {"num_blocks": 12, "block_size": 16, "target_modules": targets}
    planning, result = planned(model=folder, method=method, dtype=dtype, checkpointing=checkpointing, batch_size=2,
                               tokens=40, **common)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if method == "smt":
        model = get_peft_model(model, SMTConfig(selection="random", **common))
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(r=planning.rank, target_modules=targets))
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == result["trained"]
    kinds = result["bytes"]["loss"]  # logits: of three float32 copies forward keeps one
    expected = kinds["activations"] + kinds["kept inputs"] + kinds["logits and loss"] / 3
    assert saved_bytes(model.train(), torch.randint(0, 320, (2, 40))) == pytest.approx(expected, rel=0.05)


def test_all_linear_is_every_linear_layer_but_the_head(tiny):
    named, every = (planned(model=tiny[0], target_modules=names, num_blocks=9, block_size=16)[0]
                    for names in (LINEAR, ["all-linear"]))  # fmt: skip
    assert every == named


def test_parameters_are_those_of_the_models():
    """As the model cards have them: 6.74 and 70.6 billion."""
    assert planned(model="meta-llama/Llama-2-7b-hf")[0].parameters == 6_738_415_616
    assert planned(model="llama-3-70b")[0].parameters == 70_553_706_496


def test_four_bits_are_what_bitsandbytes_holds():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(1024, 512, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    held = layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
    assert held == 1024 * 512 * (4 / 8 + 4 / 64)


def test_what_is_sharded_is_divided_and_the_bank_is_whole():
    one, two = (planned(**PAPER, strategy="fsdp2", gpus=gpus)[1]["bytes"]["step"] for gpus in (8, 16))
    assert one["weights"] == 2 * two["weights"] and one["optimizer state"] == 2 * two["optimizer state"]
    bank = 888 * 256**2 * 4
    assert two["trained parameters"] == bank * (1 + 1 / 16) and two["gradients"] > 2 * bank


def test_the_command_says_which_strategies_fit(capsys):
    common = ["--checkpointing", "non-reentrant"]
    plan.main(["--model", "llama-3-70b", *common, "--strategy", "fsdp2", "--gpus", "4"])
    assert indent(capsys.readouterr().out, "    ") in plan.__doc__
    plan.main(["--model", "llama-3.1-405b", *common, "--json"])
    result = json.loads(capsys.readouterr().out)
    fewest = {name: way["gpus"] for name, way in result["ways"].items()}
    assert fewest == {"one": None, "ddp": None, "zero2": None, "fsdp2": 32, "zero3": 16} and not result["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model no/such-model", "model is 'no/such-model': no folder .* `hf download no/such-model config.json`"),
        ("--model llama-2-7b --gpus 4", "gpus is 4, which --strategy one cannot use; take ddp"),
        ("--model llama-2-7b --dtype 4bit --method full", "dtype is '4bit', .* does not train; take bfloat16"),
        ("--model llama-2-7b --tokens 0", "tokens is 0; it must be above 0"),
        ("--model llama-2-7b --target_modules query", "no linear layer is named so; take from down_proj, gate_proj"),
        ("--model llama-2-7b --block_size 100", "block_size=100 does not divide .* use 256"),
        ("--model llama-2-7b --block_size 0", "block_size=0"),
        ("--model llama-2-7b --num_blocks 99999", "A budget of 99999 blocks is above the 24576 blocks"),
    ],
)
def test_errors_name_the_value_the_fact_and_the_way_out(words, message):
    with pytest.raises(SystemExit, match=message):
        plan.main(words.split())
