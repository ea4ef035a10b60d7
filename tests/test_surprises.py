"""What would go wrong in silence, is right or said in words: odd modules, second selections, devices, halves."""

import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from dense_truth import (
    METHODS,
    QKV,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_gradients,
    assert_same_state,
    bank_of,
    deltas_of,
    dense_of,
    layers_of,
    make_config,
    outputs,
    state_of,
    train,
    wrap,
)
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.functional import delete_adapter
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

from smt_peft import Selection, SMTConfig, SMTModel, SMTWarmupCallback, banks, quantized, select_blocks
from smt_peft.patches import sparse_patch
from smt_peft.targets import count_base_parameters


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


@pytest.mark.parametrize("odd", [37, 8], ids=["a head of 37 classes", "blocks of 8"])
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
def test_two_adapted_parts_with_one_adapter_name_are_both_named(tmp_path, warm_up, wrapped):
    pair = Pair(wrapped)
    with pytest.raises(ValueError, match=r"policy.*critic"):
        warm_up(pair, tmp_path)


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


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_a_default_device_is_not_where_a_loaded_adapter_goes(llama, batches, method, tmp_path, request):
    model = wrap(llama, method)
    expected, folder = outputs(model, batches[0]), tmp_path / "adapter"
    request.getfixturevalue("default_device_is_meta")
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(deepcopy(llama), folder)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    assert_close(outputs(loaded, batches[0]), expected)


@pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
def test_a_default_device_is_not_where_a_selection_goes(llama, batches, arrangement, tmp_path, request):
    options = {"selection": "gradient", "init_weights": True, "arrangement": arrangement, "warmup_steps": 2}
    model = wrap(llama, **options)
    model.add_adapter("second", make_config(**options))
    request.getfixturevalue("default_device_is_meta")
    selection = select_blocks(model, batches, progress_bar=False)
    selection.save(tmp_path / "a folder of its own")
    loaded = Selection.load(tmp_path / "a folder of its own")
    assert torch.equal(loaded.index, selection.index) and loaded.index.device.type == "cpu"
    given = get_peft_model(deepcopy(llama), SMTConfig(target_modules=QKV, selected_blocks=loaded))
    assert torch.equal(bank_of(given).index, bank_of(model).index)
    model.set_adapter("second")
    second = select_blocks(model, batches, "second", progress_bar=False, avoid=["default"])
    assert second.overlap(selection) == 0


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
    below = []
    for one in (model, dense):
        embeddings = base.get_input_embeddings()(batches[1]["input_ids"]).detach().requires_grad_()
        one(inputs_embeds=embeddings, labels=batches[1]["labels"]).loss.backward()
        below.append(embeddings.grad)
    assert_close(*below)
    assert all(p.grad is None for p in trained)
    dense.zero_grad()
    for parameter in trained:
        parameter.requires_grad_(True)
    (waiting + model(**batches[2]).loss).backward()
    (dense(**batches[0]).loss + dense(**batches[2]).loss).backward()
    assert_same_gradients(model, dense)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda bank: bank.index.copy_(bank.index.flip(0)), "order of the targets"),
        (lambda bank: bank.index[0].fill_(99), "does not exist"),
        (
            lambda bank: (bank.fingerprint.add_(1), bank.index[:2].copy_(bank.index[:2].flip(0))),
            "other target modules",
        ),
    ],
    ids=["out of order", "outside", "of other targets"],
)
def test_an_index_that_is_written_in_place_is_checked(base, batches, spoil, words):
    """As DDP writes buffers, distributed checkpoints and averages do, past all hooks."""
    model = wrap(base)
    spoil(bank_of(model))
    with pytest.raises(ValueError, match=words):
        model(**batches[0])


def test_an_index_that_is_another_tensor_has_other_plans(base, batches):
    model, other = wrap(base), bank_of(wrap(base, seed=4)).index
    outputs(model, batches[0])
    new = other.clone()
    while new._version < bank_of(model).index._version:
        new.copy_(other)
    bank_of(model).index = new
    assert_close(outputs(model, batches[0]), outputs(dense_of(base, model), batches[0]))


