"""torch.compile sees through the SMT layer: no graph break, and the same losses and deltas as eager."""

from copy import deepcopy

import pytest
import torch
from distributed_worker import Samples, make_base
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback, ops

IDS = Samples().ids[:4]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()


def adapted(base, selection="random", arrangement="tiles"):
    options = {"num_blocks": 17, "block_size": 16, "warmup_steps": 2, "selection": selection}
    model = LlamaForCausalLM.from_pretrained(base)
    return get_peft_model(model, SMTConfig(**options, arrangement=arrangement)).train()


def compiled_layers(model, backend):
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    return model


def steps(model, caller=None, count=4):
    """A few steps of AdamW; returns losses and the final delta."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model if caller is None else caller)(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.base_model.model.smt_bank["default"].weight.detach().clone()


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    assert expected[1].norm() > 0.5  # else the comparison would say nothing


@pytest.mark.parametrize(
    "backend, arrangement", [("aot_eager", "tiles"), ("aot_eager", "sorted"), ("inductor", "tiles")]
)
def test_a_compiled_decoder_layer_is_one_graph_and_trains_as_eager(base, backend, arrangement):
    if backend == "inductor":
        pytest.importorskip("triton")
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:
            pytest.skip("inductor needs a C++ compiler")
    expected = steps(adapted(base, arrangement=arrangement))
    found = steps(
        compiled_layers(adapted(base, arrangement=arrangement), backend)
    )  # fullgraph=True raises at a graph break
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", ["plain", "bias", "hook", "trained"])
def test_compiled_layers_of_every_kind_train_as_eager(base, monkeypatch, kind):
    """A product is computed with the base layer's where nobody looks into that, and beside it elsewhere."""
    results = []
    monkeypatch.setattr(ops, "add_blocks" if kind in ("plain", "bias") else "linear_add_blocks", None)  # not called
    for compiled in (False, True):
        model = adapted(base)
        for name, module in model.named_modules():
            if name.endswith("_proj.base_layer"):
                if kind == "bias":
                    module.bias = torch.nn.Parameter(torch.full([module.out_features], 0.1), requires_grad=False)
                elif kind == "hook":
                    module.register_forward_hook(lambda module, args, output: output * 1.5)
                elif kind == "trained":
                    module.weight.requires_grad_()
        results.append(steps(compiled_layers(model, "aot_eager") if compiled else model))
    assert_equal(*results[::-1])


def test_compiled_layers_share_a_graph_where_the_first_target_has_no_blocks(base):
    """More layers than the compiler would make graphs for."""
    config, graphs = LlamaConfig.from_pretrained(base, num_hidden_layers=12), []
    for first in ({}, {"model.layers.0.self_attn.q_proj": [[0, 0]]}):
        torch.compiler.reset()
        counters.clear()
        blocks = {**first, **{f"model.layers.{layer}.self_attn.v_proj": [[0, 0]] for layer in range(12)}}
        options = SMTConfig(block_size=16, selected_blocks=blocks, init_weights=False)
        model = get_peft_model(LlamaForCausalLM(config), options).train()
        compiled_layers(model, "aot_eager")
        for _ in range(2):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()  # a cache is another one in each layer
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_a_compiled_model_trains_as_eager(base):
    model = adapted(base)
    assert_equal(steps(model, torch.compile(model, backend="aot_eager")), steps(adapted(base)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_torch_compile_equals_trainer_without(base, tmp_path, checkpointing):
    results = []
    for compiled in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None, logging_steps=1,
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model, callback = adapted(base, selection="gradient"), SMTWarmupCallback()
        trainer = Trainer(model, arguments, train_dataset=Samples(), callbacks=[callback])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, model.base_model.model.smt_bank["default"].weight.detach(), callback.selection))
    eager, compiled = results
    assert torch.equal(compiled[2].index, eager[2].index)
    assert_equal(compiled[:2], eager[:2])


def test_compiled_inference_follows_the_trained_delta(base):
    model = compiled_layers(adapted(base), "aot_eager")
    steps(model)
    model.eval()
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        for layer in model.base_model.model.model.layers:
            layer._compiled_call_impl = None
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_disabled_adapter_computes_the_base_model_when_compiled(base):
    model = compiled_layers(adapted(base), "aot_eager")
    steps(model)
    model.eval()
    plain = LlamaForCausalLM.from_pretrained(base).eval()
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_does_not_recompile_at_every_step(base):
    model = compiled_layers(adapted(base), "aot_eager")
    steps(model, count=2)
    before = counters["stats"]["unique_graphs"]
    steps(model, count=4)
    assert counters["stats"]["unique_graphs"] == before


def test_a_copy_compiles_without_a_break():
    """A compiler can look plans up, but not make them."""
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), SMTConfig(
        target_modules=["0"], block_size=16, num_blocks=2, selection="random", init_weights=False))  # fmt: skip
    x = torch.randn(2, 32)
    copy = deepcopy(model.eval())
    torch.testing.assert_close(torch.compile(copy, backend="eager", fullgraph=True)(x), model(x))
