"""Adding adapters up: the blocks of a weighted sum, of adapters in a model or in folders.

The sum is formed on the union of the adapters' blocks, cut as finely as it takes. Sign election and pruning are PEFT's
own functions (peft.utils.merge_utils) on that union.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune, task_arithmetic
from torch import Tensor

from smt_peft.bank import DeltaBank
from smt_peft.banks import find_bank
from smt_peft.bases import other_base
from smt_peft.config import SMTConfig
from smt_peft.files import Blocks, StoredAdapter, blocks_of, fill, read_adapter, write_adapter
from smt_peft.targets import SMALLEST_FAST_BLOCK
from smt_peft.writing import refuse_same_folder

CombinationType = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySignMethod = Literal["total", "frequency"]

WORTH_IT = 1.25  # blocks are cut no further for less than this: large ones are quicker
MOST_GROWTH = 8  # times as many values as the adapters have together


class Method(NamedTuple):
    """How adapters are combined, see `SMTModel.add_weighted_adapter`."""

    combination_type: str
    density: float | None
    majority_sign_method: str

    def check(self) -> None:
        """Raise ValueError for what is impossible."""
        kind = self.combination_type
        if kind.endswith("svd") or kind == "cat":
            raise ValueError(
                f"combination_type={kind!r} is for low-rank factors, and an SMT adapter has none: its blocks add up "
                f"exactly. Use {kind.removesuffix('_svd') if '_' in kind else 'linear'!r}."
            )
        if kind not in get_args(CombinationType):
            raise ValueError(f"Invalid combination_type: {kind}; use one of {', '.join(get_args(CombinationType))}.")
        if self.majority_sign_method not in get_args(MajoritySignMethod):
            raise ValueError(f"majority_sign_method={self.majority_sign_method!r} is neither 'total' nor 'frequency'.")
        if kind == "linear" and self.density is not None:
            raise ValueError(
                f"density={self.density} does nothing for 'linear', which prunes nothing: leave density out, or "
                "choose another combination_type."
            )
        if kind != "linear" and not (self.density is not None and 0 < self.density <= 1):
            raise ValueError(
                f"combination_type={kind!r} keeps a share of each adapter's values, but density={self.density}; give "
                "one above 0 and at most 1."
            )

    def thin(self, deltas: Tensor) -> Tensor:
        """The deltas of one adapter in one target, less what this method prunes."""
        if self.combination_type == "linear" or self.density == 1:
            return deltas
        is_random = self.combination_type.startswith("dare")
        return prune(deltas, self.density, "random" if is_random else "magnitude", rescale=is_random)

    def mix(self, deltas: list[Tensor], weights: Tensor) -> Tensor:
        """The combination of several adapters' deltas, all of one shape, with a weight for each."""
        if not self.combination_type.endswith("ties"):
            return task_arithmetic(deltas, weights)
        stacked = torch.stack(deltas)
        elected = calculate_majority_sign_mask(stacked, self.majority_sign_method)
        return disjoint_merge(stacked * weights.view(-1, 1, 1, 1), elected)


class Grid(NamedTuple):
    """The blocks that a target will have.

    Attributes:
        rows, cols: int64 [p, b] and [q, b], the features of each line.
        taken: bool [p, q], where there is a block.
    """

    rows: Tensor
    cols: Tensor
    taken: Tensor


# --- in a model ------------------------------------------------------------------------------------------------------


def add_weighted_adapter(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, method: Method
) -> None:
    """See `SMTModel.add_weighted_adapter`."""
    if adapter_name in model.peft_config:
        warnings.warn(
            f"There is an adapter {adapter_name!r} already, so nothing was done; give another name, or call "
            f"delete_adapter({adapter_name!r}) first."
        )
        return
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"Adapter {name} does not exist; the model has {', '.join(model.peft_config)}.")
    wholes = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    configs = {name: model.peft_config[name] for name in adapters}
    biased = {name for name, of in configs.items() if of.bias != "none" or of.trainable_token_indices}
    _refuse_wholes(biased | {name for name in adapters for whole in wholes if name in whole.modules_to_save})
    parts = [_of_bank(find_bank(model, name)) for name in adapters]
    _check(adapters, weights, parts, method)
    blocks = combine(parts, weights, method)
    model.peft_config[adapter_name] = _config_of_sum(parts, blocks)
    model.inject_adapter(model.model, adapter_name)
    fill(find_bank(model, adapter_name), blocks)


def _of_bank(bank: DeltaBank) -> StoredAdapter:
    """An adapter's blocks on the CPU, in the form of one that lies in a folder."""
    size, names = bank.block_size, {position: target.name for position, target in enumerate(bank.targets)}
    shapes = {target.name: (target.rows * size, target.cols * size) for target in bank.targets}
    blocks = {}
    if bank.is_selected:
        blocks = blocks_of(bank.index.cpu().long(), torch.cat(bank.split()).detach().cpu(), names)
    return StoredAdapter(bank.config, shapes, blocks, {}, {})


