"""Models called in part, differentiated twice or interrupted between forward and backward: the gradient is right."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from dense_truth import (
    CHECKPOINTING,
    METHODS,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_right,
    assert_same_gradients,
    bank_of,
    dense_of,
    enable_checkpointing,
    is_smt,
    outputs,
    wrap,
)
from peft import get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import T5Config, T5ForConditionalGeneration

from smt_peft import select_blocks

pytestmark = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def base(make_llama):
    """Never wrapped, in float64; its attention can be differentiated twice."""
    return make_llama(attn_implementation="eager").double()


# --- parts of a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_checkpointing_that_keeps_what_matrix_products_gave(make_llama, batches, method, bias):
    """The second forward goes on from there, so that nobody may have changed it."""
    base = make_llama(attn_implementation="eager", attention_bias=bias).double()
    model = wrap(base, method)
    dense = dense_of(base, model)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": kept})
    model(**batches[0]).loss.backward()
    dense(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)


class SeesAndSpeaks(nn.Module):
    """Like LLaVA: a frozen tower under no_grad, then a body, then a head, with target modules in all but the head."""

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x, labels=None):
        with torch.no_grad():
            for layer in self.tower:
                x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.query(x) @ torch.ones(32, 48, dtype=x.dtype) / 32 + self.key(x)))


PARTS = {"target_modules": ["tower.0", "tower.1", "query", "key"], "modules_to_save": ["head"]}


def test_a_tower_under_no_grad_and_a_head_that_is_saved_whole(method):
    torch.manual_seed(0)
    base, x = SeesAndSpeaks().double(), torch.randn(2, 6, 32, dtype=torch.float64)
    model = wrap(base, method, budget=10, **PARTS)
    dense = dense_of(base, model)
    dense.head.requires_grad_()
    for _ in range(2):
        found, expected = model(x), dense(x)
        assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
    assert_same_gradients(model, dense)
    head = model.base_model.model.head.modules_to_save["default"]
    assert_close(head.weight.grad, dense.head.weight.grad)
    assert_close(head.bias.grad, dense.head.bias.grad)


@pytest.mark.parametrize("scope", ["model", "input", "module"])
def test_a_warmed_up_model_with_a_tower_under_no_grad_trains_like_the_dense_one(method, scope):
    if method == "lora":
        pytest.skip("LoRA has no warm-up")
    torch.manual_seed(0)
    base = SeesAndSpeaks().double()
    data = [{"x": torch.randn(2, 6, 32, dtype=torch.float64)} for _ in range(2)]
    options = {"selection": "gradient", "init_weights": True, "warmup_steps": 2, "block_size": 8}
    model = wrap(base, method, scope=scope, budget=12, **options, **PARTS)
    select_blocks(model, data, loss_function=lambda m, batch: m(**batch).square().sum(), progress_bar=False)
    nn.init.normal_(bank_of(model).weight, std=0.1)
    dense = dense_of(base, model)
    for one in (model, dense):
        one.train()(**data[0]).square().sum().backward()
    assert_same_gradients(model, dense)
    assert_base_untouched(model, with_the_saved_head_named(base, model))


def with_the_saved_head_named(base, model):
    """The base, whose head PEFT keeps under another name."""
    named = deepcopy(base)
    named.head = deepcopy(model.base_model.model.head)
    return named


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_a_backbone_called_twice_without_the_model_around_it(base, batches, method, mode, given):
    model = wrap(base, method)
    dense = dense_of(base, model)
    enable_checkpointing(mode, model, dense)
    inputs = []
    for backbone in (model.base_model.model.model, dense.model):
        leaves = [backbone.embed_tokens(batch["input_ids"]).detach().requires_grad_() for batch in batches[:2]]
        calls = [{"inputs_embeds": leaf} for leaf in leaves]
        if given == "ids":
            calls = [{"input_ids": batch["input_ids"]} for batch in batches[:2]]
        first, second = (backbone(**call).last_hidden_state for call in calls)
        (first.square().mean() - 2 * second.relu().mean() + (first * second).mean()).backward()
        inputs.append(leaves)
    assert_same_gradients(model, dense)
    if given == "embeddings":
        for mine, expected in zip(*inputs, strict=True):
            assert_close(mine.grad, expected.grad)


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_an_encoder_called_apart_from_its_decoder(batches, method, mode):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).double()
    model = wrap(t5, method, target_modules=["q", "v"], block_size=8, budget=60)
    dense = dense_of(t5, model)
    enable_checkpointing(mode, model, dense)
    for one in (model, dense):
        encoded = one.get_encoder()(input_ids=batches[0]["input_ids"])
        again = one.get_encoder()(input_ids=batches[1]["input_ids"]).last_hidden_state
        loss = one(encoder_outputs=encoded, labels=batches[2]["labels"]).loss
        (loss + again.square().mean()).backward()
    assert_same_gradients(model, dense)


class WithoutEmbeddings(nn.Module):
    """Checkpointed by hand; there is no get_input_embeddings that anything could hook."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=False)
        return x


