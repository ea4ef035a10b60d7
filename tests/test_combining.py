"""Weighted sums of adapters, in a model and in folders, against dense sums and PEFT's functions on dense deltas."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from dense_truth import (
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_state,
    bank_of,
    deltas_of,
    make_config,
    outputs,
    state_of,
    train,
    wrap,
)
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from transformers import (
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from smt_peft import SMTConfig, combining
from smt_peft.combining import Method, combine, combine_adapters
from smt_peft.files import Blocks, StoredAdapter

PAGE = Path(__file__).parents[1] / "docs/combine.md"
SECOND = {  # what the second adapter is beside a first with 20 tiles of 16 in q, k and v
    "same tiles": {"seed": 0},
    "other tiles": {"seed": 1},
    "smaller tiles": {"block_size": 8, "budget": 60, "seed": 2},
    "larger tiles": {"block_size": 32, "budget": 7, "seed": 3},
    "other targets": {"seed": 4, "target_modules": ["down_proj", "v_proj"]},
    "sorted": {"seed": 5, "arrangement": "sorted"},
    "smaller and sorted": {
        "seed": 6,
        "arrangement": "sorted",
        "block_size": 8,
        "target_modules": ["q_proj", "up_proj"],
    },
}


@pytest.fixture
def base(llama):
    return llama.double()


def two(base, first: dict | None = None, **second) -> PeftModel:
    """A model with the adapters "default" and "second", whose deltas are random and of the same size."""
    model = wrap(base, **(first or {}))
    add_adapter(model, "second", **second)
    for name in ("default", "second"):
        torch.nn.init.normal_(bank_of(model, name).weight)
    return model


def summed(model: PeftModel, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The dense sum, by target."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in weights.items():
        for name, delta in deltas_of(model, adapter).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def assert_deltas(model: PeftModel, adapter: str, expected: dict[str, torch.Tensor]) -> None:
    found = deltas_of(model, adapter)
    for name, delta in expected.items():
        assert_close(found.pop(name), delta)
    assert not any(delta.any() for delta in found.values())


# --- the exact sum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["smt", "sorted"])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_a_sum_is_the_dense_sum_and_nothing_else_changes(base, second, method):
    model = two(base, {"arrangement": {"smt": "tiles"}.get(method, method)}, **second)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    assert_deltas(model, "sum", summed(model, {"default": 0.5, "second": -2.0}))
    assert_base_untouched(model, base)
    after = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    for name, (value, requires_grad) in before.items():
        parameter = after[name.replace(".base_layer.", ".")]
        assert torch.equal(parameter, value) and parameter.requires_grad == requires_grad, name
    assert model.active_adapters == ["default"]
    assert not bank_of(model, "sum").weight.requires_grad


def test_tiles_are_the_union_on_the_finer_grid(base):
    model = two(base, block_size=32, budget=7, seed=3)
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    config, bank = model.peft_config["sum"], bank_of(model, "sum")
    masks = [{n: d != 0 for n, d in deltas_of(model, adapter).items()} for adapter in ("default", "second")]
    union = sum(int((masks[0][name] | masks[1][name]).sum()) for name in masks[0])
    assert bank.weight.numel() == union
    assert (config.block_size, config.num_blocks, config.arrangement) == (16, union // 256, "tiles")


def test_sorted_adapters_on_the_same_lines_keep_their_blocks(base):
    """As two trainings have from one selection; here with blocks and order of their own."""
    model = wrap(base, "sorted", budget=30)
    blocks = bank_of(model).selected_blocks()
    for name, part in (("early", slice(None, 4)), ("late", slice(-4, None))):
        chosen = {target: of[part][::-1] for target, of in blocks.items()}
        model.add_adapter(name, make_config("sorted", budget=None, num_blocks=None, selected_blocks=chosen))
    model.double().add_weighted_adapter(["early", "late"], [1, 1], "sum")
    assert_deltas(model, "sum", summed(model, {"early": 1, "late": 1}))
    assert bank_of(model, "sum").block_size == 16
    assert bank_of(model, "sum").num_blocks == sum(len({*map(str, [*of[:4], *of[-4:]])}) for of in blocks.values())


def test_many_adapters_of_every_kind(base):
    model = two(base, {"selection": "diagonal"}, **SECOND["sorted"])  # which sorted blocks cannot be
    for i, name in enumerate(["smaller tiles", "other targets", "smaller and sorted"]):
        model.add_adapter(f"adapter {i}", make_config("smt", **SECOND[name]))
    weights = {name: 1.5**i for i, name in enumerate(model.peft_config)}
    model.double().add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert_deltas(model, "sum", summed(model, weights))


def test_layers_of_all_adapters_are_targets(base):
    first = {"layers_to_transform": [0], "exclude_modules": ["k_proj"], "budget": 9}
    model = two(base, first, layers_to_transform=[1], budget=9)
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    assert len(bank_of(model, "sum").targets) == 5
    assert_deltas(model, "sum", summed(model, {"default": 1, "second": 1}))


def test_one_adapter_alone_is_scaled(base):
    model = two(base)
    model.add_weighted_adapter(["second"], [3.0], "thrice")
    assert torch.equal(bank_of(model, "thrice").weight, 3 * bank_of(model, "second").weight)
    assert torch.equal(bank_of(model, "thrice").index, bank_of(model, "second").index)


def test_experts_and_modules(batches):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    options = {"block_size": 8, "selection": "random", "init_weights": False}
    of_experts = SMTConfig(num_blocks=9, target_modules=[], target_parameters=["mlp.experts.down_proj"], **options)
    base = MixtralForCausalLM(config).double()
    base.set_experts_implementation("eager")  # the others are not for float64
    model = get_peft_model(base, of_experts)
    model.add_adapter("second", SMTConfig(num_blocks=9, target_modules=["q_proj"], **options))
    model.double().add_weighted_adapter(["default", "second"], [1, 2], "sum")
    model.base_model.set_adapter(["default", "second"])
    bank_of(model, "second").weight.data *= 2
    expected = outputs(model, batches[0])
    model.set_adapter("sum")
    assert_close(outputs(model, batches[0]), expected)


# --- a full member -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["smaller tiles", "other targets", "sorted"])
def test_a_sum_is_an_adapter_like_any_other(base, batches, tmp_path, second):
    model = two(base, **SECOND[second])
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    model.set_adapter("sum")
    assert bank_of(model, "sum").weight.requires_grad
    assert_right(model, base, batches[0], "sum")
    train(model, batches)
    assert_right(model, base, batches[0], "sum")
    expected = outputs(model, batches[0])
    model.save_pretrained(tmp_path)
    again = bank_of(PeftModel.from_pretrained(deepcopy(base), tmp_path / "sum", adapter_name="sum"), "sum")
    assert torch.equal(again.weight, bank_of(model, "sum").weight.float())
    assert torch.equal(again.index, bank_of(model, "sum").index)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batches[0]), outputs(base, batches[0]))
    assert_close(outputs(model.merge_and_unload(), batches[0]), expected)


@pytest.mark.parametrize("second", SECOND)
def test_a_reference_of_a_sum_is_the_sum(base, second):
    """TRL makes an adapter of the same config and fills it through the parameters' names."""
    model = two(base, **SECOND[second])
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    model.add_adapter("ref", model.peft_config["sum"])
    bank_of(model, "ref").weight.data.copy_(bank_of(model, "sum").weight)
    assert_deltas(model, "ref", deltas_of(model, "sum"))


