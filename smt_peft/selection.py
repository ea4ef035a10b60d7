"""The rules of selection, on plain tensors: from scores and a budget to blocks, and what blocks are cut from. Nothing
here knows PEFT, transformers or a training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch.nn.functional import pad

Scope = Literal["model", "input", "module"]


def select(
    scores: Sequence[torch.Tensor],
    groups: Sequence[tuple[Sequence[int], int]],
    scope: Scope,
    inputs: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
) -> torch.Tensor:
    """The best blocks of every group.

    Args:
        scores: one float tensor [block rows, block columns] per target matrix; a block below zero is never selected.
        groups: (positions of the targets that share a budget, that budget in blocks).
        scope: who competes within a group, see `SMTConfig`.
        inputs: for scope 'input', a number per target, equal where targets read the same input. Default: all differ.
        kinds: of each target, such as 'q_proj'; where there are fewer blocks than targets, no kind is passed over.
            Default: all are of one.

    Returns:
        int32 [num_blocks, 3] of (target, block row, block column), sorted. Ties go to the earlier block. Targets that
        are ranked together and whose scores are all zero get none.

    Raises:
        ValueError: where a score is not finite, no score of a group is above zero, or a budget is above the number of
            blocks that may be selected.
    """
    chosen = [torch.zeros(score.shape, dtype=torch.bool, device="cpu") for score in scores]
    for members, budget in groups:
        _check_scores([scores[member] for member in members])
        rankings = _rankings(members, scope, inputs)
        # What nothing reached, as experts without tokens, would be given blocks that are never trained.
        reached = [ranking for ranking in rankings if any((scores[member] > 0).any() for member in ranking)]
        unreached, rankings = sum(map(len, rankings)) - sum(map(len, reached)), reached
        sizes = [sum(int((scores[member] >= 0).sum()) for member in ranking) for ranking in rankings]
        if sum(sizes) < budget:
            why = f" ({unreached} targets have none, because all their scores are zero)" if unreached else ""
            raise ValueError(
                f"A budget of {budget} blocks is above the {sum(sizes)} that may be selected{why}; lower it."
            )
        shares = apportion(budget, sizes, kinds and [kinds[ranking[0]] for ranking in rankings])
        for ranking, share in zip(rankings, shares, strict=True):
            _mark_best([scores[member] for member in ranking], share, [chosen[member] for member in ranking])
    return torch.cat([pad(blocks.nonzero(), (1, 0), value=target) for target, blocks in enumerate(chosen)]).int()


def _check_scores(scores: list[torch.Tensor]) -> None:
    everything = torch.cat([score.flatten().cpu() for score in scores])
    if not everything.isfinite().all():
        raise ValueError(
            f"{int((~everything.isfinite()).sum())} of {len(everything)} block scores are not finite; "
            "train in bfloat16 or float32, or look for NaN in the weights and the data."
        )
    if not (everything > 0).any():
        raise ValueError(
            "Every block scores zero: the loss does not depend on the target modules. Check that the labels are "
            "not all -100, that target_modules are used by this model's forward, and, in RL, that completions of one "
            "prompt had different rewards."
        )


def _rankings(members: Sequence[int], scope: Scope, inputs: Sequence[int] | None) -> list[list[int]]:
    """The sets of targets whose blocks are ranked together."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is not one of {', '.join(get_args(Scope))}.")
    rankings: dict[int, list[int]] = {}
    for member in members:
        key = {"model": 0, "input": inputs[member] if inputs else member, "module": member}[scope]
        rankings.setdefault(key, []).append(member)
    return list(rankings.values())


def _mark_best(scores: list[torch.Tensor], count: int, chosen: list[torch.Tensor]) -> None:
    """Set the `count` best blocks of these targets; a stable sort, because topk breaks ties as each device likes."""
    flat = torch.cat([score.flatten().cpu().double() for score in scores])
    best = torch.zeros(len(flat), dtype=torch.bool, device="cpu")
    best[flat.sort(descending=True, stable=True).indices[:count]] = True
    for blocks, part in zip(chosen, best.split([blocks.numel() for blocks in chosen]), strict=True):
        blocks.copy_(part.view_as(blocks))


def apportion(total: int, sizes: Sequence[int], kinds: Sequence[str] | None = None) -> list[int]:
    """Whole shares of `total` in proportion to `sizes`, each less than 1 from its exact share.

    What is rounded is the sum of the shares so far, one kind after another, so that what is left over is spread evenly
    over the layers of each kind: the largest remainders would all be of one kind, or of the first layers.
    """
    order = sorted(range(len(sizes)), key=lambda i: kinds.index(kinds[i]) if kinds else 0)
    shares, whole, passed, given = [0] * len(sizes), sum(sizes), 0, 0
    for i in order:
        passed += sizes[i]
        shares[i] = (2 * total * passed // whole + 1) // 2 - given  # rounded half up, in whole numbers
        given += shares[i]
    return shares


def random_scores(grids: Sequence[tuple[int, int]], seed: int) -> list[torch.Tensor]:
    """Uniform scores, the same for the same seed on every machine."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.rand(grid, generator=generator, dtype=torch.float64, device="cpu") + 1e-9 for grid in grids]


def diagonal_scores(grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """1 on the block diagonal (stretched where the grid is not square), less with each step to its right, wrapped."""
    scores = []
    for rows, cols in grids:
        first = torch.arange(rows, device="cpu") * cols // rows
        steps = (torch.arange(cols, device="cpu")[None, :] - first[:, None]) % cols
        scores.append(1 - steps.double() / cols)
    return scores


class Lines(NamedTuple):
    """What the blocks of a matrix are cut from in a sorted arrangement: its features, the most important first.

    Attributes:
        rows: int64 [block rows, b], the output features of each block row, ascending.
        cols: int64 [block columns, b], the input features of each block column, ascending.
    """

    rows: torch.Tensor
    cols: torch.Tensor

    def in_order(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in] with its features in this order: its tiles are the blocks."""
        return matrix[self.rows.flatten()[:, None], self.cols.flatten()]

    def index(self, target: int, blocks: torch.Tensor) -> torch.Tensor:
        """int32 [n, 1 + 2 b] of (target, rows, columns), from the blocks' places in this order, int [n, 2]."""
        rows, cols = blocks.long().unbind(1)
        return pad(torch.cat([self.rows[rows], self.cols[cols]], 1), (1, 0), value=target).int()


def sort_lines(rows: torch.Tensor, cols: torch.Tensor, block_size: int) -> Lines:
    """Lines from how much each row [out] and each column [in] matters. Ties go to the earlier."""
    orders = (side.sort(descending=True, stable=True).indices for side in (rows, cols))
    return Lines(*(order.view(-1, block_size).sort(1).values for order in orders))


def random_lines(grids: Sequence[tuple[int, int]], block_size: int, seed: int) -> list[Lines]:
    """Lines in a random order, the same for the same seed on every machine."""
    scores = iter(random_scores([(1, side * block_size) for grid in grids for side in grid], seed))
    return [sort_lines(next(scores)[0], next(scores)[0], block_size) for _ in grids]


def arrange(index: torch.Tensor, lines: Sequence[Lines]) -> torch.Tensor:
    """A selection [num_blocks, 3] of places in the order of `lines`, as int32 [num_blocks, 1 + 2 b] of features."""
    return torch.cat([lines[i].index(i, index[index[:, 0] == i, 1:]) for i in index[:, 0].unique().tolist()])
