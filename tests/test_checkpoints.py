"""An adapter on disk: what is written comes back as the same function, and what does not fit is refused."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig, select_blocks
from smt_peft.layer import Linear


def config(**options) -> SMTConfig:
    """An adapter that changes the model from the start, without a warm-up."""
    defaults = {"block_size": 16, "num_blocks": 20, "selection": "random", "init_weights": False}
    return SMTConfig(**{**defaults, **options})


def wrap(base, **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, config(**options))


@pytest.fixture
def base(llama):
    """What the model was before it was wrapped."""
    return deepcopy(llama)


@pytest.mark.parametrize("load", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_a_saved_adapter_loads_as_the_same_function(llama, base, logits, tmp_path, load):
    model = wrap(llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, **load)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_nb_trainable_parameters()[0] == (20 * 256 if "is_trainable" in load else 0)
    assert all(p.device.type == "cpu" for p in loaded.parameters())


def test_a_loaded_adapter_trains_on_without_a_selection(llama, base, batches, tmp_path):
    model = get_peft_model(llama, config(selection="gradient", warmup_steps=4, init_weights=True))
    select_blocks(model, batches, progress_bar=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    loaded(**batches[0]).loss.backward()
    model.train()(**batches[0]).loss.backward()
    banks = [m.base_model.model.smt_bank["default"] for m in (model, loaded)]
    assert torch.equal(banks[0].weight.grad, banks[1].weight.grad) and banks[0].weight.grad.any()


def test_auto_classes_load_base_and_adapter(llama, logits, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    model = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_the_file_holds_the_values_and_hardly_anything_else(make_llama, tmp_path, block_size):
    big = make_llama(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    wrap(big, block_size=block_size, num_blocks=20).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    manifest = load_file(file)["base_model.model.smt_bank.manifest"].numel()
    assert manifest < 600 + 60 * 6, "a checksum, a sample of the base model, and a line for each of six targets"
    assert file.stat().st_size - header - manifest <= 1.01 * 4 * 20 * block_size**2 and header < 1024


@pytest.mark.parametrize("bias", ["smt_only", "all"])
def test_trained_biases_and_saved_modules_come_back(make_llama, batches, logits, tmp_path, bias):
    llama = make_llama(attention_bias=True)
    base = deepcopy(llama)
    model = wrap(llama, bias=bias, modules_to_save=["lm_head"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batches[0]).loss.backward()
    optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad.any()}
    assert len([name for name in trained if "bias" in name]) >= 4 and any("modules_to_save" in n for n in trained)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_keeps_a_float32_delta(llama, logits, tmp_path, dtype):
    llama.to(dtype)
    base = deepcopy(llama)
    model = wrap(llama)
    bank = model.base_model.model.smt_bank["default"]
    assert bank.weight.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert torch.equal(loaded.base_model.model.smt_bank["default"].weight, bank.weight)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0.05, atol=0.05)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, Linear):
            exact = (base.get_submodule(name).weight.float() + layer.get_delta_weight("default")).to(dtype)
            assert torch.equal(merged.get_submodule(name).weight, exact)


# --- files that must not load -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"num_key_value_heads": 4}], ids=str)
def test_an_adapter_of_another_model_is_refused(llama, make_llama, tmp_path, changes):
    wrap(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other target modules than this adapter's"):
        PeftModel.from_pretrained(make_llama(**changes), tmp_path)


# --- transformers' own doors ------------------------------------------------------------------------------------


def test_an_injected_adapter_trains_and_has_short_keys(llama, base, batches):
    inject_adapter_in_model(config(), llama)
    assert "smt_bank.default.weight" in llama.state_dict()
    llama.train()(**batches[0]).loss.backward()
    wrapped = get_peft_model(base, config()).train()
    bank, other = llama.smt_bank["default"], wrapped.base_model.model.smt_bank["default"]
    other.weight.data.copy_(bank.weight.data)
    wrapped(**batches[0]).loss.backward()
    assert torch.equal(bank.index, other.index) and torch.equal(bank.weight.grad, other.weight.grad)


def test_the_adapter_of_a_plain_transformers_model_saves_loads_and_switches(llama, base, logits, tmp_path):
    plain = logits(base)
    base.save_pretrained(tmp_path / "base")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    llama.add_adapter(config(), "mine")
    expected = logits(llama)
    llama.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    base.load_adapter(str(tmp_path / "adapter"), "loaded")
    assert torch.equal(logits(base), expected)
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    base.load_adapter(str(tmp_path / "adapter"), "again")
    base.set_adapter("again")
    base.delete_adapter("loaded")
    assert torch.equal(logits(base), expected)
    base.delete_adapter("again")
    assert torch.equal(logits(base), plain)


def test_the_model_card_shows_the_import_that_loading_needs_once(llama, tmp_path):
    model = wrap(llama)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("import smt_peft") == 1


# --- files of earlier versions ---------------------------------------------------------------------------------------

OLD = sorted((Path(__file__).parent / "fixtures/adapters_of_0.1").iterdir())


def with_what_a_file_holds(base, folder):
    """A dense model with the blocks of an adapter file, read without this package."""
    tensors = {key.rpartition(".")[2]: value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    targets = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    for (target, row, col), block in zip(tensors["index"].tolist(), tensors["weight"], strict=True):
        weight = base.get_submodule(targets[target]).weight.data
        weight[16 * row : 16 * row + 16, 16 * col : 16 * col + 16] += block
    return base


@pytest.mark.parametrize("load", ["PEFT", "transformers"])
@pytest.mark.parametrize("folder", OLD, ids=lambda folder: folder.name)
def test_adapter_files_of_earlier_versions_load_unchanged(llama, logits, folder, load):
    """Also where the index is not in the order of the targets, which no selection of this package is."""
    expected = logits(with_what_a_file_holds(deepcopy(llama), folder))
    if load == "PEFT":
        model = PeftModel.from_pretrained(llama, folder)
    else:
        model = llama
        model.load_adapter(str(folder), "default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", OLD, ids=lambda folder: folder.name)
def test_adapter_files_of_earlier_versions_go_on_training(llama, batches, folder):
    dense = with_what_a_file_holds(deepcopy(llama), folder).requires_grad_(False).train()
    model = PeftModel.from_pretrained(llama, folder, is_trainable=True).train()
    bank = model.base_model.model.smt_bank["default"]
    for target in bank.targets:
        dense.get_submodule(target.name).weight.requires_grad_()
    for one in (model, dense):
        one(**batches[0]).loss.backward()
    for gradient, (target, row, col) in zip(bank.weight.grad, bank.index.tolist(), strict=True):
        full = dense.get_submodule(bank.targets[target].name).weight.grad
        torch.testing.assert_close(gradient, full.unfold(0, 16, 16).unfold(1, 16, 16)[row, col], rtol=1e-4, atol=1e-6)


def test_a_model_that_is_made_empty_can_be_filled_again(llama, logits):
    model = wrap(llama)
    expected, state = logits(model), deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    bank = model.base_model.model.smt_bank["default"]
    bank.index.fill_(10_000)  # whatever lay there
    bank.to("cpu", torch.float64).float()
    rope = llama.model.rotary_emb
    model.load_state_dict(state)
    rope.inv_freq = type(rope)(llama.config).inv_freq  # no part of a state
    assert torch.equal(logits(model), expected)
