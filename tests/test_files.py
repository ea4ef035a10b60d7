"""Adapter files: their format, what loading refuses, and saving as a whole."""

import errno
import json
import os
import re
import tracemalloc
import warnings
from copy import deepcopy
from pathlib import Path

import fuzz_adapter
import peft
import pytest
import torch
from dense_truth import (
    METHODS,
    assert_base_untouched,
    assert_same_state,
    bank_of,
    deltas_of,
    outputs,
    state_of,
    train,
    wrap,
)
from fixtures.make_adapters import ADAPTERS, FOLDER, make, make_base
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging

from smt_peft import SMTConfig, given, select_blocks, writing
from smt_peft.bases import far_apart
from smt_peft.checks import Target, fingerprint
from smt_peft.contents import Parts, in_order_of, manifest, take_apart
from smt_peft.files import Blocks, StoredAdapter, read_adapter, write_adapter
from smt_peft.places import Tiles
from smt_peft.writing import written_whole

ROOT = Path(__file__).parents[1]

VERSION_1 = sorted((Path(__file__).parent / "fixtures/adapters_of_0.1").iterdir())
BANK = "base_model.model.smt_bank."
Q0 = "model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """An adapter of eight tiles in a folder."""
    wrap(llama, budget=8).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_weights(folder, change) -> None:
    tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def by_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def by_peft_with_little_memory(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def by_transformers(base, folder):
    base.load_adapter(str(folder))
    return base


doors = pytest.mark.parametrize("load", [by_peft, by_transformers])


def dense(adapter) -> dict[str, torch.Tensor]:
    """The deltas of what `read_adapter` found, by target, where there are any."""
    found = {name: torch.zeros(adapter.shapes[name]) for name in adapter.blocks}
    for name, blocks in adapter.blocks.items():
        for rows, cols, values in zip(*blocks, strict=True):
            found[name][rows[:, None], cols] = values
    return found


# --- the format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrangement", ADAPTERS)
def test_the_code_in_the_documentation_reads_what_the_model_has(arrangement, monkeypatch):
    (code,) = re.findall(r"```python\n(import hashlib.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL)
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    monkeypatch.chdir(FOLDER / arrangement)
    names = {}
    exec(code, names)
    expected = deltas_of(make(arrangement))
    assert list(names["deltas"]) == list(expected)
    for name, delta in expected.items():
        assert torch.equal(torch.from_numpy(names["deltas"][name]), delta)


@doors
@pytest.mark.parametrize("arrangement", ADAPTERS)
def test_files_of_version_2_load_unchanged(arrangement, load):
    """The folders were saved by make_adapters.py once; whoever changes the format must not change them."""
    loaded, made = load(make_base(), FOLDER / arrangement), make(arrangement)
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(loaded(tokens).logits, made.eval()(tokens).logits)
    assert_same_parts(bank_of(loaded), bank_of(made))


def assert_same_parts(found, expected) -> None:
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.index, expected.index)


@pytest.mark.parametrize("arrangement", ADAPTERS)
def test_an_adapter_is_read_without_its_model(arrangement):
    adapter, model = read_adapter(FOLDER / arrangement), make(arrangement)
    expected = deltas_of(model)
    assert adapter.shapes == {name: tuple(delta.shape) for name, delta in expected.items()}
    for name, delta in dense(adapter).items():
        assert torch.equal(delta, expected[name]) and delta.any()
    assert set(adapter.blocks) == {name for name, delta in expected.items() if delta.any()}
    others = {f"{BANK[:-9]}lm_head.weight"} if arrangement == "tiles" else set()
    assert {key for key in adapter.others if "bias" not in key} == others


@pytest.mark.parametrize("folder", VERSION_1, ids=lambda folder: folder.name)
def test_a_file_of_version_1_is_read_by_the_names_in_its_config(llama, folder):
    adapter, bank = read_adapter(folder), bank_of(by_peft(llama, folder))
    for name, at, deltas in zip((t.name for t in bank.targets), bank.layout().blocks, bank.split(), strict=True):
        assert (name in adapter.blocks) == bool(len(at))
        if len(at):
            assert torch.equal(adapter.blocks[name].deltas, deltas)
            assert torch.equal(adapter.blocks[name].rows[:, 0] // 16, at[:, 0])
            assert torch.equal(adapter.blocks[name].cols[:, 0] // 16, at[:, 1])
    with pytest.raises(ValueError, match=r"version 1 of the format.*save it again"):
        adapter.shapes[Q0]


@pytest.mark.parametrize(
    ("selected", "words"),
    [
        ({Q0: "0,1", "model.layers.1.self_attn.q_proj": "0,1"}, "have the same blocks"),
        (None, "no selected_blocks"),
    ],
    ids=["ambiguous", "none"],
)
def test_a_file_of_version_1_that_does_not_name_its_targets_is_refused_in_words(llama, tmp_path, selected, words):
    given = selected or {Q0: "0,1"}
    model = get_peft_model(llama, SMTConfig(block_size=16, selected_blocks=given))
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop(BANK + "manifest"))
    change_config(tmp_path, selected_blocks=selected)
    with pytest.raises(ValueError, match=f"{words}.*save it again"):
        read_adapter(tmp_path)


def test_a_file_of_version_1_becomes_version_2_by_saving_it_again(llama, tmp_path):
    model = by_peft(llama, VERSION_1[0])
    model.save_pretrained(tmp_path)
    again = dense(read_adapter(tmp_path))
    assert again.keys() == read_adapter(VERSION_1[0]).blocks.keys()
    assert all(torch.equal(delta, deltas_of(model)[name]) for name, delta in again.items())


# --- what is refused -----------------------------------------------------------------------------------------------


def with_part(part, change):
    def edit(folder):
        change_weights(folder, lambda tensors: tensors.update({BANK + part: change(tensors[BANK + part])}))

    return edit


def without_part(part):
    return lambda folder: change_weights(folder, lambda tensors: tensors.pop(BANK + part))


def with_config(**changes):
    return lambda folder: change_config(folder, **changes)


def with_another_bank(folder):
    change_weights(folder, lambda tensors: tensors.update({"smt_bank.other.weight": torch.ones(8, 16, 16)}))


def with_another_block(index):
    """A valid index of other blocks: only the checksum tells, and the config."""
    grid = {(0, row, col) for row in range(4) for col in range(4)} - set(map(tuple, index.tolist()))
    return torch.cat([torch.tensor([min(grid)], dtype=index.dtype), index[1:]])


def with_version(version):
    def edit(manifest):
        return torch.tensor(list(bytes(manifest.tolist()).replace(b'"version":2', b'"version":%d' % version)))

    return with_part("manifest", lambda manifest: edit(manifest).byte())


TWO_ADAPTERS = "of two adapters"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "a LoRA checkpoint": (
        lambda folder: save_file({LORA: torch.zeros(2, 64)}, folder / WEIGHTS),
        "holds no SMT adapter",
    ),
    "another block size": (
        with_config(block_size=8),
        "8 blocks of 16 x 16.*configured for|block_size=8.*of two adapters",
    ),
    "int8 deltas": (with_part("weight", lambda weight: weight.to(torch.int8)), "are int8; an adapter's are float32"),
    "bool deltas": (with_part("weight", lambda weight: weight > 0), "are bool"),
    "complex deltas": (with_part("weight", lambda weight: weight.to(torch.complex64)), "are complex64"),
    "float8 deltas": (with_part("weight", lambda weight: weight.to(torch.float8_e4m3fn)), "are float8_e4m3fn"),
    "a float index": (with_part("index", torch.Tensor.float), "index is float32.*averaged or cast"),
    "another valid index": (with_part("index", with_another_block), "checksum of the index is wrong"),
    "an index of -1": (with_part("index", lambda index: index * 0 - 1), "-1 throughout, though it has deltas"),
    "deltas without an index": (without_part("index"), "without their index"),
    "deltas without a fingerprint": (without_part("fingerprint"), "without their index"),
    "an index without deltas": (without_part("weight"), "index without deltas"),
    "another adapter's bank": (with_another_bank, "'smt_bank.other.weight', which is no part of one SMT adapter"),
    "a later version": (with_version(3), "version 3 of the format.*update smt_peft"),
    "no JSON": (with_part("manifest", lambda manifest: manifest[:-9]), "manifest cannot be read"),
    "no manifest at all": (with_part("manifest", torch.Tensor.float), "manifest is float32"),
    "another selection": (
        with_config(selected_blocks={Q0: "0,0 0,1 0,2 0,3 1,0 1,1 1,2 1,3"}),
        "contradicts the index",
    ),
    "another budget": (with_config(num_blocks=9, selected_blocks=None), "holds 8 blocks.*configured for 9"),
    "other modules": (with_config(modules_to_save=["lm_head"]), f"modules_to_save.*{TWO_ADAPTERS}"),
    "other biases": (with_config(bias="all"), f"bias='all'.*bias='none'.*{TWO_ADAPTERS}"),
    "another arrangement": (with_config(arrangement="sorted", selected_blocks=None), f"'sorted'.*{TWO_ADAPTERS}"),
    "other targets": (
        with_config(target_modules=["q_proj", "k_proj"], selected_blocks=None),
        "other target modules: it has .*class and a version",
    ),
    "no name of a base": (with_config(base_model_name_or_path={}), "base_model_name_or_path={} is no text"),
    "a row of 0.9": (with_config(selected_blocks={Q0: [[0.9, 0]] * 8}), "is not a list of"),
    "a row of true": (with_config(selected_blocks={Q0: [[True, 0]] * 8}), "is not a list of"),
    "text for rows": (with_config(selected_blocks={Q0: "0,1 ,2"}), "is not a list of"),
    "a list of modules": (with_config(selected_blocks=[Q0]), "selected_blocks=.* is not a mapping"),
    "a list of patterns": (with_config(num_blocks_pattern=["q"]), "num_blocks_pattern=.* is not a mapping"),
    "a number of modules": (with_config(target_modules=5), "target_modules=5 is not a list of names"),
    "a list of numbers": (with_config(exclude_modules=[5]), r"exclude_modules=\[5\] is not a list of names"),
    "letters for layers": (with_config(layers_to_transform="01"), "layers_to_transform='01' is neither"),
    "a mapping for a rule": (with_config(selection={"a": 1}), "selection=.* is not one of gradient"),
    "a list of lists": (with_config(modules_to_save=[[1]]), r"modules_to_save=\[\[1\]\] is not a list of names"),
    "a regex for a module": (with_config(modules_to_save=["(a|a)+!"]), "holds more than names of modules"),
    "no regex to leave out": (with_config(exclude_modules="("), r"exclude_modules='\(' is no regex"),
    "a token twice": (with_config(trainable_token_indices=[1, 1]), "names a token twice"),
    "no regex": (with_config(num_blocks_pattern={"(": 3}, num_blocks=5, selected_blocks=None), "is no regex"),
    "an endless regex": (
        with_config(num_blocks_pattern={r"^(.|..|...)*[A-Z]\d$": 3}, num_blocks=5, selected_blocks=None),
        "takes forever",
    ),
}


@pytest.mark.parametrize("load", [by_peft, by_peft_with_little_memory, by_transformers])
@pytest.mark.parametrize("damage, words", REFUSED.values(), ids=REFUSED)
def test_a_file_is_refused_in_words_before_anything_changes(llama, folder, load, damage, words):
    base = deepcopy(llama)
    damage(folder)
    with pytest.raises(ValueError, match=words) as refusal:
        load(llama, folder)
    assert len(str(refusal.value)) < 700
    assert_same_state(state_of(llama), state_of(base))
    assert not getattr(llama, "peft_config", None)


def test_an_average_of_adapters_is_one_of_their_deltas_alone(llama, folder):
    model = by_peft(llama, folder)
    saved = get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=r"averaged or cast\? Do that to smt_bank.weight alone, and copy the others"):
        set_peft_model_state_dict(model, {key: value.float() / 2 for key, value in saved.items()})
    halved = {key: value / 2 if value.is_floating_point() else value for key, value in saved.items()}
    set_peft_model_state_dict(model, halved)
    found = get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], value) for key, value in halved.items())


@pytest.mark.parametrize("target", [Target("a." * 600, 4, 4), Target("q_proj", 2**21, 4)], ids=["name", "side"])
def test_names_and_shapes_that_no_model_has_are_refused(folder, target):
    """Reports would allocate them."""
    tensors = load_file(folder / WEIGHTS)
    broken = manifest(SMTConfig.from_pretrained(folder), [target], tensors[BANK + "index"], (), {})
    with pytest.raises(ValueError, match="says what cannot be"):
        take_apart({**tensors, BANK + "manifest": broken})


def test_loading_scores_no_more_blocks_than_a_model_has(llama, tmp_path, monkeypatch):
    """A config may ask for random blocks of one weight."""
    adapter = wrap(deepcopy(llama), selection="random")
    adapter.save_pretrained(tmp_path)
    change_config(tmp_path, selected_blocks=None)
    monkeypatch.setattr(given, "MOST_SCORED_ON_LOADING", 10)
    monkeypatch.setattr(given, "random_scores", lambda *_: pytest.fail("scored"))
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(by_peft(llama, tmp_path)(tokens).logits, adapter(tokens).logits)


def test_a_fresh_adapter_of_a_config_that_awaits_its_file_says_so(llama, batches, tmp_path, monkeypatch):
    wrap(deepcopy(llama), selection="random").save_pretrained(tmp_path)
    change_config(tmp_path, selected_blocks=None)
    monkeypatch.setattr(given, "MOST_SCORED_ON_LOADING", 10)
    model = get_peft_model(llama, SMTConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="awaits the file that its config was read beside"):
        select_blocks(model, batches)


def test_an_adapter_in_a_subfolder_is_read_and_refused_like_any_other(llama, folder):
    def by_peft_below(base):
        return PeftModel.from_pretrained(base, folder.parent, subfolder=folder.name)

    def by_transformers_below(base):
        base.load_adapter(str(folder.parent), adapter_kwargs={"subfolder": folder.name})
        return base

    get_peft_model(deepcopy(llama), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder.parent / "low_rank")
    try:
        deepcopy(llama).load_adapter(str(folder.parent), adapter_kwargs={"subfolder": "low_rank"})
    except ValueError:
        pytest.skip("this transformers finds no adapter in a subfolder, not LoRA's either")
    tokens = torch.arange(1, 9)[None]
    expected = by_peft(deepcopy(llama), folder)(tokens).logits
    for load in (by_peft_below, by_transformers_below):
        assert torch.equal(load(deepcopy(llama))(tokens).logits, expected)
    change_config(folder, block_size=8)
    before = state_of(llama)
    for load in (by_peft_below, by_transformers_below):
        with pytest.raises(ValueError, match="block_size"):
            load(llama)
        assert_same_state(state_of(llama), before)


@doors
@pytest.mark.parametrize("tokens", [[9, 5], [5, 8], {"embed_tokens": [5, 9]}, None, "59"], ids=str)
def test_rows_of_other_tokens_than_the_files_are_refused(llama, tmp_path, load, tokens):
    wrap(llama, trainable_token_indices=[5, 9]).save_pretrained(tmp_path)
    change_config(tmp_path, trainable_token_indices=tokens)
    before = state_of(llama)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        load(llama, tmp_path)
    assert_same_state(state_of(llama), before)


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@doors
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rows, words",
    [
        (torch.ones(2, 8), r"trainable_tokens_delta.* where the model has"),
        (torch.ones(3, 64), r"holds \[3\] rows .*\[2\]"),
    ],
    ids=["another width", "another number"],
)
def test_rows_of_another_shape_are_refused_and_leave_no_wrapper(make_llama, tmp_path, load, tied, rows, words):
    base = make_llama(tie_word_embeddings=tied)
    wrap(base, trainable_token_indices=[5, 9]).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({ROWS: rows}))
    before, tokens = state_of(base), torch.arange(1, 9)[None]
    expected = base(tokens).logits
    with pytest.raises(ValueError, match=words):
        load(base, tmp_path)
    assert_same_state(state_of(base), before)
    assert torch.equal(base(tokens).logits, expected)


def test_rows_are_not_loaded_into_those_of_other_tokens(llama, tmp_path):
    wrap(llama, trainable_token_indices=[5, 9]).save_pretrained(tmp_path)
    model = wrap(llama, trainable_token_indices=[9, 5])
    before = state_of(model)
    with pytest.raises(ValueError, match=r"saved with trainable_token_indices=\[5, 9\].*rows would be other tokens'"):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
    assert_same_state(state_of(model), before)


@pytest.mark.filterwarnings("error:The file of adapter", "error:The adapter's file")
def test_an_embedding_that_was_resized_for_its_rows_is_nothing_to_warn_of(llama, tmp_path):
    """PEFT saves all of it beside them."""
    model = wrap(llama, trainable_token_indices=[5, 9], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(".token_adapter.base_layer." in key for key in load_file(tmp_path / WEIGHTS))
    by_peft(llama, tmp_path)
    assert sorted(read_adapter(tmp_path).others) == ["base_model.model.lm_head.weight", ROWS]


def test_a_refused_load_leaves_the_head_that_is_active(llama, tmp_path):
    model = wrap(llama, modules_to_save=["lm_head"])
    torch.nn.init.normal_(model.get_output_embeddings().modules_to_save["default"].weight)
    wrap(llama, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(5, 64)}))
    tokens = torch.arange(1, 9)[None]
    expected = model(tokens).logits
    with pytest.raises(ValueError, match="lm_head"):
        model.load_adapter(tmp_path, "b")
    assert torch.equal(model(tokens).logits, expected) and list(model.peft_config) == ["default"]


def only_a_config(folder):
    (folder / WEIGHTS).unlink()


def without_its_head(folder):
    """And without a manifest that would say so, as files of version 1 are: PEFT alone misses it."""
    change_weights(folder, lambda tensors: tensors.pop(BANK + "manifest"))
    change_config(folder, modules_to_save=["lm_head"])


@pytest.mark.parametrize("damage", [only_a_config, without_its_head])
def test_a_load_that_fails_leaves_the_model_as_it_was(llama, folder, damage):
    model = wrap(llama)
    damage(folder)
    before, beside = state_of(llama), state_of(model)
    with pytest.raises(ValueError, match=r"Repo id|file lacks .*lm_head"):
        PeftModel.from_pretrained(llama, folder)
    assert_same_state(state_of(llama), before)
    with pytest.raises(ValueError, match=r"Repo id|file lacks .*lm_head"):
        model.load_adapter(folder, "second")
    assert_same_state(state_of(model), beside)
    assert list(model.peft_config) == ["default"]


def test_a_head_that_is_missing_is_named_by_transformers_loader_too(make_llama, folder):
    without_its_head(folder)
    base = make_llama()
    before = state_of(base)
    with pytest.raises(ValueError, match=r"file lacks .*lm_head"):
        base.load_adapter(folder)
    assert_same_state(state_of(base), before)


def test_a_missing_bias_is_refused_in_an_adapter_that_is_there(make_llama):
    """As a resume loads, without its config."""
    base = make_llama(attention_bias=True)
    state = get_peft_model_state_dict(wrap(base, bias="smt_only"))
    del state[next(key for key in state if key.endswith("bias"))]
    model = wrap(base, bias="smt_only")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"lacks .*bias"):
        set_peft_model_state_dict(model, state)
    assert_same_state(state_of(model), before)


OF_A_MODEL = {"other targets", "no regex", "an endless regex"}  # only a model shows what is wrong with these


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in OF_A_MODEL])
def test_a_reader_without_the_model_refuses_as_much(folder, name):
    damage, words = REFUSED[name]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        read_adapter(folder)


@pytest.mark.parametrize("used", ["forward", "load"])
def test_a_refused_file_leaves_an_adapter_in_use_what_it_is(llama, folder, batches, tmp_path, used):
    """Also one that was made from the config of a file."""
    config = SMTConfig.from_pretrained(folder)
    config.inference_mode = False
    model = get_peft_model(deepcopy(llama), config)
    if used == "forward":
        train(model, batches)
    else:
        model.load_adapter(folder, "default", is_trainable=True)
    before, expected = state_of(model), outputs(model, batches[0])
    with_part("index", with_another_block)(folder)
    with pytest.raises(ValueError, match="checksum"):
        model.load_adapter(folder, "default")
    assert_same_state(state_of(model), before)
    assert torch.equal(outputs(model, batches[0]), expected)


@doors
def test_an_adapter_without_blocks_yet_loads_and_says_so(llama, batches, tmp_path, load):
    get_peft_model(deepcopy(llama), SMTConfig(block_size=16, num_blocks=8, warmup_steps=1)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="saved before its blocks were selected"):
        model = load(deepcopy(llama), tmp_path)
    assert torch.equal(outputs(model, batches[0]), outputs(llama, batches[0]))


def test_a_module_that_is_missing_is_refused_in_words(llama, tmp_path):
    wrap(llama, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks 'lm_head\.weight'"):
        by_peft(llama, tmp_path)


def test_a_state_dict_by_hand_is_refused_where_its_index_is_bad(llama):
    model = wrap(llama, budget=8)
    for name, value, words in (
        ("index", torch.full((8, 3), 99), "does not exist"),
        ("index", torch.zeros(8, 3), "holds integers"),
        ("fingerprint", torch.zeros(1, dtype=torch.int64), "other target modules"),
        ("weight", torch.ones(8, 16, 16, dtype=torch.int8), "are int8"),
    ):
        state = model.state_dict() | {f"{BANK}default.{name}": value}
        with pytest.raises(ValueError, match=words):
            model.load_state_dict(state)


def test_a_few_dozen_broken_files_neither_crash_nor_change_the_base():
    results = fuzz_adapter.fuzz(limit=60, seed=7)
    assert [result for result in results if result.outcome in fuzz_adapter.WRONG] == []
    for door in ("PEFT", "transformers"):
        outcomes = [result.outcome for result in results if result.case.door == door]
        assert outcomes.count("refused") > len(outcomes) / 2 > 10


# --- whose weights -----------------------------------------------------------------------------------------------


FOREIGN = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", f"{Q0}.base_layer.weight"]


@doors
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_weights_of_the_base_model_are_not_read_from_an_adapter(llama, folder, load, name, prefix):
    base, plain = deepcopy(llama), read_adapter(folder)
    shape = llama.get_parameter(name.replace(".base_layer", "")).shape
    change_weights(folder, lambda tensors: tensors.update({prefix + name: torch.ones(shape)}))
    with pytest.warns(UserWarning, match=f"{re.escape(name)}', which is not the adapter's and was left out"):
        loaded = load(llama, folder)
    assert_base_untouched(loaded, base)
    found = deltas_of(loaded)
    assert all(torch.equal(found[target], delta) for target, delta in dense(plain).items())


def test_a_whole_module_comes_from_the_file_and_its_original_does_not(llama, tmp_path):
    base = deepcopy(llama)
    model = wrap(llama, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    for name in ("lm_head.original_module.weight", "lm_head.base_layer.weight"):
        key = f"base_model.model.{name}"
        change_weights(tmp_path, lambda tensors, key=key: tensors.update({key: torch.ones(64, 64)}))
    with pytest.warns(UserWarning, match="was left out"):
        loaded = by_peft(llama, tmp_path)
    assert torch.equal(loaded.base_model.model.lm_head.original_module.weight, base.lm_head.weight)


@doors
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_said_at_loading_and_refused_by_safe_merge(llama, folder, load, value):
    change_weights(folder, lambda tensors: tensors[BANK + "weight"][3, 2, 1:2].fill_(value))
    with pytest.warns(UserWarning, match="NaN or infinite"):
        loaded = load(llama, folder)
    if load is by_peft:
        with pytest.raises(ValueError, match="NaNs detected"):
            loaded.merge_and_unload(safe_merge=True)


@doors
@pytest.mark.filterwarnings("error:Adapter")
def test_a_new_head_is_no_other_base_model(tmp_path, llama, load):
    """A classifier's is random in each process, and the adapter brings its own."""

    def make(seed: int) -> LlamaForSequenceClassification:
        model = LlamaForSequenceClassification(llama.config)
        model.model.load_state_dict(llama.model.state_dict())
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
        return model

    trained = wrap(make(0), task_type="SEQ_CLS")
    trained.save_pretrained(tmp_path / "classifier")
    loaded = load(make(1), tmp_path / "classifier")
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(loaded.eval()(tokens).logits, trained.eval()(tokens).logits)


