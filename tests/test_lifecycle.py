"""What PEFT does with adapters in a model: add, switch, combine, mix, merge, copy. As LoRA, and as the dense truth."""

import pickle
from copy import deepcopy

import pytest
import torch
from dense_truth import (
    METHODS,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_state,
    bank_of,
    dense_of,
    is_smt,
    outputs,
    state_of,
    wrap,
)
from peft import get_base_model_state_dict, set_base_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

OTHER = {"block_size": 8, "budget": 30, "seed": 5, "target_modules": ["v_proj", "down_proj"]}
OVERLAPPING = {"block_size": 32, "budget": 12, "seed": 6}
OURS = ["smt", "sorted"]
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def base(llama):
    """Never wrapped, in float64."""
    return llama.double()


def with_another(base, method):
    """A model with the adapters "default" and "other", of different block sizes and targets."""
    model = wrap(base, method)
    add_adapter(model, "other", **OTHER)
    return model


@pytest.fixture(params=METHODS)
def two(request, base):
    return with_another(base, request.param)


# --- several adapters -------------------------------------------------------------------------------------------


def test_each_adapter_computes_as_if_alone(two, base, batches):
    for adapter in ("default", "other", "default"):
        two.set_adapter(adapter)
        assert_right(two, base, batches[0], adapter)
        assert two.active_adapter == adapter


@methods
@pytest.mark.parametrize("second", [OTHER, OVERLAPPING], ids=["other blocks", "overlapping blocks"])
def test_adapters_active_together_add_up_and_come_off_bit_for_bit(base, batches, method, second):
    model = wrap(base, method)
    add_adapter(model, "second", **second)
    alone = outputs(model, batches[0])
    for active in (["default", "second"], ["second"]):
        model.base_model.set_adapter(active)
        assert_close(outputs(model, batches[0]), outputs(dense_of(base, model, *active), batches[0]))
    model.set_adapter("default")
    assert torch.equal(outputs(model, batches[0]), alone)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batches[0]), outputs(base, batches[0]))
    assert_base_untouched(model, base)


def test_a_deleted_adapter_leaves_nothing(two, base, batches):
    two.base_model.set_adapter(["default", "other"])
    two.delete_adapter("other")
    assert_right(two, base, batches[0])
    assert "other" not in two.peft_config and not any(".other" in key for key in two.state_dict())


@methods
def test_a_saved_adapter_can_be_added_under_another_name(llama, batches, tmp_path, method):
    two = with_another(llama, method)
    two.save_pretrained(tmp_path, selected_adapters=["other"])
    two.set_adapter("other")
    model = wrap(llama, method, seed=9)
    model.load_adapter(tmp_path / "other", "again")
    model.set_adapter("again")
    assert torch.equal(outputs(model, batches[0]), outputs(two, batches[0]))


