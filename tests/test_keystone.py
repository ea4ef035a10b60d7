"""The promise of the method: SMT does to the selected blocks what full fine-tuning would, and nothing else."""

from contextlib import nullcontext

import pytest
import torch
from dense_truth import (
    CHECKPOINTING,
    METHODS,
    add_adapter,
    assert_right,
    assert_same_gradients,
    bank_of,
    dense_of,
    enable_checkpointing,
    in_place,
    wrap,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

ALL_BLOCKS = 64  # of q, k and v of the two layers
ours = pytest.mark.parametrize("method", ["smt", "sorted"])
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def base(llama):
    """Never wrapped, in float64, so that a comparison sees mistakes and little rounding."""
    return llama.double()


def mask_of(model) -> dict[str, torch.Tensor]:
    """By target, where its weight belongs to a selected block."""
    return {name: mask.bool() for name, mask in in_place(model, torch.ones_like(bank_of(model).weight)).items()}


def train(model, batches, steps=4):
    """With a large eps, so that Adam does not blow up the rounding of gradients that are almost zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, eps=1e-4)
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@ours
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("num_blocks", [ALL_BLOCKS, 20, 3])
def test_training_equals_masked_full_fine_tuning_step_for_step(base, batches, method, num_blocks, checkpointing):
    """With every block selected, the mask is all ones: full fine-tuning of the targets."""
    model = wrap(base, method, budget=num_blocks, init_weights=True)
    dense = dense_of(base, model)
    enable_checkpointing(checkpointing, model)
    for name, mask in mask_of(model).items():
        dense.get_submodule(name).weight.register_hook(mask.mul)
    train(model, batches)
    train(dense, batches)
    merged, before = model.merge_and_unload().state_dict(), base.state_dict()
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
        unselected = weight == before[name]
        assert torch.equal(merged[name][unselected], weight[unselected]), "an entry outside the blocks has moved"


@ours
def test_float32_training_keeps_every_other_entry_bit_identical(llama, batches, method):
    before = llama.state_dict()
    model = wrap(llama, method, init_weights=True)
    chosen = {f"{name}.weight": mask for name, mask in mask_of(model).items()}
    train(model, batches)
    for name, weight in model.merge_and_unload().state_dict().items():
        changed = weight != before[name]
        assert not changed[~chosen[name]].any() if name in chosen else not changed.any()
        assert changed[chosen[name]].float().mean() > 0.99 if name in chosen and chosen[name].any() else True


# --- one gradient, by every road --------------------------------------------------------------------------------


def one_backward(model, batches):
    model(**batches[0]).loss.backward()


def accumulated(model, batches):
    for batch in batches:
        model(**batch).loss.backward()


def two_forwards_before_one_backward(model, batches):
    (model(**batches[0]).loss - 2 * model(**batches[1]).loss).backward()


def backwards_in_the_order_of_the_forwards(model, batches):
    losses = [model(**batch).loss for batch in batches[:2]]
    for loss in losses:
        loss.backward()


def graph_used_twice(model, batches):
    loss = model(**batches[0]).loss
    loss.backward(retain_graph=True)
    loss.backward()


def saved_tensors_on_cpu(model, batches):
    with torch.autograd.graph.save_on_cpu():
        loss = model(**batches[0]).loss
    loss.backward()


def embeddings_given(model, batches):
    embeddings = model.get_input_embeddings()(batches[0]["input_ids"])
    model(inputs_embeds=embeddings, labels=batches[0]["labels"]).loss.backward()


def evaluation_between(model, batches):
    loss = model(**batches[0]).loss
    with torch.no_grad():
        model.eval()(**batches[1])
    model.train()
    loss.backward()


def other_adapter_between(model, batches):
    if not hasattr(model, "peft_config"):
        return one_backward(model, batches)
    add_adapter(model, "other", block_size=8, budget=40, layers_to_transform=[1], seed=7)
    loss = model(**batches[0]).loss
    model.set_adapter("other")
    with torch.no_grad():
        model(**batches[0])
    model.set_adapter("default")
    loss.backward()


PLAIN = [one_backward, accumulated, graph_used_twice, saved_tensors_on_cpu, embeddings_given]
MIXED_UP = [two_forwards_before_one_backward, backwards_in_the_order_of_the_forwards]
INTERRUPTED = [evaluation_between, other_adapter_between]


@methods
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("road", PLAIN + MIXED_UP + INTERRUPTED, ids=lambda road: road.__name__)
def test_gradient_equals_that_of_the_full_weight(base, batches, method, road, checkpointing):
    if checkpointing == "reentrant" and road is graph_used_twice:
        pytest.skip("reentrant checkpointing frees its graph, in PyTorch itself")
    model = wrap(base, method)
    dense = dense_of(base, model)
    enable_checkpointing(checkpointing, model, dense)
    road(model, batches)
    road(dense, batches)
    assert_same_gradients(model, dense)


@methods
@pytest.mark.parametrize(
    "targets, budget",
    [(["v_proj"], 5), (["gate_proj", "up_proj", "down_proj"], 30), (["o_proj", "down_proj"], 20), ("all-linear", 60)],
)
def test_any_projection_and_its_bias_agree_with_the_full_weight(make_llama, batches, method, targets, budget):
    base = make_llama(attention_bias=True, mlp_bias=True).double()
    assert_right(wrap(base, method, target_modules=targets, budget=budget), base, batches[0])


@methods
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_transposed_weights_of_gpt2_agree_with_the_full_weight(batches, method):
    torch.manual_seed(0)
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, **dry)).double()
    targets = {"target_modules": ["c_attn", "c_fc", "c_proj"], "block_size": 8, "budget": 50}
    assert_right(wrap(gpt2, method, **targets), gpt2, batches[0])


@methods
def test_two_adapters_trained_together_each_get_the_gradient_of_their_blocks(base, batches, method):
    model = wrap(base, method, budget=40)
    add_adapter(model, "other", block_size=8, budget=90, seed=3)
    model.base_model.set_adapter(["default", "other"])
    dense = dense_of(base, model, "default", "other")
    one_backward(model, batches)
    one_backward(dense, batches)
    assert_same_gradients(model, dense, "default")
    assert_same_gradients(model, dense, "other")


class UsedTwice(nn.Module):
    """One module in two places, and another that reads the same input."""

    def __init__(self):
        super().__init__()
        self.shared, self.beside = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

    def forward(self, x):
        return self.shared(torch.tanh(self.shared(x) + self.beside(x))) * self.beside(x)


@methods
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (2, 3, 4, 32)], ids=["rank 2", "rank 3", "rank 4"])
@pytest.mark.parametrize("x_has_gradient", [True, False])
def test_a_module_used_twice_agrees_with_the_full_weight(method, shape, x_has_gradient):
    torch.manual_seed(0)
    base = UsedTwice().double()
    model = wrap(base, method, target_modules=["shared", "beside"], block_size=8, budget=11)
    dense = dense_of(base, model)
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(x_has_gradient) for _ in range(2)]
    for one, mine in zip((model, dense), inputs, strict=True):
        one(mine).square().sum().backward()
    assert_same_gradients(model, dense)
    if x_has_gradient:
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@ours
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast over float32", "bfloat16 base"])
def test_bfloat16_gradients_agree_within_its_precision(llama, batches, method, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = wrap(llama, method)
    dense, bank = dense_of(llama, model).to(dtype), bank_of(model)
    model.to(dtype), bank.float()
    for one in (model, dense):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = one(**batches[0]).loss
        loss.backward()
    assert bank.weight.grad.dtype == torch.float32
    found, mask = in_place(model, bank.weight.grad), mask_of(model)
    assert any(gradient.any() for gradient in found.values())
    for name, gradient in found.items():
        expected = dense.get_submodule(name).weight.grad.float() * mask[name]
        assert (gradient - expected).norm() <= 0.05 * expected.norm()
