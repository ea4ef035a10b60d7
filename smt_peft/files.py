"""Adapters in folders, read and written without their model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from smt_peft.bank import DeltaBank
from smt_peft.checks import BANK, Group, Target, by_target, short
from smt_peft.config import SMTConfig
from smt_peft.contents import (
    PREFIX,
    WRAPPED,
    Parts,
    check_config,
    is_embedding,
    load,
    manifest,
    names_of,
    narrow,
    take_apart,
)
from smt_peft.ops import tile_features
from smt_peft.selected import SELECTION_FILE
from smt_peft.writing import written_whole


class Blocks(NamedTuple):
    """The blocks of one target: rows and columns int64 [n, b] of its matrix [out, in], deltas float32 [n, b, b]."""

    rows: Tensor
    cols: Tensor
    deltas: Tensor

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """What reads the blocks out of the matrix as [n, b, b]: rows [n, b, 1] and columns [n, 1, b]."""
        return self.rows[:, :, None], self.cols[:, None, :]

    def are_tiles(self) -> bool:
        """Whether each block is neighbouring rows by neighbouring columns, cut at multiples of b."""
        size = self.rows.shape[1]
        return all(torch.equal(side, tile_features(side[:, 0] // size, size)) for side in (self.rows, self.cols))


class StoredAdapter(NamedTuple):
    """An adapter as it lies in a folder.

    Attributes:
        config: what adapter_config.json holds.
        shapes: of each target of the adapter (out_features, in_features), in the order of the index. Files of version
            1 hold none; looking one up raises ValueError then.
        blocks: of each target that has any, its blocks.
        others: further tensors, of biases, modules_to_save and trainable_token_indices, by their keys.
        base: a sample of the base model, see `bases.sample`.
    """

    config: SMTConfig
    shapes: dict[str, tuple[int, int]]
    blocks: dict[str, Blocks]
    others: dict[str, Tensor]
    base: dict[str, list[float]]

    @property
    def names(self) -> list[str]:
        """Of all targets; in files of version 1, of those that have blocks."""
        return list(dict.fromkeys([*self.shapes, *self.blocks]))


class _NoShapes(dict):
    """The shapes in a file of version 1."""

    def __missing__(self, name: str) -> None:
        raise ValueError(
            f"The shape of {name} is not in the file: it has version 1 of the format. Load the adapter with its model "
            "and save it again, which writes the present version."
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict:
    """Raises ValueError where a file holds no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {short(str(error))}; copy or download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return content


