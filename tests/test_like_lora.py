"""Whatever loop people run around LoRA, they run around SMT: outputs and gradients are those of the full weight."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from dense_truth import (
    METHODS,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_same_gradients,
    bank_of,
    base_weights,
    dense_of,
    gradients_of,
    layers_of,
    make_config,
    outputs,
    train,
    with_everything_trainable,
    wrap,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.parametrize("method", METHODS)
OTHER = {"target_modules": ["v_proj", "down_proj"], "block_size": 8, "budget": 30, "seed": 5}


@pytest.fixture
def base(llama):
    """Never wrapped, in float64: what an adapter must leave alone."""
    return llama.double()


def assert_same_outputs(model, dense, batches):
    for batch in batches:
        assert_close(outputs(model, batch), outputs(dense, batch))


# --- steps one after the other -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_keeps_nothing_of_the_graph_of_the_one_before(base, batches, method, fused):
    """Whatever is kept, its stream is kept with it: a step on another stream could not be captured in a CUDA graph."""
    model = wrap(base, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fused)  # fused ones change no version
    for step in range(3):
        loss = model(**batches[0]).loss
        ends = [torch.autograd.graph.get_gradient_edge(p).node.metadata for p in trained]
        assert not any(ends)
        for end in ends:
            end["step"] = step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss, ends, end


# --- several adapters, several models ----------------------------------------------------------------------------


def test_two_adapters_in_one_loss_each_get_their_own_gradient(base, batches, method):
    model = wrap(base, method)
    add_adapter(model, "other", **OTHER)
    first, second = dense_of(base, model, "default"), dense_of(base, model, "other")
    losses = []
    for adapter, batch in (("default", batches[0]), ("other", batches[1]), ("default", batches[2])):
        model.set_adapter(adapter)
        losses.append(with_everything_trainable(model)(**batch).loss)
    (losses[0] - 2 * losses[1] + 3 * losses[2]).backward()
    (first(**batches[0]).loss + 3 * first(**batches[2]).loss).backward()
    (-2 * second(**batches[1]).loss).backward()
    assert_same_gradients(model, first, "default")
    assert_same_gradients(model, second, "other")


def test_two_adapters_in_one_loss_on_a_frozen_side_give_the_other_its_gradient(base, batches, method):
    """A student beside a frozen teacher in one model: only the student is trained, through both forwards."""
    model = wrap(base, method)
    add_adapter(model, "teacher", **OTHER)
    student, teacher = dense_of(base, model, "default"), dense_of(base, model, "teacher")
    model.set_adapter("teacher")
    with torch.no_grad():
        wanted = model(**batches[0]).logits
    model.set_adapter("default")
    (model(**batches[0]).logits - wanted).square().mean().backward()
    with torch.no_grad():
        wanted = teacher(**batches[0]).logits
    (student(**batches[0]).logits - wanted).square().mean().backward()
    assert_same_gradients(model, student)


@pytest.mark.parametrize("same_parameters", [True, False], ids=["one parameter", "one storage"])
def test_models_that_share_base_tensors_do_not_see_each_others_adapter(
    base, make_llama, batches, method, same_parameters
):
    plain = make_llama().double()
    models, truths = [], []
    for seed in (1, 2):
        sharing = make_llama()
        sharing.load_state_dict(plain.state_dict(keep_vars=same_parameters), assign=True)
        torch.manual_seed(seed)
        models.append(get_peft_model(sharing, make_config(method, seed=seed)).double())
        truths.append(dense_of(base, models[-1]))
    for name, weight in base_weights(models[0]).items():
        assert (
            weight.data_ptr()
            == base_weights(models[1])[name].data_ptr()
            == plain.get_submodule(name).weight.data_ptr()
        )
    for _ in range(2):
        assert_same_outputs(models[0], truths[0], batches[:1])
        assert_same_outputs(models[1], truths[1], batches[:1])
        assert torch.equal(outputs(plain, batches[0]), outputs(base, batches[0]))
    losses = [model.train()(**batches[0]).loss for model in models]
    outputs(plain, batches[0])
    for loss, model, truth in zip(losses, models, truths, strict=True):
        loss.backward()
        truth(**batches[0]).loss.backward()
        assert_same_gradients(model, truth)
    assert_base_untouched(plain, base)


# --- values that change without an optimizer -----------------------------------------------------------------------


def copied(parameters):
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape) * 0.02)


def set_to_zero(parameters):
    for parameter in parameters:
        parameter.data.mul_(0)


def given_another_tensor(parameters):
    for parameter in parameters:
        parameter.data = torch.randn_like(parameter) * 0.02


def perturbed(parameters):
    """As MeZO does it: there, back past the start, and a step."""
    for parameter in parameters:
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.01 * noise
        parameter.data = parameter.data - 0.02 * noise
        parameter.data.add_(noise, alpha=0.003)


def stepped_by_a_fused_optimizer(parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters, lr=0.01, fused=True).step()
    for parameter in parameters:
        parameter.grad = None


CHANGES = [copied, set_to_zero, given_another_tensor, perturbed, stepped_by_a_fused_optimizer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_forward_sees_a_parameter_that_was(base, batches, method, change):
    model = wrap(base, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    outputs(model, batches[0])
    model(**batches[0]).loss.backward()
    model.zero_grad()
    for _ in range(2):
        change(trained)
        dense = dense_of(base, model)
        assert_same_outputs(model, dense, batches[:1])
        model(**batches[0]).loss.backward()
        dense(**batches[0]).loss.backward()
        assert_same_gradients(model, dense)
        model.zero_grad()


def test_averaged_weights_are_seen_when_they_are_swapped_in_and_out(base, batches, method):
    model = wrap(base, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    averages = [p.data.clone() for p in trained]
    train(model, batches)
    last = outputs(model, batches[0])
    for average, parameter in zip(averages, trained, strict=True):
        average.mul_(0.5).add_(parameter.data, alpha=0.5)
        average.data, parameter.data = parameter.data, average.data
    assert_same_outputs(model, dense_of(base, model), batches[:1])
    for average, parameter in zip(averages, trained, strict=True):
        average.data, parameter.data = parameter.data, average.data
    assert torch.equal(outputs(model, batches[0]), last)


def test_mezo_estimates_the_slope_of_the_dense_model(base, batches, method):
    model = wrap(base, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**batches[0]).loss.backward()
    noise = [torch.randn_like(p) for p in trained]
    slope = sum((p.grad * z).sum() for p, z in zip(trained, noise, strict=True))
    losses = []
    for step in (1e-3, -2e-3):
        for parameter, z in zip(trained, noise, strict=True):
            parameter.data.add_(z, alpha=step)
        with torch.no_grad():
            losses.append(model(**batches[0]).loss)
    assert ((losses[0] - losses[1]) / 2e-3).item() == pytest.approx(slope.item(), rel=1e-2)


# --- teachers and averages ------------------------------------------------------------------------------------------


def test_a_teacher_made_by_deepcopy_follows_the_parameters_of_its_student(base, batches, method):
    student = wrap(base, method)
    teacher = deepcopy(student)
    for _ in range(3):
        train(student, batches)
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)
    assert_base_untouched(teacher, base)
    assert_same_outputs(teacher, dense_of(base, teacher), batches)
    assert_same_outputs(student, dense_of(base, student), batches)


def test_an_averaged_model_is_the_base_with_averaged_deltas(base, batches, method):
    """Not with use_buffers=True, which would average the index as numbers."""
    model = wrap(base, method)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        train(model, batches)
        averaged.update_parameters(model)
    assert_base_untouched(averaged.module, base)
    assert_same_outputs(averaged.module, dense_of(base, averaged.module), batches)


def test_trls_reference_model_follows_the_policy(base, batches, method):
    callbacks = pytest.importorskip("trl.trainer.callbacks", reason="TRL's reference model needs trl")
    policy = wrap(base, method)
    reference = deepcopy(policy).eval()
    for _ in range(2):
        train(policy, batches)
        callbacks.SyncRefModelCallback._sync_target_model(policy, reference, 0.6)
    assert_base_untouched(reference, base)
    assert_same_outputs(reference, dense_of(base, reference), batches)


def test_a_reference_adapter_stays_where_it_was_copied_from_the_policy(base, batches, method):
    """As TRL does it: an adapter "ref" of the same config, filled through the parameters' names."""
    model = wrap(base, method)
    train(model, batches)
    model.add_adapter("ref", model.peft_config["default"])
    model.double()
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    before = dense_of(base, model, "default")
    train(model, batches)
    after = dense_of(base, model, "default")
    for adapter, truth in (("ref", before), ("default", after), ("ref", before)):
        model.set_adapter(adapter)
        assert_same_outputs(model, truth, batches[:2])


