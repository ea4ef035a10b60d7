"""The layer that stands in for a target Linear: forward, merge, unmerge, disable."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_peft import ops
from smt_peft.bank import DeltaBank
from smt_peft.compiled import compiled_forward
from smt_peft.quantized import Original, dequantized
from smt_peft.resident import ResidentWeight
from smt_peft.root import Blocks, LayerBlocks, SMTRoot


class SMTLayer(BaseTunerLayer):
    """Marks the layers of this package for PEFT."""

    adapter_layer_names = ("smt_blocks",)


class Linear(nn.Module, ResidentWeight, SMTLayer):
    """A frozen Linear (or GPT-2's Conv1D) whose selected blocks are trained.

    The deltas live in the banks at the root of the model; `smt_blocks` says which of them are this layer's. All block
    coordinates are those of the matrix [out_features, in_features], also where Conv1D stores its transpose.
    """

    def __init__(self, base_layer: nn.Module, root: SMTRoot, parent: str, shared_weight: bool, quantization: dict):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = self._sides()
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)
        self.smt_blocks = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.__dict__["root"] = root  # not registered: the banks' home is the root of the model
        self.parent = parent  # name of the module that holds this one: its other children may read the same input
        self._shared_weight = shared_weight
        self.written = []
        self._original: Original | None = None  # a quantised weight while a merged one stands in for it
        self.register_load_state_dict_pre_hook(_restore_before)
        self.register_state_dict_pre_hook(_restore_before)

    def _sides(self) -> tuple[int, int]:
        if isinstance(self.base_layer, Conv1D):
            return tuple(reversed(self.base_layer.weight.shape))
        return self.base_layer.out_features, self.base_layer.in_features

    def target_name(self, module_name: str) -> str:
        """The name of the target among the bank's, from the name of this module in the model."""
        return module_name

    def update_layer(self, adapter_name: str) -> None:
        """Make this layer a target of another adapter."""
        self.smt_blocks[adapter_name] = LayerBlocks(self.root, adapter_name)

    # --- what this layer's adapters are ----------------------------------------------------------------------------

    def bank(self, adapter: str) -> DeltaBank:
        return self.root[adapter]

    def blocks(self, adapter: str) -> Blocks | None:
        """The layer's selected blocks of an adapter; None where it has none."""
        shares = self.smt_blocks
        return shares[adapter].on(self.device) if adapter in shares and adapter in self.root else None

    def get_base_layer(self) -> nn.Module:
        """As PEFT's, but without asking a module for what it lacks, which is slow: each forward comes here often."""
        layer = self
        while (inner := layer._modules.get("base_layer")) is not None:
            layer = inner
        return layer

    @property
    def weight(self) -> torch.Tensor:
        weight = self.get_base_layer()._parameters.get("weight")
        return super().weight if weight is None else weight

    @property
    def device(self) -> torch.device:
        """Where this layer computes: its weight's device, or the hook's that brings an offloaded weight in."""
        hook = vars(self.get_base_layer()).get("_hf_hook")
        device = getattr(hook, "execution_device", None)
        return self.weight.device if device is None else torch.device(device)

    def _active(self) -> tuple[str, ...]:
        return tuple(name for name in self.active_adapters if self.blocks(name) is not None)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's delta as a dense matrix in the shape of the base weight, float32."""
        size = self.bank(adapter).block_size
        blocks = self.blocks(adapter)
        delta = torch.zeros(
            self.out_features // size, self.in_features // size, size, size, device=self.device, dtype=torch.float32
        )
        if blocks is not None:
            delta[blocks.rows, blocks.cols] = blocks.of(self.bank(adapter).values()).to(delta)
        delta = delta.transpose(1, 2).reshape(self.out_features, self.in_features)
        return delta.T if isinstance(self.base_layer, Conv1D) else delta

    # --- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> torch.Tensor:
        """The base layer's output [..., out_features] with the active adapters' deltas."""

        def base(hidden: torch.Tensor) -> torch.Tensor:
            return self.base_layer(hidden, *args, **kwargs)

        if self.disable_adapters:
            if self.merged:
                with onload_layer(self):  # an offloaded weight comes in for this
                    self.unmerge()
            if self.written:
                self._sync()
            return base(x)
        if adapter_names is not None:
            return self._mixed_batch(x, base, adapter_names)
        if self.merged:
            return base(x)
        if torch.compiler.is_compiling():
            return compiled_forward(self, x, base)
        tape = self.root.tape
        if tape.collector is not None and torch.is_grad_enabled() and tape.collector.wants(self):
            record = tape.collector.keep(tape, x, self)
            return self._caught(record, x, base, self._active(), tape.collector.consumers(self))
        self._require_selection()
        active = self._active()
        trained = [name for name in active if self.bank(name).weight.requires_grad]
        if not trained:
            return self._with_deltas(x, base, active)
        for name in trained:
            tape.settle(name, self)
        if not torch.is_grad_enabled():
            return self._with_deltas(x, base, active)
        record = tape.record(x, self, aside=not x.requires_grad)
        self._anchor(record, x, trained)
        return self._caught(record, x, base, active, self._keep(record, trained))

    def _with_deltas(self, x: torch.Tensor, base, active: tuple[str, ...]) -> torch.Tensor:
        """The forward without what training needs."""
        if self.is_resident:
            self._sync()
            return base(x)
        y = base(x)
        for name in active:
            y = y + self._additive(x, name, y.dtype)
        return y

    def _additive(self, x: torch.Tensor, adapter: str, dtype: torch.dtype) -> torch.Tensor:
        blocks = self.blocks(adapter)
        delta = blocks.of(self.bank(adapter).values().to(x.device))
        flat = x.reshape(-1, self.in_features).to(dtype)
        y = ops.block_matmul(flat, delta, blocks.rows, blocks.cols, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def _caught(self, record, x: torch.Tensor, base, active: tuple[str, ...], consumers: list) -> torch.Tensor:
        """The forward, behind the nodes that bring gradients to the consumers."""
        thread = self.root.tape.alias
        return record.catch(self._with_deltas(x if record.aside else thread, base, active), thread, consumers)

    def _keep(self, record, trained: list[str]) -> list[tuple]:
        """Save what this layer's block gradients need of its input; returns what computes them."""
        tape, consumers = self.root.tape, []
        for name in trained:
            bank, blocks = self.bank(name), self.blocks(name)
            width = bank.block_size
            places = record.read(tape.columns(width, self.in_features // width, self.device), blocks)
            consumers.append((width, partial(_add_block_gradients, bank, blocks, places)))
        tape.alias = record.keep_columns(tape.alias)
        return consumers

    def _anchor(self, record, x: torch.Tensor, trained: list[str]) -> None:
        """Put the banks' anchors before this layer if it is the first, or if nothing before it needs gradients."""
        tape = self.root.tape
        for name in trained:
            if name not in record.anchored and (tape.homes[name] is self or not x.requires_grad):
                record.anchored.add(name)
                tape.alias = self.bank(name)(tape.alias)

    def _mixed_batch(self, x: torch.Tensor, base, adapter_names: list[str]) -> torch.Tensor:
        """Each sample of the batch with its own adapter (inference): the plain base output plus each one's delta."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively; give one name per row."
            )
        self._base_only = True
        self.root.sync_layer(self)
        y = base(x)
        self._base_only = False
        for name in {name for name in adapter_names if self.blocks(name) is not None}:
            rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            y = y.index_add(0, rows, self._additive(x[rows], name, y.dtype))
        return y

    def _require_selection(self) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        for name in self.active_adapters:
            if name in self.smt_blocks and not self.bank(name).is_selected:
                raise RuntimeError(
                    f"Adapter {name!r} has no blocks yet: training needs a selection first. Pass "
                    "callbacks=[SMTWarmupCallback()] to the Trainer, or call "
                    "smt_peft.select_blocks(model, dataloader)."
                )

    # --- merge, disable, switch ----------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the weight hold the active (or named) adapters for good, until `unmerge`.

        With `safe_merge`, raise ValueError and leave the weight alone where the result has NaN or infinite entries.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.smt_blocks]
        if not adapter_names:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(
                f"A {self.quantization_backend.backend_name} weight cannot be merged into; merge on the unquantised "
                "base model instead."
            )
        if hasattr(self.weight, "ds_id") or hasattr(self.weight, "full_tensor"):
            raise TypeError(
                "A sharded weight cannot be merged into; save the adapter and merge it on an unsharded base model."
            )
        if not self.is_plain():
            self._original = self._original or Original(self.base_layer)  # before dequantising, which may unpack it
        weight = self._base_weight()
        if safe_merge:
            for name in adapter_names:
                if not torch.isfinite(weight + self._delta_for_merge(name).to(weight.device)).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its delta or "
                        "the base weight is not finite."
                    )
        self.merged_adapters += adapter_names
        if self.is_plain():
            self.root.sync_layer(self)
            return
        weight = sum((self._delta_for_merge(name).to(weight) for name in adapter_names), weight)
        if self._shared_weight:  # the other module keeps the original
            self.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.set_base_weight(weight)

    def _delta_for_merge(self, adapter: str) -> torch.Tensor:
        """The dense delta, or zero where the weight holds it already."""
        delta = self.get_delta_weight(adapter)
        return delta * 0 if any(written.adapter == adapter for written in self.written) else delta

    def unmerge(self) -> None:
        """Take merged adapters out again: the weight is what it was, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.merged_adapters.clear()
        if self._original is not None:
            self.base_layer = self._original.put_back()
            self._original = None
        else:
            self.restore()  # also where accelerate brought the weight in for this call alone
            self.root.sync_layer(self)

    def base_matrix(self) -> torch.Tensor:
        """The base weight as [out_features, in_features], dequantised."""
        weight = self._base_weight()
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def _base_weight(self) -> torch.Tensor:
        return self.get_base_weight() if self.quantization_backend is None else dequantized(self)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.root.switched(self)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.root.switched(self)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.root.switched(self)
        self.root.remove(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # blocks have full rank: an SVD would lose part of what was trained

    def __repr__(self) -> str:
        return "smt." + super().__repr__()


def _add_block_gradients(bank: DeltaBank, blocks: Blocks, places: torch.Tensor, dy: torch.Tensor, x: torch.Tensor):
    gradient = bank.add_gradient()
    if gradient.device == dy.device:
        ops.block_grad_(gradient, dy, x, blocks.slots, blocks.rows, places)
    else:  # model spread over devices: the bank lives on one of them
        part = torch.zeros(len(blocks.columns), *gradient.shape[1:], dtype=gradient.dtype, device=dy.device)
        ops.block_grad_(part, dy, x, torch.arange(len(part), device=dy.device), blocks.rows, places)
        gradient.index_add_(0, blocks.slots.to(gradient.device), part.to(gradient.device))


def _restore_before(layer: Linear, *_: object) -> None:
    """State dicts hold the base weight, not what stands in its blocks."""
    layer.restore()
