"""What goes wrong without an error is said once, with the value, the fact and the way out."""

import math
import warnings
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smt_peft import SMTConfig, SMTMonitorCallback, SMTWarmupCallback, select_blocks
from smt_peft.bank import DeltaBank
from smt_peft.checks import Group, Target
from smt_peft.diagnostics import warn


def wrap(base, **options):
    return get_peft_model(base, SMTConfig(**{"block_size": 16, "num_blocks": 12, "warmup_steps": 4, **options}))


def warned_of(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if w.category is UserWarning]


def warm_up(model, batches, **options) -> list[str]:
    return warned_of(lambda: select_blocks(model, batches, progress_bar=False, **options))


@pytest.fixture
def arguments(tmp_path):
    def make(**options) -> TrainingArguments:
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        return TrainingArguments(
            str(tmp_path), **{**quiet, "max_steps": 3, "per_device_train_batch_size": 2, **options}
        )

    return make


@pytest.fixture
def trainer(arguments, batches):
    """A Trainer for a model with an adapter."""
    rows = [{"input_ids": ids, "labels": ids} for batch in batches for ids in batch["input_ids"]]

    def make(model, **options) -> Trainer:
        return Trainer(model, arguments(**options), None, rows, callbacks=[SMTWarmupCallback(), SMTMonitorCallback()])

    return make


def test_nothing_is_said_where_nothing_is_wrong(llama, trainer):
    run = trainer(wrap(llama, num_blocks=30), logging_steps=1)
    assert warned_of(run.train) == []


# --- a budget in modules of one input ----------------------------------------------------------------------------


@pytest.fixture
def only_v(llama):
    """Q and K are zero and the rest far from the loss, so that nearly every gradient is in V."""
    for layer in llama.model.layers:
        layer.mlp.down_proj.weight.data.mul_(1e-3)
        layer.self_attn.o_proj.weight.data.mul_(30)
        layer.self_attn.q_proj.weight.data.zero_()
        layer.self_attn.k_proj.weight.data.zero_()
    return llama


def test_a_budget_in_modules_of_one_input_is_named(only_v, batches):
    sizes = {name: module.weight.numel() for name, module in only_v.model.named_modules() if hasattr(module, "bias")}
    fair = round(100 * sum(size for name, size in sizes.items() if name[-6] in "qkv") / sum(sizes.values()))
    [message] = warm_up(wrap(only_v, target_modules="all-linear", block_size=8, num_blocks=40), batches)
    assert f"100 % of 40 selected blocks are in k_proj q_proj v_proj, which has {fair} % of the blocks" in message
    assert "scope='input'" in message and "num_blocks_pattern" in message


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "module"},
        {"scope": "input"},
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"target_modules": ["v_proj"]},
        {"num_blocks": 5},
        {"target_modules": ["v_proj", "o_proj"], "num_blocks_pattern": {"v_proj": 40}},
    ],
    ids=["every matrix", "every input", "one input", "one type", "few blocks", "a budget of its own"],
)
def test_a_budget_that_no_ranking_put_there_is_not(only_v, batches, options):
    options = {"target_modules": "all-linear", "block_size": 8, "num_blocks": 40, **options}
    assert warm_up(wrap(only_v, **options), batches) == []


# --- scores from one batch ---------------------------------------------------------------------------------------


def louder(factor: float, number: int = 3):
    """The model's loss, `factor` times it in one batch."""
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(**batch).loss * (factor if len(seen) == number else 1)

    return loss


def test_a_batch_with_most_of_the_scores_is_named(llama, batches):
    quiet = select_blocks(wrap(deepcopy(llama)), batches, progress_bar=False).batch_scores
    quiet[2] *= 10
    [message] = warm_up(wrap(llama), batches, loss_function=louder(10))
    assert f"Batch 3 of 4 in the warm-up has {100 * quiet[2] / sum(quiet):.0f} % of all scores" in message
    assert "Look at its data" in message


def test_a_batch_after_those_that_rank_lines_is_named(llama, batches):
    model = wrap(llama, arrangement="sorted", warmup_steps=8)
    [message] = warm_up(model, batches * 2, loss_function=louder(100, number=7))
    assert "Batch 7 of 8 in the warm-up" in message


@pytest.mark.parametrize("steps, factor", [(4, 1.5), (3, 100)], ids=["less than half", "too few batches"])
def test_a_batch_that_need_not_be_an_outlier_is_not(llama, batches, steps, factor):
    assert warm_up(wrap(llama, warmup_steps=steps), batches, loss_function=louder(factor)) == []


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs"])
def test_signed_scores_are_watched_too(llama, batches, score):
    model = wrap(llama, accumulation="signed", score=score)
    [message] = warm_up(model, batches, loss_function=louder(100))
    assert "Batch 3 of 4" in message


def test_activations_are_watched_too(llama, batches):
    llama.model.embed_tokens.weight.data[:2] = 0  # what norms make of zeros is zero
    silent = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    model = wrap(llama, selection="activation")
    data = [silent, silent, batches[0], silent]
    [message] = warm_up(model, data, loss_function=lambda model, batch: model(**batch).logits.sum())
    assert "Batch 3 of 4 in the warm-up has 100 % of all scores" in message


# --- divergence --------------------------------------------------------------------------------------------------


def watch(arguments, model, norms, **options) -> list[str]:
    """What the callback says about the norms of steps 1, 2, ..."""
    callback, control, state = SMTMonitorCallback(), TrainerControl(), TrainerState()
    args = arguments(**options)

    def run():
        callback.on_train_begin(args, state, control, model=model)
        for norm in norms:
            state.global_step += 1
            callback.on_log(args, state, control, logs={"loss": 1.0, "grad_norm": norm})
        callback.on_log(args, state, control, logs={"eval_loss": 1.0})
        callback.on_log(args, state, control)

    return warned_of(run)


