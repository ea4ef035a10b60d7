"""From scores and a budget to a selection. Plain tensors: nothing here knows PEFT, transformers or a training loop."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch


def select(
    scores: Sequence[torch.Tensor],
    groups: Sequence[tuple[Sequence[int], int]],
    scope: str,
    inputs: Sequence[int] | None = None,
) -> torch.Tensor:
    """The best blocks of every group.

    Args:
        scores: one float tensor [block rows, block columns] per target matrix.
        groups: (positions of the targets that share a budget, that budget in blocks).
        scope: who competes within a group. 'model': all of it, in one ranking. 'input': the matrices that read the
            same input (q, k and v; gate and up), 'module': nobody; each such set gets the same share of its blocks.
        inputs: for scope 'input', a number per target, equal where targets read the same input. Default: all differ.

    Returns:
        int32 [num_blocks, 3] of (target, block row, block column), sorted. Ties go to the earlier block.

    Raises:
        ValueError: where a score is not finite, or where all scores of a group are equal to zero.
    """
    chosen = []
    for members, budget in groups:
        _check_scores([scores[member] for member in members])
        rankings = _rankings(members, scope, inputs)
        shares = apportion(budget, [sum(scores[member].numel() for member in ranking) for ranking in rankings])
        chosen += [_best(scores, ranking, share) for ranking, share in zip(rankings, shares, strict=True)]
    return sort_index(torch.cat(chosen))


def _check_scores(scores: list[torch.Tensor]) -> None:
    everything = torch.cat([score.flatten().cpu() for score in scores])
    if not everything.isfinite().all():
        raise ValueError(
            f"{int((~everything.isfinite()).sum())} of {len(everything)} block scores are not finite; "
            "train in bfloat16 or float32, or look for NaN in the weights and the data."
        )
    if not everything.any():
        raise ValueError(
            "Every block scores zero: the loss does not depend on the target modules. Check that the labels are "
            "not all -100 and that target_modules are used by this model's forward."
        )


def _rankings(members: Sequence[int], scope: str, inputs: Sequence[int] | None) -> list[list[int]]:
    """The sets of targets whose blocks are ranked together."""
    rankings: dict[int, list[int]] = {}
    for member in members:
        key = {"model": 0, "input": inputs[member] if inputs else member, "module": member}[scope]
        rankings.setdefault(key, []).append(member)
    return list(rankings.values())


def _best(scores: Sequence[torch.Tensor], members: list[int], count: int) -> torch.Tensor:
    """The `count` best blocks of these targets, [count, 3]."""
    flat = [scores[member].flatten().cpu().double() for member in members]
    starts = torch.tensor([0, *map(len, flat[:-1])], device="cpu").cumsum(0)
    best = _top(torch.cat(flat), count)
    owner = torch.bucketize(best, starts, right=True) - 1
    block = best - starts[owner]
    target = torch.tensor(members, device="cpu")[owner]
    columns = torch.tensor([scores[member].shape[1] for member in members], device="cpu")[owner]
    return torch.stack([target, block // columns, block % columns], dim=1)


def sort_index(index: torch.Tensor) -> torch.Tensor:
    """A selection in the order of (target, row, column), int32 [num_blocks, 3]."""
    index = index.long()
    for column in (2, 1, 0):
        index = index[torch.argsort(index[:, column], stable=True)]
    return index.int()


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` largest; a stable sort, because topk breaks ties differently on every device."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Whole shares of `total` in proportion to `sizes` (largest remainder; ties to the earlier)."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
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


@dataclass
class Selection:
    """The blocks that won.

    Attributes:
        names: the target modules.
        index: int32 [num_blocks, 3] of (position in `names`, block row, block column).
        scores: the scores it was made from, one float32 [block rows, block columns] per target, where there were any.
        batches: batches that were looked at; `skipped` of them had a non-finite loss or gradient.
        batch_scores: per batch, the sum of its scores, in a distributed run over all ranks; 0 where it was skipped.
    """

    names: list[str]
    block_size: int
    index: torch.Tensor
    scores: list[torch.Tensor] | None = None
    batches: int = 0
    skipped: int = 0
    batch_scores: list[float] | None = None

    def blocks(self) -> dict[str, list[list[int]]]:
        """Module name -> [[block row, block column], ...], as `SMTConfig.selected_blocks`."""
        chosen: dict[str, list[list[int]]] = {}
        for target, row, col in self.index.tolist():
            chosen.setdefault(self.names[target], []).append([row, col])
        return chosen

    def counts_by_type(self) -> dict[str, int]:
        """Blocks per module type (see `Place`), most first."""
        places = places_of(self.names)
        counts = Counter({place.kind: 0 for place in places})
        counts.update(places[target].kind for target in self.index[:, 0].tolist())
        return dict(counts.most_common())

    def counts_by_layer(self) -> dict[str, int]:
        """Blocks per layer that has any: "3", or "decoder.3" where layers are counted more than once; "-" outside."""
        places = places_of(self.names)
        counts = Counter(places[target].layer_name for target in self.index[:, 0].tolist())
        return {layer: counts[layer] for layer in layers_of(places) if layer in counts}

    def overlap(self, other: Selection) -> float:
        """Share of the blocks that both have, by module name: |A and B| / max(|A|, |B|).

        Raises:
            ValueError: where the block sizes differ, so that no block is the same.
        """
        if self.block_size != other.block_size:
            raise ValueError(
                f"Blocks of {self.block_size} x {self.block_size} and of {other.block_size} x {other.block_size} "
                "cannot be compared; select both with the same block_size."
            )
        ours, theirs = (
            {(name, *block) for name, blocks in selection.blocks().items() for block in blocks}
            for selection in (self, other)
        )
        return len(ours & theirs) / max(len(ours), len(theirs))

    def summary(self) -> str:
        """A few lines to print: where the blocks are."""
        total = len(self.index)
        types = ", ".join(f"{name} {n} ({100 * n / total:.0f} %)" for name, n in self.counts_by_type().items())
        layers = ", ".join(f"{layer}: {n}" for layer, n in self.counts_by_layer().items())
        lines = [
            f"SMT selected {total} blocks of {self.block_size} x {self.block_size} "
            f"({total * self.block_size**2:,} parameters) in {len(self.blocks())} of {len(self.names)} modules.",
            f"  by type:  {types}",
            f"  by layer: {layers}",
        ]
        if self.batches:
            skipped = f", {self.skipped} of them skipped as not finite" if self.skipped else ""
            lines.append(f"  from {self.batches} batches{skipped}")
        return "\n".join(lines)


class Place(NamedTuple):
    """Where a module is in its model.

    Attributes:
        stack: which layers, where a model counts them more than once: "encoder", "decoder"; otherwise "".
        layer: the first number in the module's name, if there is one.
        kind: the module's type: as much of the end of its name as tells it from other modules of its layer, such as
            "q_proj", or "SelfAttention.q" where there is an "EncDecAttention.q", too.
    """

    stack: str
    layer: int | None
    kind: str

    @property
    def layer_name(self) -> str:
        return "-" if self.layer is None else f"{self.stack}.{self.layer}".lstrip(".")


def places_of(names: Sequence[str], numbered: bool = False) -> list[Place]:
    """The place of every module; `numbered`: experts of a layer differ in type ("experts.3.w1"), so that no two
    modules are in one place."""
    before, layers, inside = zip(*map(_split, names), strict=True)
    if not numbered:
        inside = [re.sub(r"\b\d+\b", "*", path) for path in inside]
    stacks = {stack: stack.split(".") for stack, layer in zip(before, layers, strict=True) if layer is not None}
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*stacks.values(), strict=False))))
    stack_names = _shortest({stack: path[shared:] for stack, path in stacks.items()})
    kinds = _shortest({path: path.split(".")[::-1] for path in inside})
    return [
        Place("" if layer is None else ".".join(stack_names[stack]), layer, ".".join(kinds[path][::-1]))
        for stack, layer, path in zip(before, layers, inside, strict=True)
    ]


def layers_of(places: Sequence[Place]) -> list[str]:
    """The names of all layers in their order, after what is outside of layers."""
    stacks = list(dict.fromkeys(place.stack for place in places))
    in_order = sorted(places, key=lambda at: (at.layer is not None, stacks.index(at.stack), at.layer))
    return list(dict.fromkeys(place.layer_name for place in in_order))


def _split(name: str) -> tuple[str, int | None, str]:
    """What stands before a module's layer, the layer, and the module's path inside of it."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.+))?", name)
    if not found:
        return "", None, name
    before, layer, inside = found.groups(default="")
    return before, int(layer), inside or before or "module"


def _shortest(paths: dict[str, list[str]]) -> dict[str, list[str]]:
    """Of every path the shortest beginning that no other has, and that does not stop at a number."""
    found = {}
    for name, path in paths.items():
        beginnings = (path[:length] for length in range(1, len(path)) if not re.fullmatch(r"\d+|\*", path[length - 1]))
        alone = (start for start in beginnings if sum(one[: len(start)] == start for one in paths.values()) == 1)
        found[name] = next(alone, path)
    return found
