"""The bank: the one parameter of an adapter, and the index that says where its blocks lie.

Gradients come home by autograd alone. The bank is split into one view per target; a layer's block product takes its
view as an input and returns that view's gradient; autograd joins the parts into the bank's gradient, once a backward.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from smt_peft import checks, ops
from smt_peft.checks import Group, Target
from smt_peft.config import SMTConfig


class Layout(NamedTuple):
    """What follows from the index alone.

    Attributes:
        index, version, values: the buffer, its version, and a copy, because older DDP rewrites it at each forward.
        counts: per target how many blocks it has; nothing before the selection.
        blocks: per target where they lie, int64 on the CPU: [n, 2] for tiles, [n, 2, b] for sorted blocks.
        plans: device -> per target its plan there; None where it has no blocks.
    """

    index: Tensor
    version: int
    values: Tensor
    counts: list[int]
    blocks: list[Tensor]
    plans: dict[torch.device, list[ops.Plan | None]]


class Kept(NamedTuple):
    """The views of a bank; `state` tells whether `weight` still is what it was."""

    weight: nn.Parameter
    state: tuple
    layout: Layout
    views: tuple[Tensor, ...]


class DeltaBank(nn.Module):
    """Every delta of one adapter.

    * `weight`: float32 parameter [num_blocks, block_size, block_size].
    * `index`: int32 buffer [num_blocks, 3] of (target, block row, block column). In a sorted arrangement
      [num_blocks, 1 + 2 * block_size]: the target, the block's rows, its columns. In the order of the targets, or -1
      before the selection.
    * `fingerprint`: int64 buffer [1], a hash of the targets' names and grids, so that a checkpoint of another model
      or block size is refused instead of half-loaded.
    """

    def __init__(self, config: SMTConfig, targets: Sequence[Target], groups: Sequence[Group], device: torch.device):
        super().__init__()
        self.config, self.targets, self.groups = config, list(targets), list(groups)
        self.block_size = block_size = config.block_size
        self.num_blocks = num_blocks = sum(group.budget for group in groups)
        with torch.inference_mode(False):  # or it could never be trained
            self.weight = nn.Parameter(torch.zeros(num_blocks, block_size, block_size, device=device))
            index_device = "cpu" if device.type == "meta" else device
            width = 1 + 2 * (block_size if config.arrangement == "sorted" else 1)
            self.register_buffer("index", torch.full((num_blocks, width), -1, dtype=torch.int32, device=index_device))
            fingerprint = torch.tensor([checks.fingerprint(block_size, self.targets)], device=index_device)
            self.register_buffer("fingerprint", fingerprint)
        self.base: dict[str, list[float]] = {}  # a sample of the base model, see `bases.sample`
        self.base_parameters = 0  # how many it has; a budget can be a share of them
        self.in_warmup = False
        self.running: tuple[Tensor, ...] | None = None  # the views of the running forward, see `begin_forward`
        self.shares: weakref.WeakSet[nn.Module] | None = None  # of layers, see banks.py; not held, or nothing is freed
        self._kept: Kept | None = None
        self._layout: Layout | None = None
        self.register_state_dict_post_hook(_leave_out_what_is_not_sharded)
        self.register_load_state_dict_pre_hook(_refuse_other_checkpoints)
        self.register_load_state_dict_post_hook(_forget_layout)

    # --- the deltas --------------------------------------------------------------------------------------------

    def parts(self, target: int, device: torch.device) -> tuple[ops.Plan | None, Tensor | None]:
        """Where a target's blocks lie, for the operations on `device`, and their deltas [n, b, b]; None, None without
        any. Gradients of the deltas reach `weight`, even where this is called under no_grad.
        """
        layout = self.layout()
        plan = self._plans(layout, device)[target] if layout.counts else None
        return (None, None) if plan is None else (plan, self._views(layout)[target])

    def _views(self, layout: Layout) -> tuple[Tensor, ...]:
        """What `split` gives, kept while the layout and `weight` with its `_state` are the same.

        Views alias `weight`, so its new values alone would need no new views; still, a new version of it, and each
        forward of the whole model that builds a graph, make new ones.
        """
        weight, kept = self._parameters["weight"], self._kept
        is_traced = torch.jit.is_tracing()  # a trace must see how views are made
        is_of_these = kept and kept.weight is weight and kept.layout is layout
        if is_of_these and not is_traced and kept.state == _state(weight):
            return kept.views
        del kept  # or the old graph would live on in the new one
        if is_sharded(weight):
            return self.split() if self.running is None else self.running
        if weight.device.type == "meta":  # accelerate has taken it away: the bank is small and read at any time
            remove_hook_from_module(self)
            weight = self._parameters["weight"]
        if is_traced:
            return self.split()
        self._forget_views()  # first let go of the old graph
        views = self.split()
        self._kept = Kept(weight, _state(weight), layout, views)
        self._make_ready(self._plans(layout, weight.device), views)
        return views  # not of `self._kept`: another thread may have made its own by now

    def split(self) -> tuple[Tensor, ...]:
        """The deltas of each target, [n, b, b], as parts of the bank, gathered if it is sharded."""
        weight, layout = self._parameters["weight"], self.layout()
        if torch.compiler.is_compiling():
            return weight.split(layout.counts)
        with torch.inference_mode(False), torch.enable_grad():
            if hasattr(weight, "ds_id"):
                weight = self()
                if weight.requires_grad:
                    weight.register_hook(self._end_backward)
            elif isinstance(weight, DTensor):  # a unit of its own, whose gradients FSDP does not join
                mesh = weight.device_mesh
                weight = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
                if weight.requires_grad:
                    weight.register_hook(lambda gradient: gradient / mesh.size())
                    weight.register_hook(self._end_backward)
            return weight.split(layout.counts)

    def _end_backward(self, gradient: Tensor) -> None:
        self.running = None  # all that was made of it has had its gradient; a step may come now

    def forward(self) -> Tensor:
        """A copy of the bank. `split` calls this because ZeRO-3 gathers a module's parameters when it is called."""
        return self.weight.clone()

    def begin_forward(self, adapter: str, shares: Callable[[], Iterable[nn.Module]]) -> None:
        """Make what layers need in a forward of the whole model and could not make themselves.

        A copy of a bank that is sharded; in a compiled model the one split whose parts all layers take; for layers
        that are compiled one by one, their `Share.ready`.
        """
        self.running, weight = None, self._parameters.get("weight")
        if weight is None or (weight.ndim == 1 and not hasattr(weight, "ds_id")):
            raise ValueError(
                f"The deltas of adapter {adapter!r} are a piece of a flat parameter, as FSDP's first version makes "
                "them of a module: block products need the bank as it is. Use version 2: fsdp_version: 2 in "
                'accelerate\'s config, fsdp_config={"version": 2} in TrainingArguments.'
            )
        if not torch.compiler.is_compiling():
            self.refuse_deltas_without_blocks(adapter)
        if not self.is_selected:
            return
        if is_sharded(weight) or torch.compiler.is_compiling():
            self.running = self.split()
            return
        if torch.is_grad_enabled() or self.shares is None:
            self._forget_views()  # each forward that may be trained on has a graph, and with it a stream, of its own
        if self.shares is None:
            self.shares = weakref.WeakSet(shares())
        if weight.device.type != "meta":  # else it is offloaded, and read where it is needed
            self._views(self.layout())

    def refuse_deltas_without_blocks(self, adapter: str) -> None:
        """Raise ValueError for deltas that have no blocks, as in a copy updated by its parameters alone."""
        may_be = self.is_selected or not self.config.init_weights or self.weight.device.type == "meta"
        if not may_be and self.local().any():
            raise ValueError(
                f"The deltas of adapter {adapter!r} are not zero, and it has no blocks: they would do nothing. If "
                "this is a copy from before the selection, copy the buffers, too: "
                "copy.load_state_dict(model.state_dict())."
            )

    def local(self) -> Tensor:
        """The part of `weight` that this process holds, detached."""
        weight = self.weight
        if hasattr(weight, "ds_tensor"):  # the last ranks' parts are filled up with whatever was in memory
            part, rank = weight.ds_tensor, dist.get_rank(weight.ds_process_group)
            return part.detach()[: max(0, weight.ds_numel - rank * part.ds_numel)]
        return weight.detach().to_local() if isinstance(weight, DTensor) else weight.detach()

    # --- the selection -----------------------------------------------------------------------------------------

    @property
    def is_selected(self) -> bool:
        return bool(self.layout().counts)

    def set_index(self, index: Tensor) -> None:
        """Write a selection of the shape of `index`. Raises ValueError where it does not fit the targets."""
        self._check_index(index)
        with torch.no_grad():
            self.index.copy_(index)
        _forget_layout(self)

    def layout(self) -> Layout:
        """What follows from the index; without counts before the selection."""
        index, layout = self._buffers["index"], self._layout
        if index.is_meta and hasattr(self, "_hf_hook"):  # accelerate's offload_buffers=True
            remove_hook_from_module(self)
            index = self._buffers["index"]
        if torch.compiler.is_compiling() and layout is not None:
            return layout
        if layout is None or layout.index is not index:  # some loaders replace the buffer
            layout = None
        elif layout.version != _version(index):
            is_same = index.device.type != "meta" and torch.equal(index, layout.values)
            layout = self._layout = layout._replace(version=_version(index)) if is_same else None
        if layout is None:
            with torch.inference_mode(False):  # or its tensors could not be kept for a backward
                layout = self._layout = self._lay_out(index)
        return layout

    def plan(self, target: int, device: torch.device) -> ops.Plan | None:
        """Where the blocks of one target lie, for the operations on `device`; None where it has none."""
        layout = self.layout()
        return self._plans(layout, device)[target] if layout.counts else None

    def selected_blocks(self) -> dict[str, list] | None:
        """The selection by name, as `SMTConfig.selected_blocks` holds it."""
        chosen = zip(self.targets, self.layout().blocks, strict=False)
        return {target.name: blocks.tolist() for target, blocks in chosen if len(blocks)} or None

    def _lay_out(self, index: Tensor) -> Layout:
        on_cpu = index.detach().cpu().long()
        self._check_index(on_cpu)
        if not (on_cpu[:, 0] >= 0).all():
            return Layout(index, _version(index), index.clone(), [], [], {})
        checks.check_fingerprint(self.fingerprint, self.block_size, self.targets)
        counts = torch.bincount(on_cpu[:, 0], minlength=len(self.targets)).tolist()
        sides = on_cpu[:, 1:] if index.shape[1] == 3 else on_cpu[:, 1:].unflatten(1, (2, -1))
        layout = Layout(index, _version(index), index.clone(), counts, list(sides.split(counts)), {})
        self._plans(layout, index.device)  # a compiler can look plans up, but not make them
        return layout

    def _plans(self, layout: Layout, device: torch.device) -> list[ops.Plan | None]:
        """Each target's plan on a device; None where it has no blocks.

        Sibling modules may read one input. Where the columns that they would keep add up to all of it or more, each
        keeps the input itself: one tensor for all of them, never more than LoRA keeps.
        """
        if device in layout.plans:
            return layout.plans[device]
        siblings = [(target.name.rpartition(".")[0], target.cols) for target in self.targets]
        read: Counter = Counter()
        for key, blocks in zip(siblings, layout.blocks, strict=True):
            read[key] += len(blocks[:, 1].unique(dim=0)) if len(blocks) else 0
        with torch.inference_mode(False):  # or its tensors could not be kept for a backward
            layout.plans[device] = [
                ops.plan(*blocks.unbind(1), read[key] >= key[1], device) if len(blocks) else None
                for key, blocks in zip(siblings, layout.blocks, strict=True)
            ]
        return layout.plans[device]

    def check(self, weight: Tensor | None, index: Tensor | None, fingerprint: Tensor | None) -> None:
        """Raise ValueError where what a checkpoint holds does not fit this bank."""
        if weight is not None:
            checks.check_weight(weight, self.num_blocks, self.block_size)
            if index is None or fingerprint is None:
                raise ValueError(
                    "The checkpoint holds deltas without their index; the file is broken, or it has the trained "
                    "parameters alone: keep the bank's buffers beside them, or copy the values into the parameter."
                )
        if fingerprint is not None:
            checks.check_fingerprint(fingerprint, self.block_size, self.targets)
        if index is not None:
            self._check_index(index)

    def _check_index(self, index: Tensor) -> None:
        checks.check_index(index, *self.index.shape, self.block_size, self.targets)
        if not checks.is_in_order(index):
            raise ValueError(
                "The blocks of the index are not in the order of the targets. Loading a file by PEFT sorts them; by "
                "hand, sort index and deltas alike."
            )

    def _apply(self, fn, recurse: bool = True) -> DeltaBank:
        self._forget_views()
        known = self.index, self.fingerprint
        moved = super()._apply(fn, recurse)
        if self.index.device.type == "meta":
            self.index, self.fingerprint = known  # small, and nothing could tell them anew
        self._prepare()
        return moved

    def _prepare(self) -> None:
        """Make the plans where the index is: a compiler can look them up, but not make them."""
        if type(self.index) is Tensor and self.index.device.type != "meta":
            with contextlib.suppress(ValueError):  # after `to_empty`, before the values come
                self.layout()

    def _forget_views(self) -> None:
        """Let go of the old graph, and of the old storage."""
        self.running = None
        if self._kept is not None:
            self._kept = None
            self._make_ready()

    def _make_ready(self, plans: Sequence[ops.Plan | None] = (), views: Sequence[Tensor] = ()) -> None:
        """Give each layer its part, or, without any, take it back."""
        for share in self.shares or ():
            ready = (plans[share.target], views[share.target]) if views else None
            vars(share)["ready"] = ready  # not by nn.Module's way, which is slow

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "running": None, "shares": None, "_kept": None, "_layout": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, block_size={self.block_size}, targets={len(self.targets)}"


