"""A model that is exported, traced, replicated, called with other weights or thrown away: as LoRA."""

import gc
import warnings
import weakref
from copy import deepcopy

import pytest
import torch
from dense_truth import (
    METHODS,
    add_adapter,
    assert_base_untouched,
    assert_close,
    assert_same_gradients,
    dense_of,
    make_config,
    outputs,
    train,
    wrap,
)
from peft import get_peft_model
from torch import nn

pytestmark = pytest.mark.parametrize("method", METHODS)


class Plain(nn.Module):
    """Two targets that read one input, and one behind them."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.out = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 16)

    def forward(self, x):
        return self.out(torch.tanh(self.query(x)) * self.value(x))


TARGETS = {"target_modules": ["query", "value", "out"], "block_size": 8, "budget": 15}


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain().double()


@pytest.fixture
def x():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def base(llama):
    return llama.double()


# --- other ways to call it -------------------------------------------------------------------------------------------


def trainable(model, x):
    pass


def trainable_and_used(model, x):
    model(x).sum().backward()
    model.zero_grad()


def frozen(model, x):
    model.requires_grad_(False)


STATES = [trainable, trainable_and_used, frozen]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_an_exported_model_equals_eager(plain, x, method, state, strict):
    model = wrap(plain, method, **TARGETS).eval()
    dense = dense_of(plain, model)
    state(model, x)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=strict).module()
        assert_close(exported(x), dense(x))
        assert_close(exported(x + 1), dense(x + 1))
    assert_close(model(x), dense(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False], ids=["PeftModel", "inner model"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_traced_model_equals_eager(plain, x, method, state, whole):
    model = wrap(plain, method, **TARGETS).eval()
    dense = dense_of(plain, model)
    state(model, x)
    with torch.no_grad():
        traced = torch.jit.trace(model if whole else model.base_model.model, (x,))
        assert_close(traced(x + 1), dense(x + 1))
    assert_close(model(x), dense(x))


def test_a_call_with_other_weights_uses_them_and_leaves_the_models_own(plain, x, method):
    model = wrap(plain, method, **TARGETS)
    own = dense_of(plain, model)
    assert_close(model(x), own(x))
    changed = {n: (torch.randn_like(p) * 0.1).requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    twin = deepcopy(model)
    for name, value in changed.items():
        twin.get_parameter(name).data.copy_(value.detach())
    other = dense_of(plain, twin)
    found = torch.func.functional_call(model, changed, (x,))
    assert_close(found, other(x))
    found.square().sum().backward()
    other(x).square().sum().backward()
    assert all(p.grad is None for p in model.parameters()), "the gradient is the given weights'"
    for name, value in changed.items():
        twin.get_parameter(name).grad = value.grad
    assert_same_gradients(twin, other)
    assert_close(model(x), own(x))
    assert_base_untouched(model, plain)


def test_a_call_with_another_base_weight_uses_it(plain, x, method):
    model = wrap(plain, method, **TARGETS)
    dense = dense_of(plain, model)
    model(x)
    other = torch.randn(32, 32, dtype=torch.float64)
    expected = torch.func.functional_call(
        dense, {"value.weight": other + dense.value.weight.detach() - plain.value.weight.detach()}, (x,)
    )
    found = torch.func.functional_call(model, {"base_model.model.value.base_layer.weight": other}, (x,))
    assert_close(found, expected)
    assert_close(model(x), dense(x))


# --- what is left behind ------------------------------------------------------------------------------------------


@pytest.fixture
def without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def used(model, batches):
    outputs(model, batches[0])
    train(model, batches)


def disabled_and_merged(model, batches):
    with model.disable_adapter():
        outputs(model, batches[0])
    model.merge_adapter()
    model.unmerge_adapter()


def of_mixed_batches(model, batches):
    with torch.no_grad():
        model.eval()(batches[0]["input_ids"], adapter_names=["default", "__base__"])


def fresh(model, batches):
    pass


@pytest.mark.parametrize("use", [fresh, used, disabled_and_merged, of_mixed_batches], ids=lambda use: use.__name__)
@pytest.mark.parametrize("end", ["del", "unload", "merge_and_unload"])
def test_a_deleted_model_is_freed_without_the_garbage_collector(
    llama, batches, without_garbage_collection, method, use, end
):
    base = llama
    del llama
    model = get_peft_model(deepcopy(base), make_config(method)).train()
    use(model, batches)
    parameter = weakref.ref(next(p for p in model.parameters() if p.requires_grad))
    inner = weakref.ref(model.base_model.model)
    weight = weakref.ref(model.get_input_embeddings().weight)
    if end != "del":
        plain = getattr(model, end)()
        del model
        assert parameter() is None, "the adapter is still there after unloading"
        del plain
    else:
        del model
    assert parameter() is None and inner() is None and weight() is None


def live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def left_by_cycles(base, batches, method, count):
    """Tensors that are alive after adding, training and deleting an adapter so many times."""
    model = wrap(base, method)
    train(model, batches, steps=1)
    before = live_tensors()
    for cycle in range(count):
        add_adapter(model, f"cycle{cycle}", seed=cycle)
        model.set_adapter(f"cycle{cycle}")
        train(model, batches, steps=1)
        model.set_adapter("default")
        model.delete_adapter(f"cycle{cycle}")
    return live_tensors() - before


def test_forty_adapters_that_come_and_go_leave_no_tensors(make_llama, batches, method):
    if method == "lora":
        pytest.skip("is the control")
    base = make_llama(num_hidden_layers=1).double()
    left_by_cycles(base, batches, method, 2)  # what is made once
    assert left_by_cycles(base, batches, method, 40) <= max(0, left_by_cycles(base, batches, "lora", 40))


def test_many_steps_and_switches_leave_no_tensors(make_llama, batches, method):
    model = wrap(make_llama(num_hidden_layers=1), method)
    add_adapter(model, "other", seed=2)

    def use():
        for adapter in ("other", "default"):
            model.set_adapter(adapter)
            train(model, batches)
            outputs(model, batches[0])
            with model.disable_adapter():
                outputs(model, batches[0])

    use()
    before = live_tensors()
    for _ in range(10):
        use()
    assert live_tensors() <= before


def test_an_output_that_is_kept_does_not_keep_the_next_forwards(plain, x, method):
    """The graph of a loss that was logged by mistake holds its own activations, not those of later steps."""
    model = wrap(plain, method, **TARGETS)
    kept = [model(x).sum()]
    model(x).sum().backward()
    before = live_tensors()
    for _ in range(5):
        model(x).sum().backward()
    assert live_tensors() <= before and kept
