"""The warm-up: score every block by the gradient of the loss, select, and leave everything else as it was.

Scores come from activations, not from `weight.grad`: each target layer keeps x and receives dY, and a custom op forms
dW = dY^T x a row of blocks at a time, reduces it to scores and drops it. Nothing needs `requires_grad` on a base
weight, so quantised and sharded models work, and memory is one float per block.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy
import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from smt_peft import ops
from smt_peft.bank import DeltaBank
from smt_peft.diagnostics import report_additive, warn_of_concentration, warn_of_dominant_batch
from smt_peft.root import SMTRoot
from smt_peft.selection import Selection, select
from smt_peft.tape import Record, Tape, as_matrix


class ScoreCollector:
    """Sums block scores over batches; a batch with a non-finite score anywhere is left out.

    * accumulation 'absolute': the sum of each batch's score.
    * accumulation 'signed': the score of the summed gradient. Needs a dense float32 gradient per target, except for
      'mean_abs': the mean of a block is linear, so block sums suffice.
    """

    def __init__(self, layers: list[nn.Module], block_size: int, score: str, accumulation: str):
        self.layers, self.block_size, self.score, self.accumulation = layers, block_size, score, accumulation
        self.source = torch.zeros((), requires_grad=True)  # makes the graph exist: in the warm-up nothing is trained
        self.scale = 1.0  # of the loss, for float16
        self._of = {id(layer): i for i, layer in enumerate(layers)}
        self.inputs = list(range(len(layers)))  # per layer the first one that read the same input just before it
        self._last: tuple[torch.Tensor, int] | None = None
        self._batch: list[torch.Tensor | None] = [None] * len(layers)
        self._sums: list[torch.Tensor | None] = [None] * len(layers)
        self.skipped = 0
        self._totals: list[float] = []  # of each batch's scores; 0 where it was left out

    @property
    def batches(self) -> int:
        return len(self._totals)

    def wants(self, layer: nn.Module) -> bool:
        return id(layer) in self._of

    def reads(self, layer: nn.Module, x: torch.Tensor) -> None:
        """Note which layers read one input, one after the other."""
        position = self._of[id(layer)]
        if self._last is None or self._last[0] is not x:
            self._last = x, position
        self.inputs[position] = self._last[1]

    def keep(self, tape: Tape, x: torch.Tensor, layer: nn.Module) -> Record:
        """Save x once for all layers that read it."""
        self.reads(layer, x)
        record = tape.record(x, layer)
        if not record.has("x"):
            tape.alias = record.keep(tape.alias, self.source, {"x": as_matrix})
        return record

    def consumers(self, layer: nn.Module) -> list[tuple[str, Callable]]:
        return [("x", partial(self._add, self._of[id(layer)]))]

    def gradient_consumer(self, layer: nn.Module) -> Callable[[torch.Tensor], None]:
        """For a layer that has dW itself, [out, in]."""
        return partial(self._add_gradient, self._of[id(layer)])

    def _add_gradient(self, position: int, gradient: torch.Tensor) -> None:
        if self.accumulation == "absolute":
            new = ops.reduce_blocks(gradient, self.block_size, self.score).float()
        elif self.score == "mean_abs":
            new = gradient.float().unfold(0, *[self.block_size] * 2).unfold(1, *[self.block_size] * 2).sum((2, 3))
        else:
            new = gradient.float()
        old = self._batch[position]
        self._batch[position] = new if old is None else old + new

    def _add(self, position: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        if self.accumulation == "absolute":
            new = ops.block_scores(dy, x, self.block_size, self.score)
        elif self.score == "mean_abs":
            new = ops.block_sums(dy, x, self.block_size)
        else:
            new = dy.float().T @ x.float()
        old = self._batch[position]
        self._batch[position] = new if old is None else old + new

    def end_batch(self) -> bool:
        """Take the batch's scores over; False where they were not finite."""
        self._last = None
        new, self._batch = self._batch, [None] * len(self.layers)
        total = sum(_totals(new)) / self.scale
        finite = math.isfinite(total)
        self._totals.append(total if finite else 0.0)
        if not finite:
            self.skipped += 1
            return False
        for position, scores in enumerate(new):
            if scores is not None:
                scores = scores / self.scale
                old = self._sums[position]
                self._sums[position] = scores if old is None else old.add_(scores)
        return True

    def scores(self) -> list[torch.Tensor]:
        """Mean over the batches, float32 [block rows, block columns] per layer; the same on every rank."""
        used = self.batches - self.skipped
        sums = []
        for layer, total in zip(self.layers, self._sums, strict=True):
            grid = (layer.out_features // self.block_size, layer.in_features // self.block_size)
            if self.accumulation == "signed" and self.score != "mean_abs":
                total = torch.zeros(layer.out_features, layer.in_features) if total is None else total
                total = ops.reduce_blocks(_sum_over_ranks(total), self.block_size, self.score)
            else:
                total = torch.zeros(grid, device=layer.device) if total is None else total
                total = _sum_over_ranks(total)
                if self.accumulation == "signed":
                    total = total.abs() / self.block_size**2
            sums.append(total)
        used = int(_sum_over_ranks(torch.tensor(float(used), device=sums[0].device)))
        return [total / max(used, 1) for total in sums]

    def batch_scores(self) -> list[float]:
        """Per batch, the sum of its scores ('signed': of its |gradients|) over all ranks; 0 where it was left out."""
        return _sum_over_ranks(torch.tensor(self._totals, device=self.layers[0].device)).tolist()


class ActivationCollector(ScoreCollector):
    """Scores a block by the mean |x| over its input columns: the same for all blocks of a block column."""

    def wants(self, layer: nn.Module) -> bool:
        return False

    def observe(self, layer: nn.Module, args: tuple) -> None:
        self.reads(layer, args[0])
        x = args[0].detach().abs().flatten(0, -2).float().mean(0)
        columns = x.view(-1, self.block_size).mean(1)
        self._batch[self._of[id(layer)]] = columns.expand(layer.out_features // self.block_size, -1).clone()


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


def _totals(scores: list[torch.Tensor | None]) -> list[float]:
    """The sum of |score| on each device, so that a batch costs one look at the device."""
    sums: dict[torch.device, torch.Tensor] = {}
    for score in scores:
        if score is not None:
            sums[score.device] = sums.get(score.device, 0) + torch.linalg.vector_norm(score, 1)
    return [total.item() for total in sums.values()]


def _sum_over_ranks(scores: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(scores)
    return scores
