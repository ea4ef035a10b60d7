"""Where a model lives: hooks and offloading of accelerate, tied weights. Results equal those of a plain model."""

import contextlib
import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dense_truth import bank_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from smt_peft import SMTConfig, select_blocks
from smt_peft.layer import Linear

NUM_BLOCKS, SIZE = 6, 8
CPU = torch.device("cpu")
TOKENS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def tiny_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def config(**changes) -> SMTConfig:
    return SMTConfig(**{"num_blocks": NUM_BLOCKS, "block_size": SIZE, "warmup_steps": 1} | changes)


def on_cpu_and_disk() -> dict[str, str]:
    """Everything in memory but the second layer."""
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    return {name: "disk" if name == "model.layers.1" else "cpu" for name in names}


def in_memory(model: LlamaForCausalLM, folder: Path):
    cpu_offload(model, execution_device=CPU)
    return model


def on_disk(model: LlamaForCausalLM, folder: Path):
    disk_offload(model, folder, execution_device=CPU)
    return model


def dispatched(model: LlamaForCausalLM, folder: Path):
    return dispatch_model(model, on_cpu_and_disk(), main_device="cpu", offload_dir=folder, force_hooks=True)


def loaded_with_a_device_map(model: LlamaForCausalLM, folder: Path):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, device_map=on_cpu_and_disk(), offload_folder=folder / "off")


@pytest.fixture(params=[in_memory, on_disk, dispatched, loaded_with_a_device_map], ids=lambda place: place.__name__)
def place(request, tmp_path_factory):
    """A function that puts a model under hooks."""
    return partial(request.param, folder=tmp_path_factory.mktemp("offload"))


