"""What an adapter in a folder is, and how two of them differ: reports, made without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from smt_peft.contents import PREFIX
from smt_peft.files import Blocks, read_adapter
from smt_peft.locations import layers_of, locations_of
from smt_peft.selected import SELECTION_FILE

OPTIONS = {  # that a rule of selection has, beside the scope
    "gradient": ["score", "accumulation", "warmup_steps"],
    "activation": ["warmup_steps"],
    "random": ["seed"],
}


def describe(folder: Path) -> dict:
    """An adapter's base model, its blocks, how they were selected, where they are, and how large their deltas are."""
    adapter = read_adapter(folder)
    names = adapter.names
    config, locations = adapter.config, locations_of(names)
    deltas = {name: blocks.deltas for name, blocks in adapter.blocks.items()}
    options = [f"{name} {getattr(config, name)}" for name in ("scope", *OPTIONS.get(config.selection, []))]
    # Sums and converted models have the config of a warm-up, and never had one; of others its record may be lost.
    is_known = not config.needs_warmup or (folder / SELECTION_FILE).is_file()
    kinds = {name: location.kind for name, location in zip(names, locations, strict=True)}
    layers = {name: location.layer_name for name, location in zip(names, locations, strict=True)}
    return {
        "base_model": config.base_model_name_or_path,
        "blocks": sum(map(len, deltas.values())),
        "block_size": config.block_size,
        "arrangement": config.arrangement,
        "parameters": sum(delta.numel() for delta in deltas.values()),
        "modules": len(names),
        "modules_with_blocks": len(deltas),
        "selection": ", ".join([config.selection, *options]) if is_known else None,
        "norm": _norm(deltas.values()),
        "largest": torch.stack([delta.abs().max() for delta in deltas.values()]).max().item() if deltas else 0.0,
        "also_trained": sorted(key.removeprefix(PREFIX) for key in adapter.others),
        "bytes": (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        "by_type": _by_group(deltas, kinds, dict.fromkeys(kinds.values())),
        "by_layer": _by_group(deltas, layers, layers_of(locations)),
    }


def _by_group(deltas: dict[str, Tensor], groups: dict[str, str], order: Iterable[str]) -> dict[str, dict]:
    """Of the targets of each group, the blocks, their share of all, and the norm of their deltas."""
    report, total = {}, max(1, sum(map(len, deltas.values())))
    for group in order:
        own = [delta for name, delta in deltas.items() if groups[name] == group]
        blocks = sum(map(len, own))
        report[group] = {"blocks": blocks, "share": blocks / total, "norm": _norm(own)}
    return report


def _norm(deltas: Iterable[Tensor]) -> float:
    """The Frobenius norm of all of them together."""
    return sum(delta.double().square().sum().item() for delta in deltas) ** 0.5


def compare(folder: Path, other_folder: Path) -> dict:
    """How much of the weights two adapters both train, and how far their deltas point the same way.

    Overlap is the number of entries that both train over that of the larger adapter. The cosine is that of all deltas
    as one vector, with zeros where an adapter has no block; None where one has only zeros.

    Raises:
        ValueError: where a target has another shape in the other.
    """
    one, other = read_adapter(folder), read_adapter(other_folder)
    names = list(dict.fromkeys([*one.names, *other.names]))
    by_type, total = {}, Counter()
    for name, location in zip(names, locations_of(names), strict=True):
        shapes = [of.shapes[name] for of in (one, other) if name in of.shapes or name in of.blocks]
        if shapes[0] != shapes[-1]:
            raise ValueError(
                f"{name} has the shape {shapes[0]} in {folder} and {shapes[-1]} in {other_folder}: the adapters were "
                "made for different models, and cannot be compared."
            )
        sums = _products(*(_entries(of.blocks.get(name), shapes[0][1]) for of in (one, other)))
        by_type.setdefault(location.kind, Counter()).update(sums)
        total.update(sums)
    return {
        "base_models": [adapter.config.base_model_name_or_path for adapter in (one, other)],
        "parameters": [int(total["one"]), int(total["other"])],
        "parameters_in_both": int(total["both"]),
        "norms": [total["one squared"] ** 0.5, total["other squared"] ** 0.5],
        **_shares(total),
        "by_type": {kind: _shares(sums) for kind, sums in by_type.items()},
    }


def _shares(sums: Counter) -> dict[str, float | None]:
    most, norms = max(sums["one"], sums["other"]), (sums["one squared"] * sums["other squared"]) ** 0.5
    return {"overlap": sums["both"] / most if most else None, "cosine": sums["product"] / norms if norms else None}


def _entries(blocks: Blocks | None, columns: int) -> tuple[Tensor, Tensor]:
    """The entries of a matrix that blocks cover, int64 in ascending order, and their deltas, float64."""
    if blocks is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    rows, cols = blocks.entries
    entries, order = (rows * columns + cols).flatten().sort()
    return entries, blocks.deltas.flatten()[order].double()


def _products(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How many entries each has and both have, and the products of the deltas."""
    common = torch.isin(one[0], other[0], assume_unique=True), torch.isin(other[0], one[0], assume_unique=True)
    return {
        "one": len(one[0]),
        "other": len(other[0]),
        "both": int(common[0].sum()),
        "product": (one[1][common[0]] @ other[1][common[1]]).item(),
        "one squared": one[1].square().sum().item(),
        "other squared": other[1].square().sum().item(),
    }
