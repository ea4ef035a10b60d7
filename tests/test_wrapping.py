"""A notebook cell that is run again, a config that is refused: as LoRA, or in words."""

from copy import deepcopy

import pytest
import torch
from dense_truth import (
    METHODS,
    QKV,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_state,
    bank_of,
    make_config,
    outputs,
    state_of,
    train,
    wrap,
)
from peft import PeftModel, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaForTokenClassification


@pytest.fixture
def base(llama):
    """Never wrapped, in float64."""
    return llama.double()


# --- one base, wrapped twice ---------------------------------------------------------------------------------------


AGAIN = {
    "the same": {},
    "another budget": {"budget": 10},
    "a larger budget": {"budget": 40},
    "another seed": {"seed": 11},
    "more targets": {"target_modules": [*QKV, "o_proj", "down_proj"]},
    "fewer targets": {"target_modules": ["v_proj"], "budget": 10},
    "other targets": {"target_modules": ["o_proj", "down_proj"]},
    "another block size": {"block_size": 8, "budget": 40},
}
LEFT_ACTIVE = {"fewer targets", "other targets"}  # LoRA leaves the first adapter active in what is no target now


def both_methods(names):
    cells = [(method, name) for method in METHODS for name in names]
    return [cell for cell in cells if cell[0] != "lora" or cell[1] not in LEFT_ACTIVE]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method, second", both_methods(AGAIN))
