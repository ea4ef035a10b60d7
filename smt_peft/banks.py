"""The banks of a model's adapters, at its root, and each layer's share of one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from smt_peft import ops
from smt_peft.bank import DeltaBank


class Banks(nn.ModuleDict):
    """The banks of all adapters, at the root of the wrapped model (state key `smt_bank.<adapter>.weight`)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._hooks = [
            model.register_forward_pre_hook(self._begin_forward),
            model.register_forward_hook(self._end_forward),
        ]

    def _begin_forward(self, model: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            _refuse_reentrant_checkpointing(model)
            for bank in self.values():
                bank.config.stop_waiting()
        for adapter, bank in self.items():
            bank.begin_forward(adapter, functools.partial(_shares_of, model, adapter))

    def _end_forward(self, *_: object) -> None:
        # A graph need not hand the views out; and without a backward nothing comes that needs them.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            for bank in self.values():
                bank.running = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x as it is: where the model is a torch.nn.Sequential, this is the last of its modules."""
        return x

    def let_go(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


class Share(nn.Module):
    """One layer's part of one adapter's bank.

    It owns no parameter; its `parameters()` yields the bank's, so that PEFT's bookkeeping per layer (requires_grad,
    status, trainability of the active adapter) reaches the one parameter there is.
    """

    def __init__(self, banks: Banks, adapter: str):
        super().__init__()
        self.__dict__["banks"] = banks  # not registered: their home is the root of the model
        self.adapter = adapter
        self.target = -1  # position among the bank's targets
        self.ready: tuple[ops.Plan | None, torch.Tensor] | None = None  # for a layer that is compiled by itself

    def parts(self, device: torch.device) -> tuple[ops.Plan | None, torch.Tensor | None]:
        """Where this layer's blocks lie, for the operations on `device`, and their deltas; None, None without any."""
        bank = self.banks._modules[self.adapter]
        if not torch.compiler.is_compiling():
            return bank.parts(self.target, device)
        if bank.running is None and self.ready is not None and self.ready[1].device == device:
            return self.ready  # tensors of its own: layers can share a graph
        plan = bank.plan(self.target, device)
        return plan, None if plan is None else (bank.running or bank.split())[self.target]

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "ready": None}

    @property
    def bank(self) -> DeltaBank:
        return self.banks[self.adapter]

    @property
    def has_blocks(self) -> bool:
        counts = self.bank.layout().counts
        return bool(counts and counts[self.target])

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        if recurse and self.adapter in self.banks:  # else each module of the model is asked for its own
            yield self.bank.weight


def _shares_of(model: nn.Module, adapter: str) -> Iterator[Share]:
    return (module for module in model.modules() if isinstance(module, Share) and module.adapter == adapter)


def banks_of(model: nn.Module) -> dict[str, Banks]:
    """Where in a model banks are; in several places if parts of it were wrapped."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Banks)}


def find_bank(model: nn.Module, adapter: str) -> DeltaBank:
    """An adapter's bank. Raises ValueError where there is no such adapter, or more than one."""
    homes = banks_of(model)
    if not homes:
        raise ValueError("The model has no SMT adapter; wrap it first: get_peft_model(model, SMTConfig(...)).")
    found = [name for name, banks in homes.items() if adapter in banks]
    if not found:
        raise ValueError(f"There is no SMT adapter {adapter!r}; the model has {sorted(set().union(*homes.values()))}.")
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} parts of the model have an SMT adapter {adapter!r} ({', '.join(found)}), each with a "
            "budget of its own. Give them different adapter names and run a warm-up for each: "
            "get_peft_model(part, config, adapter_name=...), SMTWarmupCallback(adapter_name=...)."
        )
    return homes[found[0]][adapter]


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Raise ValueError: DDP and ZeRO cannot train one parameter in many segments of reentrant checkpointing."""
    if not (model.training and torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    reentrant = False
    for module in model.modules():
        if isinstance(module, FSDPModule):
            return
        if vars(module).get("gradient_checkpointing"):
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, functools.partial):  # else a model's own, of which nothing is known
                reentrant |= function.keywords.get("use_reentrant", True)
    if reentrant:
        raise ValueError(
            "Reentrant gradient checkpointing cannot train an SMT adapter in several processes: DDP and ZeRO would "
            "take the bank for finished after the first of the checkpointed segments. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, the default of transformers 5; under ZeRO-3 TRL '
            'forces the other, so set trainer.args.gradient_checkpointing_kwargs["use_reentrant"] = False after it.'
        )
