"""The warm-up: score every block by the gradient of the loss, select, and leave everything else as it was."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy
import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from smt_peft.bank import DeltaBank
from smt_peft.diagnostics import report_additive, warn_of_concentration, warn_of_dominant_batch
from smt_peft.root import SMTRoot
from smt_peft.scoring import ActivationCollector, ScoreCollector
from smt_peft.selection import Selection, select


def select_blocks(
    model: nn.Module,
    dataloader: Iterable,
    adapter_name: str = "default",
    loss_function: Callable[[nn.Module, object], torch.Tensor] | None = None,
    loss_scale: float = 1.0,
    progress_bar: bool = True,
) -> Selection:
    """Run the warm-up by hand and apply its selection: what `SMTWarmupCallback` does inside a Trainer.

    Base weights, `requires_grad`, gradients, train/eval mode and random states are afterwards what they were. The
    model runs in train mode. In a distributed run every rank calls this with its own batches; all get the selection of
    the summed scores.

    Args:
        model: a model with an SMT adapter (from `get_peft_model`, or one that transformers injected).
        dataloader: batches; iterated again from the start where it is shorter than `warmup_steps`.
        adapter_name: which adapter to select for.
        loss_function: (model, batch) -> scalar loss. Default: `model(**batch).loss`, the batch moved to the model.
        loss_scale: multiplies the loss, for float16; halved after a batch that overflows.
        progress_bar: show one.

    Returns:
        The selection, with the scores it was made from. It is already applied.

    Raises:
        ValueError: without such an adapter, where the dataloader is empty, where half of the batches or more are not
            finite, or where every score is zero.
    """
    root, bank, config = find_adapter(model, adapter_name)
    if config.selection not in ("gradient", "activation"):
        raise ValueError(
            f"selection={config.selection!r} needs no data: the blocks of adapter {adapter_name!r} were selected when "
            "it was made. Use selection='gradient' to select by a warm-up."
        )
    layers = [layer for layer in root.layers if adapter_name in layer.smt_blocks]
    collecting = ActivationCollector if config.selection == "activation" else ScoreCollector
    collector = collecting(layers, bank.block_size, config.score, config.accumulation)
    collector.scale = loss_scale
    with _untouched(model), _collecting(root, collector):
        _run(model, dataloader, config.warmup_steps, collector, loss_function or _model_loss, progress_bar)
    scores = collector.scores()
    index = select(scores, bank.groups, config.scope, collector.inputs)
    apply_selection(model, adapter_name, index)
    selection = Selection(
        [target.name for target in bank.targets],
        bank.block_size,
        bank.index.cpu(),
        [score.float().cpu() for score in scores],
        collector.batches,
        collector.skipped,
        collector.batch_scores(),
    )
    warn_of_dominant_batch(selection)
    warn_of_concentration(selection, bank.groups, collector.inputs)
    report_additive(root, adapter_name)
    return selection


def find_adapter(model: nn.Module, adapter_name: str) -> tuple[SMTRoot, DeltaBank, object]:
    """The model's root, the adapter's bank and its config. Raises ValueError where there is no such adapter."""
    root = next((module for module in model.modules() if isinstance(module, SMTRoot)), None)
    if root is None:
        raise ValueError("The model has no SMT adapter; wrap it first: get_peft_model(model, SMTConfig(...)).")
    if adapter_name not in root:
        raise ValueError(f"There is no SMT adapter {adapter_name!r}; the model has {sorted(root)}.")
    owner = next(m for m in model.modules() if adapter_name in (getattr(m, "peft_config", None) or {}))
    return root, root[adapter_name], owner.peft_config[adapter_name]


def apply_selection(model: nn.Module, adapter_name: str, index: torch.Tensor) -> None:
    """Fill the adapter's index, int [num_blocks, 3], with rank 0's selection, and mirror it in the config."""
    _, bank, config = find_adapter(model, adapter_name)
    index = index.to(bank.index.device, torch.int32)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(index, src=0)
    bank.set_index(index)
    config.selected_blocks = bank.selected_blocks()


def _run(model, dataloader, steps: int, collector: ScoreCollector, loss_function, progress_bar: bool) -> None:
    batches = _endless(dataloader, steps)
    bar = tqdm(range(steps), desc="SMT warm-up", disable=not progress_bar, unit="batch")
    needs_backward = not isinstance(collector, ActivationCollector)
    for _ in bar:
        batch = next(batches)
        with torch.set_grad_enabled(needs_backward):
            loss = loss_function(model, batch)
            if needs_backward:
                (loss * collector.scale).backward()
        if not collector.end_batch():
            collector.scale = max(1.0, collector.scale / 2)
            bar.set_postfix(skipped=collector.skipped)
    if 2 * collector.skipped >= collector.batches:
        raise ValueError(
            f"{collector.skipped} of {collector.batches} warm-up batches had a non-finite loss or gradient, too many "
            "to select from; lower the loss scale or use bfloat16, and look for NaN in the data."
        )


def _endless(dataloader: Iterable, steps: int) -> Iterator:
    seen = 0
    while True:
        before = seen
        for batch in dataloader:
            seen += 1
            yield batch
        if seen == before:
            raise ValueError(
                "The warm-up got no batch: the dataloader is empty, or it can be iterated only once. Give it data, or "
                "a dataset that can be iterated again."
            )
        if seen < steps and before == 0:
            warnings.warn(
                f"The data has {seen} batches, fewer than warmup_steps={steps}: the warm-up goes through them again."
            )


def _model_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded: accelerate's hooks move the inputs
        return model(**batch).loss
    moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    return model(**moved).loss


@contextlib.contextmanager
def _collecting(root: SMTRoot, collector: ScoreCollector) -> Iterator[None]:
    hooks = []
    if isinstance(collector, ActivationCollector):
        hooks = [layer.register_forward_pre_hook(collector.observe) for layer in collector.layers]
    root.tape.collector = collector
    try:
        yield
    finally:
        root.tape.collector = None
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Train mode with nothing trainable; then modes, requires_grad, gradients and random states as they were."""
    modes = {module: module.training for module in model.modules()}
    trainable = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    states = random.getstate(), numpy.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.train()
            for parameter, _ in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, gradient in trainable:
                parameter.requires_grad_(True)
                parameter.grad = gradient
            for module, mode in modes.items():
                module.training = mode
            random.setstate(states[0])
            numpy.random.set_state(states[1])
