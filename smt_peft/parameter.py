"""The layer that stands in for a module of which one *parameter* is a target: a Mixture of Experts' 3-D weights.

A module of experts keeps `gate_up_proj` [experts, out, in] and multiplies with it as it likes (a loop over the
experts, a grouped or a batched matmul), so there is no one input and output to look at. What is always there is the
gradient of the weight: for the time of a forward the module sees it behind an autograd node, whose backward receives
dW, takes the selected blocks (or, in the warm-up, scores all of them) and lets it go. One dense dW lives at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from smt_peft.bank import DeltaBank
from smt_peft.layer import Linear
from smt_peft.root import Blocks, SMTRoot


class WatchedWeight(torch.autograd.Function):
    """Identity on a frozen weight that hands its gradient to `consumers`.

    `x` and `source` carry no gradient here: they place the node downstream of the anchor, and make it exist.
    """

    @staticmethod
    def forward(ctx, weight, x, source, consumers: Sequence[Callable[[torch.Tensor], None]]):
        ctx.consumers = consumers
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        for consume in ctx.consumers:
            consume(gradient.reshape(-1, gradient.shape[-1]))
        return None, None, None, None


class ParamWrapper(Linear):
    """A module with a frozen 3-D parameter whose selected blocks are trained.

    Blocks are tiles of the matrix [experts * out, in]: block row r lies in expert r // (out / block_size). Several
    parameters of a module are wrapped one around the other. The class has the name by which PEFT knows such wrappers.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, root: SMTRoot, parent: str, shared_weight: bool):
        self.parameter_name = parameter_name  # before the parent's constructor, which asks for the weight
        super().__init__(base_layer, root, parent, shared_weight, quantization={})

    @property
    def weight(self) -> torch.Tensor:
        return self.get_base_layer()._parameters[self.parameter_name]

    def _sides(self) -> tuple[int, int]:
        shape = self.weight.shape
        return shape[:-1].numel(), shape[-1]

    def target_name(self, module_name: str) -> str:
        return f"{module_name.replace('.base_layer', '')}.{self.parameter_name}"

    def matrix(self) -> torch.Tensor:
        return self.weight.data.view(self.out_features, self.in_features)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return super().get_delta_weight(adapter).view(self.weight.shape)

    def get_base_weight(self) -> torch.Tensor:
        return self.weight.data

    def base_matrix(self) -> torch.Tensor:
        return self.matrix()

    @torch.compiler.disable  # the module reads its parameter in ways that a graph cannot follow behind this node
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        def base(hidden: torch.Tensor) -> torch.Tensor:
            return self.base_layer(hidden, *args, **kwargs)

        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"adapter_names cannot mix adapters of a parameter ({self.parameter_name}) in one batch.")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            if self.written:
                self._sync()
            return base(x)
        if self.merged:
            return base(x)
        tape, active = self.root.tape, self._active()
        collector = tape.collector if torch.is_grad_enabled() else None
        if collector is not None and collector.wants(self):
            return self._watched(x, base, active, collector.source, [collector.gradient_consumer(self)])
        self._require_selection()
        trained = [name for name in active if self.bank(name).weight.requires_grad]
        for name in trained:
            tape.settle(name, self)
        if not (trained and torch.is_grad_enabled()):
            with self._shown(self._current(active)):
                return base(x)
        record = tape.record(x, self)
        self._anchor(record, x, trained)
        consumers = [partial(_add_blocks, self.bank(name), self.blocks(name)) for name in trained]
        return self._watched(tape.alias, base, active, None, consumers)

    def _watched(self, x, base, active, source, consumers) -> torch.Tensor:
        with self._shown(WatchedWeight.apply(self._current(active), x, source, consumers)):
            return base(x)

    def _current(self, active: tuple[str, ...]) -> torch.Tensor:
        """The weight with the active deltas: in place where it is resident, a copy where it must not be touched."""
        if self.is_resident:
            self._sync()
            return self.weight.detach()
        deltas = [self.get_delta_weight(name).to(self.weight) for name in active]
        return sum(deltas, self.weight.detach())

    @contextlib.contextmanager
    def _shown(self, weight: torch.Tensor) -> Iterator[None]:
        """Let the module find `weight` under the parameter's name: an attribute shadows a registered parameter."""
        attributes = vars(self.get_base_layer())
        attributes[self.parameter_name] = weight
        try:
            yield
        finally:
            del attributes[self.parameter_name]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Leave the base module, with the deltas of all its wrapped parameters in it or without."""
        layer = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge, adapter_names)
            layer = layer.base_layer
        return layer


def _add_blocks(bank: DeltaBank, blocks: Blocks, gradient: torch.Tensor) -> None:
    size = bank.block_size
    grid = gradient.unfold(0, size, size).unfold(1, size, size)
    total = bank.add_gradient()
    total.index_add_(0, blocks.slots.to(total.device), grid[blocks.rows, blocks.cols].to(total))
