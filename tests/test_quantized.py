"""Quantised base models through PEFT's quantisation back ends: warm-up, training, files and merging."""

import importlib.util
import warnings

import pytest
import torch
from dense_truth import bank_of, deltas_of, gradients_of, in_place
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks
from smt_peft.quantized import dequantized

NUM_BLOCKS, SIZE = 6, 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def nf4_twice() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,  # as FSDP needs it
    )


def int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


LIBRARY = {nf4: "bitsandbytes", nf4_twice: "bitsandbytes", int8: "bitsandbytes", torchao_int8: "torchao"}
# Half the widest gap between two levels, as a share of the largest |weight|: 0.30 / 2 for NF4, 1 / 127 / 2 for 8 bits.
ROUNDING = {nf4: 0.16, nf4_twice: 0.17, int8: 0.005, torchao_int8: 0.005}
# bitsandbytes' 8-bit matmul rounds the activations to 8 bits too; the others compute with the dequantised weight.
GRADIENT_ERROR = {nf4: 1e-4, nf4_twice: 1e-4, int8: 0.05, torchao_int8: 1e-4}


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """The folder of a tiny random model in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("float_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=LIBRARY, ids=lambda method: method.__name__)
def method(request, float_model):
    """A way to quantise that works on this machine."""
    if importlib.util.find_spec(LIBRARY[request.param]) is None:
        pytest.skip(f"{LIBRARY[request.param]} is not installed")
    try:
        with torch.no_grad():
            quantized(float_model, request.param)(**batch())
    except (ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"{LIBRARY[request.param]} cannot do this here: {error}")
    return request.param


def quantized(folder, method) -> LlamaForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=method(), device_map="cpu", dtype=torch.float32
        )


def config(arrangement: str = "tiles") -> SMTConfig:
    options = {"num_blocks": NUM_BLOCKS, "block_size": SIZE, "warmup_steps": 2, "task_type": "CAUSAL_LM"}
    return SMTConfig(**options, arrangement=arrangement)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def smt_layers(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(PROJECTIONS)}


def dequantized_weights(model) -> dict[str, torch.Tensor]:
    return {name: dequantized(layer).detach().clone() for name, layer in smt_layers(model).items()}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**batch()).logits


@pytest.fixture(params=["tiles", "sorted"])
def selected(request, float_model, method):
    """A quantised model with a selected, untrained adapter."""
    model = get_peft_model(quantized(float_model, method), config(request.param))
    select_blocks(model, [batch()] * 2, progress_bar=False)
    return model


@pytest.fixture
def trained(selected):
    optimizer = torch.optim.AdamW([p for p in selected.parameters() if p.requires_grad], lr=0.01)
    selected.train()
    for _ in range(3):
        selected(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return selected


def dense_model(folder, method) -> LlamaForCausalLM:
    """A float model that has the dequantised weights."""
    dense = LlamaForCausalLM.from_pretrained(folder)
    every_linear = SMTConfig(target_modules="all-linear", block_size=SIZE, num_blocks=1, selection="random")
    for name, layer in get_peft_model(quantized(folder, method), every_linear).base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            dense.get_submodule(name).weight.data = layer.matrix().float()
    return dense


def test_output_and_gradients_are_the_dense_ones_of_the_dequantised_weight_and_the_delta(
    selected, method, float_model
):
    bank, dense = bank_of(selected), dense_model(float_model, method)
    torch.nn.init.normal_(bank.weight, std=0.2)
    without = dense(**batch()).logits
    for name, delta in deltas_of(selected).items():
        dense.get_submodule(name).weight.data += delta
    found, expected = (
        model.train()(**batch()) for model in (selected, dense)
    )  # in eval mode bitsandbytes rounds more
    for one in (found, expected):
        one.loss.backward()
    moved = (expected.logits - without).norm()
    assert (found.logits - expected.logits).norm() <= 2 * GRADIENT_ERROR[method] * moved
    masks, compared = in_place(selected, torch.ones_like(bank.weight)), 0
    for name, found in in_place(selected, bank.weight.grad).items():
        expected = dense.get_submodule(name).weight.grad * masks[name]
        assert (found - expected).norm() <= 2 * GRADIENT_ERROR[method] * expected.norm()
        compared += int(expected.any())
    assert compared


@pytest.mark.parametrize("selected", ["tiles"], indirect=True)
def test_the_warm_up_selects_blocks_with_large_dense_gradients(selected, method, float_model):
    dense, bank = dense_model(float_model, method), bank_of(selected)
    dense(**batch()).loss.backward()
    gradients = gradients_of(dense)
    grids = [gradients[t.name].unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).abs().mean((2, 3)) for t in bank.targets]
    best = torch.cat([grid.flatten() for grid in grids]).topk(NUM_BLOCKS).values
    chosen = torch.stack([grids[target][row, col] for target, row, col in bank.index.tolist()])
    torch.testing.assert_close(chosen.sum(), best.sum(), rtol=GRADIENT_ERROR[method], atol=0)


def test_the_delta_is_trained_in_float32_and_the_base_stays_as_it_was(trained, method, float_model):
    bank = trained.base_model.model.smt_bank["default"]
    assert bank.weight.dtype == torch.float32 and bank.weight.count_nonzero()
    before = dequantized_weights(get_peft_model(quantized(float_model, method), config()))
    after = dequantized_weights(trained)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_loaded_adapter_gives_the_trained_logits(trained, method, float_model, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(float_model, method), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=0)


@pytest.mark.parametrize("evaluated", [False, True], ids=["after training", "after an evaluation"])
def test_merging_requantises_the_weight_plus_the_delta(trained, method, evaluated):
    before = dequantized_weights(trained)
    deltas = {name: layer.get_delta_weight("default") for name, layer in smt_layers(trained).items()}
    if evaluated:  # bitsandbytes packs 4-bit weights for inference on some CPUs
        logits(trained)
    trained.merge_adapter()
    for name, merged in dequantized_weights(trained).items():
        wanted = before[name] + deltas[name]
        assert (merged - wanted).abs().max() <= ROUNDING[method] * wanted.abs().max(), name


def test_unmerging_gives_back_the_logits_bit_for_bit(trained):
    before = logits(trained)
    trained.merge_adapter()
    logits(trained)
    trained.unmerge_adapter()
    assert torch.equal(logits(trained), before)


def test_an_unmerged_model_can_be_moved(trained):
    before = logits(trained)
    trained.merge_adapter()
    trained.unmerge_adapter()
    assert torch.equal(logits(trained.to("cpu")), before)


def test_merge_and_unload_leaves_a_plain_quantised_model(trained, method, float_model):
    merged = trained.merge_and_unload()
    reference = quantized(float_model, method)
    types = {name: type(parameter) for name, parameter in merged.named_parameters()}
    assert types == {name: type(parameter) for name, parameter in reference.named_parameters()}


def test_unloading_gives_the_base_models_logits(trained, method, float_model):
    assert torch.equal(logits(trained.unload()), logits(quantized(float_model, method)))


def test_a_disabled_adapter_gives_the_base_models_logits(trained, method, float_model):
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(quantized(float_model, method)))


def test_the_recipe_for_quantised_models_trains_with_checkpointing_in_a_trainer(method, float_model, tmp_path):
    model = prepare_model_for_kbit_training(quantized(float_model, method))
    model = get_peft_model(model, config())
    data = [{key: value[0] for key, value in batch().items()} for _ in range(8)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SMTWarmupCallback()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_model_that_torchao_itself_has_quantised_is_trained_as_with_lora(float_model):
    quantization = pytest.importorskip("torchao.quantization", reason="this needs torchao")
    base, x = LlamaForCausalLM.from_pretrained(float_model).bfloat16(), torch.arange(2, 9)[None]
    quantization.quantize_(base.model, quantization.Int8WeightOnlyConfig())
    expected = base(x).logits
    model = get_peft_model(base, SMTConfig(num_blocks=4, block_size=SIZE, selection="random"))
    model(x, labels=x).loss.backward()
    assert model.base_model.model.smt_bank["default"].weight.grad.any()
    with pytest.raises(TypeError, match="A torchao weight cannot be merged into"):  # nothing says how to make one anew
        model.merge_adapter()
    assert torch.equal(model.unload()(x).logits, expected)


def test_a_share_of_a_quantised_model_is_that_of_the_float_model(method, float_model):
    options = {"block_size": SIZE, "trainable_ratio": 0.05, "selection": "random"}
    models = quantized(float_model, method), LlamaForCausalLM.from_pretrained(float_model)
    found = [get_peft_model(one, SMTConfig(**options)).peft_config["default"].num_blocks for one in models]
    assert found[0] == found[1] > 1
