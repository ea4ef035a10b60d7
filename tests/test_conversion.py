"""To LoRA, and from two checkpoints: against dense singular values and dense differences."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from dense_truth import base_weights, deltas_of, make_config, outputs, wrap
from peft import PeftConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from smt_peft import SMTConfig
from smt_peft.conversion import adapter_of_difference, convert_to_lora_files, lora_errors
from smt_peft.files import Blocks, StoredAdapter, write_adapter

PAGE = Path(__file__).parents[1] / "docs/convert.md"


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1))


@pytest.fixture(params=["tiles", "sorted", "conv1d"])
def adapted(request, llama, gpt2) -> tuple[PeftModel, nn.Module]:
    """A model with an adapter, and its base."""
    base = gpt2 if request.param == "conv1d" else llama
    targets = {"target_modules": ["c_attn", "c_proj"], "block_size": 8} if request.param == "conv1d" else {}
    method = "sorted" if request.param == "sorted" else "smt"
    return wrap(base, method, budget=8, **targets), base


def stored_as(layer: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    return matrix.T if type(layer).__name__ == "Conv1D" else matrix


def dense_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """[out, in] of every target that has blocks."""
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "smt_blocks")}
    deltas = {n: stored_as(layer.get_base_layer(), layer.get_delta_weight("default")) for n, layer in layers.items()}
    return {name: delta.double() for name, delta in deltas.items() if delta.any()}


def least_errors(deltas: dict[str, torch.Tensor], rank: int) -> tuple[dict[str, float], float]:
    """What a rank loses at least, by the singular values: of each target, and in all."""
    lost = {name: torch.linalg.svdvals(delta)[rank:].square().sum() for name, delta in deltas.items()}
    norms = {name: delta.square().sum() for name, delta in deltas.items()}
    each = {name: (lost[name] / norms[name]).sqrt().item() for name in deltas}
    return each, (sum(lost.values()) / sum(norms.values())).sqrt().item()


def close(found: dict[str, float] | float, expected: dict[str, float] | float) -> bool:
    return found == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- to LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 32])
def test_peft_converts_a_model_and_the_loss_is_known(adapted, batches, tmp_path, rank):
    model, base = adapted
    save_as_lora(tmp_path, model, rank=rank)
    loss = lora_errors(model, load_file(tmp_path / "adapter_model.safetensors"))
    each, total = least_errors(dense_deltas(model), rank)
    assert close({name: loss.errors[name] for name in each}, each)
    assert not any(error for name, error in loss.errors.items() if name not in each)
    assert close(loss.error, total)
    lora = PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert lora.peft_config["default"].peft_type == "LORA"
    if rank == 32:  # as many as the blocks of any target have rows or columns
        assert total < 1e-6
        torch.testing.assert_close(outputs(lora, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-4)


def test_folders_convert_as_peft_converts_a_model(adapted, tmp_path):
    model, _ = adapted
    model.save_pretrained(tmp_path)
    for choice, rank in (({"rank": 3}, 3), ({"energy": 0.9}, 0.9)):
        _, state = convert_to_lora(model, rank=rank)
        expected, loss = lora_errors(model, state), convert_to_lora_files(tmp_path, tmp_path / "lora", **choice)
        assert loss.rank == {name: expected.rank[name] for name in dense_deltas(model)}
        assert close(loss.errors, {name: expected.errors[name] for name in loss.rank})
        assert close(loss.error, expected.error)
        assert all(name in loss.summary() for name in loss.rank) and f"{loss.error:.4f}" in loss.summary()


@pytest.mark.parametrize("choice", [{"rank": 64}, {"energy": 1.0}], ids=str)
def test_a_rank_that_holds_everything_loses_nothing(adapted, batches, tmp_path, choice):
    """And is no higher than it has to be: targets whose blocks have few rows get few."""
    model, base = adapted
    model.save_pretrained(tmp_path)
    loss = convert_to_lora_files(tmp_path, tmp_path / "lora", **choice)
    assert loss.error < 1e-6
    assert loss.rank == {name: int(torch.linalg.matrix_rank(delta)) for name, delta in dense_deltas(model).items()}
    lora = PeftModel.from_pretrained(deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-4)
    found = {name.removeprefix("base_model.model."): m for name, m in lora.named_modules() if hasattr(m, "lora_A")}
    for name, delta in dense_deltas(model).items():
        of_lora = stored_as(found[name].get_base_layer(), found[name].get_delta_weight("default"))
        torch.testing.assert_close(of_lora.double(), delta, rtol=1e-4, atol=1e-6)
        assert found[name].scaling["default"] == 1


def test_a_target_whose_name_ends_with_anothers_keeps_its_own_rank(tmp_path):
    base = nn.ModuleDict({"q": nn.Linear(64, 64), "z": nn.ModuleDict({"q": nn.Linear(64, 64)})})
    chosen = {"q": [[0, 0]], "z.q": [[0, 0], [1, 1], [2, 2]]}
    config = SMTConfig(target_modules=["q"], block_size=16, selected_blocks=chosen, init_weights=False)
    get_peft_model(deepcopy(base), config).save_pretrained(tmp_path)
    loss = convert_to_lora_files(tmp_path, tmp_path / "lora", rank=64)
    assert loss.rank == {"q": 16, "z.q": 48} and loss.error < 1e-6
    lora = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert lora.base_model.model["q"].r["default"] == 16 and lora.base_model.model["z"]["q"].r["default"] == 48


def test_the_lora_adapter_knows_nothing_of_smt(llama, tmp_path):
    wrap(llama).save_pretrained(tmp_path)
    convert_to_lora_files(tmp_path, tmp_path / "lora", rank=2)
    assert all(b"smt" not in file.read_bytes().lower() for file in (tmp_path / "lora").iterdir())


def test_a_head_comes_along(llama, batches, tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(llama.config)
    model = get_peft_model(deepcopy(base), make_config(task_type="SEQ_CLS", budget=6)).eval()
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    convert_to_lora_files(tmp_path, tmp_path / "lora", energy=1.0)
    lora, ids = PeftModel.from_pretrained(base, tmp_path / "lora").eval(), batches[0]["input_ids"]
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "choice, words",
    [
        ({}, "give one of them"),
        ({"rank": 4, "energy": 0.5}, "give one of them"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 0}, "energy=0"),
        ({"energy": 90}, "energy=90.*share"),
    ],
)
def test_impossible_ranks_are_refused(llama, tmp_path, choice, words):
    wrap(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        convert_to_lora_files(tmp_path, tmp_path / "lora", **choice)
    assert not (tmp_path / "lora").exists()


def test_what_peft_cannot_convert_is_refused(llama, tmp_path):
    wrap(llama, bias="smt_only").save_pretrained(tmp_path / "bias")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    options = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "block_size": 8}
    experts = get_peft_model(MixtralForCausalLM(config), make_config(**options))
    experts.save_pretrained(tmp_path / "experts")
    for name, option in (("bias", "bias='smt_only'"), ("experts", "target_parameters=")):
        with pytest.raises(ValueError, match=f"{option}.*cannot be converted"):
            convert_to_lora_files(tmp_path / name, tmp_path / "lora", rank=2)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(experts, rank=2)
    with pytest.raises(ValueError, match="no adapter 'other'; the model has default"):
        convert_to_lora(wrap(llama), rank=2, adapter_name="other")


def test_rows_of_tokens_come_along(llama, batches, tmp_path):
    model = wrap(llama, budget=5, trainable_token_indices=[5, 9])
    torch.nn.init.normal_(model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"])
    model.save_pretrained(tmp_path / "smt")
    convert_to_lora_files(tmp_path / "smt", tmp_path / "lora", energy=1.0)
    lora = PeftModel.from_pretrained(deepcopy(llama), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-5)


def test_a_delta_of_zeros_has_no_error(tmp_path):
    rows = torch.arange(8)[None]
    blocks = {"q": Blocks(rows, rows, torch.zeros(1, 8, 8))}
    config = SMTConfig(block_size=8, num_blocks=1, target_modules=["q"])
    write_adapter(tmp_path, StoredAdapter(config, {"q": (16, 16)}, blocks, {}, {}))
    loss = convert_to_lora_files(tmp_path, tmp_path / "lora", energy=0.5)
    assert (loss.error, loss.errors, loss.rank) == (0, {"q": 0}, {"q": 1})


def test_a_converted_adapter_knows_what_the_first_knew_of_its_base(llama, tmp_path):
    model = wrap(llama)
    model.peft_config["default"].revision = "v1"
    model.save_pretrained(tmp_path / "adapter")
    convert_to_lora_files(tmp_path / "adapter", tmp_path / "lora", rank=4)
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.revision == "v1" and config.auto_mapping["base_model_class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("place", ["peft.LoraConfig.save_pretrained", "smt_peft.conversion.save_file"])
def test_a_conversion_that_fails_leaves_what_was_there(llama, tmp_path, monkeypatch, place):
    for seed, rank, folder in ((0, 4, "out"), (1, 2, "other")):
        wrap(llama, seed=seed).save_pretrained(tmp_path / f"adapter-{seed}")
        convert_to_lora_files(tmp_path / f"adapter-{seed}", tmp_path / folder, rank=rank)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(OSError, match="No space left"):
        convert_to_lora_files(tmp_path / "adapter-1", tmp_path / "out", rank=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# --- from two checkpoints ----------------------------------------------------------------------------------------


def tuned_from(base: nn.Module) -> nn.Module:
    """Every weight changed, some rows and columns more than others."""
    tuned = deepcopy(base)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in tuned.parameters():
            change = 0.01 * torch.randn(weight.shape)
            for side, length in enumerate(weight.shape):
                change *= 0.1 + torch.rand(length).view([-1 if i == side else 1 for i in range(weight.ndim)])
            weight += change
    return tuned


@pytest.fixture
def folders(llama, tmp_path) -> tuple[nn.Module, nn.Module, Path]:
    """A base and a fully fine-tuned model, and the folder that holds both, in shards."""
    tuned = tuned_from(llama)
    llama.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="90KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    return llama, tuned, tmp_path


def converted(base: nn.Module, folder: Path, **options):
    """What was said of the difference, and the base with the adapter."""
    about = adapter_of_difference(folder / "base", folder / "tuned", folder / "difference", **options)
    return about, PeftModel.from_pretrained(deepcopy(base), folder / "difference")


def differences(base: nn.Module, tuned: nn.Module, names) -> dict[str, torch.Tensor]:
    """[out, in], of these modules."""
    modules = ((name, base.get_submodule(name), tuned.get_submodule(name)) for name in names)
    return {name: stored_as(of, (its.weight - of.weight).detach()) for name, of, its in modules}


def squared_sum(tensors) -> float:
    return sum(tensor.detach().double().square().sum().item() for tensor in tensors)


def test_blocks_that_differ_most_are_taken(folders):
    base, tuned, folder = folders
    about, model = converted(base, folder, num_blocks=10, block_size=16)
    dense, found = differences(base, tuned, base_weights(model)), deltas_of(model)
    scores = {
        (name, row, col): block.square().sum().item()
        for name, matrix in dense.items()
        for row, line in enumerate(matrix.split(16))
        for col, block in enumerate(line.split(16, 1))
    }
    best = sorted(scores, key=scores.get, reverse=True)[:10]
    for name, row, col in best:
        at = slice(16 * row, 16 * row + 16), slice(16 * col, 16 * col + 16)
        assert torch.equal(found[name][at], dense[name][at])
    assert sum(int((delta != 0).sum()) for delta in found.values()) == 10 * 256
    held = sum(scores[block] for block in best)
    both = zip(tuned.parameters(), base.parameters(), strict=True)
    assert close(about.of_targets, held / sum(scores.values()))
    assert close(about.of_all, held / squared_sum(its - of for its, of in both))
    assert (about.num_blocks, about.block_size, about.not_compared) == (10, 16, [])
    assert f"{about.of_targets:.1%}" in about.summary()


def test_sorted_blocks_hold_what_they_say_and_more_than_tiles(folders):
    base, tuned, folder = folders
    tiles, _ = converted(base, folder, num_blocks=10, block_size=16)
    about, model = converted(base, folder, num_blocks=10, block_size=16, arrangement="sorted")
    dense, found = differences(base, tuned, base_weights(model)), deltas_of(model)
    for name, delta in found.items():
        assert torch.equal(delta, dense[name] * (delta != 0))
    assert close(about.of_targets, squared_sum(found.values()) / squared_sum(dense.values()))
    assert about.of_targets > tiles.of_targets


@pytest.mark.filterwarnings("error:Adapter 'default' was made for another base model")
def test_all_blocks_of_all_targets_give_the_tuned_model_back(folders):
    base, tuned, folder = folders
    about, model = converted(base, folder, num_blocks=256, block_size=8, target_modules=["q_proj", "k_proj", "v_proj"])
    assert about.of_targets == pytest.approx(1)
    for name, weight in base_weights(model.merge_and_unload()).items():
        torch.testing.assert_close(weight, tuned.get_submodule(name).weight, rtol=1e-6, atol=1e-8)
    with pytest.warns(UserWarning, match="was made for another base model"):
        PeftModel.from_pretrained(tuned, folder / "difference")


def test_conv1d_in_bfloat16(gpt2, tmp_path):
    base = gpt2.bfloat16()
    tuned = tuned_from(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    options = {"target_modules": ["c_attn", "c_fc"], "block_size": 8, "num_blocks": 224}
    about, model = converted(base, tmp_path, **options)
    assert about.of_targets == pytest.approx(1)
    merged = model.merge_and_unload()
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"):
        torch.testing.assert_close(merged.get_submodule(name).weight, tuned.get_submodule(name).weight)


def test_a_base_whose_names_lack_a_prefix(gpt2, tmp_path):
    """As GPT-2 lies on the hub, and not what is fine-tuned of it."""
    base, tuned = gpt2, tuned_from(gpt2)
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    named = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    save_file(named, file, {"format": "pt"})
    tuned.save_pretrained(tmp_path / "tuned")
    options = {"target_modules": ["c_attn", "c_fc"], "block_size": 8, "num_blocks": 224}
    about, model = converted(base, tmp_path, **options)
    assert about.of_targets == pytest.approx(1) and not about.not_compared
    merged = model.merge_and_unload().transformer.h[0].attn.c_attn.weight
    torch.testing.assert_close(merged, tuned.transformer.h[0].attn.c_attn.weight)


def test_the_budget_may_be_a_share_and_the_block_size_automatic(folders):
    base, _, folder = folders
    about, model = converted(base, folder, trainable_ratio=0.1, target_modules="all-linear")
    total = sum(parameter.numel() for parameter in base.parameters())
    assert about.block_size == 32 and about.num_blocks == round(0.1 * total / 32**2)
    assert model.peft_config["default"].base_model_name_or_path == str(folder / "base")


def test_what_is_not_comparable_is_named(folders, make_llama):
    base, tuned, folder = folders
    larger = make_llama(vocab_size=80)
    state = {
        **larger.state_dict(),
        **{n: p for n, p in tuned.state_dict().items() if "embed" not in n and "head" not in n},
    }
    larger.load_state_dict(state)
    larger.save_pretrained(folder / "tuned")
    (folder / "tuned/model.safetensors.index.json").unlink(missing_ok=True)
    about, _ = converted(base, folder, num_blocks=10, block_size=16)
    assert about.not_compared == ["lm_head.weight", "model.embed_tokens.weight"]
    assert "Not compared: 2 tensors (lm_head.weight" in about.summary()
    with pytest.raises(ValueError, match=r"lm_head.weight is not in both checkpoints"):
        converted(base, folder, num_blocks=10, block_size=16, target_modules=["lm_head"])


def test_an_output_projection_can_be_a_target(folders):
    """Which PEFT would save beside the blocks, and which has no values here."""
    base, tuned, folder = folders
    _, model = converted(base, folder, num_blocks=9, block_size=16, target_modules=["lm_head", "q_proj"])
    for name, delta in deltas_of(model).items():
        wanted = differences(base, tuned, [name])[name]
        torch.testing.assert_close(delta, torch.where(delta != 0, wanted, 0), rtol=1e-4, atol=1e-6)
    assert deltas_of(model)["lm_head"].any()


def test_models_that_do_not_differ_are_refused(folders):
    _, _, folder = folders
    with pytest.raises(ValueError, match=r"6 target modules .* do not differ"):
        adapter_of_difference(folder / "base", folder / "base", folder / "difference", num_blocks=3, block_size=16)
    assert not (folder / "difference").exists()


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_neither_model_is_written_into(folders, name):
    _, _, folder = folders
    before = sorted(path.name for path in (folder / name).iterdir())
    with pytest.raises(ValueError, match="is one of the inputs; write into another folder"):
        adapter_of_difference(folder / "base", folder / "tuned", folder / name, num_blocks=3, block_size=16)
    assert sorted(path.name for path in (folder / name).iterdir()) == before


def test_an_adapter_goes_through_its_merged_model_and_back(llama, tmp_path, batches):
    """An SMT adapter is what its merged model differs by, where its blocks are known to be enough."""
    llama.save_pretrained(tmp_path / "base")
    model = wrap(llama, budget=9)
    expected, deltas = outputs(model, batches[0]), deltas_of(model)
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    about, again = converted(llama, tmp_path, num_blocks=9, block_size=16)
    assert about.of_all == pytest.approx(1)
    for name, delta in deltas_of(again).items():
        torch.testing.assert_close(delta, deltas[name], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(outputs(again, batches[0]), expected, rtol=1e-4, atol=1e-5)


def test_the_page_runs_and_shows_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = PAGE.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    exec("\n".join(block for language, block in fenced if language == "python"), {})
    printed = re.sub(r"\d\.\d+", "0.0", capsys.readouterr().out)
    for line in [line for language, block in fenced if not language for line in block.splitlines()]:
        assert line == "..." or re.sub(r"\d\.\d+", "0.0", line) in printed