@pytest.mark.parametrize("x_has_gradient", [True, False])
def test_checkpointing_in_a_model_without_embeddings(method, x_has_gradient):
    torch.manual_seed(0)
    base, x = WithoutEmbeddings().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    model = wrap(base, method, target_modules=["layers.0", "layers.2"], budget=5)
    dense = dense_of(base, model)
    leaves = []
    for one in (model, dense):
        leaves.append(x.clone().requires_grad_(x_has_gradient))
        (one(leaves[-1]).square().sum() + one(leaves[-1] + 1).sum()).backward()
    assert_same_gradients(model, dense)
    if x_has_gradient:
        assert_close(leaves[0].grad, leaves[1].grad)


# --- more than one derivative ----------------------------------------------------------------------------------------


def test_the_gradient_of_a_hidden_state_and_then_a_backward(base, batches, method):
    model = wrap(base, method)
    dense, found = dense_of(base, model), []
    for one in (model, dense):
        out = one(**batches[0], output_hidden_states=True)
        states = out.hidden_states[1:]
        found.append(torch.autograd.grad(out.loss, states, retain_graph=True))
        out.loss.backward()
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected)
    assert_same_gradients(model, dense)


def test_autograd_grad_for_the_adapters_parameters_and_then_a_backward(base, batches, method):
    model = wrap(base, method)
    dense = dense_of(base, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batches[0]).loss
    asked = torch.autograd.grad(loss, trained, retain_graph=True)
    assert all(p.grad is None for p in trained), "autograd.grad leaves .grad alone"
    loss.backward()
    dense(**batches[0]).loss.backward()
    assert_same_gradients(model, dense)
    for gradient, parameter in zip(asked, trained, strict=True):
        assert_close(gradient, parameter.grad)


def test_create_graph_is_refused_in_words(base, batches, method):
    """Better no second derivative than one that lacks a part."""
    if method == "lora":
        pytest.skip("has second derivatives")
    model = wrap(base, method)
    with pytest.raises(RuntimeError, match="no second derivative: do not pass create_graph=True"):
        model(**batches[0]).loss.backward(create_graph=True)
    model.zero_grad()
    assert_right(model, base, batches[0])


# --- between forward and backward -----------------------------------------------------------------------------------


def a_state_dict(model, batches, folder):
    model.state_dict()


def saving(model, batches, folder):
    model.save_pretrained(folder)


def the_adapters_state_dict(model, batches, folder):
    get_peft_model_state_dict(model)


def mixed_adapters(model, batches, folder):
    with torch.no_grad():
        model.eval()(batches[1]["input_ids"], adapter_names=["other", "__base__"])
    model.train()


def a_disabled_pass(model, batches, folder):
    with model.disable_adapter():
        outputs(model, batches[1])


def a_disabled_pass_in_train_mode(model, batches, folder):
    with model.disable_adapter():
        model(**batches[1])


def generation(model, batches, folder):
    model.eval().generate(input_ids=batches[1]["input_ids"], max_new_tokens=2, do_sample=False)
    model.train()


def merging_and_unmerging(model, batches, folder):
    model.merge_adapter()
    outputs(model, batches[1])
    model.unmerge_adapter()


def merging_the_other_and_unmerging(model, batches, folder):
    model.merge_adapter(["other"])
    model.unmerge_adapter()


def loading_another(model, batches, folder):
    model.save_pretrained(folder, selected_adapters=["other"])
    model.load_adapter(folder / "other", "third")


def adding_and_deleting(model, batches, folder):
    add_adapter(model, "third", seed=3)
    model.delete_adapter("other")


def a_copy(model, batches, folder):
    twin = deepcopy(model)
    twin(**batches[1]).loss.backward()


BETWEEN = [a_state_dict, saving, the_adapters_state_dict, mixed_adapters, a_disabled_pass]
BETWEEN += [a_disabled_pass_in_train_mode, generation, merging_and_unmerging, merging_the_other_and_unmerging]
BETWEEN += [loading_another, adding_and_deleting, a_copy]


@pytest.mark.parametrize("mode", ["off", "non-reentrant"])
@pytest.mark.parametrize("action", BETWEEN, ids=lambda action: action.__name__)
def test_between_forward_and_backward_comes(base, batches, tmp_path, method, action, mode):
    model = wrap(base, method)
    add_adapter(model, "other", seed=7)
    dense = dense_of(base, model)
    enable_checkpointing(mode, model, dense)
    losses = [one(**batches[0]).loss for one in (model, dense)]
    action(model, batches, tmp_path)
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, dense)
    if is_smt(model):  # LoRA's unmerging leaves rounding in the weight
        assert_base_untouched(model, base)
