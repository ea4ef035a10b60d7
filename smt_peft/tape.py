"""How block gradients come home: what is kept of each input, and how the bank receives its gradient exactly once.

Every layer with selected blocks needs, in backward, dY and the columns of x that its blocks read. The tape keeps those
columns through `save_for_backward` (so that gradient checkpointing and saved-tensor hooks work), once for all layers
that read the same tensor (q, k and v), and catches dY with a tensor hook. Autograd runs nodes in the reverse order of
their creation, so the first layer on an input runs last in backward and computes the block gradients of its group; the
anchor, before the first layer of all, runs after every group and hands the bank its whole gradient in one piece. One
piece, because slicing the bank per layer would cost a bank-sized zero fill per layer, and because DDP and ZeRO accept
one gradient per parameter and backward. Under gradient checkpointing the anchor sits on the embedding's output
instead: the reentrant kind runs a small backward per segment, and DDP must find the bank in the graph outside of them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch

# What a consumer does with a finished pair: (dy [tokens, out], the kept columns of x [tokens, columns * width]).
Consume = Callable[[torch.Tensor, torch.Tensor], None]


class Anchor(torch.autograd.Function):
    """Identity on x whose backward returns the bank's collected gradient as the gradient of its second input."""

    @staticmethod
    def forward(ctx, x, weight, bank):
        ctx.bank = bank
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, ctx.bank.take_gradient(), None


class Keep(torch.autograd.Function):
    """Identity on x that saves pieces of it. Its backward brings them to the record of the group that reads x.

    `source` only makes the output require grad where nothing else does (the warm-up trains nothing).
    """

    @staticmethod
    def forward(ctx, x, source, record, position, gathers):
        ctx.record, ctx.position = record, position
        ctx.save_for_backward(*[gather(x) for gather in gathers])
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        ctx.record.arrive(ctx.position, ctx.saved_tensors)
        return dx, None, None, None, None


class Columns:
    """Which block columns of an input are kept, after some of the layers that read it have run.

    A chain: `after(blocks)` adds what those blocks read and nothing has kept yet. The links are cached, so that the
    work (and the copies of indices to the device) happens once per selection.
    """

    def __init__(self, width: int, total: int, places: dict[int, int]):
        self.width, self.total, self.places = width, total, places
        self.gather: Callable[[torch.Tensor], torch.Tensor] | None = None  # what the last link adds
        self._next: dict[int, tuple[object, Columns, torch.Tensor]] = {}

    def after(self, blocks) -> tuple[Columns, torch.Tensor]:
        """The chain with `blocks` added, and for each block the place of its column among those kept, int64 [n]."""
        cached = self._next.get(id(blocks))
        if cached is None:
            new = sorted(set(blocks.columns) - set(self.places))
            added = {column: len(self.places) + i for i, column in enumerate(new)}
            link = Columns(self.width, self.total, {**self.places, **added})
            if len(new) == self.total:
                link.gather = as_matrix  # everything is read: keep x itself, copy nothing
            elif new:
                link.gather = _Gather(self.width, torch.tensor(new, device=blocks.cols.device))
            places = torch.tensor([link.places[c] for c in blocks.columns], device=blocks.cols.device)
            cached = self._next[id(blocks)] = (blocks, link, places)  # holds `blocks`, so that its id stays taken
        return cached[1:]