def layers_of(model) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def train(model, steps: int = 2):
    """The warm-up and some steps, a weight decay included."""
    select_blocks(model, [BATCH], progress_bar=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def plain():
    """The reference: the same training without hooks."""
    return train(get_peft_model(tiny_model(), config()))


@pytest.fixture
def placed(place):
    return train(get_peft_model(place(tiny_model()), config()))


# --- offloading ------------------------------------------------------------------------------------------------------


def test_an_offloaded_model_selects_the_blocks_of_a_plain_one(placed, plain):
    assert torch.equal(bank_of(placed).index, bank_of(plain).index)


@pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
def test_the_largest_weights_of_an_offloaded_model_are_those_of_a_plain_one(place, arrangement):
    options = {"selection": "magnitude", "arrangement": arrangement}
    placed, plain = (get_peft_model(base, config(**options)) for base in (place(tiny_model()), tiny_model()))
    assert torch.equal(bank_of(placed).index, bank_of(plain).index)


@pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
def test_weights_that_are_not_there_yet_are_not_looked_at(arrangement, tmp_path):
    options = {"selection": "magnitude", "arrangement": arrangement}
    made = get_peft_model(tiny_model(), config(**options))
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = [tiny_model(), tiny_model()]
    loaded = PeftModel.from_pretrained(empty[0], tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(bank_of(loaded).index, bank_of(made).index)
    with pytest.raises(ValueError, match="is on the meta device: load it first"):
        get_peft_model(empty[1], config(**options))


def test_an_offloaded_model_trains_the_deltas_of_a_plain_one(placed, plain):
    assert_same(bank_of(placed).weight, bank_of(plain).weight)


def test_an_offloaded_model_has_the_logits_of_a_plain_one(placed, plain):
    assert_same(logits(placed), logits(plain))


def test_an_adapter_trained_offloaded_loads_into_a_plain_model(placed, plain, tmp_path):
    placed.save_pretrained(tmp_path)
    assert_same(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(plain))


# Not with `hf_device_map`: there PEFT dispatches anew, which accelerate can do only where there is a GPU.
@pytest.mark.parametrize("place", [in_memory, on_disk, dispatched], indirect=True)
def test_an_adapter_loads_into_an_offloaded_model(place, plain, tmp_path):
    plain.save_pretrained(tmp_path)
    assert_same(logits(PeftModel.from_pretrained(place(tiny_model()), tmp_path)), logits(plain))


def test_a_disabled_adapter_gives_the_base_models_logits(placed):
    with placed.disable_adapter():
        assert_same(logits(placed), logits(tiny_model()))


def test_merging_an_offloaded_model_keeps_its_logits(placed, plain):
    placed.merge_adapter()
    assert_same(logits(placed), logits(plain))


def test_unmerging_an_offloaded_model_gives_back_base_and_adapter(placed, plain):
    placed.merge_adapter()
    placed.unmerge_adapter()
    assert_same(logits(placed), logits(plain))
    with placed.disable_adapter():
        assert_same(logits(placed), logits(tiny_model()))


def test_disabling_a_merged_adapter_of_an_offloaded_model_gives_the_base_models_logits(placed):
    placed.merge_adapter()
    with placed.disable_adapter():
        assert_same(logits(placed), logits(tiny_model()))


def test_merge_and_unload_of_an_offloaded_model_keeps_its_logits(placed, plain):
    assert_same(logits(placed.merge_and_unload()), logits(plain))


def test_unloading_an_offloaded_model_gives_the_base_models_logits(placed):
    assert_same(logits(placed.unload()), logits(tiny_model()))


@pytest.mark.parametrize("with_buffers", [False, True])
def test_a_model_that_is_offloaded_with_its_adapter_keeps_its_logits(plain, with_buffers):
    expected = logits(plain)
    cpu_offload(plain, execution_device=CPU, offload_buffers=with_buffers)
    assert_same(logits(plain), expected)


@pytest.mark.parametrize("method", ["lora", "smt", "smt on the disk"])
def test_an_adapter_loads_where_peft_dispatches_anew(tmp_path, monkeypatch, method):
    """As it does for a base with layers on a disk; its auto, which needs a GPU, puts the bank on the disk as well."""
    monkeypatch.chdir(tmp_path)  # where PEFT puts what it writes anew
    lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    made = get_peft_model(tiny_model(), lora if method == "lora" else config(init_weights=False, selection="random"))
    made.save_pretrained("adapter")
    base = loaded_with_a_device_map(tiny_model(), tmp_path / "base")
    places = {f"base_model.model.{name}": place for name, place in on_cpu_and_disk().items()}
    if method == "smt on the disk":
        places["base_model.model.smt_bank"] = "disk"
    model = PeftModel.from_pretrained(base, "adapter", device_map=places, offload_folder="off")
    assert_same(logits(model), logits(made))


def test_a_refused_second_adapter_leaves_accelerates_hooks_alone(tmp_path):
    """What puts a whole module back must not copy the forward that a hook stands in for."""
    model = dispatched(tiny_model(), tmp_path)
    model = get_peft_model(model, config(selection="random", init_weights=False, modules_to_save=["lm_head"]))
    expected = logits(model)
    with pytest.raises(ValueError, match="above the"):
        model.add_adapter("second", config(selection="random", num_blocks=10**6))
    assert_same(logits(model), expected)


def test_an_offloaded_model_is_unmerged_by_whatever_asks_for_it(place):
    model = get_peft_model(place(tiny_model()), config(init_weights=False, selection="random"))
    model.add_adapter("other", config(init_weights=False, selection="random", seed=1))
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    model.merge_adapter()
    model.set_adapter("other")  # takes the merged one out
    assert_same(logits(model), expected)


def test_the_delta_of_an_offloaded_layer_is_that_of_a_plain_one(placed, plain):
    for one, other in zip(layers_of(placed), layers_of(plain), strict=True):
        assert_same(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_an_offloaded_module_of_experts_is_refused_in_words():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    cpu_offload(base, execution_device=CPU)
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "selection": "random"}
    model = get_peft_model(base, config(**options))
    with pytest.raises(TypeError, match=r"is offloaded.*Keep this module on a device"):
        model(**BATCH)


# --- tied weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tied():
    """The output projection is a target and shares its weight with the embedding."""
    return train(get_peft_model(tiny_model(tied=True), config(target_modules=["lm_head"])))


def with_delta_in_the_head_only(model) -> LlamaForCausalLM:
    """A dense model with untied weights: what an adapter of the output projection means."""
    dense = tiny_model(tied=True)
    dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.detach().clone())
    dense.lm_head.weight.data += model.base_model.model.lm_head.get_delta_weight("default")
    return dense


def test_a_tied_target_changes_only_the_module_that_was_named(tied):
    assert_same(logits(tied), logits(with_delta_in_the_head_only(tied)))


def test_a_tied_target_leaves_the_shared_weight_alone(tied):
    assert torch.equal(tied.base_model.model.model.embed_tokens.weight, tiny_model(tied=True).lm_head.weight)


def test_the_gradient_of_a_tied_target_is_the_one_of_its_own_use(tied):
    dense = with_delta_in_the_head_only(tied)
    dense(**BATCH).loss.backward()
    tied.train()(**BATCH).loss.backward()
    blocks = dense.lm_head.weight.grad.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE)
    _, rows, cols = bank_of(tied).index.long().unbind(1)
    assert_same(bank_of(tied).weight.grad, blocks[rows, cols])