def is_sharded(weight: Tensor) -> bool:
    """Whether ZeRO-3, FSDP2 or tensor parallelism has divided it."""
    return hasattr(weight, "ds_id") or isinstance(weight, DTensor)


def _state(weight: Tensor) -> tuple:
    return weight.data_ptr(), _version(weight), weight.requires_grad


def _version(tensor: Tensor) -> int:
    """PyTorch's count of changes in place; tensors made in inference mode have none."""
    return -1 if tensor.is_inference() else tensor._version


def _is_sharded_on_meta(bank: DeltaBank) -> bool:
    """While accelerate hands rank 0's weights out (`fsdp_cpu_ram_efficient_loading`), as if all state were sharded."""
    return is_sharded(bank.weight) and bank.weight.device.type == "meta"


def _leave_out_what_is_not_sharded(bank: DeltaBank, state_dict: dict, prefix: str, *_: object) -> None:
    if _is_sharded_on_meta(bank):
        for name, _ in bank.named_buffers():
            del state_dict[f"{prefix}{name}"]


def _refuse_other_checkpoints(bank: DeltaBank, state_dict: dict, prefix: str, *_: object) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if _is_sharded_on_meta(bank) and weight is not None:
        own = {f"{prefix}{name}": buffer.to(weight.device) for name, buffer in bank.named_buffers()}
        state_dict.update(own | state_dict)
    bank.check(*(state_dict.get(f"{prefix}{name}") for name in ("weight", "index", "fingerprint")))


def _forget_layout(bank: DeltaBank, *_: object) -> None:
    bank._layout = None
    bank._forget_views()
    if bank.index.dtype != torch.int32:  # files hold int16 where that suffices, and some loaders keep a file's dtype
        bank.index = bank.index.int()
    bank.layout()