@pytest.mark.parametrize("place", [[0, 4, 0], [0, 0, 4], [99, 0, 0]], ids=["row", "column", "target"])
def test_the_first_place_outside_is_outside(llama, place):
    model = wrap(llama, block_size=16, target_modules=["q_proj"])  # a grid of 4 x 4
    index = bank_of(model).index.clone()
    index[-1] = torch.tensor(place)
    index[-1, 0] = place[0] or index[-1, 0]
    with pytest.raises(ValueError, match="does not exist"):
        bank_of(model).set_index(index)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_of_a_base_layer_is_called(method, kind):
    model, seen = wrap(nn.Sequential(nn.Linear(32, 32)), method, target_modules=["0"], budget=2), []
    [layer] = layers_of(model).values()
    getattr(layer.get_base_layer(), kind)(lambda *_: seen.append(1))
    model(torch.randn(3, 32, requires_grad=True)).sum().backward()
    assert seen == [1]


def test_a_format_that_only_runs_forward_is_not_merged(base):
    model = wrap(base)
    before = state_of(model)
    for layer in layers_of(model).values():
        layer.quantization_backend = SimpleNamespace(supports_merge=False, backend_name="GPTQ")
    with pytest.raises(TypeError, match="A GPTQ weight cannot be merged into"):
        model.merge_adapter()
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_layer_is_in_the_mode_of_what_it_stands_for(llama, is_training):
    inject_adapter_in_model(make_config(), llama.train(is_training))
    assert {layer.training for layer in layers_of(llama).values()} == {is_training}


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_tokens_of_a_plain_module(method):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.linear = nn.Embedding(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.embed_tokens(x))

    model = wrap(Plain(), method, target_modules=["linear"], budget=2, block_size=4, trainable_token_indices=[1])
    model(torch.tensor([1, 2])).sum().backward()
    assert sum(p.grad is not None and p.grad.shape[0] == 1 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_no_parameter_is_a_modules_own_twice(llama, method):
    """As whoever asks each module for its own takes for granted."""
    own = [parameter for module in wrap(llama, method).modules() for parameter in module.parameters(recurse=False)]
    assert len(own) == len(set(own))


def test_training_in_eval_mode_without_a_selection_is_refused(llama, batches):
    """An evaluation is not, though it may build a graph; models that are loaded are in that mode."""
    expected = outputs(llama.eval(), batches[0])
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=4))
    model.base_model.model.eval()  # PEFT's own wrapper is new
    model.enable_input_require_grads()
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda layer, args, y: y.mul_(1))  # as OLMo clamps q, k and v
    found = model(**batches[0])
    assert torch.equal(found.logits, expected)
    with pytest.raises(RuntimeError, match="has no blocks yet: training needs a selection"):
        found.loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_given_to_all_linears_is_used_in_training_too(method, monkeypatch):
    model = wrap(nn.Sequential(nn.Linear(32, 32)), method, target_modules=["0"], budget=2)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias))
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = model(x)
    assert_close(model(x), expected)


@pytest.mark.parametrize("method", ["lora", "smt"])
def test_an_adapter_of_modules_called_like_its_own_is_deleted(method):
    model = nn.Module()
    model.smt_head = nn.Linear(32, 32)
    model.forward = lambda x: model.smt_head(x)
    x = torch.randn(3, 32)
    expected = model(x)
    config = make_config(method, target_modules=["smt_head"], budget=2)
    inject_adapter_in_model(config, model)
    assert not model.smt_head.get_base_layer().weight.requires_grad
    delete_adapter(model, "default", {"lora": "lora_", "smt": SMTModel.prefix}[method])
    assert torch.equal(model(x), expected) and len(list(model.parameters())) == 2


def test_what_only_has_the_usual_names_is_no_default_target(tmp_path):
    """As in Gemma 4's towers, where they are modules around layers; PEFT's defaults for LoRA leave these out."""
    names = "q_proj", "k_proj", "v_proj"

    def make() -> nn.Module:
        torch.manual_seed(0)
        text, tower = (
            nn.ModuleDict({name: layer() for name in names}) for layer in (linear, lambda: around(linear()))
        )
        return nn.ModuleDict({"text": text, "tower": tower})

    def linear() -> nn.Linear:
        return nn.Linear(32, 32)

    around = nn.Sequential
    model = get_peft_model(make(), SMTConfig(block_size=16, num_blocks=2, selection="random"))
    assert {target.name for target in bank_of(model).targets} == {f"text.{name}" for name in names}
    model.save_pretrained(tmp_path)
    assert torch.equal(bank_of(PeftModel.from_pretrained(make(), tmp_path)).index, bank_of(model).index)


class Grouped(nn.Linear):
    """As DeepSeek-V4's: groups of inputs, each with rows of its own."""

    def forward(self, x):
        return torch.einsum("...gi,gri->...gr", x, self.weight.unflatten(0, (4, -1)))


