"""Adapter files: what stands in them beside the tensors, and reading them without a model.

docs/format.md describes them for other readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

VERSION = 2
BANK = "smt_bank"  # attribute of the wrapped model, and part of the state keys


class Blocks(NamedTuple):
    """The blocks of one target: rows and columns int64 [n, b] of its matrix [out, in], deltas float32 [n, b, b]."""

    rows: Tensor
    cols: Tensor
    deltas: Tensor


class StoredAdapter(NamedTuple):
    """An adapter as it lies in a folder.

    Attributes:
        config: what adapter_config.json holds.
        shapes: of each target of the adapter (out_features, in_features), in the order of the index.
        blocks: of each target that has any, its blocks.
        others: further tensors, of biases and modules_to_save, by their keys.
    """

    config: dict
    shapes: dict[str, tuple[int, int]]
    blocks: dict[str, Blocks]
    others: dict[str, Tensor]


def manifest(block_size: int, targets: list[tuple[str, int, int]]) -> Tensor:
    """What the tensors alone do not say, as UTF-8 JSON in a uint8 tensor.

    Args:
        targets: (name, block rows, block columns) of each.
    """
    content = {"version": VERSION, "block_size": block_size, "targets": targets}
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter without its model."""
    config = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    tensors = load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME))
    parts = {key.rpartition(".")[2]: tensors.pop(key) for key in list(tensors) if f"{BANK}." in key}
    content = json.loads(bytes(parts["manifest"].tolist()))
    size, index = content["block_size"], parts["index"].long()
    blocks = {}
    for position, (name, _, _) in enumerate(content["targets"]):
        slots = index[:, 0] == position
        if slots.any():
            rows, cols = index[slots, 1:].unflatten(1, (2, -1)).unbind(1)
            if rows.shape[1] == 1:
                rows, cols = (side * size + torch.arange(size) for side in (rows, cols))
            blocks[name] = Blocks(rows, cols, parts["weight"][slots].float())
    shapes = {name: (rows * size, cols * size) for name, rows, cols in content["targets"]}
    return StoredAdapter(config, shapes, blocks, tensors)