def adapter_config(adapter: Path) -> dict:
    """What an adapter's folder says of it."""
    if not (adapter / CONFIG_NAME).is_file():
        inside = sorted(str(file.parent) for file in adapter.glob(f"*/{CONFIG_NAME}"))
        hint = f" There is one in {', '.join(inside)}." if inside else ""
        raise ValueError(f"{adapter} is no adapter: it has no {CONFIG_NAME}.{hint}")
    return read_json(adapter / CONFIG_NAME)


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter without its model.

    Raises:
        ValueError: where a file is missing or broken, or where the two belong to different adapters; for files of
            version 1 also where their config does not say which blocks are whose.
    """
    config = adapter_config(Path(folder))
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if not file.is_file():
        raise ValueError(f"There is no {SAFETENSORS_WEIGHTS_NAME} in {folder}.")
    parts = take_apart(load(file))
    config = SMTConfig.from_peft_type(**{**config, "peft_type": "SMT"})  # refuses values of wrong types
    check_config(vars(config), parts)
    size, index = parts.weight.shape[1], parts.index.long()
    if parts.content:
        names = {position: target.name for position, target in enumerate(parts.content["targets"])}
        shapes = {name: (rows * size, cols * size) for name, rows, cols in parts.content["targets"]}
    else:
        names, shapes = _names_in_version_1(parts, config.selected_blocks or {}, folder), _NoShapes()
    blocks = blocks_of(index, parts.weight.float(), names)
    others = _named(parts, config, [*shapes, *blocks])
    return StoredAdapter(config, shapes, blocks, others, parts.content["base"] if parts.content else {})


def blocks_of(index: Tensor, deltas: Tensor, names: Mapping[int, str]) -> dict[str, Blocks]:
    """The blocks of each target that has a name, from an index [n, 3] or [n, 1 + 2 b] and deltas [n, b, b]."""
    blocks = {}
    for position, slots in by_target(index).items():
        if (name := names.get(position)) is not None:
            rows, cols = index[slots, 1:].unflatten(1, (2, -1)).unbind(1)
            if rows.shape[1] == 1:
                rows, cols = (tile_features(side[:, 0], deltas.shape[1]) for side in (rows, cols))
            blocks[name] = Blocks(rows, cols, deltas[slots])
    return blocks


def _named(parts: Parts, config: SMTConfig, targets: Collection[str]) -> dict[str, Tensor]:
    """The biases, token rows and whole modules that config and manifest name. As in loading, nothing else is taken
    from a file; the base weight of a target embedding, which PEFT saves, is left out without a warning."""
    named, whole = {}, [f"{module}." for module in config.modules_to_save or ()]
    for key, tensor in parts.others.items():
        name = key.removeprefix(PREFIX)
        is_bias = name.endswith(".bias") and config.bias != "none"
        is_known = parts.content is None or name in parts.content["others"]
        is_row = config.trainable_token_indices and ".token_adapter." in name
        if is_known and (is_bias or is_row or any(module in name for module in whole)):
            named[key] = tensor
        elif any(part in name for part in WRAPPED):
            continue  # what whole modules and rows stand in for, which PEFT saves where embeddings were resized
        elif (module := name.rpartition(".base_layer.")[0]) not in targets or not is_embedding(module):
            warnings.warn(f"The adapter's file holds {name}, which its config does not name; it is left out.")
    return named


def _names_in_version_1(parts: Parts, selected: Mapping, folder: str | Path) -> dict[int, str]:
    names = names_of(parts.index, selected) if selected else {}
    ambiguous = next((of for of in names.values() if len(of) > 1), None)
    if ambiguous or not names:
        why = f"{' and '.join(ambiguous[:2])} have the same blocks" if ambiguous else "no selected_blocks"
        raise ValueError(
            f"The file in {folder} does not say which target each block is of: it has version 1 of the format (in its "
            f"config: {why}). Load it with its model and save it again, which writes the present version."
        )
    return {position: of[0] for position, of in names.items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(folder: str | Path, adapter: StoredAdapter) -> None:
    """Write an adapter without its model; what `read_adapter` reads, and PEFT loads.

    Raises:
        ValueError: where the blocks do not fit the shapes or the configuration.
    """
    if not (adapter.blocks and adapter.shapes):
        raise ValueError("The adapter has no blocks to write, or no shapes, as files of version 1 have none.")
    size = adapter.config.block_size
    for name, (rows, cols, deltas) in adapter.blocks.items():
        if not rows.shape[1] == cols.shape[1] == deltas.shape[1] == deltas.shape[2] == size:
            raise ValueError(f"The blocks of {short(name)} are not of {size} x {size} (block_size).")
        if adapter.config.arrangement == "tiles" and not adapter.blocks[name].are_tiles():
            raise ValueError(f"The blocks of {short(name)} are no tiles, which arrangement='tiles' says.")
    if odd := next((name for name, shape in adapter.shapes.items() if any(side % size for side in shape)), None):
        raise ValueError(f"block_size={size} does not divide {short(odd)}'s shape {adapter.shapes[odd]}.")
    targets = [Target(name, rows // size, cols // size) for name, (rows, cols) in adapter.shapes.items()]
    count = sum(len(blocks.deltas) for blocks in adapter.blocks.values())
    budget = {"num_blocks": count, "num_blocks_pattern": {}, "trainable_ratio": None}
    config = replace(adapter.config, **budget, selected_blocks=None, inference_mode=True)
    bank = DeltaBank(config, targets, [Group(list(range(len(targets))), count)], torch.device("cpu"))
    fill(bank, adapter.blocks)
    config.selected_blocks = bank.selected_blocks()
    index = narrow(bank.index)
    parts = {"weight": bank.weight.data, "index": index, "fingerprint": bank.fingerprint}
    others = [key.removeprefix(PREFIX) for key in adapter.others]
    parts["manifest"] = manifest(config, targets, index, others, adapter.base)
    tensors = {f"{PREFIX}{BANK}.{part}": tensor for part, tensor in parts.items()}
    with written_whole(Path(folder)) as new:
        save_file({**tensors, **adapter.others}, new / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(str(new))
    Path(folder, SELECTION_FILE).unlink(missing_ok=True)  # of what was there before


def fill(bank: DeltaBank, blocks: dict[str, Blocks]) -> None:
    """Give a bank its blocks; its deltas are frozen then."""
    values, index = [], []
    for position, target in enumerate(bank.targets):
        if target.name in blocks:
            rows, cols, deltas = blocks[target.name]
            are_tiles = bank.index.shape[1] == 3
            sides = [side[:, :1] // side.shape[1] if are_tiles else side for side in (rows, cols)]
            index.append(pad(torch.cat(sides, 1), (1, 0), value=position))
            values.append(deltas)
    bank.weight = nn.Parameter(torch.cat(values).to(bank.weight.device), requires_grad=False)
    bank.set_index(torch.cat(index).int())
