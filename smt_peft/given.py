"""Selections that are known when an adapter is made: listed in its config, or by a rule that needs no data."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch.nn.functional import pad

from smt_peft.bank import DeltaBank, is_sharded
from smt_peft.checks import Target, short
from smt_peft.layer import Linear
from smt_peft.locations import kinds_of
from smt_peft.ops import reduce_blocks
from smt_peft.places import places_in
from smt_peft.selection import arrange, diagonal_scores, random_lines, random_scores, select, sort_lines

# 13B in blocks of 16 has 50 million. A file may ask for blocks of 1 x 1, whose scores would take many times the
# memory of the model.
MOST_SCORED_ON_LOADING = 2**26


def given_index(bank: DeltaBank, layers: list[Linear]) -> torch.Tensor | None:
    """The selection where none needs to be learnt: given, or by a rule that needs no data."""
    config = bank.config
    if config.selected_blocks is not None:
        return _listed(bank)
    size, lines = bank.block_size, None
    grids = [(target.rows, target.cols) for target in bank.targets]
    if config.awaits_weights and sum(rows * cols for rows, cols in grids) > MOST_SCORED_ON_LOADING:
        return None  # the file brings the index itself
    if config.selection == "random":
        scores = random_scores(grids, config.seed)
        lines = random_lines(grids, size, config.seed) if config.arrangement == "sorted" else None
    elif config.selection == "diagonal":
        scores = diagonal_scores(grids)
    elif config.selection == "magnitude":
        scores, lines = [], []
        for layer, target in zip(layers, bank.targets, strict=True):  # one dequantised matrix at a time
            with align_module_device(layer.get_base_layer()):  # an offloaded weight comes in for this
                is_meta = layer.weight.device.type == "meta"
                if is_meta or is_sharded(layer.weight):
                    if config.awaits_weights:  # and its index with them
                        return None
                    why = "on the meta device: load it first" if is_meta else "divided: select before it is"
                    raise ValueError(
                        f"selection='magnitude' looks at the weights, and {target.name}'s is {why}, or give the "
                        "blocks (selected_blocks)."
                    )
                matrix = layer.matrix()
                if config.arrangement == "sorted":
                    sums = (matrix.abs().sum(side, dtype=torch.float32).cpu() for side in (1, 0))
                    lines.append(sort_lines(*sums, size))
                    matrix = lines[-1].in_order(matrix)
                scores.append(reduce_blocks(matrix, size, "abs_mean"))
        if not any(score.any() for score in scores):
            raise ValueError("selection='magnitude' ranks blocks by their weights, and all of them are zero.")
    else:
        return None
    # All diagonals tie: each module has the same share of its own.
    scope = "module" if config.selection == "diagonal" else config.scope
    index = select(scores, bank.groups, scope, kinds=kinds_of([target.name for target in bank.targets]))
    return arrange(index, lines) if lines else index


def _listed(bank: DeltaBank) -> torch.Tensor:
    config, size = bank.config, bank.block_size
    position = {target.name: i for i, target in enumerate(bank.targets)}
    if config.made_by is not None:
        config.made_by.check_shapes(bank.targets)
    unknown = sorted(set(config.selected_blocks) - set(position))
    if unknown:
        raise ValueError(
            f"selected_blocks names {short(unknown[0])}, which is not among the {len(bank.targets)} target "
            f"modules ({bank.targets[0].name}, ...); fix the name or target_modules."
        )
    names = sorted(config.selected_blocks, key=position.get)
    given, index = config.selected_blocks, []
    if config.arrangement == "sorted" and any(
        len(side) != size for blocks in given.values() for sides in blocks for side in sides
    ):
        raise ValueError(f"selected_blocks has a block that is not {size} rows by {size} columns (block_size).")
    for name in names:
        places = places_in(given[name]).long()
        if config.arrangement == "tiles":
            _check_tiles(places, bank.targets[position[name]], size)
        index.append(pad(places, (1, 0), value=position[name]))
    return torch.cat(index)


def _check_tiles(places: torch.Tensor, target: Target, size: int) -> None:
    """Raise ValueError where places, [n, 2], are not all different blocks of a target."""
    outside = ((places < 0) | (places >= places.new_tensor([target.rows, target.cols]))).any(1)
    if outside.any():
        raise ValueError(
            f"selected_blocks names block {places[outside][0].tolist()} of {short(target.name)}, which has "
            f"{target.rows} x {target.cols} blocks of {size} x {size}; fix it, or block_size."
        )
    different, counts = places.unique(dim=0, return_counts=True)
    if len(different) < len(places):
        raise ValueError(
            f"selected_blocks names block {different[counts > 1][0].tolist()} of {short(target.name)} twice; fix it."
        )
