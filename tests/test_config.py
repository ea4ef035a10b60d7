"""SMTConfig: what may be chosen, and what is refused, with the value and the way out."""

import json
import re
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from torch import nn

from smt_peft import SMTConfig
from smt_peft.layer import Linear

Q0 = "model.layers.0.self_attn.q_proj"


def test_no_argument_is_needed(llama):
    model = get_peft_model(llama, SMTConfig())
    config = model.peft_config["default"]
    assert config.target_modules == {"q_proj", "k_proj", "v_proj"} and config.block_size == 32
    assert config.num_blocks == 1, "0.86 % of this model is less than half a block of 32 x 32, and one is the least"


def test_the_number_of_trainable_parameters_is_right_before_the_warm_up(llama):
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=9))
    assert model.get_nb_trainable_parameters()[0] == 9 * 16**2


def test_the_ratio_is_a_share_of_the_base_models_parameters(llama):
    total = llama.num_parameters()
    trainable, _ = get_peft_model(llama, SMTConfig(block_size=16, trainable_ratio=0.05)).get_nb_trainable_parameters()
    assert abs(trainable - 0.05 * total) <= 16**2 / 2, "the nearest whole number of blocks"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"selection": "best"}, "selection='best' is not one of gradient, activation, magnitude, random, diagonal"),
        ({"scope": "layer"}, "scope='layer' is not one of model, input, module"),
        ({"score": "l3"}, "score='l3' is not one of abs_mean, mean_abs, l1, l2"),
        ({"accumulation": "sum"}, "accumulation='sum' is not one of absolute, signed"),
        ({"bias": "lora_only"}, "bias='lora_only' is not one of none, all, smt_only"),
        ({"block_size": 0}, "block_size=0 is neither a positive integer nor 'auto'"),
        ({"block_size": 16.0}, "block_size=16.0 is neither a positive integer nor 'auto'"),
        ({"block_size": "big"}, "block_size='big' is neither a positive integer nor 'auto'"),
        ({"num_blocks": 0}, "num_blocks=0 is not a positive integer"),
        ({"num_blocks": True}, "num_blocks=True is not a positive integer"),
        ({"trainable_ratio": 0.0}, r"trainable_ratio=0.0 is not in \(0, 1\]"),
        ({"trainable_ratio": 0.86 * 2}, r"trainable_ratio=1.72 .*so 0.86 % is 0.0086"),
        ({"trainable_ratio": float("nan")}, r"trainable_ratio=nan is not in \(0, 1\]"),
        ({"warmup_steps": 0}, "warmup_steps=0 is not a positive integer"),
        ({"num_blocks_pattern": {"mlp": 0}}, r"num_blocks_pattern\['mlp'\]=0 is not a positive integer"),
        ({"num_blocks": 5, "trainable_ratio": 0.1}, "num_blocks=5 and trainable_ratio=0.1 .* give one of them"),
        ({"accumulation": "signed", "selection": "magnitude"}, "selection='magnitude' has none; use"),
        ({"layers_pattern": "h"}, "layers_pattern='h' has no effect without layers_to_transform; give both"),
        ({"target_modules": ".*q", "layers_to_transform": 0}, "layers_to_transform=0 needs target_modules as a list"),
        ({"selected_blocks": {}}, "selected_blocks is empty; leave it out"),
        ({"selected_blocks": {Q0: [[0]]}}, r"selected_blocks\['model.*'\]=\[\[0\]\] is not a list of \[block row"),
        ({"selected_blocks": {Q0: "0,1 2"}}, r"selected_blocks\['model.*'\]='0,1 2' is not a list of \[block row"),
        ({"selected_blocks": {Q0: [[0, 0]]}, "num_blocks": 2}, "names 1 blocks but the budget is 2; drop num_blocks"),
        ({"selected_blocks": {Q0: [[0, 0]]}, "num_blocks_pattern": {"q": 4}}, "names 1 blocks but the budget is 4"),
        ({"selected_blocks": {Q0: [[0, 0]]}, "trainable_ratio": 0.5}, "trainable_ratio=0.5 has no effect; drop one"),
        ({"num_blocks_pattern": [["q", 4, 5]]}, r"num_blocks_pattern=\[\['q', 4, 5\]\] is not a mapping"),
        ({"trainable_ratio": True}, r"trainable_ratio=True is not in \(0, 1\]"),
        ({"init_weights": "gaussian"}, "init_weights='gaussian' is neither True"),
        ({"seed": True}, "seed=True is not an integer of 64 bits"),
        ({"seed": 2**64}, "seed=18446744073709551616 is not an integer of 64 bits"),
    ],
)
def test_impossible_values_and_combinations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SMTConfig(**options)


