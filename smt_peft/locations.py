"""Where modules are in their model, as their names tell: stack, layer and kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Location(NamedTuple):
    """Where a module is in its model."""

    stack: str  # "encoder", "decoder" where a model counts layers more than once; otherwise ""
    layer: int | None  # the first number in the module's name
    kind: str  # as much of the end of the name as tells it from others of its layer: "q_proj", or "SelfAttention.q"

    @property
    def layer_name(self) -> str:
        return "-" if self.layer is None else f"{self.stack}.{self.layer}".lstrip(".")


def locations_of(names: Sequence[str], numbered: bool = False) -> list[Location]:
    """The location of every module; `numbered`: experts of a layer differ in kind ("experts.3.w1"), so that no two
    modules are in one location."""
    parts = [_split(name) for name in names]
    if not numbered:
        parts = [(stack, layer, re.sub(r"\b\d+\b", "*", inside)) for stack, layer, inside in parts]
    stacks = {stack: stack.split(".") for stack, layer, _ in parts if layer is not None}
    common = set.intersection(*map(set, stacks.values())) if stacks else set()
    insides = {inside for _, _, inside in parts}
    counts = Counter(end for inside in insides for end in _ends(inside))
    kinds = {inside: next((end for end in _ends(inside) if counts[end] == 1), inside) for inside in insides}
    return [
        Location("" if layer is None else ".".join(p for p in stacks[stack] if p not in common), layer, kinds[inside])
        for stack, layer, inside in parts
    ]


def kinds_of(names: Sequence[str]) -> list[str]:
    """The kind of every module, see `Location`."""
    return [location.kind for location in locations_of(names)]


def _ends(name: str) -> Iterator[str]:
    """The ends of a name that do not begin with a number, the shortest first; a kind is the first of its own."""
    words = name.split(".")
    for start in range(len(words) - 1, -1, -1):
        if not re.fullmatch(r"\d+|\*", words[start]):
            yield ".".join(words[start:])


def layers_of(locations: Sequence[Location]) -> list[str]:
    """The names of all layers in their order, after what is outside of layers."""
    stacks = list(dict.fromkeys(location.stack for location in locations))
    in_order = sorted(locations, key=lambda at: (at.layer is not None, stacks.index(at.stack), at.layer))
    return list(dict.fromkeys(location.layer_name for location in in_order))


def _split(name: str) -> tuple[str, int | None, str]:
    """What stands before a module's layer, the layer, and the module's path inside of it."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.+))?", name, re.DOTALL)
    if not found:
        return "", None, name
    before, layer, inside = found.groups(default="")
    return before, int(layer), inside or before or "module"