# --- the base is the base ---------------------------------------------------------------------------------------


def test_a_state_dict_that_is_kept_holds_the_base_for_ever(base, batches, method):
    model = wrap(base, method)
    outputs(model, batches[0])
    loss = model(**batches[0]).loss
    kept = model.state_dict()
    loss.backward()
    train(model, batches, steps=3)
    for name, weight in base.state_dict().items():
        key = f"base_model.model.{name}"
        assert torch.equal(kept[key if key in kept else key.replace(".weight", ".base_layer.weight")], weight), name


def test_a_base_weight_that_is_edited_keeps_its_edit(base, batches, method):
    model = wrap(base, method)
    outputs(model, batches[0])
    edited = deepcopy(base)
    for name, weight in base_weights(model).items():
        edit = torch.randn_like(weight) * 0.05
        weight.data += edit
        edited.get_submodule(name).weight.data += edit
    dense = dense_of(edited, model)
    assert_same_outputs(model, dense, batches[:1])
    model(**batches[0]).loss.backward()
    dense(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batches[0]), outputs(edited, batches[0]))
    assert_base_untouched(model, edited)


def test_base_weights_trained_beside_the_adapter_get_the_gradient_of_the_full_weight(base, batches, method):
    model, expected = wrap(base, method), deepcopy(base)
    outputs(model, batches[0])
    for weight in base_weights(model).values():
        weight.requires_grad_(True)
    for batch in batches:
        dense = dense_of(expected, model)
        model(**batch).loss.backward()
        dense(**batch).loss.backward()
        assert_same_gradients(model, dense)
        for name, full in gradients_of(dense).items():
            weight = layers_of(model)[name].get_base_layer().weight
            assert_close(weight.grad, full)
            weight.data -= 0.1 * weight.grad
            expected.get_submodule(name).weight.data -= 0.1 * full
        model.zero_grad()
    for name, weight in base_weights(model).items():
        assert_close(weight, expected.get_submodule(name).weight)


