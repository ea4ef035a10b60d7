"""The promise of the method: SMT does to the selected blocks what full fine-tuning would, and nothing else."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from smt_peft import SMTConfig
from smt_peft.layer import Linear

ALL_BLOCKS = 64  # of q, k and v of the two layers
CHECKPOINTING = ["off", "non-reentrant", "reentrant"]


def smt_layers(model) -> dict[str, Linear]:
    root = model.base_model.model
    return {name: module for name, module in root.named_modules() if isinstance(module, Linear)}


def twins(base, **options):
    """An SMT model whose delta is not zero, and the dense model of the same function whose targets are trainable.

    Both in float64, so that a comparison sees mistakes and little rounding (norms and the loss stay in float32).
    """
    torch.manual_seed(0)
    dense = deepcopy(base).requires_grad_(False).double()
    options = {"block_size": 16, "selection": "random", "init_weights": False, **options}
    model = get_peft_model(base, SMTConfig(**options)).double()
    for name, layer in smt_layers(model).items():
        weight = dense.get_submodule(name).weight.requires_grad_()
        weight.data += layer.get_delta_weight("default")
    return model.train(), dense.train()


def mask(model, name, adapter="default") -> torch.Tensor:
    """1 where the weight belongs to a selected block, in the shape of the stored weight."""
    layer, config = smt_layers(model)[name], model.peft_config[adapter]
    grid = torch.zeros(layer.out_features // config.block_size, layer.in_features // config.block_size)
    for row, col in config.selected_blocks.get(name, []):
        grid[row, col] = 1
    full = grid.repeat_interleave(config.block_size, 0).repeat_interleave(config.block_size, 1)
    return full.T if isinstance(layer.base_layer, Conv1D) else full


def gradients(model, adapter="default") -> dict[str, torch.Tensor]:
    """The bank's gradient, scattered into matrices of the stored weights' shapes."""
    bank, layers = model.base_model.model.smt_bank[adapter], smt_layers(model)
    size = bank.block_size
    dense = {n: torch.zeros(m.out_features, m.in_features, dtype=bank.weight.dtype) for n, m in layers.items()}
    for slot, (target, row, col) in enumerate(bank.index.tolist()):
        place = dense[bank.targets[target].name]
        place[row * size : (row + 1) * size, col * size : (col + 1) * size] = bank.weight.grad[slot]
    return {n: g.T if isinstance(layers[n].base_layer, Conv1D) else g for n, g in dense.items()}


def assert_same_gradients(model, dense, adapter="default"):
    for name, gradient in gradients(model, adapter).items():
        expected = dense.get_submodule(name).weight.grad * mask(model, name, adapter)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def checkpoint(mode, *models):
    for model in models if mode != "off" else ():
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()


def train(model, batches, steps=4):
    """With a large eps, so that Adam does not blow up the rounding of gradients that are almost zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, eps=1e-4)
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("num_blocks", [ALL_BLOCKS, 20, 3])
def test_training_equals_masked_full_fine_tuning_step_for_step(llama, batches, num_blocks, checkpointing):
    """With every block selected, the mask is all ones: full fine-tuning of the targets."""
    base = deepcopy(llama).double()
    model, dense = twins(llama, num_blocks=num_blocks, init_weights=True)
    checkpoint(checkpointing, model)
    for name in smt_layers(model):
        dense.get_submodule(name).weight.register_hook(mask(model, name).mul)
    train(model, batches)
    train(dense, batches)
    merged = model.merge_and_unload().state_dict()
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
        unselected = weight == base.state_dict()[name]
        assert torch.equal(merged[name][unselected], weight[unselected]), "an entry outside the blocks has moved"


def test_float32_training_keeps_every_other_entry_bit_identical(llama, batches):
    base = deepcopy(llama).state_dict()
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=20, selection="random")).train()
    chosen = {f"{name}.weight": mask(model, name).bool() for name in smt_layers(model)}
    train(model, batches)
    for name, weight in model.merge_and_unload().state_dict().items():
        changed = weight != base[name]
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


def reference_pass_between(model, batches):
    """As DPO does it: the policy's forward, the reference's forward, then the policy's backward."""
    loss = model(**batches[0]).loss
    if hasattr(model, "disable_adapter"):
        with torch.no_grad(), model.disable_adapter():
            model(**batches[0])
    loss.backward()