@pytest.fixture
def selected(llama):
    return wrap(llama, selection="random")


@pytest.mark.parametrize("norm, shown", [(math.nan, "nan"), (math.inf, "inf")])
def test_a_norm_that_is_not_finite_is_named_once(arguments, selected, norm, shown):
    [message] = watch(arguments, selected, [2.0, 1.0, norm, norm, norm])
    assert f"The gradient norm is {shown} at step 3" in message and "Lower the learning rate" in message


def test_a_leap_is_named_once_with_the_median(arguments, selected):
    [message] = watch(arguments, selected, [2.0, 4.0, 3.0, 5.0, 1.0, 301.0, 9999.0])
    assert "The gradient norm is 301 at step 6, after a median of 3:" in message and "max_grad_norm" in message


@pytest.mark.parametrize(
    "norms",
    [[2.0, 4.0, 3.0, 5.0, 1.0, 299.0], [1.0, 1.0, 1.0, 1.0, 1000.0], [0.0] * 6 + [1.0], [1000.0, 1.0] * 6],
    ids=["below", "too early to say", "after zeros", "noise from the start"],
)
def test_norms_that_are_no_leap_are_not(arguments, selected, norms):
    assert watch(arguments, selected, norms) == []


def test_a_callback_judges_each_run_by_itself(arguments, selected):
    callback, args = SMTMonitorCallback(), arguments()

    def run(*norms: float) -> list[str]:
        state = TrainerState()

        def log():
            callback.on_train_begin(args, state, TrainerControl(), model=selected)
            for norm in norms:
                callback.on_log(args, state, TrainerControl(), logs={"grad_norm": norm})

        return warned_of(log)

    assert run(*[1e-3] * 6) == []
    assert run(1.0, 2.0) == [], "no leap from the run before"
    assert len(run(math.nan)) == len(run(math.nan)) == 1


def test_single_overflows_of_float16_are_left_to_the_loss_scaler(arguments, selected):
    overflows = [math.inf] * 10
    assert watch(arguments, selected, [*overflows, 1.0, *overflows], fp16=True) == []
    [message] = watch(arguments, selected, [*overflows, math.inf], fp16=True)
    assert "inf at step 11" in message


def test_a_trainer_that_diverges_is_named(selected, trainer):
    run = trainer(selected, learning_rate=1e30, logging_steps=1)
    [message] = [text for text in warned_of(run.train) if "gradient norm" in text]
    logged = {entry["step"]: entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry}
    first = next(step for step, norm in logged.items() if not math.isfinite(norm))
    assert f"at step {first}" in message


@pytest.mark.parametrize(
    "options, step", [({}, 5), ({"save_strategy": "steps", "save_steps": 4}, 4)], ids=["end", "save"]
)
def test_deltas_that_are_not_finite_are_named_once_whatever_is_logged(selected, trainer, options, step):
    run = trainer(selected, learning_rate=1e38, logging_strategy="no", max_steps=5, **options)
    [message] = [text for text in warned_of(run.train) if "finite" in text]
    assert f"100 % of the trained values are not finite at step {step}" in message


def test_an_adapter_that_another_callback_merged_in_the_end_is_no_error(selected, trainer):
    class Merge(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.merge_and_unload()

    run = trainer(selected)
    run.callback_handler.callbacks.insert(0, Merge())
    run.train()


def test_of_a_sharded_bank_the_own_part_is_looked_at(selected, arguments):
    whole = torch.ones(4, 2, 2)
    whole[0, 0, 0] = math.inf
    bank = DeltaBank(SMTConfig(block_size=2, num_blocks=4), [Target("a", 2, 2)], [Group([0], 4)], torch.device("cpu"))

    def message(weight) -> str:
        callback, state = SMTMonitorCallback(), TrainerState(global_step=7)
        callback.on_train_begin(arguments(), state, TrainerControl(), model=selected)
        bank.weight, callback._bank = weight, bank
        [text] = warned_of(lambda: callback.on_save(arguments(), state, TrainerControl()))
        return text

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        fsdp = torch.nn.Parameter(DTensor.from_local(whole[:2], mesh, [Shard(0)], run_check=False))
        assert message(fsdp).startswith("12.5 % of the trained values are not finite at step 7")
    finally:
        dist.destroy_process_group()
    dist.init_process_group("fake", store=dist.HashStore(), rank=2, world_size=3)
    try:
        zero3 = torch.nn.Parameter(torch.empty(0))
        zero3.ds_tensor = torch.tensor([math.inf, 1.0, 1.0, 1.0, 3e38, 3e38])  # the last two fill it up
        zero3.ds_numel, zero3.ds_tensor.ds_numel, zero3.ds_process_group = 16, 6, dist.group.WORLD
        bank.weight = zero3
        assert bank.local().tolist() == [math.inf, 1.0, 1.0, 1.0]
    finally:
        dist.destroy_process_group()


def test_the_first_version_of_fsdp_is_refused_in_words(llama, batches):
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        model, options = wrap(llama, selection="random"), {"device_id": torch.device("cpu"), "use_orig_params": True}
        units = ModuleWrapPolicy({DeltaBank})  # as PEFT's own policy has it, too: what is trained, by itself
        whole = FullyShardedDataParallel(model, auto_wrap_policy=units, **options)
        with pytest.raises(ValueError, match=r"a piece of a flat parameter.*fsdp_version: 2"):
            whole(batches[0]["input_ids"])
    finally:
        dist.destroy_process_group()


def test_only_the_main_process_of_a_distributed_run_speaks(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank, messages in ((0, 1), (1, 0)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert len(warned_of(lambda: warn("Look out."))) == messages
