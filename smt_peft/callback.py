"""SMTWarmupCallback: decides when the warm-up runs inside a Trainer, and gives it the Trainer's own loss."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from smt_peft.warmup import find_adapter, select_blocks


class SMTWarmupCallback(TrainerCallback):
    """Runs the SMT warm-up when training begins, unless the adapter has its blocks (resumed, loaded, data-free).

    It goes through the training data's first batches with the Trainer's own loss (label smoothing,
    compute_loss_func, TRL's losses); the batches that follow in training are the same as without it. A summary of
    where the selected blocks are is printed on the main process.

    Args:
        adapter_name: which adapter to select for.

    Attributes:
        selection: the `Selection` with its scores, once the warm-up has run; None if it was not needed.
    """

    def __init__(self, adapter_name: str = "default"):
        self.adapter_name = adapter_name
        self.selection = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        bank, _ = find_adapter(model, self.adapter_name)
        if bank.is_selected:
            return
        loss_function, scale, (trainer, _) = None, 1.0, calling_trainer()
        if trainer is not None:
            loss_function = _TrainerLoss(trainer)
            scaler = getattr(trainer.accelerator, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            train_dataloader = _RawBatches(trainer, train_dataloader)
        with _without_trace(trainer):
            self.selection = select_blocks(
                model,
                train_dataloader,
                self.adapter_name,
                loss_function=loss_function,
                loss_scale=scale,
                progress_bar=not args.disable_tqdm and state.is_local_process_zero,
            )
        if state.is_world_process_zero:
            tqdm.write(self.selection.summary())


# What TRL's losses count and log, and what Trainer divides the loss by (set only when its loop has begun).
_COUNTED = ("_metrics", "_logs", "_total_train_tokens", "_pending_metrics", "_pending_extra_logs")
_ACCUMULATION = "current_gradient_accumulation_steps"


@contextlib.contextmanager
def _without_trace(trainer: Trainer | None) -> Iterator[None]:
    """Keep warm-up batches out of what the Trainer logs; each counts as a step of its own, without accumulation."""
    if trainer is None:
        yield
        return
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in (*_COUNTED, _ACCUMULATION) if name in vars(trainer)}
    tokens = trainer.state.num_input_tokens_seen
    setattr(trainer, _ACCUMULATION, 1)
    try:
        yield
    finally:
        vars(trainer).update(kept)
        trainer.state.num_input_tokens_seen = tokens


class _RawBatches:
    """The Trainer's dataloader as (batch, num_items_in_batch), counted by the Trainer for each batch alone."""

    def __init__(self, trainer: Trainer, dataloader):
        self.trainer, self.dataloader = trainer, dataloader

    def __iter__(self):
        epoch = getattr(getattr(self.dataloader, "batch_sampler", None), "epoch", 0)
        iterator = iter(self.dataloader)
        while True:
            batches, items = self.trainer.get_batch_samples(iterator, 1, self.trainer.args.device)
            if not batches:
                break
            yield batches[0], items
        if hasattr(self.dataloader, "set_epoch"):
            self.dataloader.set_epoch(epoch)  # the sampler counts complete passes; training starts at its own epoch


class _TrainerLoss:
    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __call__(self, model: nn.Module, batch_and_items) -> torch.Tensor:
        batch, items = batch_and_items
        trainer = self.trainer
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        return loss.mean()


def calling_trainer() -> tuple[Trainer | None, str | None]:
    """The Trainer whose event this is, and the checkpoint it resumes from.

    Events hand over the model and the data but not the Trainer, and only it knows the loss; it is found as the `self`
    of a calling frame, so that users need not pass it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    return None, None