class Flat(nn.Linear):
    """Groups side by side in one row."""

    def forward(self, x):
        return torch.einsum("...gi,gri->...gr", x.unflatten(-1, (4, -1)), self.weight.unflatten(0, (4, -1))).flatten(
            -2
        )


class Gate(nn.Linear):
    """As routers of some mixtures of experts."""

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("kind, x", [(Grouped, (2, 5, 4, 32)), (Flat, (5, 4 * 32)), (Gate, (5, 32))])
@pytest.mark.parametrize("selection", ["random", "gradient"])
def test_a_linear_layer_that_does_more_than_multiply_is_refused(kind, x, selection):
    """A block's rows would be no rows of its output, and a kernel would write past them."""
    options = {"target_modules": ["0"], "selection": selection}
    model = get_peft_model(nn.Sequential(kind(32, 64)), SMTConfig(block_size=16, num_blocks=4, **options))
    with pytest.raises(TypeError, match=rf"0, a {kind.__name__} of 32 to 64 features, .*exclude_modules"):
        model(torch.ones(x))
    with model.disable_adapter():
        model(torch.ones(x))


@pytest.mark.parametrize("block_size", [16, "auto"])
def test_all_linear_leaves_out_a_gate_of_one_output(base, tmp_path, block_size):
    """As those of shared experts; README's recipe was refused for Qwen2-MoE."""
    base.float().model.layers[0].mlp.gate = nn.Linear(64, 1)
    like = deepcopy(base)
    options = {"target_modules": "all-linear", "scope": "module", "selection": "random", "trainable_ratio": 0.05}
    model = get_peft_model(base, SMTConfig(block_size=block_size, **options))
    assert len(bank_of(model).targets) == 14 and bank_of(model).block_size >= 16
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does
    model.save_pretrained(tmp_path)
    assert torch.equal(bank_of(PeftModel.from_pretrained(like, tmp_path)).index, bank_of(model).index)


def test_the_size_of_blocks_that_few_modules_refuse_is_not_the_way_out():
    with pytest.raises(ValueError, match=r"leave .*odd.* out with exclude_modules"):
        get_peft_model(WithAnOddModule(20), SMTConfig(target_modules="all-linear", block_size=16, num_blocks=2))


@pytest.mark.parametrize("method", sorted({*METHODS} - {"lora"}))
def test_a_layer_of_pytorchs_transformer_evaluates_what_it_trains(method):
    """In eval mode it takes the weights past layers that have no hooks: LoRA is without effect there."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval(), torch.randn(2, 5, 32)
    model = wrap(base, method, target_modules=["linear1", "linear2"], budget=6).eval().float()
    nn.init.normal_(bank_of(model).weight)
    with torch.no_grad():
        assert (model(x) - base(x)).abs().max() > 1e-3
        torch.testing.assert_close(model(x), dense_of(base, model).eval()(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_packed_counts_in_full():
    """As GPTQ's and AWQ's, which are buffers, and Gemma's of 2 bits, four to a byte."""

    class Packed(nn.Module):
        in_features = out_features = 256

        def __init__(self, is_buffer: bool):
            super().__init__()
            weight = torch.zeros(64, 256, dtype=torch.uint8)
            self.register_buffer("qweight", weight) if is_buffer else setattr(
                self, "weight", nn.Parameter(weight, requires_grad=False)
            )
            self.bias = nn.Parameter(torch.zeros(256))

    model = nn.Sequential(Packed(True), Packed(False), nn.Linear(256, 256))
    assert count_base_parameters(model) == 3 * 256 * 257


def test_a_quantised_layer_without_a_weight_is_a_target(monkeypatch):
    """As AQLM's, which have codes and codebooks."""

    class Coded(nn.Module):
        in_features = out_features = 32

        def __init__(self):
            super().__init__()
            self.codebooks = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
            self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return 0 * x

    backend = SimpleNamespace(supports_merge=False, backend_name="AQLM", layer_type="linear")
    monkeypatch.setattr(quantized, "resolve_quantization_backend", lambda *_, **__: backend)
    model = wrap(nn.Sequential(Coded()), target_modules=["0"], budget=4, block_size=16)
    torch.nn.init.ones_(bank_of(model).weight)
    x = torch.ones(1, 32)
    assert torch.equal(model(x), torch.full((1, 32), 32.0)) and torch.equal(model.unload()(x)[:, :32], 0 * x)