@doors
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_another_base_model_of_the_same_shapes_is_named(llama, folder, load, name):
    llama.get_parameter(name).data.mul_(1.1)
    llama.name_or_path = "another/model"
    with pytest.warns(UserWarning, match=rf"made for another base model than this \(another/model\): '{name}'"):
        load(llama, folder)


@doors
@pytest.mark.parametrize(
    "change",
    [
        torch.nn.Module.bfloat16,
        torch.nn.Module.half,
        torch.nn.Module.double,
        lambda model: model.resize_token_embeddings(80, mean_resizing=False) and model,
    ],
    ids=["bfloat16", "float16", "float64", "resized"],
)
def test_the_same_base_model_in_another_form_is_the_same(llama, folder, load, change):
    base = change(llama)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter")
        load(base, folder)


def test_the_base_weight_of_a_target_that_peft_saves_is_left_out_without_a_word(llama, batches, tmp_path):
    model = wrap(llama, target_modules=["q_proj", "lm_head"]).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The file of adapter")
        loaded = by_peft(llama, tmp_path)
    assert torch.equal(outputs(loaded, batches[0]), outputs(model, batches[0]))


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_a_long_selection_costs_a_few_times_its_text_and_a_short_message(llama, folder):
    text = " ".join(f"{i % 999},{i // 999}" for i in range(100_000))
    change_config(folder, selected_blocks={Q0: text}, num_blocks=100_000)
    (folder / WEIGHTS).unlink()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="budget of 100000 blocks is above the 64") as refusal:
            get_peft_model(llama, SMTConfig.from_pretrained(folder))
        assert tracemalloc.get_traced_memory()[1] < 8 * len(text)
    finally:
        tracemalloc.stop()
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "options",
    [
        {"selected_blocks": {"x": "1,2 " * 10**6}},
        {"selected_blocks": {"x" * 10**6: "0"}},
        {"block_size": "1" * 10**6},
        {"num_blocks_pattern": {"q" * 10**6: 0}},
        {"target_modules": ["q"] * 10**6 + [1]},
    ],
    ids=["blocks", "name", "block_size", "pattern", "modules"],
)
def test_messages_stay_short(options):
    with pytest.raises(ValueError, match=next(iter(options))) as refusal:
        SMTConfig(**options)
    assert len(str(refusal.value)) < 700