# --- in folders ------------------------------------------------------------------------------------------------------


def combine_adapters(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    combination_type: str,
    out: str | Path,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> StoredAdapter:
    """`SMTModel.add_weighted_adapter` for adapters in folders, without their model; writes the folder `out`.

    Raises:
        ValueError: as that method, and where adapters disagree about the shape of a target.
    """
    method, folders = Method(combination_type, density, majority_sign_method), list(map(str, folders))
    refuse_same_folder(out, folders)
    parts = [read_adapter(folder) for folder in folders]
    _refuse_wholes({folder for folder, part in zip(folders, parts, strict=True) if part.others})
    _check(folders, weights, parts, method)
    _warn_of_other_base(folders, parts)
    shapes: dict[str, tuple[int, int]] = {}
    for part, folder in zip(parts, folders, strict=True):
        for name in part.shapes or part.blocks:
            if shapes.setdefault(name, part.shapes[name]) != part.shapes[name]:
                raise ValueError(
                    f"{name} is {part.shapes[name]} in {folder}, but {shapes[name]} in an adapter before it: they "
                    "belong to different base models, whose adapters cannot be combined."
                )
    blocks = combine(parts, weights, method)
    combined = StoredAdapter(_config_of_sum(parts, blocks), shapes, blocks, {}, parts[0].base)
    write_adapter(out, combined)
    return combined


def _warn_of_other_base(folders: list[str], parts: list[StoredAdapter]) -> None:
    first, *others = parts
    for folder, part in zip(folders[1:], others, strict=True):
        if other_base(first.base, {name: part.base[name] for name in set(first.base) & set(part.base)}):
            warnings.warn(
                f"{folders[0]} and {folder} were made for different base models: their weights have other values. "
                "Each learnt a difference from its own, and their sum fits neither."
            )


# --- what both need --------------------------------------------------------------------------------------------------


def _refuse_wholes(names: set[str]) -> None:
    if names:
        raise ValueError(
            f"Cannot combine {', '.join(sorted(names))}: beside blocks it has biases, rows or whole modules of its "
            "own (bias, trainable_token_indices, modules_to_save), of which there can be one at a time. Train "
            "adapters that are to be combined without them, or merge one and train the other on the merged model."
        )


def _check(names: Sequence[str], weights: Sequence[float], adapters: Sequence[StoredAdapter], method: Method) -> None:
    method.check()
    if not adapters:
        raise ValueError("There is no adapter to combine; name one or more.")
    if len(names) != len(weights):
        raise ValueError(f"{len(names)} adapters and {len(weights)} weights; give one weight for each adapter.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"The weights {', '.join(map(str, weights))} are not all finite.")
    for name, adapter in zip(names, adapters, strict=True):
        if not adapter.blocks:
            raise ValueError(f"Adapter {name} has no blocks yet: train it first, or let select_blocks() choose them.")


def _config_of_sum(parts: Sequence[StoredAdapter], blocks: dict[str, Blocks]) -> SMTConfig:
    """The first adapter's configuration, with the blocks of the sum and, where they differ, the targets of all."""
    targets = [set(part.shapes) for part in parts]
    first = next(iter(blocks.values()))
    changes = {"block_size": first.deltas.shape[1], "num_blocks": sum(len(of.deltas) for of in blocks.values())}
    changes["arrangement"] = "tiles" if all(of.are_tiles() for of in blocks.values()) else "sorted"
    changes |= {"trainable_ratio": None, "num_blocks_pattern": {}, "selected_blocks": None}
    changes |= {"selection": "gradient", "init_weights": True}  # nothing that would select anew
    if any(names != targets[0] for names in targets[1:]):
        every = set().union(*targets)
        parameters = {
            name
            for part in parts
            for name in part.shapes
            if any(f".{name}".endswith(f".{parameter}") for parameter in part.config.target_parameters or ())
        }
        changes |= {"target_modules": every - parameters, "target_parameters": sorted(parameters) or None}
        changes |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return replace(parts[0].config, **changes)


# --- the sum ---------------------------------------------------------------------------------------------------------


def combine(adapters: Sequence[StoredAdapter], weights: Sequence[float], method: Method) -> dict[str, Blocks]:
    """The blocks of the weighted sum, by target, on the CPU.

    Tiles of different sizes are cut into tiles of their greatest common divisor. Sorted blocks whose lines differ are
    cut along the lines of all adapters, as far as that saves bytes, and hold zeros where lines cannot be cut evenly.

    Raises:
        ValueError: where sorted blocks would take more than MOST_GROWTH times as many values as the adapters have.
    """
    shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
    names = [name for name in shapes if any(name in adapter.blocks for adapter in adapters)]
    parts = {name: [a.blocks[name] for a in adapters if name in a.blocks] for name in names}
    size, grids = _cut(parts, shapes)
    had = sum(blocks.deltas.numel() for of in parts.values() for blocks in of)
    count = sum(int(grid.taken.sum()) for grid in grids.values())
    if count * size**2 > MOST_GROWTH * had:
        raise ValueError(
            f"The rows and columns of these sorted adapters cross: their sum would take {count:,} blocks of {size} x "
            f"{size}, {count * size**2 / had:.0f} times as many values as they have together. Merge them into the "
            "weights one after the other instead, or let them be active together: model.base_model.set_adapter([...])."
        )
    combined = {}
    for name, of in parts.items():
        grid = grids[name]
        deltas = [_place(blocks._replace(deltas=method.thin(blocks.deltas)), grid, shapes[name]) for blocks in of]
        factors = [weight for weight, adapter in zip(weights, adapters, strict=True) if name in adapter.blocks]
        rows, cols = grid.taken.nonzero().unbind(1)
        mixed = method.mix(deltas, torch.tensor(factors, dtype=deltas[0].dtype, device="cpu"))
        if not mixed.isfinite().all():
            raise ValueError(f"The sum in {name} has NaN or infinite values, from an adapter or from the weights.")
        combined[name] = Blocks(grid.rows[rows], grid.cols[cols], mixed)
    return combined


def _cut(parts: dict[str, list[Blocks]], shapes: dict[str, tuple[int, int]]) -> tuple[int, dict[str, Grid]]:
    """The size of the sum's blocks, and where they lie in each target."""
    everything = [blocks for of in parts.values() for blocks in of]
    common = math.gcd(*(blocks.rows.shape[1] for blocks in everything))
    sizes = [size for size in range(common, min(common, SMALLEST_FAST_BLOCK) - 1, -1) if common % size == 0]
    if all(of.are_tiles() for of in everything):
        sizes = [common]
    cuts = [(size, {name: _grid(of, shapes[name], size) for name, of in parts.items()}) for size in sizes]
    enough = WORTH_IT * min(_bytes(*cut) for cut in cuts)
    return next(cut for cut in cuts if _bytes(*cut) <= enough)  # the largest comes first


def _bytes(size: int, grids: dict[str, Grid]) -> int:
    return sum(int(grid.taken.sum()) for grid in grids.values()) * 4 * (size**2 + 1 + 2 * size)


def _grid(parts: list[Blocks], shape: tuple[int, int], size: int) -> Grid:
    rows = _lines([blocks.rows for blocks in parts], shape[0], size)
    cols = _lines([blocks.cols for blocks in parts], shape[1], size)
    taken = torch.zeros(len(rows), len(cols), dtype=torch.bool, device="cpu")
    for blocks in parts:
        on_rows = _touched(blocks.rows, rows, shape[0])
        on_cols = _touched(blocks.cols, cols, shape[1])
        taken |= on_rows.T @ on_cols > 0
    return Grid(rows, cols, taken)


def _lines(sides: list[Tensor], length: int, size: int) -> Tensor:
    """Lines of `size` features [p, size] that hold all features of these blocks [n, b], and cut them where they can.

    Features are put into the order of the first adapter's lines, within one of them into that of the second's, and so
    on; those that no block has come last and fill the last line up.
    """
    keys = []
    for side in sides:
        lines = side.sort(1).values.unique(dim=0)
        key = torch.full((length,), len(lines), device="cpu")
        key[lines] = torch.arange(len(lines), device="cpu")[:, None]
        keys.append(key)
    _, kind = torch.stack(keys).unique(dim=1, return_inverse=True)
    used = len(torch.cat([side.flatten() for side in sides]).unique())
    return kind.argsort(stable=True)[: -(-used // size) * size].view(-1, size)


def _number(lines: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of every feature [length] its line, and its place there; of those without one, anything."""
    line, place = torch.zeros(2, length, dtype=torch.int64, device="cpu")
    line[lines] = torch.arange(len(lines), device="cpu")[:, None]
    place[lines] = torch.arange(lines.shape[1], device="cpu")
    return line, place


def _touched(side: Tensor, lines: Tensor, length: int) -> Tensor:
    """Which lines each block [n, b] has features of: float32 [n, lines], 0 or 1."""
    line, _ = _number(lines, length)
    return torch.zeros(len(side), len(lines), device="cpu").scatter_(1, line[side], 1.0)


def _place(blocks: Blocks, grid: Grid, shape: tuple[int, int]) -> Tensor:
    """The deltas of one adapter, cut into the blocks of a grid: [n, b, b], zero where it has none."""
    slot = grid.taken.flatten().cumsum(0).view_as(grid.taken) - 1
    (row, y), (col, x) = (_number(lines, length) for lines, length in zip(grid[:2], shape, strict=True))
    size = grid.rows.shape[1]
    deltas = blocks.deltas.new_zeros(int(grid.taken.sum()), size, size)
    rows, cols = blocks.entries
    deltas[slot[row[rows], col[cols]], y[rows], x[cols]] = blocks.deltas
    return deltas
