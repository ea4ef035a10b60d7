"""What was selected, and what it was selected by: a record to save, to select by anew, and to look at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smt_peft.checks import Target, by_target, check_index
from smt_peft.locations import kinds_of, layers_of, locations_of
from smt_peft.ops import tile_features
from smt_peft.selection import Lines, Scope, arrange, select
from smt_peft.writing import written_whole

SELECTION_FILE = "selection.safetensors"
# What a broken file may cause.
ERRORS = (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError)


@dataclass
class Selection:
    """The blocks that won, and what they won by.

    Attributes:
        names: the target modules.
        block_size: b.
        index: int32 [num_blocks, 3] of (position in `names`, block row, block column); of a sorted arrangement, in the
            order of `lines`.
        scores: the scores it was made from, one float32 [block rows, block columns] per target, where there were any.
        batch_scores: per batch that scored, the sum of the absolute values that it added, over all ranks; 0 where it
            was skipped.
        skipped: how many batches had a gradient that is not finite.
        lines: of a sorted arrangement, the rows and columns of each target's blocks.
        groups: (positions in `names`, budget) of targets that share a budget; the group of `num_blocks` is the last.
        patterns: how many of the groups are from `num_blocks_pattern`.
        inputs: a number per target, equal where targets read one input.
        scope: who competed within a group.
        base_parameters: of the model, for `trainable_ratio`.
    """

    names: list[str]
    block_size: int
    index: torch.Tensor
    scores: list[torch.Tensor] | None = None
    batch_scores: Sequence[float] = ()
    skipped: int = 0
    lines: list[Lines] | None = None
    groups: Sequence[tuple[Sequence[int], int]] = ()
    patterns: int = 0
    inputs: Sequence[int] | None = None
    scope: Scope = "model"
    base_parameters: int | None = None

    @property
    def batches(self) -> int:
        return len(self.batch_scores)

    def features(self) -> torch.Tensor:
        """The index as a bank holds it: of a sorted arrangement int32 [num_blocks, 1 + 2 b], see `arrange`."""
        return self.index if self.lines is None else arrange(self.index, self.lines)

    def blocks(self) -> dict[str, list[list]]:
        """Module name -> its blocks, as `SMTConfig.selected_blocks`."""
        index = self.features()
        sides = index[:, 1:] if self.lines is None else index[:, 1:].unflatten(1, (2, -1))
        return {self.names[target]: sides[slots].tolist() for target, slots in by_target(index).items()}

    def has_blocks(self, blocks: dict[str, list]) -> bool:
        """Whether its blocks are these, in any order."""
        own = self.blocks()
        return own.keys() == blocks.keys() and all(sorted(own[name]) == sorted(blocks[name]) for name in own)

    def grids(self) -> list[tuple[int, int]] | None:
        """Per target its block rows and columns, where they are known."""
        scored = [tuple(score.shape) for score in self.scores or ()]
        return scored or [(len(lines.rows), len(lines.cols)) for lines in self.lines or ()] or None

    def check_shapes(self, targets: Sequence[Target]) -> None:
        """Raise ValueError where a matrix of the same name has another shape here than where it was made."""
        here = {target.name: (target.rows, target.cols) for target in targets}
        for name, grid in zip(self.names, self.grids() or (), strict=False):
            if here.get(name, grid) != grid:
                raise ValueError(
                    f"The selection was made in a model where {name} has {grid[0]} x {grid[1]} blocks of "
                    f"{self.block_size}; here it has {here[name][0]} x {here[name][1]}. Select in this model."
                )

    def rebudget(
        self, num_blocks: int | None = None, trainable_ratio: float | None = None, scope: Scope | None = None
    ) -> Selection:
        """What the same warm-up selects with another budget or scope; the budgets of `num_blocks_pattern` stay.

        Raises:
            ValueError: for a budget that is impossible, or where there are no scores to select by.
        """
        if self.scores is None or not self.groups:
            raise ValueError(
                "This selection has no scores to select by anew; select_blocks() gives one that has them."
            )
        if num_blocks is not None and trainable_ratio is not None:
            raise ValueError(f"num_blocks={num_blocks} and trainable_ratio={trainable_ratio} both set the budget.")
        if trainable_ratio is not None:
            if not 0 < trainable_ratio <= 1:
                raise ValueError(
                    f"trainable_ratio={trainable_ratio} is not in (0, 1]: it is a share, 0.86 % is 0.0086."
                )
            num_blocks = max(1, round(trainable_ratio * self.base_parameters / self.block_size**2))
        groups, scope = [*self.groups], scope or self.scope
        if num_blocks is not None:
            if len(groups) == self.patterns:
                raise ValueError(
                    "num_blocks_pattern covers every target, or has the whole budget, so there is no other to change."
                )
            if not isinstance(num_blocks, int) or num_blocks < 1:
                raise ValueError(f"num_blocks={num_blocks} is not a positive integer.")
            groups[-1] = groups[-1][0], num_blocks
        index = select(self.scores, groups, scope, self.inputs, kinds_of(self.names))
        return replace(self, index=index, groups=groups, scope=scope)

    def save(self, folder: str | Path) -> None:
        """Write selection.safetensors into a folder, beside an adapter; `load` reads it."""
        tensors = {"index": self.index}
        tensors |= {f"scores.{i}": scores.contiguous() for i, scores in enumerate(self.scores or ())}
        for i, lines in enumerate(self.lines or ()):
            tensors |= {f"{side}.{i}": features.int() for side, features in lines._asdict().items()}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        with written_whole(Path(folder)) as new:
            save_file(tensors, new / SELECTION_FILE, {"format": "pt", "selection": json.dumps(settings)})

    @classmethod
    def load(cls, folder: str | Path) -> Selection:
        """Read what `save` wrote. Raises ValueError where that is broken, FileNotFoundError where there is none."""
        path = Path(folder, SELECTION_FILE)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {SELECTION_FILE} in {folder}: a warm-up leaves one beside its adapter, other selections "
                "(random, given, combined) do not."
            )
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["selection"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
            positions = range(len(settings["names"]))
            lines = [
                Lines(tensors[f"rows.{i}"].long(), tensors[f"cols.{i}"].long())
                for i in positions
                if "rows.0" in tensors
            ]
            scores = [tensors[f"scores.{i}"] for i in positions if "scores.0" in tensors]
            read = cls(
                index=tensors["index"],
                scores=scores or None,
                lines=lines or None,
                **{name: settings[name] for name in _SETTINGS},
            )
            read._check()
            return read
        except ERRORS as error:
            raise ValueError(f"{path} is not a selection, or it is broken ({error}).") from None

    def _check(self) -> None:
        """Raise ValueError, or the TypeError of what is of another type, unless its parts fit together."""
        names, size, targets = self.names, self.block_size, range(len(self.names))
        counts = [size, self.patterns, self.skipped, *(budget for _, budget in self.groups)]
        if not isinstance(names, list) or any(type(name) is not str for name in names):
            raise ValueError("its names are no list of texts")
        if size == 0 or any(type(count) is not int or count < 0 for count in counts):
            raise ValueError("its counts are no numbers")
        named = [member for members, _ in self.groups for member in members] + [*(self.inputs or ())]
        if any(member not in targets for member in named):
            raise ValueError("its groups or inputs name targets that it has not")
        for side in [side for lines in self.lines or () for side in lines]:
            if side.shape[1:] != (size,) or not torch.equal(
                side.flatten().sort().values, torch.arange(side.numel(), device="cpu")
            ):
                raise ValueError(f"its lines are not every feature once, {size} to a block")
        cut = [(len(lines.rows), len(lines.cols)) for lines in self.lines or ()]
        if self.scores and cut and self.grids() != cut:
            raise ValueError("its scores and its lines are of other matrices")
        grids = self.grids() or [(2**31 // size, 2**31 // size)] * len(names)
        found = [Target(name, *grid) for name, grid in zip(names, grids, strict=True)]
        check_index(self.index, len(self.index), 3, size, found)
        if (self.index < 0).all():
            raise ValueError("its index is -1 throughout: nothing is selected")

    def counts_by_type(self) -> dict[str, int]:
        """Blocks per kind of module (see `Location`), most first."""
        kinds = kinds_of(self.names)
        counts = Counter(dict.fromkeys(kinds, 0))
        counts.update(kinds[target] for target in self.index[:, 0].tolist())
        return dict(counts.most_common())

    def counts_by_layer(self) -> dict[str, int]:
        """Blocks per layer that has any: "3", or "decoder.3" where layers are counted more than once; "-" outside."""
        locations = locations_of(self.names)
        counts = Counter(locations[target].layer_name for target in self.index[:, 0].tolist())
        return {layer: counts[layer] for layer in layers_of(locations) if layer in counts}

    def overlap(self, other: Selection) -> float:
        """Share of the weights that both have in blocks, by module name: |A and B| / max(|A|, |B|)."""
        ours, theirs = self._entries(), other._entries()
        common = sum(int(torch.isin(ours[name], theirs[name]).sum()) for name in ours.keys() & theirs.keys())
        return common / max(sum(map(len, of.values())) for of in (ours, theirs))

    def _entries(self) -> dict[str, torch.Tensor]:
        """Module name -> a number for each weight that is in a block, int64."""
        found, index = {}, self.features().long()
        for target, slots in by_target(index).items():
            rows, cols = index[slots, 1:].unflatten(1, (2, -1)).unbind(1)
            if self.lines is None:
                rows, cols = (tile_features(side[:, 0], self.block_size) for side in (rows, cols))
            found[self.names[target]] = (rows[:, :, None] * 2**32 + cols[:, None, :]).flatten()
        return found

    def summary(self) -> str:
        """A few lines to print: where the blocks are."""
        total, size, having = len(self.index), self.block_size, len(self.index[:, 0].unique())
        types = ", ".join(f"{name} {n} ({100 * n / total:.0f} %)" for name, n in self.counts_by_type().items())
        layers = ", ".join(f"{layer}: {n}" for layer, n in self.counts_by_layer().items())
        skipped = f", {self.skipped} of them skipped as not finite" if self.skipped else ""
        source = f"\n  from {self.batches} batches{skipped}" if self.batches else ""
        return (
            f"SMT selected {total} blocks of {size} x {size} ({total * size**2:,} parameters) in "
            f"{having} of {len(self.names)} modules.\n  by type:  {types}\n  by layer: {layers}{source}"
        )


_SETTINGS = [field.name for field in fields(Selection) if field.name not in ("index", "scores", "lines")]
