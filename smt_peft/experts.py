"""The layer that stands in for a module of which one *parameter* is a target: a Mixture of Experts' weights.

A module of experts keeps `gate_up_proj` [experts, out, in] and multiplies with it as it likes (a loop over the
experts, a grouped or a batched matmul), so there is no one input and output to look at. What is always there is the
weight: during a forward the module sees a copy with the blocks added, and autograd returns the copy's gradient dW. The
selected blocks are taken from dW (in the warm-up, all blocks are scored), and dW is freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from smt_peft import ops
from smt_peft.bank import is_sharded
from smt_peft.banks import Banks
from smt_peft.layer import Linear


class ParamWrapper(Linear):
    """A module with a frozen parameter, of two dimensions or more, whose selected blocks are trained.

    Blocks are parts of the matrix [experts * out, in]. Several parameters of a module are wrapped one around the
    other. The class has the name by which PEFT knows such wrappers.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, banks: Banks, shared_weight: bool):
        self.parameter_name = parameter_name  # before the parent's constructor, which asks for the weight
        super().__init__(base_layer, banks, shared_weight, backend=None)
        self.watch: Callable[[Tensor], Tensor] | None = None  # the warm-up's: lays hands on the weight's gradient

    is_transposed = False  # a parameter is taken as it is stored

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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts linear layers only

    def matrix(self) -> Tensor:
        try:
            return self.weight.data.view(-1, self.weight.shape[-1])
        except RuntimeError:
            raise TypeError(
                f"{self.parameter_name} is not contiguous, so that no matrix is a view of it; make it so before it is "
                "wrapped: parameter.data = parameter.data.contiguous()."
            ) from None

    @torch.compiler.disable  # the module reads its parameter in ways that a graph cannot follow behind this node
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"adapter_names cannot mix adapters of a parameter ({self.parameter_name}) in one batch.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        with self._shown(self._with_blocks()):
            return self.base_layer(x, *args, **kwargs)

    def _with_blocks(self) -> Tensor | None:
        """The weight with the active adapters' deltas, in the warm-up watched; None where it is the base weight."""
        weight = shown = self.weight
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        active = [name for name in active if name in self.smt_blocks]
        if is_sharded(weight) and (active or self.watch is not None):
            raise TypeError(
                f"{self.parameter_name} is divided among processes, as by ZeRO-3; SMT trains blocks of whole "
                "parameters. Use ZeRO-2 or DDP, or take it out of target_parameters."
            )
        for share in (self.smt_blocks[name] for name in active):
            plan, delta = share.parts(weight.device)
            if plan is not None:
                matrix, entries = shown.flatten(0, -2), ops.entries(plan, delta.shape[1])
                blocks = (matrix[entries] + delta.to(weight.device)).to(weight.dtype)
                shown = matrix.index_put(entries, blocks).view(weight.shape)
            elif not share.bank.is_selected:
                shown = self._unselected(shown, share)
        is_offloaded = getattr(vars(self.get_base_layer()).get("_hf_hook"), "offload", False)
        if is_offloaded and (shown is not weight or self.watch is not None):
            raise TypeError(
                f"The module of {self.parameter_name} is offloaded, and what accelerate loads would be hidden by the "
                "weight with the deltas. Keep this module on a device (device_map), or merge the adapter first."
            )
        if self.watch is not None and torch.is_grad_enabled():
            return self.watch(shown)
        return None if shown is weight else shown

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