def test_the_second_config_on_one_base_is_obeyed(base, batches, tmp_path, method, second):
    cell = deepcopy(base)
    first = get_peft_model(cell, make_config(method)).double().train()
    train(first, batches)
    model = get_peft_model(cell, make_config(method, **AGAIN[second])).double().train()
    assert_right(model, base, batches[0])
    alone = wrap(base, method, **AGAIN[second])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in alone.parameters() if p.requires_grad
    )
    train(model, batches)
    assert_right(model, base, batches[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(deepcopy(base), tmp_path).double()
    torch.testing.assert_close(outputs(again, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-5)
    if method != "lora":
        assert_base_untouched(model, base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method, second", both_methods(AGAIN))
def test_the_second_file_on_one_base_is_obeyed(base, batches, tmp_path, method, second):
    wrap(base, method, seed=1).save_pretrained(tmp_path / "first")
    other = wrap(base, method, **AGAIN[second])
    torch.manual_seed(8)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape) * 0.05).to(parameter)
    other.save_pretrained(tmp_path / "second")
    cell = deepcopy(base)
    first = PeftModel.from_pretrained(cell, tmp_path / "first", is_trainable=True).train()
    train(first, batches)
    model = PeftModel.from_pretrained(cell, tmp_path / "second", is_trainable=True).double()
    assert_close(outputs(model, batches[0]), outputs(other, batches[0]))
    assert_right(model, base, batches[0])
    if method != "lora":
        assert_base_untouched(model, base)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(deepcopy(base), tmp_path / "again")
    assert_close(outputs(again, batches[0]), outputs(other, batches[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_wrapping_a_model_that_is_wrapped_gives_a_working_adapter_or_an_error_in_words(base, batches, method):
    model = wrap(base, method)
    train(model, batches)
    before = outputs(model, batches[0])
    if method != "lora":
        with pytest.raises(ValueError, match="The model is a PeftModel already"):
            get_peft_model(model, make_config(method, budget=10))
        assert torch.equal(outputs(model, batches[0]), before)
        assert_right(model, base, batches[0])
        return
    again = get_peft_model(model, make_config(method, budget=10)).double().train()
    trained = [p for p in again.parameters() if p.requires_grad]
    again(**batches[0]).loss.backward()
    assert trained and any(p.grad is not None and p.grad.any() for p in trained)
    start = outputs(again, batches[0])
    train(again, batches)
    assert not torch.equal(outputs(again, batches[0]), start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"block_size": 48}], ids=str)
def test_a_second_config_takes_the_place_of_the_firsts_whole_modules(base, batches, tmp_path, options):
    cell = deepcopy(base)
    first = get_peft_model(cell, make_config(modules_to_save=["lm_head"])).double().train()
    train(first, batches)
    before, expected = state_of(first), outputs(first, batches[0])
    if "block_size" in options:  # one that is refused changes nothing
        config = make_config(**options)
        with pytest.raises(ValueError, match="block_size=48"):
            get_peft_model(cell, config)
        assert_same_state(state_of(first), before)
        assert torch.equal(outputs(first, batches[0]), expected)
        first.delete_adapter("default")
        return
    model = get_peft_model(cell, make_config(**options)).double().train()
    head = model.base_model.model.lm_head
    head = head.modules_to_save["default"] if options else head
    assert torch.equal(head.weight, base.lm_head.weight) and head.weight.requires_grad == bool(options)
    train(model, batches)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(deepcopy(base), tmp_path).double()
    torch.testing.assert_close(outputs(again, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-5)


def test_what_the_replaced_adapter_trained_whole_can_be_a_target(base):
    get_peft_model(base, make_config(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    model = get_peft_model(base, make_config(target_modules="all-linear"))
    assert sum("down_proj" in target.name for target in bank_of(model).targets) == 2


def test_what_another_adapter_trains_whole_is_no_target(base, tmp_path):
    model = wrap(base, modules_to_save=["lm_head"])
    model.add_adapter("b", make_config(target_modules="all-linear"))
    assert not any("lm_head" in target.name for target in bank_of(model, "b").targets)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "b"):
        PeftModel.from_pretrained(deepcopy(base), folder)


# --- configs that are refused ----------------------------------------------------------------------------------------


OUTSIDE = {"selected_blocks": {"model.layers.0.self_attn.q_proj": [[0, 99]]}, "num_blocks": 1}
REFUSED = {  # options, and what is said of them
    "a block size that divides nothing": (
        {"block_size": 48},
        r"block_size=48 does not divide .*q_proj's weight of shape \(64, 64\); use 32 or",
    ),
    "a block size for q alone": ({"block_size": 64}, r"k_proj's weight of shape \(32, 64\); use 32 or"),
    "a budget above all blocks": ({"num_blocks": 65}, "A budget of 65 blocks is above the 64 .* lower num_blocks"),
    "a ratio above all blocks": (
        {"trainable_ratio": 0.9, "num_blocks": None},
        "above the 64 blocks of 16 x 16 .* trainable_ratio .*at most 0",
    ),
    "a pattern above its blocks": (
        {"num_blocks_pattern": {"v_proj": 17}},
        r"A budget of 17 blocks is above the 16 .*lower num_blocks_pattern\['v_proj'\]\.",
    ),
    "a pattern of no target": (
        {"num_blocks_pattern": {"mlp": 3}},
        r"num_blocks_pattern 'mlp' matches none of the targets \(.*fix the pattern",
    ),
    "a pattern of all targets": (
        {"num_blocks_pattern": {"proj": 3}},
        "covers every target, .* main budget would be unused",
    ),
    "targets that do not exist": ({"target_modules": ["no_such_module"]}, "no_such_module"),
    "blocks of a module that is no target": (
        {"selected_blocks": {"lm_head": [[0, 0]]}, "num_blocks": 1},
        "names 'lm_head', which is not among the 6",
    ),
    "blocks outside of the weight": (
        OUTSIDE,
        r"names block \[0, 99\] of .*q_proj', which has 4 x 4 blocks of 16 x 16",
    ),
    "blocks before the weight": (
        {"selected_blocks": {"model.layers.0.self_attn.q_proj": [[-1, 0]]}, "num_blocks": 1},
        r"block \[-1, 0\] of .*q_proj', which has 4 x 4",
    ),
    "a block twice": (
        {"selected_blocks": {"model.layers.0.self_attn.q_proj": [[0, 0], [0, 0]]}, "num_blocks": 2},
        r"names block \[0, 0\] of .*q_proj' twice; fix it",
    ),
    "a token that is none": (
        {"trainable_token_indices": [3, 64]},
        r"names token 64, and model\.embed_tokens has 64 rows|either all have trainable_token_indices",
    ),
    "rows in one adapter": (
        {"trainable_token_indices": [3], "block_size": 48},
        "of one model either all|does not divide",
    ),
    "an embedding": ({"target_modules": ["embed_tokens"]}, r"embed_tokens is a Embedding; SMT trains blocks of"),
    "a norm": ({"target_modules": ["q_proj", "input_layernorm"]}, r"input_layernorm is a LlamaRMSNorm; SMT trains"),
    "a target that has no weight": ({"target_modules": ["act_fn", "q_proj"]}, "is a SiLUActivation"),
}


def test_an_adapter_that_is_merged_is_not_replaced(base, batches):
    """Its deltas are in the weights, and what these were would be lost."""
    cell = deepcopy(base)
    model = get_peft_model(cell, make_config()).double()
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' already, which is merged into its weights"):
        get_peft_model(cell, make_config())
    model.unmerge_adapter()
    assert_base_untouched(model, base)
    assert_right(model, base, batches[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["as another adapter", "around the same base"])
@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_a_config_that_is_refused_leaves_the_earlier_adapter_whole(base, batches, options, words, how):
    cell = deepcopy(base)
    model = get_peft_model(cell, make_config()).double().train()
    train(model, batches)
    model.base_model.model.lm_head.weight.requires_grad_(True)  # a user's own choice
    before, expected = state_of(model), outputs(model, batches[0])
    names = list(model.peft_config)
    bad = make_config(**options)
    with pytest.raises((ValueError, TypeError), match=words):
        model.add_adapter("bad", bad) if how == "as another adapter" else get_peft_model(cell, bad)
    assert_same_state(state_of(model), before)
    assert list(model.peft_config) == names and model.active_adapter == "default"
    assert torch.equal(outputs(model, batches[0]), expected)
    assert_right(model, base, batches[0])
    add_adapter(model, "bad", seed=2)
    model.set_adapter("bad")
    assert_right(model, base, batches[0], "bad")


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_has_no_weight_of_its_own_is_unloaded(method, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = RobertaForSequenceClassification(RobertaConfig(**sizes, intermediate_size=32)).eval()
    model = get_peft_model(
        deepcopy(base), make_config(method, target_modules=["query"], budget=2, task_type="SEQ_CLS")
    )
    model.base_model.model.classifier.modules_to_save["default"].dense.weight.data.normal_()
    expected = model.eval()(torch.arange(2, 9)[None]).logits
    merged = model.merge_and_unload()
    assert_close(merged(torch.arange(2, 9)[None]).logits, expected)
    assert merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("way", ["refused", "taken"])
def test_modules_that_are_saved_stay_those_of_the_adapter_that_has_them(base, batches, way):
    model = get_peft_model(deepcopy(base), make_config(modules_to_save=["lm_head"])).double().eval()
    expected = outputs(model, batches[0])
    if way == "refused":
        with pytest.raises(ValueError, match="above"):
            model.add_adapter("b", make_config(modules_to_save=["lm_head"], budget=10**6))
    model.add_adapter("b", make_config(target_modules=["down_proj"]))
    model.set_adapter("b")
    model.set_adapter("default")
    assert_close(outputs(model, batches[0]), expected)
    assert_close(outputs(model.merge_and_unload(), batches[0]), expected)


def test_what_is_refused_is_no_target_afterwards(base):
    model = get_peft_model(deepcopy(base), make_config(target_modules=["q_proj"]))
    before = list(model.base_model.targeted_module_names)
    with pytest.raises(ValueError, match="above"):
        model.add_adapter("b", make_config(target_modules=["v_proj"], budget=10**6))
    assert model.base_model.targeted_module_names == before


def test_heads_are_named_once_however_often_an_adapter_is_loaded(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = RobertaForTokenClassification(RobertaConfig(**sizes, intermediate_size=32))
    options = {"target_modules": ["query"], "budget": 2, "task_type": "TOKEN_CLS"}
    model = get_peft_model(deepcopy(base), make_config(**options))
    named = list(model.peft_config["default"].modules_to_save)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(deepcopy(base), tmp_path / "one")
    assert sorted(again.peft_config["default"].modules_to_save) == sorted(named) == sorted(set(named))


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_a_config_that_is_refused_leaves_a_plain_model_as_it_was(base, batches, options, words):
    model = deepcopy(base)
    before = state_of(model)
    model.lm_head.weight.requires_grad_(False)
    before["flags"]["lm_head.weight"] = False
    with pytest.raises((ValueError, TypeError), match=words):
        get_peft_model(model, make_config(**options))
    assert_same_state(state_of(model), before)
    assert_right(get_peft_model(model, make_config()).double(), base, batches[0])
