"""Targets, and what every bank asks of an index, deltas and a fingerprint, whatever they come from.

Files come from strangers, and break on the way. Every check here raises ValueError before anything is changed.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BANK = "smt_bank"  # attribute of the wrapped model, and part of the state keys
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100


class Target(NamedTuple):
    """A weight that an adapter may train: its module's name and its grid of blocks."""

    name: str
    rows: int
    cols: int


class Group(NamedTuple):
    """Targets (their positions) that compete for one budget of blocks."""

    members: list[int]
    budget: int


def fingerprint(block_size: int, targets: Sequence[Target]) -> int:
    """A hash of the targets' names and grids, an int64."""
    text = repr([block_size, *map(tuple, targets)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def check_fingerprint(found: Tensor, block_size: int, targets: Sequence[Target]) -> None:
    """Refuse what was made for other targets."""
    if found.numel() != 1 or found.dtype != torch.int64 or int(found.item()) != fingerprint(block_size, targets):
        raise ValueError(
            f"The checkpoint was made for other target modules than this adapter's {len(targets)} targets "
            f"({short(targets[0].name)}, ...) with blocks of {block_size}: another base model, target_modules "
            "or block size. Load it with the adapter_config.json saved beside it, on its own base model."
        )


def check_weight(weight: Tensor, num_blocks: int, block_size: int) -> None:
    """Refuse deltas that are no floating-point numbers, or are not as many as configured."""
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"The deltas of the checkpoint are {str(weight.dtype).removeprefix('torch.')}; an adapter's are float32, "
            "or another floating-point type of two bytes or more. The file is broken, or was made by other means."
        )
    if weight.numel() and tuple(weight.shape) != (num_blocks, block_size, block_size):
        held = f"{weight.shape[0]} blocks of {' x '.join(map(str, weight.shape[1:]))}"
        raise ValueError(
            f"The checkpoint holds {held if weight.ndim == 3 else form(weight)}, but the adapter was configured for "
            f"{num_blocks} blocks of {block_size} x {block_size} (num_blocks, block_size); use the "
            "adapter_config.json that was saved with it."
        )


def check_index(index: Tensor, num_blocks: int, width: int, block_size: int, targets: Sequence[Target]) -> None:
    """Refuse an index of another shape, and blocks that do not exist, come twice, or overlap. All -1: no selection."""
    if index.dtype not in INTEGERS:
        raise ValueError(f"The index is {form(index)}; an adapter's holds integers. The file is broken.")
    if tuple(index.shape) != (num_blocks, width):
        if index.ndim == 2 and len(index) == num_blocks:
            kinds = {3: "tiles"}
            raise ValueError(
                f"The checkpoint holds {kinds.get(index.shape[1], 'sorted blocks')} (an index {index.shape[1]} wide), "
                f"but the adapter was configured for {kinds.get(width, 'sorted blocks')} of {block_size} "
                "(arrangement, block_size); use the adapter_config.json saved with it."
            )
        held = f"{len(index)} blocks" if index.ndim == 2 else f"an index that is {form(index)}"
        raise ValueError(
            f"The checkpoint holds {held}, but the adapter's budget is {num_blocks}; "
            "use the adapter_config.json that was saved with it."
        )
    index = index.detach().cpu().long()
    if (index < 0).all():
        return
    target = index[:, 0].clamp(0, len(targets) - 1)
    sides = index[:, 1:].unflatten(1, (2, -1))
    unit = block_size if sides.shape[2] > 1 else 1  # what an entry of the index counts: features, or tiles
    grids = unit * torch.tensor([(t.rows, t.cols) for t in targets], device="cpu")[target]
    is_outside = (sides >= grids[:, :, None]).flatten(1).any(1)
    wrong = ((index < 0).any(1) | (index[:, 0] != target) | is_outside).nonzero()
    if len(wrong):
        raise ValueError(
            f"Block {short(index[wrong[0, 0]].tolist())} (target, row, column) in slot {wrong[0, 0]} of the index "
            f"does not exist among the {len(targets)} targets of this model; the file is broken or belongs to "
            "another model or block size."
        )
    if len(torch.cat([target[:, None], sides.sort(2).values.flatten(1)], 1).unique(dim=0)) != len(index):
        raise ValueError("The index names a block twice; the file is broken.")
    for side in sides.unbind(1) if unit > 1 else ():
        lines = torch.cat([target[:, None], side], 1).unique(dim=0)
        features = lines[:, :1] * int(grids.max()) + lines[:, 1:]
        if len(features.unique()) != features.numel():
            raise ValueError(
                "Blocks of the index share some of their rows or columns, but not all, or in another order, or name "
                "one twice; the file is broken. Two blocks of a matrix must have the same rows, in the same order, or "
                "none in common, and columns alike."
            )


def is_in_order(index: Tensor) -> bool:
    """Whether blocks are in the order of their targets."""
    return bool((index[1:, 0] >= index[:-1, 0]).all())


def by_target(index: Tensor) -> dict[int, Tensor]:
    """Position of a target -> the slots of its blocks."""
    order = torch.argsort(index[:, 0], stable=True)
    positions, counts = index[order, 0].unique_consecutive(return_counts=True)
    return dict(zip(positions.tolist(), order.split(counts.tolist()), strict=True))


def short(value: object) -> str:
    """A value for a message, however long it is."""
    return _repr.repr(value)


def form(tensor: Tensor) -> str:
    """Its dtype and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