def test_names_in_a_state_dict_are_no_targets(base):
    """LoRA takes its targets from them; the bank's are in its manifest."""
    with pytest.raises(ValueError, match="targets from the config"):
        inject_adapter_in_model(SMTConfig(target_modules=["q_proj"]), base, state_dict=base.state_dict())


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_deltas_in_any_order_are_sorted_by_target_when_they_are_loaded(base, batches, method):
    """Files may have them so; each layer would need a copy of the whole bank."""
    model = wrap(base, method)
    with torch.no_grad():
        bank_of(model).weight.normal_(std=0.1)
    expected, state = outputs(model, batches[0]), get_peft_model_state_dict(model)
    index = bank_of(model).index.clone()
    with pytest.raises(ValueError, match="not in the order of the targets"):
        bank_of(model).set_index(index.flip(0))
    turned = {
        key: value.flip(0) if key.endswith(("smt_bank.weight", "smt_bank.index")) else value
        for key, value in state.items()
        if not key.endswith("manifest")
    }
    other = wrap(base, method)
    set_peft_model_state_dict(other, turned)
    assert bank_of(other).index[:, 0].tolist() == index[:, 0].tolist()
    assert_close(outputs(other, batches[0]), expected)


def test_a_share_counts_what_zero3_has_taken_away():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    total = model.num_parameters()
    for weight in model.parameters():
        weight.ds_id, weight.ds_shape, weight.ds_numel = 0, weight.shape, weight.numel()
        weight.data = torch.empty(0)
    config = SMTConfig(trainable_ratio=0.01, block_size=8, selection="random", target_modules=["c_attn"])
    assert get_peft_model(model, config).peft_config["default"].num_blocks == round(0.01 * total / 64) > 1


# --- layers that are not what they seem ----------------------------------------------------------------------------


