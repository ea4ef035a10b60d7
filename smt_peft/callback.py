"""The callback that decides when a Trainer's warm-up runs, and gives it the Trainer's own loss."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.data_loader import IterableDatasetShard
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from smt_peft.banks import find_bank
from smt_peft.diagnostics import warn
from smt_peft.selected import SELECTION_FILE, Selection
from smt_peft.untouched import apart, as_before, put_back_afterwards, random_states, refill, same_order_afterwards
from smt_peft.warmup import apply_selection, select_blocks

# Where TRL's losses log.
LOGGED = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs", "_stored_metrics")
LOSS_SCALE = 2.0**16  # where PyTorch's gradient scaler begins, too; batches that overflow halve it


class SMTWarmupCallback(TrainerCallback):
    """Runs the SMT warm-up when training begins, unless the adapter has its blocks (resumed, loaded, data-free).

    It goes through the training data's first batches with the Trainer's own loss (label smoothing,
    compute_loss_func, TRL's losses); the batches that follow in training are the same as without it. A summary of
    where the selected blocks are is printed on the main process.

    Args:
        adapter_name: which adapter to select for.
        selection: of an earlier warm-up, to be used instead of a new one.
        avoid: see `select_blocks`.

    Attributes:
        selection: the `Selection` of this run with its scores: given, from the warm-up, or found beside the checkpoint
            or the adapter that the run goes on with; None where there is none.

    Raises:
        ValueError: when training begins, where the adapter has other blocks than the given selection's, where the
            checkpoint to resume from holds other adapters alone, where the optimizer does not have its deltas, where
            the data can be read only once, where `avoid` stands beside a selection or a rule that needs no warm-up,
            and for what `select_blocks` refuses.
    """

    def __init__(self, adapter_name: str = "default", selection: Selection | None = None, avoid: Sequence[str] = ()):
        if selection is not None and avoid:
            raise ValueError(
                f"avoid={[*avoid]} is for a warm-up, and selection=... takes its place: leave one of the two out. "
                "select_blocks(model, data, avoid=...) gives a selection without these weights."
            )
        self.adapter_name = adapter_name
        self.selection = self._given = selection
        self.avoid = avoid

    def on_train_begin(
        self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs
    ) -> None:
        bank = find_bank(model, self.adapter_name)
        config = bank.config
        _refuse_to_train_without(bank.weight, self.adapter_name, model, optimizer)
        if args.deepspeed_plugin is None:  # which may cast the whole model
            _warn_of_cast_deltas(model, bank.weight, self.adapter_name)
        trainer, resumed = calling_trainer()
        self.selection = self._given
        is_loaded_by_name = trainer and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        if resumed and is_loaded_by_name and isinstance(model, PeftModel):
            _refuse_checkpoint_of_others(resumed, self.adapter_name)
        if self.avoid and not config.needs_warmup:
            raise ValueError(
                f"avoid={[*self.avoid]} is for a warm-up, and selection={config.selection!r} needs none: the blocks "
                f"of adapter {self.adapter_name!r} were selected when it was made. Leave it out, or use 'gradient'."
            )
        if bank.is_selected:
            blocks = bank.selected_blocks()
            if self._given is not None and not self._given.has_blocks(blocks):
                raise ValueError(
                    f"Adapter {self.adapter_name!r} has other blocks already (loaded, given, or by a rule that needs "
                    "no data) than those of SMTWarmupCallback(selection=...). Leave one of the two out."
                )
            if self._given is None:
                self.selection = _record_beside(resumed, self.adapter_name, blocks) or config.record(blocks)
            config.made_by, config.selected_blocks = self.selection, blocks
            return
        if self._given is not None:
            apply_selection(model, self.adapter_name, self._given)
            return
        scaler = getattr(trainer.accelerator, "scaler", None) if trainer else None  # DeepSpeed has one of its own
        loss_scale = scaler.get_scale() if scaler else LOSS_SCALE if args.fp16 else 1.0
        own = _Batches(trainer, train_dataloader) if trainer else None
        with same_order_afterwards(train_dataloader), _lent(trainer) if trainer else contextlib.nullcontext():
            _refuse_what_is_read_once(train_dataloader)
            self.selection = select_blocks(
                model,
                own or train_dataloader,
                self.adapter_name,
                loss_function=own and own.loss,
                loss_scale=loss_scale,
                progress_bar=not args.disable_tqdm and state.is_local_process_zero,
                avoid=self.avoid,
            )
        if state.is_world_process_zero:
            tqdm.write(self.selection.summary())


def _refuse_to_train_without(
    deltas: nn.Parameter, adapter: str, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise ValueError where the optimizer lacks the deltas. One that offloads holds copies: that of the deltas has
    their shape. One that steps in the backward holds nothing of the model, and passes."""
    zero = getattr(optimizer, "optimizer", None)  # DeepSpeed's, whose groups have parts of parameters
    groups = getattr(zero, "bit16_groups", None) or getattr(zero, "fp16_groups", None)  # ZeRO-2's, ZeRO-3's
    groups = groups or [group["params"] for group in (optimizer.param_groups if optimizer else [])]
    held = [one for group in groups for one in group]
    own = {id(parameter) for parameter in model.parameters()}
    has_deltas = any(one is deltas or (one.shape == deltas.shape and id(one) not in own) for one in held)
    if deltas.requires_grad and not has_deltas and any(id(one) in own for one in held):
        raise ValueError(
            f"The optimizer does not have the deltas of adapter {adapter!r}, which would never be trained. They are "
            "one parameter at the root of the model, which parameters() of a part of it do not contain: add "
            f"model.get_base_model().smt_bank[{adapter!r}].weight to one of its groups. Or was it made before "
            "get_peft_model?"
        )


def _refuse_checkpoint_of_others(checkpoint: str, adapter: str) -> None:
    """Raise ValueError where Trainer, which takes the name of a folder in a checkpoint for that of an adapter, has
    loaded others from there, and left this one as it was."""
    held = sorted(file.parent.name for file in Path(checkpoint).glob(f"*/{SAFETENSORS_WEIGHTS_NAME}"))
    if held and (Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME).is_file():
        held.append("default")
    if held and adapter not in held:
        raise ValueError(
            f"{checkpoint} does not hold the adapter {adapter!r}, but {', '.join(held)}: the adapter would start "
            f"untrained in mid-run. Resume with get_peft_model(model, config, adapter_name={held[0]!r}) and "
            f"SMTWarmupCallback({held[0]!r}), or train without resume_from_checkpoint."
        )


def _record_beside(checkpoint: str | None, adapter: str, blocks: Mapping[str, Sequence]) -> Selection | None:
    """What the warm-up left in a checkpoint, beside an adapter with these blocks."""
    for folder in [Path(checkpoint, adapter), Path(checkpoint)] if checkpoint else []:
        if (folder / SELECTION_FILE).is_file() and (record := Selection.load(folder)).has_blocks(blocks):
            return record
    return None


def _refuse_what_is_read_once(dataloader) -> None:
    data = getattr(dataloader, "dataset", dataloader)
    while isinstance(data, IterableDatasetShard):  # which begins anew whatever it is a part of
        data = data.dataset
    with put_back_afterwards(random_states()):  # to begin may be to shuffle
        is_one_iterator = isinstance(data, IterableDataset) and iter(data) is iter(data)
    if is_one_iterator or isinstance(data, Iterator):
        raise ValueError(
            "The training data can be read only once: the warm-up would use up its first batches. Give a dataset that "
            "begins anew at every iter(), such as datasets.IterableDataset.from_generator(function), or select by "
            "select_blocks(model, other_batches) before training."
        )


class _Batches:
    """A Trainer's batches and loss; each batch, (inputs, num_items_in_batch), is a step of its own, without
    accumulation."""

    def __init__(self, trainer: Trainer, dataloader):
        self.trainer, self.dataloader = trainer, apart(dataloader)

    def __iter__(self) -> Iterator[tuple]:
        epoch = getattr(getattr(self.dataloader, "batch_sampler", None), "epoch", 0)
        iterator = iter(self.dataloader)
        while True:
            batches, items = self.trainer.get_batch_samples(iterator, 1, self.trainer.args.device)
            if not batches:
                break
            step = vars(self.trainer).get("_step")
            yield self.trainer._prepare_inputs(batches[0]), items  # once: it may generate, and some count there
            if step is not None:
                self.trainer._step = step + 1
        if hasattr(self.dataloader, "set_epoch"):
            self.dataloader.set_epoch(epoch)  # the sampler counts complete passes; training starts at its own epoch

    def loss(self, model: nn.Module, batch: tuple) -> torch.Tensor:
        inputs = copy.copy(batch[0])  # label smoothing takes the labels out, and a batch may be run again
        offload = getattr(self.trainer, "maybe_activation_offload_context", contextlib.nullcontext())  # TRL's
        with offload, self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(model, inputs, num_items_in_batch=batch[1]).mean()


@contextlib.contextmanager
def _lent(trainer: Trainer) -> Iterator[None]:
    """Leave no trace in what a Trainer counts and logs: its attributes are put back, and so are the contents of what a
    custom loss appends to or counts in, since others may hold the same objects. No copy of the Trainer is used,
    because a replaced method may be bound to the Trainer itself."""
    held, own = vars(trainer), set(trainer.model.modules())
    undo = [partial(refill, held, dict(held))]
    for name, value in held.items():
        # Of the model the warm-up takes care, also where DeepSpeed's engine or the trainer's loss holds some of it.
        if name not in LOGGED and not (isinstance(value, nn.Module) and not own.isdisjoint(value.modules())):
            undo += as_before(value)
    with put_back_afterwards(undo):
        held |= {name: copy.deepcopy(held[name]) for name in LOGGED if name in held}
        # By these TRL's online trainers generate seldom.
        held |= {name: value for name, value in {"_step": 0, "_buffered_inputs": None}.items() if name in held}
        trainer.state, trainer.log = copy.copy(trainer.state), lambda *args, **kwargs: None
        trainer.current_gradient_accumulation_steps = 1  # set only when the Trainer's loop has begun
        yield


def _warn_of_cast_deltas(model: nn.Module, weight: torch.Tensor, adapter: str) -> None:
    if weight.dtype.itemsize < 4 and any(
        getattr(model, of, False) for of in ("is_loaded_in_4bit", "is_loaded_in_8bit")
    ):
        warn(
            f"The deltas of adapter {adapter!r} are {str(weight.dtype).removeprefix('torch.')}, in which small steps "
            "are lost: TRL casts them so on a base in 4 or 8 bits. Before train(), "
            f"trainer.model.get_base_model().smt_bank[{adapter!r}].float() makes them float32 again."
        )


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
