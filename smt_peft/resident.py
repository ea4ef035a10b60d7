"""Resident deltas: the selected blocks of W hold W0 + delta, so that forward is the plain base matmul.

The float32 delta in the bank stays the master; what stands in W is its sum with the original block, rounded to W's
dtype. The originals are kept aside, so W comes back bit for bit. Writing goes through `weight.data`, which autograd's
version counter does not see: W holds the same values again when a backward reads it, whatever a reference pass with
disabled adapters did in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_peft.ops import block_pointers, write_blocks


class Written:
    """The blocks of one adapter in a set of layers whose weights share device and dtype: one batched write."""

    def __init__(self, adapter: str, layers: Sequence):
        self.adapter, self.layers = adapter, list(layers)
        self.blocks = [layer.blocks(adapter) for layer in layers]
        self.bank = layers[0].bank(adapter)
        slots = torch.cat([blocks.slots for blocks in self.blocks])
        ordered = torch.equal(slots.cpu(), torch.arange(self.bank.num_blocks))
        self.slots = None if ordered else slots  # None: every slot of the bank, in order
        self.views: list[torch.Tensor] | None = None
        self._locate()
        self.originals = torch.stack(self.views)

    def _is_located(self) -> bool:
        return self.views is not None and self._where == [layer.weight.data_ptr() for layer in self.layers]

    def _locate(self) -> None:
        """Views into the weights, made anew where the weights have moved (`.to()`, copies of the model)."""
        if self._is_located():
            return
        self.views, self._where, self.ranges = [], [layer.weight.data_ptr() for layer in self.layers], {}
        for layer, blocks in zip(self.layers, self.blocks, strict=True):
            start = len(self.views)
            self.views += layer.block_views(blocks, self.bank.block_size)
            self.ranges[id(layer)] = slice(start, len(self.views))
        self.pointers = block_pointers(self.views)

    def is_current(self) -> bool:
        """Whether the selection still is the one that was written, and the weights are where they were."""
        return self.layers[0].blocks(self.adapter) is self.blocks[0] and self._is_located()

    def sums(self) -> torch.Tensor:
        """W0 + delta [n, b, b], in float32 or wider."""
        deltas = self.bank.values()
        if self.slots is not None:
            deltas = deltas.index_select(0, self.slots.to(deltas.device))
        wide = torch.promote_types(self.originals.dtype, torch.float32)
        return self.originals.to(wide) + deltas.to(self.originals.device)

    def write(self) -> None:
        write_blocks(self.views, self.sums(), self.pointers)

    def restore(self, layers: Sequence) -> None:
        self._locate()
        self.originals = self.originals.to(self.views[0])
        if len(layers) == len(self.layers):
            write_blocks(self.views, self.originals, self.pointers)
            return
        for layer in layers:
            place = self.ranges[id(layer)]
            write_blocks(self.views[place], self.originals[place])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "views": None, "pointers": None}


class ResidentWeight:
    """The part of a layer that knows what stands in its weight; `weight`, `blocks`, `bank`, `root` are the layer's."""

    written: list[Written]  # a stack: what was written into the weight, in this order
    _residency: tuple[object, bool] = (None, False)
    synced: tuple | None = None
    _base_only = False  # while the weight must be the original one for a moment

    @property
    def is_resident(self) -> bool:
        """Whether the weight is a plain float tensor of this module alone, always here. Otherwise: additive."""
        weight = self.weight if self.quantization_backend is None else None
        if self._residency[0] is not weight or weight is None:
            plain = (
                type(weight) is nn.Parameter
                and weight.is_floating_point()
                and weight.dtype.itemsize > 1
                and weight.device.type != "meta"
                and not hasattr(weight, "ds_id")  # DeepSpeed ZeRO-3
                and not hasattr(self.get_base_layer(), "_hf_hook")  # accelerate may offload it
                and not self._shared_weight
                and not self.root.is_sharded()  # FSDP2 shows plain tensors during forward
            )
            if self.written and not plain:
                raise RuntimeError(
                    "A weight was sharded, offloaded or quantised while it held the deltas of adapter "
                    f"{self.written[0].adapter!r}. Wrap or shard the model before its first forward, or call "
                    "disable_adapter_layers() before wrapping it."
                )
            self._residency = (weight, plain)
        return self._residency[1]

    def wanted(self) -> tuple[str, ...]:
        """The adapters whose deltas the weight should hold now."""
        if self.merged:
            return tuple(n for n in self.merged_adapters if self.blocks(n) is not None) if self.is_plain() else ()
        if self.disable_adapters or self._base_only or not self.is_resident:
            return ()
        return self._active()

    def stale(self) -> tuple | None:
        """None where the weight holds what it should. Otherwise what to remember as `synced` once it does."""
        wanted = self.wanted()
        if not (self.written or wanted):
            return None
        state = (self.weight.data_ptr(), wanted, *[self.bank(name).stamp() for name in wanted])
        return None if self.synced == state else state

    def block_views(self, blocks, size: int) -> list[torch.Tensor]:
        """Views [b, b] of the blocks in the weight's storage."""
        grid = self.matrix().unfold(0, size, size).unfold(1, size, size)
        return [grid[row, col] for row, col in zip(blocks.rows.tolist(), blocks.columns, strict=True)]

    def matrix(self) -> torch.Tensor:
        """A view [out_features, in_features] of the weight's storage."""
        weight = self.weight.data
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def _sync(self) -> None:
        """Bring the weights of the whole model up to date once this layer finds its own to be stale."""
        if self.stale() is not None:
            self.root.sync()

    def restore(self) -> None:
        """Bring back the original weight, bit for bit; the next forward writes the deltas again."""
        if self.written and not self.merged:
            self._base_only = True
            self.root.sync_layer(self)
            self._base_only = False

    def is_plain(self) -> bool:
        """Whether merging may write into the weight: its entries are floats, and nobody else reads it."""
        return self.quantization_backend is None and type(self.weight) is nn.Parameter and not self._shared_weight