def replica_of(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them for DataParallel, on the same device."""
    replicas = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            replica._modules[name] = child and replicas[id(child)]
        for name, parameter in module._parameters.items():
            replica._parameters.pop(name, None)
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[id(model)]


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_of_data_parallel_trains(base, batches, method):
    model = wrap(base, method)
    dense = dense_of(base, model)
    loss, expected = replica_of(model)(**batches[0]).loss, dense(**batches[0]).loss
    assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, dense)


class Scaled(nn.Linear):
    def forward(self, x):
        self.kept = 2 * super().forward(x)
        return self.kept


@pytest.mark.parametrize("method", METHODS)
def test_a_subclass_of_linear_computes_by_its_own_forward_and_keeps_what_it_gave(method):
    torch.manual_seed(0)
    base, x = nn.Sequential(Scaled(32, 32)).double(), torch.randn(3, 32, dtype=torch.float64)
    model = wrap(base, method, target_modules=["0"], budget=2)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert_close(model(x), base(x) + x @ deltas_of(model)["0"].T)
        assert_close(layers_of(model)["0"].get_base_layer().kept, base(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_before_a_base_layer_is_obeyed_in_training(method):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(32, 32)).double(), torch.randn(3, 32, dtype=torch.float64)
    model = wrap(base, method, target_modules=["0"], budget=2)
    layers_of(model)["0"].get_base_layer().register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert_close(model(x), base(2 * x) + x @ deltas_of(model)["0"].T)


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_layer_trains(base, batches, method):
    """Its weight is made anew in each forward, and is no parameter."""
    plain = deepcopy(base)
    for layer, same in zip(base.model.layers, plain.model.layers, strict=True):
        prune.random_unstructured(layer.self_attn.q_proj, "weight", 0.5)
        same.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.detach()
    model = get_peft_model(base, make_config(method)).double().train()
    dense = dense_of(plain, model)
    for one in (model, dense):
        one(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)


@pytest.mark.parametrize("method", METHODS)
def test_who_keeps_what_a_base_layer_returned_keeps_it(base, batches, method):
    """Also by a forward of its own, as capturing tools put there."""
    model, kept = wrap(base, method), []
    layer = next(iter(layers_of(model).values())).get_base_layer()
    original = layer.forward

    def forward(x):
        y = original(x)
        kept.append((y, y.clone()))
        return y

    layer.forward = forward
    outputs(model, batches[0])
    assert kept and all(torch.equal(y, copy) for y, copy in kept)


def test_a_part_that_is_wrapped_already_is_named_when_the_whole_is(base):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.critic = deepcopy(base), deepcopy(base)

    pair = Pair()
    pair.policy = get_peft_model(pair.policy, make_config())
    with pytest.raises(ValueError, match="A part of the model, policy, has SMT adapters of its own"):
        get_peft_model(pair, make_config(), "outer")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("how", ["safe_merge", "merge"])
def test_a_weight_that_nobody_can_dequantise_is_not_merged_into(how, dtype):
    base = nn.ModuleDict({"fc": nn.Linear(64, 64)})
    base["fc"].weight = nn.Parameter(torch.ones(64, 64).to(dtype), requires_grad=False)
    model = get_peft_model(base, make_config(target_modules=["fc"], budget=8))
    with pytest.raises(TypeError, match=f"A weight of {str(dtype)[6:]} that PEFT cannot dequantise"):
        model.merge_adapter(safe_merge=how == "safe_merge")
    with pytest.raises(TypeError, match="is quantised"):
        sparse_patch(model)
    assert (model.base_model.model["fc"].weight.float() == 1).all()


def test_a_safe_merge_looks_at_what_is_written(llama):
    """In float16: one delta that overflows, and two whose sum does."""
    model = wrap(llama.half(), target_modules=["v_proj"], budget=5)
    add_adapter(model, "second", target_modules=["v_proj"], budget=5)
    layer = next(iter(layers_of(model).values()))
    for name, values in (("default", 7e4), ("second", 4e4)):
        bank_of(model, name).weight.data = torch.full_like(bank_of(model, name).weight.data.float(), values)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default"])
    bank_of(model).weight.data.fill_(4e4)
    bank_of(model, "second").index.copy_(bank_of(model).index)
    layer.merge(safe_merge=True, adapter_names=["second"])
    layer.unmerge()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default", "second"])
    assert torch.equal(layer.weight, before)


def test_a_subclass_of_parameter_comes_back_when_it_is_unmerged(base, batches):
    class Tagged(nn.Parameter):
        pass

    for layer in base.model.layers:
        layer.self_attn.q_proj.weight = Tagged(layer.self_attn.q_proj.weight.data)
    model = wrap(base)
    before, expected = deepcopy(base).state_dict(), outputs(model, batches[0])
    model.merge_adapter()
    model.unmerge_adapter()
    assert_close(outputs(model, batches[0]), expected)
    for name, value in model.unload().state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["subclass", "tied"])
def test_a_weight_that_another_stands_in_for_takes_adapters_in_turn(make_llama, batches, kind):
    class Tagged(nn.Parameter):
        pass

    cell = make_llama(tie_word_embeddings=kind == "tied").double()
    base = deepcopy(cell)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())  # merging changes the head alone
    if kind == "subclass":
        cell.lm_head.weight = Tagged(cell.lm_head.weight.data)
    model = wrap(cell, target_modules=["q_proj", "lm_head"])
    add_adapter(model, "other", target_modules=["q_proj", "lm_head"], seed=3)
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert_close(outputs(model, batches[0]), outputs(dense_of(base, model, "default", "other"), batches[0]))
    model.unmerge_adapter()
    after = cell.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_peft_moves_after_loading_is_the_bank(llama):
    model = wrap(llama)
    for layer in layers_of(model).values():
        layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    assert bank_of(model).weight.device.type == "meta" and bank_of(model).weight.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_memory_tells_its_shapes(llama, method):
    model = get_peft_model(llama.to("meta"), make_config(method)).train()
    loss = model(input_ids=torch.zeros(2, 8, dtype=torch.int64, device="meta")).logits.sum()
    loss.backward()
    assert loss.device.type == "meta"


def test_a_state_dict_of_trained_parameters_alone_gets_the_way_out(llama):
    model = wrap(llama)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises((ValueError, RuntimeError), match="keep the bank's buffers beside them"):
        model.load_state_dict(trained, strict=False)


# --- weights and optimizers that are divided -------------------------------------------------------------------------


def test_an_optimizer_with_groups_by_part_lacks_the_adapter_and_is_refused(base, batches, tmp_path):
    """With LoRA it has all of it: parameters() of a part has those of its layers."""
    model = wrap(base)
    bank = bank_of(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in batches[0]["input_ids"]]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")

    def train_with(*groups) -> None:
        optimizer = torch.optim.SGD([{"params": list(group)} for group in groups], lr=1.0)
        Trainer(
            model, arguments, train_dataset=rows, callbacks=[SMTWarmupCallback()], optimizers=(optimizer, None)
        ).train()

    before = bank.weight.detach().clone()
    parts = [part.parameters() for part in (model.get_base_model().model, model.get_base_model().lm_head)]
    with pytest.raises(ValueError, match=r"does not have the deltas of adapter 'default'.*smt_bank\['default'\]"):
        train_with(*parts)
    train_with(model.get_base_model().model.parameters(), model.get_base_model().smt_bank.parameters())
    assert not torch.equal(bank.weight, before)
    model.add_adapter("other", make_config(seed=5))  # of as many blocks
    model.set_adapter("other")
    with pytest.raises(ValueError, match="does not have the deltas of adapter 'other'"):
        Trainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=[SMTWarmupCallback("other")],
            optimizers=(torch.optim.SGD([bank.weight], lr=1.0), None),
        ).train()
    model.delete_adapter("other")
    model.set_adapter("default")
    # One that offloads holds copies, one that steps in the backward nothing of the model's.
    train_with([bank.weight.detach().clone()], model.get_base_model().lm_head.parameters())
    train_with([torch.zeros(1, 1, requires_grad=True)])


def test_a_conv1d_whose_weight_zero3_has_taken_away_keeps_its_shape():
    """What DeepSpeed leaves of a parameter: an empty tensor that knows its shape."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    for weight in model.parameters():
        weight.ds_id, weight.ds_shape, weight.ds_numel = 0, weight.shape, weight.numel()
        weight.data = torch.empty(0)
    options = {"num_blocks": 4, "block_size": 8, "target_modules": ["c_attn"]}
    with pytest.raises(
        ValueError, match=r"selection='magnitude' looks at the weights.* is divided: select before it is"
    ):
        get_peft_model(model, SMTConfig(selection="magnitude", **options))
    [layer] = layers_of(get_peft_model(model, SMTConfig(selection="random", **options))).values()
    assert (layer.out_features, layer.in_features) == (96, 32)


def test_a_part_under_zero3_computes_with_the_deltas_of_now(base, batches):
    """There the deltas are a copy, made once a forward: after its backward a step may have changed them."""
    model = wrap(base)
    weight, part = bank_of(model).weight, model.get_base_model().model
    weight.ds_id = 0
    with torch.no_grad():
        model(**batches[1])
    for _ in range(2):
        model(**batches[0]).loss.backward()
        weight.data += 0.1 * weight.grad.sign()
        expected = dense_of(base, model).model(batches[0]["input_ids"]).last_hidden_state
        assert_close(part(batches[0]["input_ids"]).last_hidden_state, expected)


def test_tensor_parallelism_is_refused(base):
    layer = base.model.layers[0].self_attn.q_proj
    layer.weight.device_mesh = SimpleNamespace(mesh_dim_names=("tp",))
    with pytest.raises(TypeError, match=r"q_proj is divided by tensor parallelism \(tp\)"):
        get_peft_model(base, make_config())
    layer.weight.device_mesh.mesh_dim_names = ("dp_replicate", "fsdp")
    get_peft_model(base, make_config())


@pytest.mark.parametrize("method", METHODS)
def test_what_mambas_kernels_read_by_themselves_is_no_target(method):
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match=rf"{'LORA' if method == 'lora' else 'SMT'}.*'out_proj' is incompatible"):
        get_peft_model(model, make_config(method, target_modules=["out_proj"]))