def test_the_dense_delta_that_a_layer_gives_is_that_of_its_parameters(base, batches, method):
    model = wrap(base, method)
    train(model, batches)
    dense = dense_of(base, model)
    for name, layer in layers_of(model).items():
        found = layer.get_base_layer().weight + layer.get_delta_weight("default")
        torch.testing.assert_close(found, dense.get_submodule(name).weight, rtol=1e-6, atol=1e-7)
        if method != "lora":
            assert bank_of(model).weight.any()


def test_hooks_of_all_modules_see_what_the_base_layers_return(base, batches, method):
    model = wrap(base, method)
    kept = []

    def keep(module, args, output):
        if type(module) is torch.nn.Linear:
            kept.append((module, args[0], output, output.clone()))

    handle = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        outputs(model, batches[0])
        model(**batches[0])
    finally:
        handle.remove()
    assert {id(layer.base_layer) for layer in layers_of(model).values()} <= {id(module) for module, *_ in kept}
    for module, x, output, seen in kept:
        assert torch.equal(output, seen) and torch.equal(output, torch.nn.functional.linear(x, module.weight))


def test_a_tied_head_without_deltas_stays_tied_when_others_are_merged(make_llama, method):
    options = {"target_modules": ["q_proj"]}
    if method != "lora":
        block = [[*range(16)], [*range(16)]] if method == "sorted" else [0, 0]
        blocks = {"model.layers.0.self_attn.q_proj": [block]}
        options = {"target_modules": ["q_proj", "lm_head"], "selected_blocks": blocks, "num_blocks": None}
    model = wrap(make_llama(tie_word_embeddings=True), method, **options)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


def test_a_sequence_of_layers_may_be_the_whole_model(method):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32)).double()
    model, x = wrap(base, method, target_modules=["0", "2"], budget=5), torch.randn(3, 32, dtype=torch.float64)
    y = model(x)
    assert not torch.equal(y, base(x))
    model.merge_adapter()
    assert_close(y, model(x))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_module", [False, True])
