"""Where the selected blocks of a module lie, as a config writes it, from lists or from a file's text."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from operator import eq
from operator import index as whole_number

import torch
from torch import Tensor

from smt_peft.checks import short

CHUNK = 2**16  # characters that are looked at together, so that a long text costs little more than itself


class Tiles(Sequence):
    """The tiles of one module, [[block row, block column], ...], as 8 bytes each: files may hold millions."""

    def __init__(self, values: array):
        self._values = values

    @classmethod
    def parse(cls, name: str, blocks: str | Iterable) -> Tiles:
        """From pairs of whole numbers, or from a file's text 'row,column row,column ...'."""
        try:
            if isinstance(blocks, str):
                return cls(array("i", _numbers(blocks)))
            return cls(array("i", (_whole(at) for row, col in blocks for at in (row, col))))
        except (TypeError, ValueError, OverflowError):
            what = f"selected_blocks[{short(name)}]={short(blocks)}"
            raise ValueError(
                f"{what} is not a list of [block row, block column] pairs; blocks of any rows and columns need "
                "arrangement='sorted'."
            ) from None

    def __len__(self) -> int:
        return len(self._values) // 2

    def __getitem__(self, at: int | slice) -> list:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        return self._values[2 * at : 2 * at + 2].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, map(list, other)))

    def __repr__(self) -> str:
        return f"<{len(self)} tiles>"

    def tensor(self) -> Tensor:
        """int32 [n, 2]."""
        return torch.frombuffer(self._values or array("i", [0]), dtype=torch.int32)[: 2 * len(self)].view(-1, 2)


def _numbers(text: str) -> Iterable[int]:
    """The numbers of 'row,column row,column ...', one after the other."""
    separators = text.encode("ascii").translate(None, b"0123456789")
    is_apart = re.fullmatch("[0-9].*[0-9]", text) and not any(two in text for two in (", ", " ,"))
    if not is_apart or separators != (b", " * len(separators))[: len(separators)] or len(separators) % 2 == 0:
        raise ValueError
    text, start = text.replace(",", " "), 0
    while start < len(text):
        end = text.find(" ", start + CHUNK)
        end = len(text) if end < 0 else end
        yield from map(int, text[start:end].split())
        start = end


def _whole(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError
    return whole_number(value)


def parse_sorted(name: str, blocks: Iterable) -> list[list[list[int]]]:
    """Blocks of any rows and columns, [[[row, ...], [column, ...]], ...], ascending: blocks that share them must name
    them in one order."""
    try:
        return [[sorted(_whole(feature) for feature in side) for side in (rows, cols)] for rows, cols in blocks]
    except (TypeError, ValueError):
        what = f"selected_blocks[{short(name)}]={short(blocks)}"
        raise ValueError(f"{what} is not a list of [[rows], [columns]] pairs (sorted blocks).") from None


def places_in(blocks: Tiles | Sequence) -> Tensor:
    """Where the blocks of one module lie: tiles int [n, 2], sorted blocks int [n, 2 b]."""
    if isinstance(blocks, Tiles):
        return blocks.tensor()
    flat = [[at for side in block for at in (side if isinstance(side, list) else [side])] for block in blocks]
    return torch.tensor(flat, device="cpu")