def test_the_warm_up_copies_statistics_and_no_packed_weights(base, batches, monkeypatch):
    base.register_buffer("qweight", torch.zeros(1000, 100, dtype=torch.int32))
    base.register_buffer("counter", torch.zeros(8, dtype=torch.int64))
    copied, clone = [], torch.Tensor.clone

    def count(self, *args, **options):
        copied.append(self.shape)
        return clone(self, *args, **options)

    model = get_peft_model(base, SMTConfig(num_blocks=4, block_size=16, warmup_steps=1))
    hook = base.register_forward_pre_hook(lambda *_: (base.counter.add_(1), None)[1])
    monkeypatch.setattr(torch.Tensor, "clone", count)
    select_blocks(model, batches, progress_bar=False)
    hook.remove()
    assert base.qweight.shape not in copied and base.counter.shape in copied and not base.counter.any()


def test_a_models_own_checkpointing_is_not_taken_for_reentrant(llama, batches, monkeypatch):
    """diffusers' models have a plain function there, which transformers' `functools.partial` is not."""
    monkeypatch.setattr(banks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(banks.dist, "get_world_size", lambda *_: 2)
    model = wrap(llama)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing"):
        model(**batches[0])
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):
            module._gradient_checkpointing_func = lambda of, *args: checkpoint(of, *args, use_reentrant=False)
    model(**batches[0]).loss.backward()
    assert bank_of(model).weight.grad.any()