class Resident:
    """Brings the weights to what their layers want. Each layer's `written` is the stack of what stands in its W."""

    def sync(self, layers: Sequence) -> None:
        """Write and restore blocks of the `layers` that are out of date, in as few writes as there are adapters."""
        # an offloaded weight can be written to only while accelerate has brought it in
        states = {layer: layer.stale() for layer in layers if layer.weight.device.type != "meta"}
        stale = [layer for layer, state in states.items() if state is not None]
        if not stale:
            return
        with torch.no_grad():
            if not self._refresh(stale):
                self._unwind(stale)
                self._write(stale)
        for layer in stale:
            layer.synced = states[layer]

    def _refresh(self, stale: Sequence) -> bool:
        """A training step's case: the same blocks of one adapter with a new delta. One write, nothing read back."""
        written = stale[0].written[0] if len(stale[0].written) == 1 else None
        if written is None or len(written.layers) != len(stale) or not written.is_current():
            return False
        if any(layer.written != [written] or layer.wanted() != (written.adapter,) for layer in stale):
            return False
        written.write()
        return True

    def _unwind(self, stale: Sequence) -> None:
        """Restore, last written first, so that overlapping blocks of several adapters come off in order."""
        while any(layer.written for layer in stale):
            tops: dict[int, tuple[Written, list]] = {}
            for layer in stale:
                if layer.written:
                    top = layer.written.pop()
                    tops.setdefault(id(top), (top, []))[1].append(layer)
            for written, layers in tops.values():
                written.restore(layers)

    def _write(self, stale: Sequence) -> None:
        for depth in range(max(len(layer.wanted()) for layer in stale)):
            groups: dict[tuple, list] = {}
            for layer in stale:
                wanted = layer.wanted()
                if depth < len(wanted):
                    weight = layer.weight
                    groups.setdefault((wanted[depth], weight.device, weight.dtype), []).append(layer)
            for (adapter, *_), layers in groups.items():
                written = Written(adapter, layers)
                written.write()
                for layer in layers:
                    layer.written.append(written)