def other_adapter_between(model, batches):
    if not hasattr(model, "peft_config"):
        return one_backward(model, batches)
    other = {"layers_to_transform": [1], "selection": "random", "seed": 7, "init_weights": False}
    model.add_adapter("other", SMTConfig(block_size=8, num_blocks=40, **other))
    loss = model(**batches[0]).loss
    model.set_adapter("other")
    with torch.no_grad():
        model(**batches[0])
    model.set_adapter("default")
    loss.backward()


PLAIN = [one_backward, accumulated, graph_used_twice, saved_tensors_on_cpu, embeddings_given]
MIXED_UP = [two_forwards_before_one_backward, backwards_in_the_order_of_the_forwards]
INTERRUPTED = [evaluation_between, reference_pass_between, other_adapter_between]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("road", PLAIN + MIXED_UP + INTERRUPTED, ids=lambda road: road.__name__)
def test_gradient_equals_that_of_the_full_weight(llama, batches, road, checkpointing):
    if checkpointing == "reentrant" and road is graph_used_twice:
        pytest.skip("reentrant checkpointing frees its graph, in PyTorch itself")
    model, dense = twins(llama, num_blocks=20)
    checkpoint(checkpointing, model, dense)
    road(model, batches)
    road(dense, batches)
    assert_same_gradients(model, dense)


@pytest.mark.parametrize(
    "targets, num_blocks",
    [(["v_proj"], 5), (["gate_proj", "up_proj", "down_proj"], 30), (["o_proj", "down_proj"], 20), ("all-linear", 60)],
)
def test_any_projection_and_its_bias_agree_with_the_full_weight(make_llama, batches, targets, num_blocks):
    model, dense = twins(make_llama(attention_bias=True, mlp_bias=True), target_modules=targets, num_blocks=num_blocks)
    loss, expected = model(**batches[0]).loss, dense(**batches[0]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, dense)


def test_the_transposed_weights_of_gpt2_agree_with_the_full_weight(batches):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    model, dense = twins(gpt2, target_modules=["c_attn", "c_fc", "c_proj"], block_size=8, num_blocks=50)
    one_backward(model.eval(), batches)
    one_backward(dense.eval(), batches)
    assert_same_gradients(model, dense)


def test_two_adapters_trained_together_each_get_the_gradient_of_their_blocks(llama, batches):
    model, dense = twins(llama, num_blocks=40)
    model.add_adapter("other", SMTConfig(block_size=8, num_blocks=90, selection="random", seed=3))
    model.base_model.set_adapter(["default", "other"])
    one_backward(model.double(), batches)
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


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (2, 3, 4, 32)], ids=["rank 2", "rank 3", "rank 4"])
@pytest.mark.parametrize("x_has_gradient", [True, False])
def test_a_module_used_twice_agrees_with_the_full_weight(shape, x_has_gradient):
    torch.manual_seed(0)
    model, dense = twins(UsedTwice(), target_modules=["shared", "beside"], block_size=8, num_blocks=11)
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(x_has_gradient) for _ in range(2)]
    for one, mine in zip((model, dense), inputs, strict=True):
        one(mine).square().sum().backward()
    assert_same_gradients(model, dense)
    if x_has_gradient:
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_a_tied_weight_is_changed_only_where_it_is_a_target(make_llama, batches):
    """The head shares its weight with the embedding; the adapter on the head must leave the embedding alone."""
    tied = make_llama(tie_word_embeddings=True)
    untied = make_llama()
    untied.load_state_dict(tied.state_dict())
    model, _ = twins(tied, target_modules=["lm_head"], num_blocks=5)
    _, dense = twins(untied, target_modules=["lm_head"], num_blocks=5)
    loss, expected = model(**batches[0]).loss, dense(**batches[0]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, dense)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast over float32", "bfloat16 base"])
def test_bfloat16_gradients_agree_within_its_precision(llama, batches, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model, dense = twins(llama, num_blocks=20)
    bank = model.base_model.model.smt_bank["default"]
    model.to(dtype), dense.to(dtype), bank.float()
    for one in (model, dense):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = one(**batches[0]).loss
        loss.backward()
    assert bank.weight.grad.dtype == torch.float32
    for name, gradient in gradients(model).items():
        expected = dense.get_submodule(name).weight.grad.float() * mask(model, name)
        assert (gradient - expected).norm() <= 0.05 * expected.norm()