def test_rows_of_the_embedding_are_trained_and_saved_with_it(make_llama, batches, tmp_path, method, tied, by_module):
    """As TRL asks for where a chat template adds tokens."""
    base, tokens = make_llama(tie_word_embeddings=tied), batches[0]["input_ids"].unique().tolist()[2:0:-1]
    model = wrap(base, method, trainable_token_indices={"embed_tokens": tokens} if by_module else tokens)
    train(model, batches)
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].detach()
    dense = dense_of(base, model)
    assert not torch.equal(rows, dense.model.embed_tokens.weight[tokens])
    dense.model.embed_tokens.weight.data[tokens] = rows
    expected = outputs(model, batches[0])
    torch.testing.assert_close(expected, outputs(dense, batches[0]), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded, by_transformers = PeftModel.from_pretrained(deepcopy(base), tmp_path), deepcopy(base)
    by_transformers.load_adapter(str(tmp_path))
    assert torch.equal(outputs(loaded, batches[0]), expected)
    assert torch.equal(outputs(by_transformers, batches[0]), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batches[0]), outputs(base, batches[0]))
    merged = outputs(loaded.merge_and_unload(), batches[0])
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_rows_come_off_and_stay_out_of_mixed_batches(make_llama, batches, method):
    if method == "lora":
        pytest.skip("leaves merged weights in an unloaded model, and cannot save one of two adapters")
    base = make_llama()
    model = wrap(base, method, trainable_token_indices=[5, 9])
    with pytest.raises(ValueError, match="either all have trainable_token_indices, or none has"):
        add_adapter(model, "other", seed=3)
    add_adapter(model, "other", seed=3, trainable_token_indices=[9])
    train(model, batches)
    with torch.no_grad(), model.disable_adapter():
        found = model.eval()(batches[0]["input_ids"], adapter_names=["default", "other"]).logits
    assert_close(found, outputs(base, batches[0]))
    with pytest.raises(ValueError, match=r"rows of an earlier adapter 'default' \(trainable_token_indices\)"):
        get_peft_model(model.get_base_model(), make_config(method, trainable_token_indices=[7]))
    model.merge_adapter()
    assert torch.equal(outputs(model.unload(), batches[0]), outputs(base, batches[0]))


def test_pefts_switch_for_the_casting_of_inputs_changes_nothing(base, batches, method):
    model = wrap(base, method)
    expected = outputs(model, batches[0])
    with disable_input_dtype_casting(model):
        assert torch.equal(outputs(model, batches[0]), expected)


def test_a_state_dict_of_the_trained_parameters_is_enough_to_save(base, batches, tmp_path, method):
    """As trainers gather it under ZeRO-3."""
    model = wrap(base, method)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path, state_dict=trained)
    assert_close(outputs(PeftModel.from_pretrained(deepcopy(base), tmp_path), batches[0]), outputs(model, batches[0]))


def test_a_state_dict_that_is_the_adapters_is_saved_again(base, batches, tmp_path, method):
    """Scripts of LLaMA's first year put one in the place of the model's."""
    model = wrap(base, method)
    old = model.state_dict
    model.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, old())).__get__(model, type(model))
    model.save_pretrained(tmp_path)
    assert_close(outputs(PeftModel.from_pretrained(deepcopy(base), tmp_path), batches[0]), outputs(model, batches[0]))


def test_a_state_dict_of_one_adapter_is_not_another_s(base, method, tmp_path):
    model = wrap(base, method)
    of_default = get_peft_model_state_dict(model)
    add_adapter(model, "second", seed=3)
    with pytest.raises(KeyError) if method != "lora" else nullcontext():
        get_peft_model_state_dict(model, of_default, "second")


def test_a_base_that_was_compiled_first_takes_adapters_and_gives_them_back(base, batches, method):
    plain = wrap(base, method)
    add_adapter(plain, "second", seed=3)
    torch.manual_seed(1)  # as `wrap`
    model = get_peft_model(torch.compile(deepcopy(base), backend="eager"), make_config(method)).double()
    add_adapter(model, "second", seed=3)
    for name in ("default", "second"):
        model.set_adapter(name)
        plain.set_adapter(name)
        assert any(f".{name}." in key for key in model.state_dict())
        assert_close(outputs(model, batches[0]), outputs(plain, batches[0]))
    merged = model.merge_and_unload(adapter_names=["default"])
    assert {key.removeprefix("_orig_mod.") for key in merged.state_dict()} == set(base.state_dict())
