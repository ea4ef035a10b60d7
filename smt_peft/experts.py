"""The layer that stands in for a module of which one *parameter* is a target: a Mixture of Experts' 3-D weights.

A module of experts keeps `gate_up_proj` [experts, out, in] and multiplies with it as it likes (a loop over the
experts, a grouped or a batched matmul), so there is no one input and output to look at. What is always there is the
weight: for the time of a forward the module sees a copy with the blocks added, whose gradient dW autograd hands back;
the selected blocks are taken from it (or, in the warm-up, all of them scored) and it is let go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from smt_peft.bank import Banks
from smt_peft.layer import Linear


class AddToWeight(torch.autograd.Function):
    """A copy of `weight` with the blocks `delta` [n, b, b] added at `rows`, `cols` of the matrix [-1, in]."""

    @staticmethod
    def forward(ctx, weight, delta, rows, cols):
        ctx.places, ctx.dtype = (rows, cols, delta.shape[-1]), delta.dtype
        weight = weight.clone()
        grid = _grid(weight, delta.shape[-1])
        grid[rows, cols] = (grid[rows, cols] + delta).to(weight.dtype)
        return weight

    @staticmethod
    def backward(ctx, gradient):
        rows, cols, size = ctx.places
        return gradient, _grid(gradient, size)[rows, cols].to(ctx.dtype), None, None


class WatchWeight(torch.autograd.Function):
    """Identity on a frozen weight that hands its gradient to `consume`; `source` makes the graph exist."""

    @staticmethod
    def forward(ctx, weight, source, consume: Callable[[Tensor], None]):
        ctx.consume = consume
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        ctx.consume(gradient.reshape(-1, gradient.shape[-1]))
        return None, None, None


class ParamWrapper(Linear):
    """A module with a frozen 3-D parameter whose selected blocks are trained.

    Blocks are tiles of the matrix [experts * out, in]: block row r lies in expert r // (out / block_size). Several
    parameters of a module are wrapped one around the other. The class has the name by which PEFT knows such wrappers.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, banks: Banks, shared_weight: bool):
        self.parameter_name = parameter_name  # before the parent's constructor, which asks for the weight
        super().__init__(base_layer, banks, shared_weight, quantization={})
        self.watch: tuple[Tensor, Callable[[Tensor], None]] | None = None  # the warm-up's (source, consume)

    @property
    def weight(self) -> Tensor:
        return self.get_base_layer()._parameters[self.parameter_name]

    def _sides(self) -> tuple[int, int]:
        shape = self.weight.shape
        return shape[:-1].numel(), shape[-1]

    def target_name(self, module_name: str) -> str:
        return f"{module_name.replace('.base_layer', '')}.{self.parameter_name}"

    def get_delta_weight(self, adapter: str) -> Tensor:
        return super().get_delta_weight(adapter).view(self.weight.shape)

    def get_base_weight(self) -> Tensor:
        return self.weight.data

    def matrix(self) -> Tensor:
        return self.weight.data.view(self.out_features, self.in_features)

    @torch.compiler.disable  # the module reads its parameter in ways that a graph cannot follow behind this node
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"adapter_names cannot mix adapters of a parameter ({self.parameter_name}) in one batch.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        with self._shown(None if self.disable_adapters or self.merged else self._with_blocks()):
            return self.base_layer(x, *args, **kwargs)

    def _with_blocks(self) -> Tensor | None:
        """The weight with the active adapters' deltas; None where it is the base weight."""
        weight = self.weight
        if self.watch is not None and torch.is_grad_enabled():
            return WatchWeight.apply(weight, *self.watch)
        for name in self.active_adapters:
            bank, target = self._bank(name)
            if bank is None:
                if name in self.smt_blocks:
                    self._require_selection(self.smt_blocks[name])
                continue
            plan, delta = bank.parts(target, weight.device)
            weight = AddToWeight.apply(weight, delta.to(weight.device), plan.out.place, plan.inner.place)
        return None if weight is self.weight else weight

    @contextlib.contextmanager
    def _shown(self, weight: Tensor | None) -> Iterator[None]:
        """Let the module find `weight` under the parameter's name: an attribute shadows a registered parameter."""
        self._hide()  # what an interrupted forward may have left
        try:
            if weight is not None:
                vars(self.get_base_layer())[self.parameter_name] = weight
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        vars(self.get_base_layer()).pop(self.parameter_name, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Leave the base module, with the deltas of all its wrapped parameters in it or without."""
        layer = self
        while isinstance(layer, ParamWrapper):
            layer._hide()
            if merge:
                layer.merge(safe_merge, adapter_names)
            layer = layer.base_layer
        return layer


def _grid(weight: Tensor, size: int) -> Tensor:
    """A weight [..., in] as a grid of blocks [rows, columns, size, size]; a view where it is contiguous."""
    return weight.reshape(-1, weight.shape[-1]).unfold(0, size, size).unfold(1, size, size)
