"""What would go wrong in silence, is right or said in words: odd modules, second selections, devices, halves."""

import re
from copy import deepcopy

import pytest
import torch
from dense_truth import (
    METHODS,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_gradients,
    bank_of,
    dense_of,
    is_smt,
    layers_of,
    make_config,
    outputs,
    train,
    wrap,
)
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks


@pytest.fixture
def base(llama):
    """Never wrapped, in float64."""
    return llama.double()


# --- one odd module ----------------------------------------------------------------------------------------------


class WithAnOddModule(nn.Module):
    def __init__(self, odd: int):
        super().__init__()
        self.first, self.second, self.odd = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, odd)

    def forward(self, x):
        return self.odd(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("odd", [1, 37, 8], ids=["a gate of one row", "a head of 37 classes", "blocks of 8"])
def test_one_odd_module_that_makes_all_blocks_small_is_named_with_the_size_without_it(odd):
    with pytest.warns(UserWarning, match=r"\bodd\b") as caught:
        get_peft_model(WithAnOddModule(odd), SMTConfig(target_modules="all-linear", num_blocks=4))
    said = [str(w.message) for w in caught if re.search(r"\bodd\b", str(w.message))]
    assert any(re.search(r"\b64\b", text) for text in said), said


@pytest.mark.parametrize("changes", [{"exclude_modules": ["odd"]}, {"block_size": 8}], ids=["excluded", "asked for"])
def test_no_warning_where_the_odd_module_is_no_target_or_the_size_was_asked_for(changes, recwarn):
    config = SMTConfig(target_modules=["first", "second", "odd"], num_blocks=2, **changes)
    model = get_peft_model(WithAnOddModule(8), config)
    assert model.peft_config["default"].block_size == (changes.get("block_size") or 64)
    assert not [w for w in recwarn if "odd" in str(w.message)]


# --- a second selection ------------------------------------------------------------------------------------------


def selecting(**options) -> SMTConfig:
    return make_config(**{"selection": "gradient", "init_weights": True, "warmup_steps": 2, **options})


def test_selecting_again_for_an_adapter_that_was_trained_is_refused_with_a_way_out(base, batches):
    model = get_peft_model(deepcopy(base), selecting()).double().train()
    select_blocks(model, batches, progress_bar=False)
    first = bank_of(model).index.clone()
    train(model, batches)
    expected, blocks = outputs(model, batches[0]), model.peft_config["default"].selected_blocks
    with pytest.raises(ValueError, match=r"(?is)'default'.*(add_adapter|another adapter|new adapter|zero)"):
        select_blocks(model, batches[2:], progress_bar=False)
    assert torch.equal(bank_of(model).index, first) and model.peft_config["default"].selected_blocks == blocks
    assert torch.equal(outputs(model, batches[0]), expected)
    assert_right(model, base, batches[0])


def test_selecting_again_before_any_training_is_the_second_selection(base, batches):
    model = get_peft_model(deepcopy(base), selecting()).double().train()
    select_blocks(model, batches, progress_bar=False)
    model(**batches[0]).loss.backward()
    model.zero_grad()
    second = select_blocks(model, batches[2:], progress_bar=False)
    assert torch.equal(bank_of(model).index, second.index)
    train(model, batches)
    assert_right(model, base, batches[0])
    assert_base_untouched(model, base)


# --- two adapted parts in one model ------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two models in one, as of a policy and its critic; each may be wrapped by itself."""

    def __init__(self, wrapped):
        super().__init__()
        torch.manual_seed(0)
        self.policy, self.critic = wrapped(WithAnOddModule(16)), wrapped(WithAnOddModule(16))

    def forward(self, x, labels=None):
        found = self.policy(x) * self.critic(x).sigmoid()
        return {"loss": found.square().mean(), "out": found}


def with_get_peft_model(part):
    return get_peft_model(part, selecting(target_modules=["first", "second"], budget=6))


def injected(part):
    return inject_adapter_in_model(selecting(target_modules=["first", "second"], budget=6), part)


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"x": torch.linspace(-1, 1, 64) * (i + 1), "labels": torch.tensor(0)}