@pytest.mark.parametrize("value", ["0.1", [0.1]])
def test_a_ratio_that_is_no_number_is_refused_in_words(value):
    with pytest.raises((ValueError, TypeError), match="trainable_ratio="):
        SMTConfig(trainable_ratio=value)


def test_the_largest_ratio_that_an_error_names_is_possible(llama):
    with pytest.raises(ValueError, match="trainable_ratio") as refusal:
        get_peft_model(deepcopy(llama), SMTConfig(block_size=1, trainable_ratio=0.9))
    largest = float(re.search(r"at most (0\.\d+)", str(refusal.value))[1])
    get_peft_model(llama, SMTConfig(block_size=1, trainable_ratio=largest))


@pytest.mark.parametrize("sides, expected", [((512, 1024), 256), ((64, 96), 32), ((30, 45), 1)])
def test_auto_is_the_largest_power_of_two_that_divides_every_side(sides, expected):
    model = get_peft_model(nn.Sequential(nn.Linear(*sides)), SMTConfig(target_modules=["0"], num_blocks=1))
    assert model.peft_config["default"].block_size == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target_modules": ["v_proj", "down_proj"]}, {"0.v_proj", "0.down_proj", "1.v_proj", "1.down_proj"}),
        ({"target_modules": r".*layers\.1\..*[qk]_proj"}, {"1.q_proj", "1.k_proj"}),
        ({"exclude_modules": ["q_proj", "k_proj"]}, {"0.v_proj", "1.v_proj"}),
        ({"target_modules": ["v_proj"], "layers_to_transform": 0}, {"0.v_proj"}),
        ({"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, {"1.v_proj"}),
    ],
)
def test_targets_are_chosen_in_every_form_that_peft_knows(llama, options, expected):
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=2, **options))
    names = [name.split(".") for name, module in model.named_modules() if isinstance(module, Linear)]
    assert {f"{parts[-3]}.{parts[-1]}" for parts in names} == expected


def test_all_linear_leaves_the_head_alone(llama):
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=2, target_modules="all-linear"))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert len(wrapped) == 14 and not any("lm_head" in name for name in wrapped)


def test_the_users_config_is_not_changed(llama):
    """A second model, of another size, made from the same object must not inherit what was resolved for the first."""
    config = SMTConfig(selection="random", trainable_ratio=0.05)
    before = asdict(config)
    resolved = get_peft_model(llama, config).peft_config["default"]
    changed = {name for name, value in asdict(config).items() if value != before[name]}
    assert changed <= {"base_model_name_or_path", "inference_mode"}
    assert resolved.num_blocks and resolved.selected_blocks and resolved.block_size == 32


def test_a_saved_config_loads_equal(tmp_path, llama):
    options = {"block_size": 16, "num_blocks": 9, "selection": "random", "bias": "all", "score": "l2", "seed": 5}
    patterns = {"v_proj": 2, "": 9}  # in this order, which JSON with sorted keys would turn
    config = get_peft_model(llama, SMTConfig(**{**options, "num_blocks": None}, num_blocks_pattern=patterns))
    config = config.peft_config["default"]
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SMTConfig and loaded.peft_type == PeftType.SMT
    assert loaded.selected_blocks == config.selected_blocks and [*loaded.num_blocks_pattern] == ["v_proj", ""]
    assert {**asdict(loaded), "inference_mode": False} == {**asdict(config), "inference_mode": False}


def test_the_saved_config_is_short_json(tmp_path):
    SMTConfig(selected_blocks={Q0: [[0, 1], [2, 3]]}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SMT" and saved["selected_blocks"] == {Q0: "0,1 2,3"}


def test_given_blocks_are_the_selection_and_the_budget(llama):
    given = {Q0: [[3, 1], [0, 2]], "model.layers.1.self_attn.v_proj": [[1, 3]]}
    model = get_peft_model(llama, SMTConfig(block_size=16, selected_blocks=given))
    assert model.get_nb_trainable_parameters()[0] == 3 * 256
    assert model.peft_config["default"].selected_blocks == given
    assert model.base_model.model.smt_bank["default"].is_selected


def test_an_adapter_from_a_resolved_config_has_the_same_blocks(llama):
    first = get_peft_model(deepcopy(llama), SMTConfig(block_size=16, num_blocks=9, selection="random"))
    second = get_peft_model(llama, first.peft_config["default"])
    banks = [model.base_model.model.smt_bank["default"] for model in (first, second)]
    assert torch.equal(banks[0].index, banks[1].index)


def test_other_methods_cannot_share_the_model(llama):
    model = get_peft_model(llama, SMTConfig(num_blocks=1))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
