"""What a model has once, however many layers and adapters: its banks, its tape, and what stands in its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.distributed.fsdp import FSDPModule

from smt_peft.bank import DeltaBank
from smt_peft.resident import Resident
from smt_peft.tape import Tape


class Blocks:
    """The selected blocks of one layer: `slots` (places in the bank), `rows`, `cols`, each int64 [n] on one device.

    `columns` repeats `cols` as Python integers, so that planning what to keep of an input needs no device.
    """

    def __init__(self, slots: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, device: torch.device):
        self.columns: list[int] = cols.tolist()
        self.slots, self.rows, self.cols = slots.to(device), rows.to(device), cols.to(device)
        first, count = int(slots[0]), len(slots)
        contiguous = bool((slots == torch.arange(first, first + count)).all())
        self._range = slice(first, first + count) if contiguous else None
        kept = sorted(set(self.columns))
        self.kept = torch.tensor(kept, device=device)  # the distinct columns, and each block's place among them
        self.places = torch.tensor([kept.index(column) for column in self.columns], device=device)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """This layer's rows of a bank-sized tensor [num_blocks, b, b]: a view where the slots are adjacent."""
        return values[self._range] if self._range is not None else values.index_select(0, self.slots)


class LayerBlocks(nn.Module):
    """One layer's share of one adapter's bank.

    It owns no parameter; its `parameters()` yields the bank's, so that PEFT's bookkeeping per layer (requires_grad,
    status, trainability of the active adapter) reaches the one parameter there is.
    """

    def __init__(self, root: SMTRoot, adapter: str):
        super().__init__()
        self.__dict__["root"] = root  # not registered: the bank's home is the root of the model
        self.adapter = adapter
        self.target = -1  # position among the bank's targets
        self.delta: torch.Tensor | None = None  # for torch.compile, see DeltaBanks.prepare_compiled
        self.compiled: Blocks | None = None
        self.resident = True
        self._blocks: tuple[int, torch.device, Blocks | None] | None = None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        if self.adapter in self.root:
            yield self.root[self.adapter].weight

    @property
    def bank(self) -> DeltaBank:
        return self.root[self.adapter]

    def on(self, device: torch.device) -> Blocks | None:
        """This layer's selected blocks with their indices on `device`; None where it has none."""
        plan, generation = self.bank.plan(), self.bank.generation
        if self._blocks is None or self._blocks[:2] != (generation, device):
            mine = plan[self.target] if plan else ((),)
            self._blocks = (generation, device, Blocks(*mine, device) if len(mine[0]) else None)
        return self._blocks[2]

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_blocks": None, "delta": None, "compiled": None}


class SMTRoot(nn.ModuleDict):
    """The banks of all adapters, at the root of the wrapped model (state key `smt_bank.<adapter>.weight`).

    Layers reach it without registering it. It also carries what a model has once: the tape that brings gradients home
    and the record of what is written into the weights.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tape = Tape()
        self.layers: list = []
        self._resident = Resident()
        self._live = False  # whether deltas have been written into weights: then switches take effect at once
        self._paused = False
        self._compiled = False
        self.__dict__["_model"] = model
        self._embedding_hook = None
        self._hook = model.register_forward_pre_hook(self._begin_forward)

    def _begin_forward(self, *_: object) -> None:
        self._begin(torch.compiler.is_compiling())

    @torch.compiler.disable
    def _begin(self, compiling: bool) -> None:
        self.tape.begin_forward(self.values())
        for bank in self.values():
            remove_hook_from_module(bank)  # accelerate's offloading: the bank is small, and layers read it at any time
            bank.forget_gathered()
        compiled, checkpointing = compiling or self._compiled, False
        for module in self._model.modules():
            attributes = vars(module)  # quicker than to ask a module for what it lacks
            compiled |= attributes.get("_compiled_call_impl") is not None
            checkpointing |= bool(attributes.get("gradient_checkpointing"))
        if compiled:
            self.prepare_compiled()
        if checkpointing:
            self._anchor_on_embedding()

    def _anchor_on_embedding(self) -> None:
        """Under gradient checkpointing the anchor must lie outside of every checkpointed segment."""
        if self._embedding_hook is not None:
            self._embedding_hook.remove()
        embedding = self._model.get_input_embeddings()
        self._embedding_hook = embedding.register_forward_hook(self._anchor)

    def _anchor(self, embedding: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.tape.collector is None:
            for adapter in self.layers[0].active_adapters:
                if adapter in self and self[adapter].weight.requires_grad:
                    self.tape.settle(adapter, self)
                    output = self[adapter](output)
        return output

    # --- resident weights --------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Bring every weight up to date in one go."""
        self._live = True
        self._resident.sync(self.layers)

    def sync_layer(self, layer) -> None:
        """Bring one layer's weight up to date."""
        self._live = True
        self._resident.sync([layer])

    def switched(self, layer) -> None:
        """An adapter was switched: a backward may be waiting for the weight, so it must be right at once."""
        if self._live and not self._paused:
            self.sync_layer(layer)

    @contextlib.contextmanager
    def one_switch(self) -> Iterator[None]:
        """Let all layers switch first and write once."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            if self._live:
                self.sync()

    def is_sharded(self) -> bool:
        """Whether FSDP2 manages a part of the model."""
        return any(isinstance(module, FSDPModule) for module in self._model.modules())

    # --- torch.compile -------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def prepare_compiled(self) -> None:
        """Before a compiled forward: fresh weights, and each layer's deltas as a tensor with a gradient.

        A compiled graph cannot follow the tape, so here the bank is split once per forward and autograd brings the
        parts together again.
        """
        self._compiled = True
        self.sync()
        for adapter, bank in self.items():
            plan = bank.plan()
            if not plan:
                continue
            order = torch.cat([slots for slots, *_ in plan])
            weight = bank.weight
            if not torch.equal(order, torch.arange(bank.num_blocks)):
                weight = weight[order.to(weight.device)]
            parts = weight.split([len(slots) for slots, *_ in plan])
            for layer in self.layers:
                if adapter in layer.smt_blocks:
                    share = layer.smt_blocks[adapter]
                    share.delta = parts[share.target]
                    share.compiled = share.on(layer.device)
                    share.resident = layer.is_resident

    def remove(self, adapter: str) -> None:
        """Forget an adapter; a second call for the same one does nothing."""
        if adapter in self:
            del self[adapter]
        if not len(self):
            self._hook.remove()
            if self._embedding_hook is not None:
                self._embedding_hook.remove()
