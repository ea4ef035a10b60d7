"""Where the blocks of one matrix lie: everything the operations need to know that depends on the selection alone.

A plan names *features*. A block adds to b output features and reads b input features; blocks that share them lie on
one *line*. Neighbouring features are named by their block coordinate, which is the quicker form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """Where n blocks lie along one side of a matrix, on m distinct lines. All tensors int64, on one device.

    Attributes:
        at: [m], the block coordinate of each line, ascending: its features are `at * b` to `(at + 1) * b`. Or [m, b],
            the features of each line, in any order.
        member: [n], the line of each block.
        place: [n], where each block is: its coordinate, `at[member]`; where `at` is [m, b], `member`.
        order: [n], the blocks in the order of their lines.
        starts: [m + 1], where the blocks of each line start in `order`.
        features: [n * b], the features of each block, where lines are named by theirs; else empty.
    """

    at: Tensor
    member: Tensor
    place: Tensor
    order: Tensor
    starts: Tensor
    features: Tensor


class Plan(NamedTuple):
    """The blocks of a layer.

    Attributes:
        out: along the output features.
        inner: along the input features.
        kept: along the input features that are kept for backward: `inner` where the input itself is kept, otherwise
            its lines, one after the other.
        read: along the features of dY that backward reads: `out`; but where `out.at` is [m, b], these lines one after
            the other, as backward copies them out first.
        gathers: whether the lines that are read are copied out of the input, so that the rest of it need not be kept.
        in_order: whether block i is on line i of `kept`, so that nothing need be looked up.
    """

    out: Side
    inner: Side
    kept: Side
    read: Side
    gathers: bool
    in_order: bool


def side(blocks: Tensor) -> Side:
    """The side of blocks with these block coordinates, int [n], or with these features, int [n, b]."""
    at, member = blocks.long().unique(dim=0, return_inverse=True)
    order = torch.argsort(member, stable=True)
    counts = torch.bincount(member, minlength=len(at))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    if at.ndim == 1:
        return Side(at, member, at[member], order, starts, at[:0])
    return Side(at, member, member, order, starts, at[member].flatten())


def tile_features(places: Tensor, block_size: int) -> Tensor:
    """The features [n, b] of tiles at block coordinates [n] along one side."""
    return places[:, None] * block_size + torch.arange(block_size, device=places.device)


def entries(plan: Plan, block_size: int) -> tuple[Tensor, Tensor]:
    """What reads the blocks out of a matrix [out, in] as [n, b, b]: rows [n, b, 1] and columns [n, 1, b]."""
    rows, cols = (
        tile_features(side.place, block_size) if side.at.ndim == 1 else side.features.view(-1, block_size)
        for side in (plan.out, plan.inner)
    )
    return rows[:, :, None], cols[:, None, :]


def _apart(side: Side) -> Side:
    """The same lines, but one after the other."""
    at = torch.arange(len(side.at), device=side.at.device)
    return side._replace(at=at, place=side.member, features=at[:0])


def plan(rows: Tensor, cols: Tensor, keep_input: bool, device: torch.device | str = "cpu") -> Plan:
    """The plan, on `device`, of blocks at `rows` and `cols` on the CPU: int [n], block coordinates, or int [n, b],
    features.

    `keep_input`: for backward keep the input itself, not the lines that are read.
    """
    sides = side(rows), side(cols)
    in_order = not keep_input and sides[1].member.tolist() == list(range(len(sides[1].at)))
    out, inner = (Side(*(tensor.to(device) for tensor in one)) for one in sides)
    kept = inner if keep_input else _apart(inner)
    return Plan(out, inner, kept, out if out.at.ndim == 1 else _apart(out), not keep_input, in_order)
