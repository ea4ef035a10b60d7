"""Tests of scripts/live_sync.py, and of the code in docs/sync.md."""

import inspect
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import live_sync
import pytest
import torch
from dense_truth import bank_of, wrap
from test_patches import assert_same, fuse, merged
from torch import nn

from smt_peft import select_blocks
from smt_peft.patches import sparse_patch

ROOT = Path(__file__).parents[1]

FIRST, RECEIVER, FUSED, TRL = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sync.md").read_text(), re.DOTALL)


# --- docs/sync.md ----------------------------------------------------------------------------------------------------


def test_the_first_example_sends_and_undoes(llama):
    model, generator = wrap(llama), deepcopy(llama)
    exec(FIRST.rpartition("apply_patch")[0], here := {"model": model, "generator": generator})
    assert_same(generator, merged(model))
    exec(FIRST[FIRST.rindex("apply_patch") :], here)
    assert_same(generator, llama)


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_a_receiver_without_the_package_is_nine_lines(llama, method):
    model, generator = wrap(llama, method), deepcopy(llama)
    exec(RECEIVER, {"generator": generator, "patch": sparse_patch(model)})
    assert_same(generator, merged(model))
    assert "peft" not in RECEIVER


def test_the_fused_example_sends_and_undoes(llama):
    model, engine = wrap(llama), fuse({name: value.clone() for name, value in llama.state_dict().items()})
    exec(FUSED.rpartition("apply_patch")[0], here := {"base": llama, "model": model, "engine": engine})
    assert all(torch.equal(engine[name], value) for name, value in fuse(merged(model).state_dict()).items())
    exec(FUSED[FUSED.rindex("apply_patch") :], here)
    assert all(torch.equal(engine[name], value) for name, value in fuse(llama.state_dict()).items())


class Engine(nn.Module):
    """Parameters by their names, as vLLM has them."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in state.items():
            owner, _, attribute = name.rpartition(".")
            module = self
            for part in owner.split("."):
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(attribute, nn.Parameter(value.clone(), requires_grad=False))


def test_trls_hook_sends_patches_from_the_warm_up_on(llama, batches):
    model, resets = wrap(llama, selection="gradient", warmup_steps=1), []
    engine = Engine(fuse(llama.state_dict()))
    place = "llm.llm_engine.model_executor.driver_worker.model_runner.model"
    generation = engine
    for name in reversed(place.split(".")):
        generation = SimpleNamespace(**{name: generation})
    generation.llm.reset_prefix_cache = lambda: resets.append(True)
    trainer = SimpleNamespace(model=model, vllm_generation=generation)
    exec(TRL, {"base": llama, "trainer": trainer})

    generation.sync_weights()
    assert not resets
    deltas = bank_of(model).weight.data.clone()
    bank_of(model).weight.data.zero_()
    select_blocks(model, batches, progress_bar=False)
    for scale in (1, -2):
        bank_of(model).weight.data = deltas * scale
        generation.sync_weights()
        found, expected = engine.state_dict(), fuse(merged(model).state_dict())
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(resets) == 2


def test_trl_has_the_hooks_that_the_page_names():
    trl = pytest.importorskip("trl")
    from trl.generation.vllm_generation import VLLMGeneration

    sync = inspect.getsource(VLLMGeneration.sync_weights)
    assert "self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights" in sync
    assert "self.vllm_client.update_named_params" in sync and "self.llm.reset_prefix_cache()" in sync
    assert "merge_adapter" in inspect.getsource(VLLMGeneration._iter_named_params)
    assert "self.vllm_generation.sync_weights()" in inspect.getsource(trl.GRPOTrainer._generate_single_turn)
    options = {"vllm_mode", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode"}
    assert options <= set(inspect.signature(trl.GRPOConfig).parameters)


# --- scripts/live_sync.py --------------------------------------------------------------------------------------------


def test_the_processes_agree_in_the_end(capfd):
    assert live_sync.run(live_sync.Options(steps=2, group=2, new_tokens=4))
    printed = capfd.readouterr().out
    sizes = {way: int(size.replace(",", "")) for way, size in re.findall(r"(?m)^(\w+, .*?) {2,}([\d,]+) ", printed)}
    assert sizes["SMT, all weights, merged"] == sizes["LoRA, all weights, merged"] > 4 * 1_918_656
    assert 4 * 16_384 < sizes["SMT, a patch"] < 4 * 16_384 * 1.1
    assert "merged model's bit for bit: True; once undone, the base's: True" in printed


def test_the_loss_has_the_gradient_of_the_policy(llama):
    group = {"length": 3, "tokens": [[5, 6, 7, 8, 9], [5, 6, 7, 10, 0]], "texts": ["x" * 40, "x" * 20]}
    batch = live_sync.batch_of(group)
    assert batch["reward"] == 0.75 and batch["advantages"][0] == -batch["advantages"][1] > 0
    live_sync.grpo_loss(llama, batch).backward()
    found = llama.lm_head.weight.grad.clone()
    llama.zero_grad()
    chances = llama(batch["tokens"]).logits.log_softmax(-1)
    first = chances[0, 2, 8] + chances[0, 3, 9]
    (-(batch["advantages"][0] * first + batch["advantages"][1] * chances[1, 2, 10]) / 3).backward()  # 0 is padding
    torch.testing.assert_close(found, llama.lm_head.weight.grad)


def test_the_shapes_of_7b_are_measured(capsys):
    live_sync.measure_7b(layers=1, side=64, num_blocks=2, block_size=32)
    printed = capsys.readouterr().out
    assert printed.count("apply the next") == 2
    sizes = [int(size.replace(",", "")) for size in re.findall(r": ([\d,]+) bytes", printed)]
    assert len(sizes) == 2 and all(size > 2 * 2 * 32 * 32 for size in sizes)