def test_tiles_are_a_list_of_pairs():
    tiles = Tiles.parse("q", "0,1 12,3 4,5")
    assert tiles == [[0, 1], [12, 3], [4, 5]] != tiles[:2] == [[0, 1], [12, 3]]
    assert list(tiles) == Tiles.parse("q", [(0, 1), (12, 3), (4, 5)]) and tiles[-1] == [4, 5]
    assert deepcopy(tiles) == tiles and tiles.tensor().tolist() == list(tiles)


@pytest.mark.parametrize(
    "text", ["", "1", "1,2,3", "1,2 3", "1,2  3,4", "1, 2", "1,2 ", "-1,2", "1,2;3,4", "\u0661,2", "9999999999,1"]
)
def test_what_is_no_list_of_pairs_is_refused(text):
    with pytest.raises(ValueError, match="is not a list of"):
        Tiles.parse("q", text)


# --- transformers' door ----------------------------------------------------------------------------------------------


def test_transformers_reports_nothing_about_a_file_that_is_right(llama, folder, caplog):
    logging.enable_propagation()
    try:
        info = llama.load_adapter(str(folder))
    finally:
        logging.disable_propagation()
    assert not (info.missing_keys or info.unexpected_keys or info.mismatched_keys)
    assert "UNEXPECTED" not in caplog.text and "manifest" not in caplog.text


