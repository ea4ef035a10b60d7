"""The warm-up leaves everything as it was: when it is complete, when its loss fails, at Ctrl-C in any of its lines."""

import random
from pathlib import Path

import numpy
import pytest
import torch
from dense_truth import make_config
from interrupt import each_interrupt, explained_by
from peft import PeftModel, get_peft_model
from torch import nn

import smt_peft
from smt_peft import select_blocks

WARMUP = [Path(smt_peft.__file__).parent / name for name in ("warmup.py", "untouched.py")]
TARGETS = {"target_modules": ["query", "value"], "block_size": 4, "budget": 5}


class Noisy(nn.Module):
    """Has all that a warm-up could disturb: running averages, dropout, a head that is trained, too."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.dropout(self.norm(torch.tanh(self.query(x)) * self.value(x))))


def make_noisy(selection="gradient") -> PeftModel:
    """In no uniform state: some modules in eval mode, some parameters frozen, some gradients there."""
    torch.manual_seed(0)
    options = {"selection": selection, "init_weights": True, "warmup_steps": 3, "modules_to_save": ["head"]}
    model = get_peft_model(Noisy(), make_config(**TARGETS, **options)).train()
    head = model.base_model.model.head.modules_to_save["default"]
    head.weight.grad = torch.ones_like(head.weight)
    head.bias.requires_grad_(False)
    model.base_model.model.dropout.eval()
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    return model


def batches():
    return [{"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]


def noisy_loss(model, batch):
    return model(**batch).square().sum() * (1 + random.random() + numpy.random.rand())


def warm_up(model, loss_function=noisy_loss):
    return select_blocks(model, batches(), loss_function=loss_function, progress_bar=False)


def state_of(model) -> dict:
    """Everything but the adapter's own index and bank."""
    state = {"grad mode": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled()}
    for name, module in model.named_modules():
        state[f"training of {name}"] = module.training
        for attribute, value in vars(module).items():
            if "hook" in attribute and hasattr(value, "__len__"):
                state[f"{attribute} of {name}"] = len(value)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        hooks = len(parameter._backward_hooks or ())
        state[name] = (parameter.tolist(), parameter.requires_grad, hooks)
        state[f"grad of {name}"] = None if gradient is None else gradient.tolist()
    for name, buffer in model.named_buffers():
        if "smt_bank" not in name:
            state[name] = buffer.tolist()
    numbers = numpy.random.get_state()[1].tolist()
    return {**state, "torch": torch.get_rng_state().tolist(), "python": random.getstate(), "numpy": numbers}


def assert_same_state(model, expected):
    found = state_of(model)
    assert found.keys() == expected.keys()
    changed = [name for name in expected if found[name] != expected[name]]
    assert not changed, f"the warm-up changed {', '.join(changed)}"


@pytest.mark.parametrize("selection", ["gradient", "activation"])
def test_a_complete_warm_up_leaves_everything_as_it_was(selection):
    model = make_noisy(selection)
    before = state_of(model)
    warm_up(model)
    assert_same_state(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("selection", ["gradient", "activation"])
@pytest.mark.parametrize("batch", range(3))
def test_a_loss_that_is_interrupted_leaves_everything_as_it_was(selection, batch, error):
    model, calls = make_noisy(selection), []
    before, expected = state_of(model), warm_up(make_noisy(selection)).index

    def interrupted(model, data):
        loss = noisy_loss(model, data)
        calls.append(1)
        if len(calls) > batch:
            raise error("stop")
        return loss

    model = make_noisy(selection)
    with pytest.raises(error, match="stop"):
        warm_up(model, interrupted)
    assert_same_state(model, before)
    assert torch.equal(warm_up(model).index, expected)


@pytest.mark.parametrize("selection", ["gradient", "activation"])
def test_an_interrupt_at_any_line_of_the_warm_up_leaves_everything_as_it_was(selection):
    before = state_of(make_noisy(selection))
    expected = warm_up(make_noisy(selection)).index
    for model, place in each_interrupt(WARMUP, lambda: make_noisy(selection), warm_up):
        with explained_by(place):
            assert_same_state(model, before)
            assert torch.equal(warm_up(model).index, expected)