def by_hand(pair, folder):
    data = [{"x": torch.randn(3, 64, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    select_blocks(pair, data, loss_function=lambda model, batch: model(**batch)["loss"], progress_bar=False)


def by_the_trainer(pair, folder):
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 2}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=2, **quiet)
    Trainer(pair, arguments, train_dataset=Numbers(), callbacks=[SMTWarmupCallback()]).train()


@pytest.mark.parametrize("wrapped", [with_get_peft_model, injected], ids=lambda how: how.__name__)
@pytest.mark.parametrize("warm_up", [by_hand, by_the_trainer], ids=lambda how: how.__name__)
def test_each_of_two_adapted_parts_is_warmed_up_or_the_other_is_named(tmp_path, warm_up, wrapped):
    pair = Pair(wrapped)
    try:
        warm_up(pair, tmp_path)
    except ValueError as error:
        assert re.search(r"policy|critic", str(error)), error
    else:
        for part in (pair.policy, pair.critic):
            assert len(bank_of(part).selected_blocks()) and bank_of(part).selected_blocks() is not None


@pytest.mark.parametrize("wrapped", [with_get_peft_model, injected], ids=lambda how: how.__name__)
def test_each_of_two_adapted_parts_can_be_warmed_up_by_itself(wrapped):
    pair = Pair(wrapped)
    before = deepcopy(pair)
    data = [{"x": torch.randn(3, 64)}] * 2
    for part in (pair.policy, pair.critic):
        select_blocks(part, data, loss_function=lambda m, batch: m(**batch).square().mean(), progress_bar=False)
    for part, untouched in ((pair.policy, before.policy), (pair.critic, before.critic)):
        assert bank_of(part).selected_blocks()
        for name, layer in layers_of(part).items():
            assert torch.equal(layer.base_layer.weight, layers_of(untouched)[name].base_layer.weight)


# --- another default device --------------------------------------------------------------------------------------


@pytest.fixture
def default_device_is_meta():
    """As where a large model is being loaded; what belongs to a model on the CPU must not follow."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("selection", ["gradient", "activation", "random", "diagonal", "magnitude"])
def test_a_default_device_is_not_where_an_adapter_goes(selection, request):
    torch.manual_seed(0)
    plain = WithAnOddModule(16)
    data = [{"x": torch.randn(3, 64)} for _ in range(2)]

    def whole_life(model):
        wrapped = get_peft_model(model, selecting(selection=selection, target_modules=["first", "second"], budget=6))
        if selection in ("gradient", "activation"):
            select_blocks(wrapped, data, loss_function=lambda m, b: m(**b).square().mean(), progress_bar=False)
        for _ in range(2):
            wrapped(data[0]["x"]).square().mean().backward()
            bank = bank_of(wrapped).weight
            bank.data.sub_(bank.grad)
        for parameter in wrapped.parameters():
            parameter.grad = None
        wrapped.merge_adapter()
        merged = wrapped(data[1]["x"]).detach()
        wrapped.unmerge_adapter()
        with torch.no_grad():
            mixed = wrapped.eval()(data[1]["x"], adapter_names=["default", "__base__", "default"])
        return wrapped, [merged, wrapped(data[1]["x"]).detach(), mixed]

    expected, wanted = whole_life(deepcopy(plain))
    request.getfixturevalue("default_device_is_meta")
    model, found = whole_life(deepcopy(plain))
    tensors = [*model.parameters(), *model.buffers(), *found]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert all(layer.get_delta_weight("default").device.type == "cpu" for layer in layers_of(model).values())
    torch.set_default_device(None)
    assert torch.equal(bank_of(model).index, bank_of(expected).index)
    assert_close(bank_of(model).weight, bank_of(expected).weight)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


# --- frozen in part ----------------------------------------------------------------------------------------------


def test_freezing_one_layer_freezes_the_adapter_for_all_to_see(base, batches):
    """One parameter holds the blocks of all layers; a layer that seems frozen but is trained would be a lie."""
    model = wrap(base)
    layer = next(iter(layers_of(model).values()))
    layer.requires_grad_(False)
    assert model.get_nb_trainable_parameters()[0] == 0 and not model(**batches[0]).loss.requires_grad
    model.set_adapter("default")
    assert_right(model, base, batches[0])


@pytest.mark.parametrize("method", METHODS)
def test_freezing_and_thawing_the_whole_model_is_obeyed(base, batches, method):
    model = wrap(base, method)
    outputs(model, batches[0])
    model.requires_grad_(False)
    assert not model(**batches[0]).loss.requires_grad
    model.set_adapter("default")
    assert all("lora_" in name or "smt_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert_right(model, base, batches[0])


@pytest.mark.parametrize("method", METHODS)
def test_freezing_the_adapter_for_one_forward_and_thawing_it_for_the_next(base, batches, method):
    """As alternating optimisation does it, with what was computed before the switch still waiting for its backward."""
    model = wrap(base, method)
    dense = dense_of(base, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    waiting = model(**batches[0]).loss
    for parameter in trained:
        parameter.requires_grad_(False)
    embeddings = model.get_input_embeddings()(batches[1]["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=batches[1]["labels"]).loss.backward()
    assert all(p.grad is None for p in trained) and embeddings.grad.any()
    for parameter in trained:
        parameter.requires_grad_(True)
    (waiting + model(**batches[2]).loss).backward()
    (dense(**batches[0]).loss + dense(**batches[2]).loss).backward()
    assert_same_gradients(model, dense)
    assert is_smt(model) == (method != "lora")