def test_transformers_loads_a_second_adapter_and_refuses_a_broken_one_beside_it(llama, folder, batches):
    llama.load_adapter(str(folder))
    before = state_of(llama)
    with_part("index", with_another_block)(folder)
    with pytest.raises(ValueError, match="checksum"):
        llama.load_adapter(str(folder), "second")
    assert_same_state(state_of(llama), before)
    assert list(llama.peft_config) == ["default"] and outputs(llama, batches[0]).isfinite().all()
    with pytest.raises(ValueError, match="already exists"):
        llama.load_adapter(str(folder), "default")


def test_transformers_takes_a_state_dict_and_trains_on(llama, folder, batches):
    weights, config = load_file(folder / WEIGHTS), SMTConfig.from_pretrained(folder)
    llama.load_adapter(peft_config=config, adapter_state_dict=weights, is_trainable=True)
    llama(**batches[0]).loss.backward()
    assert bank_of(llama).weight.grad.any() and not llama.peft_config["default"].awaits_weights


# --- saving ----------------------------------------------------------------------------------------------------------


def full(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file", ["README.md", WEIGHTS, CONFIG])
def test_a_save_that_fails_leaves_the_folder_as_it_was(llama, folder, file, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = wrap(llama, budget=12, seed=8)
    place = {
        "README.md": "peft.PeftModel.create_or_update_model_card",
        WEIGHTS: "peft.peft_model.safe_save_file",
        CONFIG: "smt_peft.SMTConfig.save_pretrained",
    }
    monkeypatch.setattr(place[file], full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="this transformers takes a later PEFT to save adapters",
)
def test_a_save_by_transformers_that_fails_leaves_the_folder_as_it_was(llama, folder, tmp_path, monkeypatch):
    llama.load_adapter(str(folder))
    llama.save_pretrained(tmp_path / "again")
    assert dense(read_adapter(tmp_path / "again")).keys() == dense(read_adapter(folder)).keys()
    before = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        llama.save_pretrained(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


def test_saving_over_an_adapter_replaces_all_of_it_and_keeps_the_card(llama, folder):
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    model = wrap(llama, budget=12, seed=8)
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", WEIGHTS, CONFIG}
    assert "By hand." in card.read_text() and card.read_text().count("import smt_peft") == 1
    assert card.read_text().count("## Selected blocks") == 1
    assert "SMT selected 12 blocks of 16 x 16 (3,072 parameters)" in card.read_text()
    for name, delta in dense(read_adapter(folder)).items():
        assert torch.equal(delta, deltas_of(model)[name])


def test_a_card_says_once_where_the_blocks_are_however_often_it_is_saved(llama, tmp_path):
    for budget in (20, 20, 12, 12):
        wrap(llama, budget=budget).save_pretrained(tmp_path)
        *_, last = (tmp_path / "README.md").read_text().split("## Selected blocks\n\n```\n")
        assert last.startswith(f"SMT selected {budget} blocks") and last.endswith("\n```\n")
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Selected blocks") == card.count("import smt_peft") == 1 and card.count("\n```") == 4


def test_an_adapter_whose_name_is_a_path_is_saved_and_loaded_as_loras_is(llama, batches, tmp_path):
    for method in METHODS:
        model = wrap(llama, method, adapter_name="team/first")
        model.save_pretrained(tmp_path / method)
        again = PeftModel.from_pretrained(deepcopy(llama), tmp_path / method / "team/first")
        assert torch.equal(outputs(again, batches[0]), outputs(model, batches[0]))


def test_adapters_of_other_names_are_saved_into_folders_of_theirs_with_one_card(llama, tmp_path):
    model = wrap(llama, adapter_name="mine")
    model.save_pretrained(str(tmp_path / "new" / "one"))
    card = (tmp_path / "new/one/README.md").read_text()
    assert "import smt_peft" in card and "mine: SMT selected 20 blocks of 16 x 16" in card
    assert dense(read_adapter(tmp_path / "new/one/mine"))


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_files_of_two_saves_are_refused(llama, folder, tmp_path, file):
    wrap(llama, budget=8, seed=8).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / file).replace(folder / file)
    with pytest.raises(ValueError, match=TWO_ADAPTERS):
        by_peft(llama, folder)


def test_lora_is_saved_and_loaded_by_peft_and_transformers_alone(llama, tmp_path, batches):
    model = wrap(llama, "lora")
    model.save_pretrained(tmp_path)
    assert "smt_peft" not in (tmp_path / "README.md").read_text()
    expected = outputs(model, batches[0])
    llama.load_adapter(str(tmp_path))
    assert torch.equal(outputs(llama, batches[0]), expected)


def test_state_by_hand_keeps_the_selection_of_the_file(llama, folder):
    model = wrap(llama, budget=8, seed=5)
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    assert bank_of(model).index.tolist() == load_file(folder / WEIGHTS)[BANK + "index"].tolist()


def test_more_targets_than_a_files_integers_count_are_put_into_the_models_order():
    """As 58 layers of 256 experts have, of which a file may name few."""
    held = [Target(f"t{number}", 1, 1) for number in range(70_000)]
    content = {"targets": held, "block_size": 1}
    parts = Parts(torch.ones(1, 1, 1), torch.zeros(1, 3, dtype=torch.int16), torch.zeros(1), content, {})
    assert in_order_of(held[::-1], parts).index.tolist() == [[69_999, 0, 0]]


@pytest.mark.parametrize(
    ("blocks", "shape", "words"),
    [
        (Blocks(torch.arange(5, 21)[None], torch.arange(16)[None], torch.ones(1, 16, 16)), (64, 64), "are no tiles"),
        (Blocks(torch.arange(16)[None], torch.arange(16)[None], torch.ones(1, 16, 16)), (70, 64), "does not divide"),
        (Blocks(torch.arange(32)[None], torch.arange(32)[None], torch.ones(1, 32, 32)), (64, 64), "not of 16 x 16"),
    ],
    ids=["between tiles", "a shape of another size", "larger blocks"],
)
def test_blocks_that_do_not_fit_are_not_written_elsewhere(tmp_path, blocks, shape, words):
    config = SMTConfig(block_size=16, num_blocks=1, target_modules=["q"])
    with pytest.raises(ValueError, match=words):
        write_adapter(tmp_path / "out", StoredAdapter(config, {"q": shape}, {"q": blocks}, {}, {}))
    assert not (tmp_path / "out").exists()


def test_a_model_whose_adapter_was_unloaded_has_nothing_to_save(llama):
    model = wrap(llama)
    model.unload()
    with pytest.raises(ValueError, match="has no SMT adapter"):
        get_peft_model_state_dict(model)


# --- where they are written ------------------------------------------------------------------------------------------


def test_a_full_disk_shows_before_anything_moves(llama, folder, monkeypatch):
    before, calls = {path.name: path.read_bytes() for path in folder.iterdir()}, []

    def flush(number: int) -> None:
        calls.append(number)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="full"):
        wrap(llama, budget=12, seed=8).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_move_first_and_then_their_config(llama, tmp_path, monkeypatch):
    moved, move = [], writing._move
    monkeypatch.setattr(writing, "_move", lambda file, place: (moved.append(file.name), move(file, place)))
    wrap(llama).save_pretrained(tmp_path / "new")
    assert moved[:2] == [WEIGHTS, CONFIG]


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EXDEV], ids=["EPERM", "ENOSYS", "EXDEV"])
def test_a_file_system_without_renaming_gets_copies(monkeypatch, tmp_path, error):
    """As object stores that are mounted have it, which do not open what is there for writing either."""

    def refuse(*_):
        raise OSError(error, "not offered")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    with written_whole(tmp_path / "out") as new:
        (new / "sub").mkdir()
        (new / "sub/file").write_text("whole")
    assert (tmp_path / "out/sub/file").read_text() == "whole" and len(list((tmp_path / "out").iterdir())) == 1


# --- without blocks ----------------------------------------------------------------------------------------------


def test_an_adapter_that_has_no_blocks_yet_is_read_for_targets_in_any_order_and_not_written(llama, tmp_path):
    get_peft_model(deepcopy(llama), SMTConfig(block_size=16, num_blocks=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no blocks to write"):
        write_adapter(tmp_path / "out", read_adapter(tmp_path))
    assert not (tmp_path / "out").exists()
    parts = take_apart(load_file(tmp_path / WEIGHTS))
    targets = parts.content["targets"][::-1]
    turned = in_order_of(targets, parts)
    assert (turned.index == -1).all() and turned.fingerprint.item() == fingerprint(16, targets)


# --- whose base --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 4, 8, 50])
def test_sampled_weights_reach_from_the_first_to_the_last(count):
    names = list(range(count))
    chosen = far_apart(names)
    assert len(chosen) == min(4, count) and chosen == sorted(set(chosen))
    assert not names or (chosen[0] == names[0] and (chosen[-1] == names[-1] or count == 1))