class _Gather:
    """x [..., in] -> its chosen block columns [tokens, chosen * width], in autocast's dtype where that is on."""

    def __init__(self, width: int, chosen: torch.Tensor):
        self.width, self.chosen = width, chosen

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, x.shape[-1] // self.width, self.width)
        return _autocast(x.index_select(1, self.chosen.to(x.device)).flatten(1))


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x [..., in] -> [tokens, in], in autocast's dtype where that is on."""
    return _autocast(x.reshape(-1, x.shape[-1]))


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Record:
    """The layers that read one input tensor, from their forward until their gradients are computed."""

    def __init__(self, x: torch.Tensor, parent: str):
        self.x, self.version, self.parent = weakref.ref(x), x._version, parent
        self.readers: set[int] = set()  # ids of the layers
        self.anchored: set[str] = set()  # the adapters whose anchor sits on this input
        self.columns: dict[object, Columns] = {}
        self.nodes = 0
        self._pieces: dict[int, tuple[torch.Tensor, ...]] = {}
        self._layout: dict[object, list[tuple[int, int]]] = {}  # key -> (node, which of its saved tensors)
        self._gradients: list[tuple[object, Consume, torch.Tensor]] = []

    def admits(self, x: torch.Tensor, reader) -> bool:
        same = self.x() is x and self.version == x._version
        return same and self.parent == reader.parent and id(reader) not in self.readers

    def has(self, key: object) -> bool:
        return key in self._layout

    def keep(self, x: torch.Tensor, source: torch.Tensor | None, gathers: dict[object, Callable]) -> torch.Tensor:
        """Save pieces of x, one per key that has something new to keep; returns x behind the node that does it."""
        for place, key in enumerate(gathers):
            self._layout.setdefault(key, []).append((self.nodes, place))
        self.nodes += 1
        return Keep.apply(x, source, self, self.nodes - 1, list(gathers.values()))

    def catch(self, y: torch.Tensor, consumers: Sequence[tuple[object, Consume]]) -> None:
        """When y's gradient arrives, remember it for each consumer (key of its pieces, what to do with them)."""

        def remember(dy: torch.Tensor) -> None:
            self._gradients += [(key, consume, dy.reshape(-1, dy.shape[-1])) for key, consume in consumers]

        y.register_hook(remember)

    def arrive(self, node: int, pieces: tuple[torch.Tensor, ...]) -> None:
        self._pieces[node] = pieces
        if node:
            return
        kept: dict[object, torch.Tensor] = {}
        for key, consume, dy in self._gradients:
            if key not in kept:
                parts = [self._pieces[n][place] for n, place in self._layout[key] if n in self._pieces]
                kept[key] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            consume(dy, kept[key])
        self._gradients, self._pieces = [], {}


class Tape:
    """What the layers of one model share during a forward and its backward."""

    def __init__(self) -> None:
        self.homes: dict[str, object] = {}  # adapter -> what its anchor sits before: its first layer in a forward
        self._settled: set[str] = set()  # the adapters whose home in the running forward is known
        self.plans: dict[object, Columns] = {}
        self.collector = None  # set during the warm-up
        self.alias: torch.Tensor | None = None  # the last input behind its nodes; the next layer on it reads this
        self._last: Record | None = None  # (not the record's: that would tie autograd's graph into a cycle)

    def begin_forward(self, banks: Iterable) -> None:
        self._settled, self._last, self.alias = set(), None, None
        for bank in banks:
            if bank.gradient is not None:
                bank.gradient = None
                warnings.warn(
                    "Block gradients of the previous backward never reached the bank and were dropped. After an "
                    "interrupted backward this is harmless; otherwise please report the model's architecture.",
                    RuntimeWarning,
                )

    def settle(self, adapter: str, home: object) -> None:
        """The first to ask in a forward becomes the adapter's home. Not in a backward: there, checkpointing runs parts
        of an earlier forward again, whose home must stay."""
        if adapter not in self._settled and torch._C._current_graph_task_id() == -1:
            self.homes[adapter] = home
            self._settled.add(adapter)

    def record(self, x: torch.Tensor, reader) -> Record:
        """The group of layers that read x: the running one if x is what the layer before read, too.

        Only siblings share a group, and each joins it once, so that a group never crosses the border of a checkpointed
        segment, and a recomputation saves again exactly what the first pass saved.
        """
        if self._last is None or not self._last.admits(x, reader):
            self._last, self.alias = Record(x, reader.parent), x
        self._last.readers.add(id(reader))
        return self._last

    def columns(self, width: int, total: int, device: torch.device) -> Columns:
        """The start of the chain for blocks of `width` on inputs of `total` block columns."""
        return self.plans.setdefault((width, total, device), Columns(width, total, {}))

    def __getstate__(self) -> dict:
        return {"homes": {}, "_settled": set(), "plans": {}, "collector": None, "alias": None, "_last": None}