def test_rows_of_a_batch_may_each_have_an_adapter(two, base, batches):
    names = ["default", "__base__", "other", "default"]
    rows = torch.cat([batch["input_ids"] for batch in batches[:2]])
    mixed = two.eval()(rows, adapter_names=names).logits
    for row, name, found in zip(rows, names, mixed, strict=True):
        dense = base if name == "__base__" else dense_of(base, two, name)
        assert_close(found, outputs(dense, {"input_ids": row[None]})[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_mixed_adapters_equals_separate_runs(two, batches, beams):
    names, rows = ["default", "other"], batches[0]["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mixed = two.eval().generate(input_ids=rows, adapter_names=names, **options)
    for row, name, got in zip(rows, names, mixed, strict=True):
        two.set_adapter(name)
        assert torch.equal(two.generate(input_ids=row[None], **options)[0], got)


@pytest.mark.parametrize(
    "names, message",
    [(["default"], "adapter_names.* 1 and 2"), (["default", "nobody"], "non-existing adapter.*nobody")],
)
def test_adapter_names_that_do_not_fit_are_refused(two, batches, names, message):
    with pytest.raises(ValueError, match=message):
        two.eval()(batches[0]["input_ids"], adapter_names=names)


def test_adapter_names_are_refused_where_they_would_count_twice_or_be_trained(two, batches):
    rows, names = batches[0]["input_ids"], ["default", "other"]
    with pytest.raises(ValueError, match="in training mode"):
        two.train()(rows, adapter_names=names)
    two.merge_adapter(["other"])
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        two.eval()(rows, adapter_names=names)


@pytest.mark.parametrize("method", OURS)
def test_status_tells_what_is_active_and_trainable(base, method):
    two = with_another(base, method)
    status = two.get_model_status()
    assert status.adapter_model_type == "SMTModel" and status.peft_types == {"default": "SMT", "other": "SMT"}
    assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    two.set_adapter("other")
    assert two.get_model_status().requires_grad == {"default": False, "other": True}
    layer = next(s for s in two.get_layer_status() if s.name.endswith("q_proj"))
    assert layer.available_adapters == ["default"] and layer.requires_grad == {"default": False}
    two.merge_adapter(["other"])
    assert two.get_model_status().merged_adapters == ["other"]


# --- merge and take apart -----------------------------------------------------------------------------------------


@methods
def test_merging_computes_the_same_and_unmerging_restores_every_bit(base, batches, method):
    model = wrap(base, method)
    expected = outputs(dense_of(base, model), batches[0])
    model.merge_adapter(safe_merge=True)
    assert_close(outputs(model, batches[0]), expected)
    model.unmerge_adapter()
    assert_close(outputs(model, batches[0]), expected)
    if is_smt(model):  # LoRA's unmerging leaves rounding in the weight
        assert_base_untouched(model, base)


@methods
def test_the_merged_model_is_a_plain_one_with_the_adapters_logits(base, batches, method):
    model = wrap(base, method)
    expected = outputs(dense_of(base, model), batches[0])
    merged = model.merge_and_unload()
    assert_close(outputs(merged, batches[0]), expected)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in base.named_modules()]
    assert merged.state_dict().keys() == base.state_dict().keys() and not merged._forward_pre_hooks


def test_unloading_gives_the_base_model_back_bit_for_bit(two, base, batches):
    two.base_model.set_adapter(["default", "other"])
    outputs(two, batches[0])
    unloaded = two.unload()
    for name, value in base.state_dict().items():
        assert torch.equal(unloaded.state_dict()[name], value), name
    assert torch.equal(outputs(unloaded, batches[0]), outputs(base, batches[0]))
    assert unloaded.state_dict().keys() == base.state_dict().keys()


def test_several_adapters_merge_one_by_one_and_all_come_off(two, base, batches):
    two.merge_adapter(["other"])
    two.merge_adapter(["default"])
    assert_close(outputs(two, batches[0]), outputs(dense_of(base, two, "default", "other"), batches[0]))
    two.unmerge_adapter()
    if is_smt(two):
        assert_base_untouched(two, base)


@pytest.mark.parametrize("method", OURS)
def test_a_safe_merge_refuses_nan_and_leaves_the_weight_alone(base, method):
    model = wrap(base, method)
    bank_of(model).weight.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert_base_untouched(model, base)


def test_the_delta_of_a_transposed_weight_has_the_shape_of_the_weight():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    model = wrap(gpt2, block_size=8, budget=7, target_modules=["c_attn"])
    delta = model.base_model.model.transformer.h[0].attn.c_attn.get_delta_weight("default")
    merged = model.merge_and_unload().transformer.h[0].attn.c_attn.weight
    assert delta.shape == (32, 96) and delta.count_nonzero() == 7 * 64
    torch.testing.assert_close(merged, gpt2.transformer.h[0].attn.c_attn.weight + delta)


# --- copies, dtypes and state dicts of a model in use --------------------------------------------------------------


@methods
@pytest.mark.parametrize(
    "copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_in_use_is_equal_and_independent(base, batches, method, copy):
    model = wrap(base, method)
    model(**batches[0]).loss.backward()
    expected, before = outputs(model, batches[0]), state_of(model)
    twin = copy(model)
    assert torch.equal(outputs(twin, batches[0]), expected)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    assert_right(twin, base, batches[0])
    assert torch.equal(outputs(model, batches[0]), expected)
    assert_same_state(state_of(model), before)


@methods
def test_base_weights_loaded_into_a_model_in_use_get_the_deltas(base, batches, method):
    model, other = wrap(base, method), deepcopy(base)
    outputs(model, batches[0])
    torch.manual_seed(4)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    set_base_model_state_dict(model, other.state_dict())
    assert_base_untouched(model, other)
    assert_right(model, other, batches[0])


@methods
def test_base_weights_of_one_model_leave_the_adapter_of_another_alone(base, batches, method):
    model, other = wrap(base, method), wrap(base, method, seed=5)
    before = state_of(model)
    held = get_base_model_state_dict(other)
    assert held.keys() == base.state_dict().keys()
    set_base_model_state_dict(model, held)
    assert_same_state(state_of(model), before)


@methods
def test_a_model_in_use_can_change_its_dtype(base, batches, method):
    model = wrap(base, method)
    outputs(model, batches[0])
    model.to(torch.bfloat16)
    dense = dense_of(base, model).to(torch.bfloat16)
    torch.testing.assert_close(outputs(model, batches[0]), outputs(dense, batches[0]), rtol=0.05, atol=0.05)
    assert_base_untouched(model, base.to(torch.bfloat16))