def test_an_active_adapter_trains_on_beside_a_loaded_one(base, tmp_path):
    """A loaded adapter's config says that it is for inference, which is the sum's, but not the active one's."""
    two(base).save_pretrained(tmp_path)
    model = wrap(base)
    model.load_adapter(tmp_path / "second", "loaded")
    model.add_weighted_adapter(["loaded", "default"], [1, 1], "sum")
    assert bank_of(model).weight.requires_grad


# --- pruning and signs -------------------------------------------------------------------------------------------


def pruned(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest of the values that an adapter has: they are not zero."""
    keep = delta.abs().flatten().topk(int(density * int((delta != 0).sum()))).indices
    return torch.zeros_like(delta).flatten().index_copy(0, keep, delta.flatten()[keep]).view_as(delta)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("second", ["same tiles", "smaller tiles", "sorted"])
@pytest.mark.filterwarnings("ignore:The density 1")
def test_pruning_is_pefts_on_dense_deltas(base, kind, sign, second):
    model = two(base, **SECOND[second])
    add_adapter(model, "third", seed=8)
    names, weights, density = ["default", "second", "third"], [1.0, 2.0, -0.5], 0.3
    model.add_weighted_adapter(names, weights, "mix", kind, density=density, majority_sign_method=sign)
    options = (sign,) if kind == "ties" else ()
    dense = [deltas_of(model, name) for name in names]
    for target, found in deltas_of(model, "mix").items():
        parts = [pruned(of[target], density) for of in dense]
        assert_close(found, getattr(merge_utils, kind)(parts, torch.tensor(weights).double(), 1.0, *options))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_drops_as_pefts(base, kind):
    """The same tiles: then the blocks are the tensors that PEFT's functions would be given, in the same order."""
    model = two(base, **SECOND["same tiles"])
    torch.manual_seed(3)
    model.add_weighted_adapter(["default", "second"], [1, 0.5], "mix", kind, density=0.4)
    banks = [bank_of(model, name) for name in ("default", "second", "mix")]
    torch.manual_seed(3)
    for first, second, found in zip(*(bank.split() for bank in banks), strict=True):
        assert_close(found, getattr(merge_utils, kind)([first, second], torch.tensor([1, 0.5]), 0.4))
        assert 0 < int((found == 0).sum()) < found.numel()


@pytest.mark.filterwarnings("error:The density 1")
def test_density_one_keeps_everything(base):
    model = two(base, **SECOND["sorted"])
    model.add_weighted_adapter(["default", "second"], [1, 1], "mix", "dare_linear", density=1)
    assert_deltas(model, "mix", summed(model, {"default": 1, "second": 1}))


def test_a_sum_that_is_interrupted_leaves_no_trace(base, monkeypatch):
    model = two(base, **SECOND["other tiles"])
    before = state_of(model)
    monkeypatch.setattr(combining, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.add_weighted_adapter(["default", "second"], [1, 1], "mix")
    assert_same_state(state_of(model), before)
    assert "mix" not in model.peft_config


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"adapters": ["default", "other"]}, "Adapter other does not exist"),
        ({"weights": [1]}, "2 adapters and 1 weights"),
        ({"adapters": [], "weights": []}, "no adapter"),
        ({"combination_type": "svd"}, "low-rank factors.*Use 'linear'"),
        ({"combination_type": "cat"}, "low-rank factors.*Use 'linear'"),
        ({"combination_type": "dare_ties_svd"}, "low-rank factors.*Use 'dare_ties'"),
        ({"combination_type": "mean"}, "Invalid combination_type: mean"),
        ({"combination_type": "ties"}, "density=None"),
        ({"combination_type": "dare_linear", "density": 0}, "density=0"),
        ({"combination_type": "ties", "density": 1.5}, "density=1.5"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "mean"}, "majority_sign_method='mean'"),
        ({"adapters": ["default", "fresh"]}, "fresh has no blocks yet"),
        ({"adapter_name": "a.b"}, "cannot be called 'a.b'"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_leaves_no_trace(base, change, words):
    model = two(base)
    model.add_adapter("fresh", SMTConfig(num_blocks=3, block_size=16))
    before = list(model.peft_config), [name for name, _ in model.named_modules()]
    options = {"adapters": ["default", "second"], "weights": [1, 1], "adapter_name": "sum"}
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(**{**options, **change})
    assert before == (list(model.peft_config), [name for name, _ in model.named_modules()])


def test_a_name_that_is_taken_stays_as_it_is(base):
    model = two(base)
    before = bank_of(model, "second").weight.clone()
    with pytest.warns(UserWarning, match="nothing was done"):
        model.add_weighted_adapter(["default"], [1], "second")
    assert torch.equal(bank_of(model, "second").weight, before)


def test_whole_modules_are_refused(llama, tmp_path):
    model = get_peft_model(LlamaForSequenceClassification(llama.config), make_config(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="default: beside blocks"):
        model.add_weighted_adapter(["default"], [1], "sum")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="beside blocks"):
        combine_adapters([tmp_path], [1], "linear", tmp_path / "sum")


LINEAR = Method("linear", None, "total")


def test_rows_of_tokens_are_refused(llama):
    model = get_peft_model(llama, make_config(trainable_token_indices=[5, 9]))
    with pytest.raises(ValueError, match="biases, rows or whole modules of its own"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("biased", ["first", "second"])
def test_biases_are_refused_whichever_adapter_has_them(make_llama, biased):
    model = get_peft_model(make_llama(attention_bias=True), make_config(bias="all" if biased == "first" else "none"))
    model.add_adapter("second", make_config(bias="all" if biased == "second" else "none", seed=1))
    with pytest.raises(ValueError, match="biases, rows or whole modules of its own"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def stored(rows: torch.Tensor, cols: torch.Tensor, length: int = 512) -> StoredAdapter:
    """Blocks of ones at these rows and columns [n, b] of one square target."""
    ones = torch.ones(*rows.shape, rows.shape[1])
    return StoredAdapter(SMTConfig(), {"q": (length, length)}, {"q": Blocks(rows, cols, ones)}, {}, {})


def test_lines_that_cross_too_much_are_refused():
    """A diagonal of tiles and four blocks, which have a feature of every tile: the sum would be the whole matrix."""
    lines = torch.arange(512).view(32, 16)
    across = lines[:, 0].view(2, 16)
    tiles, blocks = stored(lines, lines), stored(across[[0, 0, 1, 1]], across[[0, 1, 0, 1]])
    with pytest.raises(ValueError, match=r"1,024 blocks of 16 x 16, 28 times"):
        combine([tiles, blocks], [1, 1], LINEAR)


def test_lines_without_common_features_keep_their_size():
    first, second = torch.arange(512).view(2, 16, 16).transpose(1, 2).contiguous()
    [blocks] = combine([stored(first, first), stored(second, second)], [1, 2], LINEAR).values()
    assert blocks.deltas.shape == (32, 16, 16)
    assert blocks.deltas.unique().tolist() == [1, 2]


@pytest.mark.parametrize("count, size", [(1, 16), (4, 32)])
def test_lines_that_cross_are_cut_where_that_pays(count, size):
    """Blocks below one another, and one that begins in the middle of the last: half of its rows are new."""
    rows, end = torch.arange(32 * count).view(count, 32).flip(1), 32 * count
    cols = torch.arange(0, 512, 16)[None]
    last = stored(torch.arange(end - 16, end + 16)[None], cols)
    [found] = combine([stored(rows, cols.expand(count, 32)), last], [1, 2], LINEAR).values()
    assert found.deltas.shape[1] == size
    dense, expected = torch.zeros(2, 512, 512)
    dense[found.rows[:, :, None], found.cols[:, None]] = found.deltas
    expected[:end, cols[0]] += 1
    expected[end - 16 : end + 16, cols[0]] += 2
    assert torch.equal(dense, expected)


def test_tiles_of_which_neither_divides_the_other():
    tiles = {size: torch.arange(96).view(-1, size) for size in (32, 48)}
    adapters = [stored(tiles[32], tiles[32], 96), stored(tiles[48][:1], tiles[48][1:], 96)]
    [found] = combine(adapters, [1, 2], LINEAR).values()
    assert found.deltas.shape == (3 * 4 + 9 - 1, 16, 16)  # one of 16 is in both
    assert found.deltas.sum() == 3 * 32**2 + 2 * 48**2


# --- folders -----------------------------------------------------------------------------------------------------

IN_FOLDERS = {**SECOND, "later targets": {"target_modules": ["q_proj"]}}


@pytest.mark.parametrize("second", IN_FOLDERS)
@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_folders_combine_as_adapters_in_a_model(base, batches, tmp_path, second, kind):
    """With other targets a folder cannot know the order in which the model has them: k, then q, v, then q and k."""
    first = {"target_modules": ["k_proj"], "budget": 10} if second == "later targets" else {}
    model = two(base.float(), first, **IN_FOLDERS[second])
    model.save_pretrained(tmp_path)
    options = {} if kind == "linear" else {"density": 0.5}
    model.add_weighted_adapter(["default", "second"], [1.5, 0.5], "sum", kind, **options)
    model.set_adapter("sum")
    written = combine_adapters([tmp_path, tmp_path / "second"], [1.5, 0.5], kind, tmp_path / "sum", **options)
    again = PeftModel.from_pretrained(deepcopy(base), tmp_path / "sum")
    assert torch.equal(outputs(again, batches[0]), outputs(model, batches[0]))
    assert torch.equal(bank_of(again).index, bank_of(model, "sum").index)
    assert sum(len(blocks.deltas) for blocks in written.blocks.values()) == bank_of(again).num_blocks
    names = [config.target_modules for config in (written.config, model.peft_config["sum"])]
    assert set(names[0]) == set(names[1])


def test_a_sum_that_cannot_be_written_leaves_what_was_there(base, tmp_path, monkeypatch):
    two(base).save_pretrained(tmp_path)
    one, other, out = tmp_path, tmp_path / "second", tmp_path / "out"
    out.mkdir()
    (out / "selection.safetensors").touch()  # of an adapter that was there before
    combine_adapters([one, other], [1.0, 1.0], "linear", out)
    assert not (out / "selection.safetensors").exists()
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(SMTConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        combine_adapters([other], [1.0], "linear", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folders_of_different_models_are_refused_or_warned_of(base, make_llama, tmp_path):
    """Of other shapes, or of other values: here after some training of the whole base."""
    other = deepcopy(base.float())
    for parameter in other.parameters():
        parameter.data += 0.01
    for name, model in (("a", base), ("b", other), ("c", make_llama(hidden_size=128))):
        wrap(model).save_pretrained(tmp_path / name)
    with pytest.warns(UserWarning, match=r"b were made for different base models"):
        combine_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], "linear", tmp_path / "sum")
    with (
        pytest.warns(UserWarning, match="different base models"),
        pytest.raises(ValueError, match=r"q_proj is \(128, 128\) in .*c, but \(64, 64\)"),
    ):
        combine_adapters([tmp_path / "a", tmp_path / "c"], [1, 1], "linear", tmp_path / "sum")


def test_a_sum_knows_its_base_model(base, make_llama, tmp_path):
    wrap(base.float()).save_pretrained(tmp_path)
    combine_adapters([tmp_path, tmp_path], [1, 1], "linear", tmp_path / "sum")
    other = make_llama(initializer_range=0.2)
    with pytest.warns(UserWarning, match="was made for another base model"):
        PeftModel.from_pretrained(other, tmp_path / "sum")


def test_the_page_runs_and_names_every_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    assert all(f'"{kind}"' in text for kind in combining.CombinationType.__args__)


def test_a_module_is_not_taken_for_the_parameter_that_its_name_ends_like(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "shared_expert_intermediate_size": 32}
    base = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, **heads))
    kinds = {"experts": {"target_modules": [], "target_parameters": ["down_proj"]}, "modules": {}}
    kinds["modules"] = {"target_modules": ["shared_expert.down_proj"]}
    both = base
    for name, options in kinds.items():
        wrap(base, budget=3, **options).save_pretrained(tmp_path / name)
        both = PeftModel.from_pretrained(deepcopy(both), tmp_path / name).merge_and_unload()
    combine_adapters([tmp_path / name for name in kinds], [1.0, 1.0], "linear", tmp_path / "sum")
    found = PeftModel.from_pretrained(deepcopy(base), tmp_path / "sum").merge_and_unload().state_dict()
    assert sum(not torch.equal(value, base.state_dict()[name]) for name, value in found.items()) == 2
    for name, value in both.state_dict().items():
        assert_close(found[name], value)
