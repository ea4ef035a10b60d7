"""Ctrl-C at any line of the package: the base weights are the base's, and the adapter goes on."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from dense_truth import assert_base_untouched, assert_close, assert_same_gradients, dense_of, make_config
from interrupt import each_interrupt, explained_by
from peft import PeftModel, get_peft_model
from torch import nn

import smt_peft

PACKAGE = Path(smt_peft.__file__).parent
SMALL = {"target_modules": ["query", "value"], "block_size": 4, "budget": 5}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Plain(nn.Module):
    """As little as has two targets and something after them."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.query(x)) * self.value(x))


def make_base() -> Plain:
    torch.manual_seed(0)
    return Plain().double()


@cache
def new_model() -> PeftModel:
    """Two adapters. To be copied, which is quicker than to make it."""
    model = get_peft_model(make_base(), make_config(**SMALL))
    model.add_adapter("other", make_config(seed=3, **SMALL))
    return model.double()


def make_model() -> PeftModel:
    """With both adapters used, one after the other."""
    model = deepcopy(new_model())
    model.set_adapter("other")
    model(X).sum().backward()
    model.set_adapter("default")
    model(X).sum().backward()
    model.zero_grad()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupts")
    make_model().save_pretrained(folder)
    return folder


def a_training_step(model, folder):
    model(X).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def switching_adapters(model, folder):
    model.set_adapter("other")
    model(X)
    model.set_adapter("default")


def a_disabled_pass(model, folder):
    with model.disable_adapter(), torch.no_grad():
        model(X)


def a_mixed_batch(model, folder):
    with torch.no_grad():
        model.eval()(X, adapter_names=["default", "__base__", "other"])


def loading_an_adapter(model, folder):
    model.load_adapter(folder, "third")


def saving(model, folder):
    model.save_pretrained(folder / "again")


@pytest.mark.parametrize(
    "action",
    [a_training_step, switching_adapters, a_disabled_pass, a_mixed_batch, loading_an_adapter, saving],
    ids=lambda action: action.__name__,
)
def test_the_base_is_untouched_and_the_adapter_goes_on_after_an_interrupt_in(folder, action):
    base = make_base()
    for model, place in each_interrupt([PACKAGE], make_model, lambda model: action(model, folder)):
        with explained_by(place):
            assert_base_untouched(model, base)
            model.base_model.enable_adapter_layers()
            model.set_adapter("default")
            model.train().zero_grad()
            dense = dense_of(base, model)
            assert_close(model(X), dense(X))
            model(X).square().sum().backward()
            dense(X).square().sum().backward()
            assert_same_gradients(model, dense)
            assert_unloads_to(base, model)


def assert_unloads_to(base, model):
    unloaded, expected = model.unload().state_dict(), base.state_dict()
    assert unloaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(unloaded[name], weight), f"{name} is not the base's"


def merging_the_first(model):
    model.merge_adapter(["default"])


def merging_the_second(model):
    model.merge_adapter(["other"])


def unmerging(model):
    model.unmerge_adapter()


def make_one_merged() -> PeftModel:
    model = make_model()
    model.merge_adapter(["default"])
    return model


def make_both_merged() -> PeftModel:
    model = make_one_merged()
    model.merge_adapter(["other"])
    return model


@pytest.mark.filterwarnings("ignore")
def test_unloading_gives_the_base_back_after_an_interrupt_in_merging_a_second_adapter():
    base = make_base()
    for model, place in each_interrupt([PACKAGE], make_one_merged, merging_the_second):
        with explained_by(place):
            assert_unloads_to(base, model)


@pytest.mark.parametrize("make, action", [(make_model, merging_the_first), (make_both_merged, unmerging)])
@pytest.mark.filterwarnings("ignore")
def test_unloading_or_unmerging_again_gives_base_and_adapter_back_after_an_interrupt(make, action):
    base = make_base()
    for model, place in each_interrupt([PACKAGE], make, action):
        with explained_by(place):
            assert_unloads_to(base, deepcopy(model))
            model.unmerge_adapter()
            assert_base_untouched(model, base)
            assert_close(model(X), dense_of(base, model)(X))