def test_merging_a_tied_target_does_not_reach_the_other_module(tied):
    expected = logits(tied)
    tied.merge_adapter()
    assert_same(logits(tied), expected)


def test_unmerging_a_tied_target_ties_it_again(tied):
    expected = logits(tied)
    tied.merge_adapter()
    tied.unmerge_adapter()
    assert_same(logits(tied), expected)
    assert tied.base_model.model.lm_head.weight is tied.base_model.model.model.embed_tokens.weight


@pytest.mark.parametrize("disabled", [False, True])
def test_a_tied_target_that_was_cast_meanwhile_comes_back_as_it_is_now(tied, disabled):
    tied.merge_adapter()
    tied.to(torch.float64)
    with tied.disable_adapter() if disabled else contextlib.nullcontext():
        logits(tied)
    tied.unmerge_adapter() if tied.base_model.model.lm_head.merged else None
    assert tied.base_model.model.lm_head.weight is tied.base_model.model.model.embed_tokens.weight
    assert tied.base_model.model.lm_head.weight.dtype == torch.float64
    logits(tied)


def test_merge_and_unload_of_a_tied_target_keeps_the_logits(tied):
    expected = logits(tied)
    assert_same(logits(tied.merge_and_unload()), expected)


SMALL = {"vocab_size": 64, "d_model": 32}
BART = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in [("layers", 1), ("attention_heads", 2)]}
T5 = SMALL | {"d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": True}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
TIED_MORE = {
    "bart": (BartForConditionalGeneration, lambda: BartConfig(**SMALL, **BART, max_position_embeddings=32)),
    "umt5": (UMT5ForConditionalGeneration, lambda: UMT5Config(**T5)),
    "t5": (T5ForConditionalGeneration, lambda: T5Config(**T5)),
    "bert": (BertForMaskedLM, lambda: BertConfig(**BERT)),
}


@pytest.mark.parametrize("name", TIED_MORE)
def test_a_model_in_which_more_is_tied_than_its_head_is_merged_and_saved(tmp_path, name):
    """PEFT says of the whole model that it is untied: half of BART's embeddings would not be saved, and UMT5 scales
    its logits by what is tied."""
    kind, make = TIED_MORE[name]
    torch.manual_seed(0)
    head = "decoder" if name == "bert" else "lm_head"
    untrained = config(target_modules=[head], selection="random", init_weights=False)
    model = get_peft_model(kind(make()).eval(), untrained)
    batch = {"input_ids": torch.arange(3, 9)[None]}
    batch |= {} if name == "bert" else {"decoder_input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        assert_same(merged(**batch).logits, expected)
        merged.save_pretrained(tmp_path)
        assert_same(kind.from_pretrained(tmp_path).eval()(**batch).logits, expected)


def test_two_targets_that_share_one_weight_keep_their_own_deltas():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight = layer.self_attn.q_proj.weight
    untied = copy.deepcopy(model)
    for layer in untied.model.layers:
        layer.self_attn.k_proj.weight = torch.nn.Parameter(layer.self_attn.k_proj.weight.detach().clone())
    trained, expected = (train(get_peft_model(each, config())) for each in (model, untied))
    assert_same(bank_of(trained).weight, bank_of(expected).weight)
    assert_same(logits(trained), logits(expected))
