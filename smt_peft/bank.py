"""The delta bank: the one parameter of an adapter, and the index that says where its blocks sit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from smt_peft.tape import Anchor

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Target(NamedTuple):
    """A weight that an adapter may train: its module's name and its grid of blocks."""

    name: str
    rows: int
    cols: int


class Group(NamedTuple):
    """Targets (their positions) that compete for one budget of blocks."""

    members: list[int]
    budget: int


class DeltaBank(nn.Module):
    """Every delta of one adapter.

    * `weight`: float32 parameter [num_blocks, block_size, block_size].
    * `index`: int32 buffer [num_blocks, 3] of (target, block row, block column); -1 before the selection.
    * `fingerprint`: int64 buffer [1], a hash of the targets' names and grids, so that a checkpoint of another model
      or block size is refused instead of half-loaded.
    """

    def __init__(self, block_size: int, targets: Sequence[Target], groups: Sequence[Group], device: torch.device):
        super().__init__()
        self.block_size, self.targets, self.groups = block_size, list(targets), list(groups)
        self.num_blocks = num_blocks = sum(group.budget for group in groups)
        self.weight = nn.Parameter(torch.zeros(num_blocks, block_size, block_size, device=device))
        index_device = "cpu" if torch.device(device).type == "meta" else device
        self.register_buffer("index", torch.full((num_blocks, 3), -1, dtype=torch.int32, device=index_device))
        self.register_buffer("fingerprint", torch.tensor([self._hash_targets()], device=index_device))
        self.gradient: torch.Tensor | None = None  # of the running backward, until an Anchor hands it to `weight`
        self.generation = 0  # counts changes of the index
        self._plan: tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]] | None = None
        self._gathered: torch.Tensor | None = None
        self.register_load_state_dict_pre_hook(_refuse_other_checkpoints)
        self.register_load_state_dict_post_hook(_forget_plan)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor | None:
        """Let the gradient of what follows `x` reach the bank: an identity that takes `weight` as a second input.

        Called rather than read, because DeepSpeed ZeRO-3 gathers a module's parameters when the module is called.
        """
        if hasattr(self.weight, "ds_id"):
            self._gathered = self.weight.detach()
        return None if x is None else Anchor.apply(x, self.weight, self)

    def values(self) -> torch.Tensor:
        """The current delta [num_blocks, b, b], detached, gathered if it is sharded."""
        if hasattr(self.weight, "ds_id"):
            if self._gathered is None:
                self()
            return self._gathered
        weight = self.weight.detach()
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight

    def forget_gathered(self) -> None:
        """Drop the copy that ZeRO-3 gathered: a forward begins, the delta may have changed."""
        self._gathered = None

    def stamp(self) -> tuple:
        """Changes whenever the delta or the index may have changed; costs no look at the device.

        PyTorch's version counter alone misses fused optimizers and DeepSpeed, so optimizer steps are counted too.
        """
        return (id(self.weight), self.weight._version, self.weight.data_ptr(), self.generation, _optimizer_steps)

    def add_gradient(self) -> torch.Tensor:
        """The buffer [num_blocks, b, b] that the running backward adds block gradients to."""
        if self.gradient is None:
            dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            shape = (self.num_blocks, self.block_size, self.block_size)
            self.gradient = torch.zeros(shape, dtype=dtype, device=self.index.device)
        return self.gradient

    def take_gradient(self) -> torch.Tensor | None:
        """Hand the buffer over, in `weight`'s dtype; the next backward starts a new one."""
        gradient, self.gradient = self.gradient, None
        return None if gradient is None else gradient.to(self.weight.dtype)

    # --- the selection -----------------------------------------------------------------------------------------

    @property
    def is_selected(self) -> bool:
        return bool(self.plan())

    def set_index(self, index: torch.Tensor) -> None:
        """Write a selection, int [num_blocks, 3]. Raises ValueError where it does not fit the targets."""
        self._check(index)
        self.index.copy_(index)
        _forget_plan(self)

    def plan(self) -> list[tuple[torch.Tensor, ...]]:
        """Per target its (slots, rows, cols) on the CPU; an empty list before the selection."""
        if self._plan is None or self._plan[0] is not self.index:  # some loaders replace the buffer
            index = self.index.detach().cpu()
            self._check(index)
            plan = []
            if (index[:, 0] >= 0).all():
                self._check_fingerprint(self.fingerprint)
                order = torch.argsort(index[:, 0].long(), stable=True)
                counts = torch.bincount(index[:, 0].long(), minlength=len(self.targets)).tolist()
                for slots in order.split(counts):
                    plan.append((slots, index[slots, 1].long(), index[slots, 2].long()))
            self._plan = (self.index, plan)
            self.generation += 1
        return self._plan[1]

    def selected_blocks(self) -> dict[str, list[list[int]]] | None:
        """The selection by name, as `SMTConfig.selected_blocks` holds it."""
        plan = self.plan()
        if not plan:
            return None
        return {
            target.name: torch.stack([rows, cols], 1).tolist()
            for target, (_, rows, cols) in zip(self.targets, plan, strict=True)
            if len(rows)
        }

    def _check(self, index: torch.Tensor) -> None:
        if tuple(index.shape) != (self.num_blocks, 3):
            raise ValueError(
                f"The checkpoint holds {index.shape[0]} blocks, but the adapter's budget is {self.num_blocks}; "
                "use the adapter_config.json that was saved with it."
            )
        index = index.detach().cpu().long()
        empty = index[:, 0] < 0
        if empty.all():
            return
        target = index[:, 0].clamp(max=len(self.targets) - 1)
        grids = torch.tensor([(t.rows, t.cols) for t in self.targets])[target]
        wrong = (empty | (index < 0).any(1) | (index[:, 0] != target) | (index[:, 1:] >= grids).any(1)).nonzero()
        if len(wrong):
            raise ValueError(
                f"Block {index[wrong[0, 0]].tolist()} (target, row, column) in slot {wrong[0, 0]} of the index does "
                f"not exist among the {len(self.targets)} targets of this model; the file is broken or belongs to "
                "another model or block size."
            )
        if len(index.unique(dim=0)) != len(index):
            raise ValueError("The index names a block twice; the file is broken.")

    def _hash_targets(self) -> int:
        text = repr([self.block_size, *map(tuple, self.targets)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)

    def _check_fingerprint(self, fingerprint: torch.Tensor) -> None:
        if int(fingerprint.item()) != self._hash_targets():
            raise ValueError(
                f"The checkpoint was made for other target modules than this adapter's {len(self.targets)} targets "
                f"({self.targets[0].name}, ...) with blocks of {self.block_size}: another base model, target_modules "
                "or block size. Load it with the adapter_config.json saved beside it, on its own base model."
            )

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "gradient": None, "_gathered": None, "_plan": None}

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, block_size={self.block_size}, targets={len(self.targets)}"


def _refuse_other_checkpoints(bank: DeltaBank, state_dict: dict, prefix: str, *_: object) -> None:
    weight, index = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}index")
    fingerprint = state_dict.get(f"{prefix}fingerprint")
    expected = (bank.num_blocks, bank.block_size, bank.block_size)
    if weight is not None and weight.numel() and tuple(weight.shape) != expected:
        raise ValueError(
            f"The checkpoint holds {weight.shape[0]} blocks of {weight.shape[1]} x {weight.shape[2]}, but the adapter "
            f"was configured for {expected[0]} blocks of {expected[1]} x {expected[2]} (num_blocks, block_size); "
            "use the adapter_config.json that was saved with it."
        )
    if weight is not None and not (index is not None and fingerprint is not None):
        raise ValueError("The checkpoint holds deltas without their index; the file is broken.")
    if index is not None:
        if fingerprint is not None:
            bank._check_fingerprint(fingerprint)
        bank._check(index)


def _forget_plan(bank: DeltaBank, *_: object) -> None:
    bank._plan = None
    bank.index = bank.index.int()  # files hold int16 where that suffices, and some loaders keep a file's dtype
