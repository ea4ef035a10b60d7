"""What PEFT does with adapters in a model: add, switch, combine, mix, merge and copy."""

import pickle
from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from smt_peft import SMTConfig
from smt_peft.layer import Linear

OTHER = {"block_size": 8, "num_blocks": 30, "seed": 5, "target_modules": ["v_proj", "down_proj"]}
OVERLAPPING = {"block_size": 32, "num_blocks": 12, "seed": 6}


def config(**options) -> SMTConfig:
    """An adapter that changes the model from the start, without a warm-up."""
    defaults = {"block_size": 16, "num_blocks": 20, "selection": "random", "init_weights": False}
    return SMTConfig(**{**defaults, **options})


def wrap(base, **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, config(**options))


def base_weights(model) -> dict[str, torch.Tensor]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name.removeprefix("base_model.model."): m.base_layer.weight.clone() for name, m in layers.items()}


def assert_equal_weights(model, base):
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, base.get_submodule(name).weight), name


def with_deltas(base, model, *adapters):
    """A dense model that holds the deltas of the adapters."""
    dense = deepcopy(base)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, Linear):
            for adapter in adapters:
                dense.get_submodule(name).weight.data += module.get_delta_weight(adapter)
    return dense


@pytest.fixture
def base(llama):
    """What the model was before it was wrapped."""
    return deepcopy(llama)


# --- several adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def two(llama, base):
    """A model with the adapters "default" and "other", of different block sizes and targets."""
    model = wrap(llama)
    model.add_adapter("other", config(**OTHER))
    return model


def test_each_adapter_computes_as_if_alone(two, base, logits):
    for adapter in ("default", "other", "default"):
        two.set_adapter(adapter)
        torch.testing.assert_close(logits(two), logits(with_deltas(base, two, adapter)), rtol=1e-4, atol=1e-5)
        assert two.active_adapter == adapter


@pytest.mark.parametrize("second", [OTHER, OVERLAPPING], ids=["other blocks", "overlapping blocks"])
def test_adapters_active_together_add_up_and_come_off_bit_for_bit(llama, base, logits, second):
    model = wrap(llama)
    model.add_adapter("second", config(**second))
    alone = logits(model)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(with_deltas(base, model, "default", "second"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["second"])
    torch.testing.assert_close(logits(model), logits(with_deltas(base, model, "second")), rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
        assert_equal_weights(model, base)


def test_a_deleted_adapter_leaves_nothing(two, base, logits):
    two.base_model.set_adapter(["default", "other"])
    logits(two)
    two.delete_adapter("other")
    torch.testing.assert_close(logits(two), logits(with_deltas(base, two, "default")), rtol=1e-4, atol=1e-5)
    assert "other" not in two.peft_config and not any(".other" in key for key in two.state_dict())


def test_a_saved_adapter_can_be_added_under_another_name(two, base, logits, tmp_path):
    two.save_pretrained(tmp_path, selected_adapters=["other"])
    two.set_adapter("other")
    model = wrap(base, seed=9)
    logits(model)
    model.load_adapter(tmp_path / "other", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(two))


def test_rows_of_a_batch_may_each_have_an_adapter(two, batches, logits):
    names = ["default", "__base__", "other", "default"]
    rows = torch.cat([batch["input_ids"] for batch in batches[:2]])
    logits(two)
    with torch.no_grad():
        mixed = two(rows, adapter_names=names).logits
        for row, name, got in zip(rows, names, mixed, strict=True):
            if name == "__base__":
                with two.disable_adapter():
                    expected = two(row[None]).logits[0]
            else:
                two.set_adapter(name)
                expected = two(row[None]).logits[0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


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


def test_status_tells_what_is_active_and_trainable(two, tmp_path):
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


@pytest.mark.parametrize("used", [False, True], ids=["before a forward", "after a forward"])
def test_merging_computes_the_same_and_unmerging_restores_every_bit(llama, base, logits, used):
    model = wrap(llama)
    expected = logits(with_deltas(base, model, "default"))
    if used:
        logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert_equal_weights(model, base)
        assert torch.equal(logits(model), logits(base))


def test_the_merged_model_is_a_plain_one_with_the_adapters_logits(llama, logits):
    names = [name for name, _ in llama.named_modules()]
    model = wrap(llama)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in merged.named_modules()] == names and not merged._forward_pre_hooks
    assert not any("smt" in key for key in merged.state_dict())


def test_unloading_gives_the_base_model_back_bit_for_bit(two, base, logits):
    two.base_model.set_adapter(["default", "other"])
    logits(two)
    unloaded = two.unload()
    assert torch.equal(logits(unloaded), logits(base))
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in unloaded.state_dict().items())


def test_several_adapters_merge_one_by_one_and_all_come_off(two, base, logits):
    two.merge_adapter(["other"])
    two.merge_adapter(["default"])
    expected = logits(with_deltas(base, two, "default", "other"))
    torch.testing.assert_close(logits(two), expected, rtol=1e-4, atol=1e-5)
    two.unmerge_adapter()
    with two.disable_adapter():
        assert_equal_weights(two, base)


def test_a_safe_merge_refuses_nan_and_leaves_the_weight_alone(llama, base):
    model = wrap(llama)
    model.base_model.model.smt_bank["default"].weight.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert_equal_weights(model, base)


def test_the_delta_of_a_transposed_weight_has_the_shape_of_the_weight():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    base = deepcopy(gpt2)
    model = wrap(gpt2, block_size=8, num_blocks=7)
    delta = model.base_model.model.transformer.h[0].attn.c_attn.get_delta_weight("default")
    merged = model.merge_and_unload().transformer.h[0].attn.c_attn.weight
    assert delta.shape == (32, 96) and delta.count_nonzero() == 7 * 64
    torch.testing.assert_close(merged, base.transformer.h[0].attn.c_attn.weight + delta)


# --- copies, dtypes and state dicts while the weights hold deltas ----------------------------------------------------


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_in_use_is_equal_and_independent(llama, base, batches, logits, copy):
    model = wrap(llama).train()
    model(**batches[0]).loss.backward()
    expected = logits(model)
    twin = copy(model)
    assert torch.equal(logits(twin), expected)
    torch.nn.init.zeros_(twin.base_model.model.smt_bank["default"].weight)
    assert torch.equal(logits(twin), logits(base)) and torch.equal(logits(model), expected)
    with model.disable_adapter(), twin.disable_adapter():
        assert_equal_weights(model, base)
        assert_equal_weights(twin, base)
    twin.train()(**batches[0]).loss.backward()
    assert twin.base_model.model.smt_bank["default"].weight.grad.any()


def test_base_weights_loaded_into_a_model_in_use_get_the_deltas(llama, make_llama, logits):
    model = wrap(llama)
    state = deepcopy(model.state_dict())
    logits(model)
    generator = torch.Generator().manual_seed(4)
    for key in state:
        if key.endswith("base_layer.weight"):
            state[key] = torch.randn(state[key].shape, generator=generator) * 0.1
    model.load_state_dict(state)
    other = make_llama()
    other.load_state_dict(
        {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in state.items() if "smt" not in k}
    )
    torch.testing.assert_close(logits(model), logits(with_deltas(other, model, "default")), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert_equal_weights(model, other)


def test_a_model_in_use_can_change_its_dtype(llama, base, logits):
    model = wrap(llama)
    logits(model)
    model.to(torch.bfloat16)
    dense = with_deltas(base, model, "default").to(torch.bfloat16)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.05)
    with model.disable_adapter():
        assert_equal_weights(model, base.to(torch.bfloat16))
