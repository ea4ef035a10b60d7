"""How block gradients come home: what is kept of each input, and how the bank receives its gradient exactly once.

Every layer with selected blocks needs, in backward, dY and the columns of x that its blocks read. The tape keeps those
columns through `save_for_backward` (so that gradient checkpointing and saved-tensor hooks work), once for all layers
that read the same tensor (q, k and v), and catches dY with a tensor hook. Autograd runs nodes in the reverse order of
their creation, so the first layer on an input runs last in backward and computes the block gradients of its group; the
anchor, before the first layer of all, runs after every group and hands the bank its whole gradient in one piece. One
piece, because slicing the bank per layer would cost a bank-sized zero fill per layer, and because DDP and ZeRO accept
one gradient per parameter and backward. Under gradient checkpointing the anchor sits on the embedding's output
instead: the reentrant kind runs a small backward per segment, and DDP must find the bank in the graph outside of them.

Where the input needs no gradient (the lowest layers), the same nodes stand beside it on an empty tensor, which the
layers' outputs are made to depend on: nothing computes dX there.
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
    """Identity on `thread` that saves pieces of a group's input. Its backward brings them to the group's record.

    `source` only makes the output require grad where nothing else does (the warm-up trains nothing).
    """

    @staticmethod
    def forward(ctx, thread, source, record, position, gathers):
        ctx.record, ctx.position = record, position
        x = record.x()
        ctx.save_for_backward(*[gather(x) for gather in gathers])
        return thread.view_as(thread)

    @staticmethod
    def backward(ctx, dthread):
        ctx.record.arrive(ctx.position, ctx.saved_tensors)
        return dthread, None, None, None, None


class Catch(torch.autograd.Function):
    """Identity on y that depends on `thread` too. Its backward shows dY to `remember`."""

    @staticmethod
    def forward(ctx, y, thread, remember):
        ctx.remember = remember
        return y.detach()  # as `view_as` would, but a model may change this in place

    @staticmethod
    def backward(ctx, dy):
        ctx.remember(dy)
        return dy, None, None


class Columns:
    """Block columns of an input in the order in which they are kept, after some of the layers that read it have run.

    A tree: `after(blocks)` adds what those blocks read and nothing has kept yet. Branches, and what follows from them,
    are made once per selection, and with them the copies of indices to the device.
    """

    def __init__(self, width: int, total: int, device: torch.device, columns: tuple[int, ...] = ()):
        self.width, self.total, self.device, self.columns = width, total, device, columns
        self.ends = (self, self)  # on the branch of a group's first reader: those of its last one, last two times
        self._sorted: Columns | None = None
        self._after: dict[object, Columns] = {}
        self._places: dict[object, torch.Tensor] = {}
        self._gathers: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def after(self, blocks) -> Columns:
        if blocks not in self._after:
            new = sorted(set(blocks.columns) - set(self.columns))
            self._after[blocks] = Columns(self.width, self.total, self.device, (*self.columns, *new))
        return self._after[blocks]

    def sorted(self) -> Columns:
        """The same columns in the input's order."""
        if self._sorted is None:
            self._sorted = Columns(self.width, self.total, self.device, tuple(sorted(self.columns)))
        return self._sorted

    def places(self, blocks) -> torch.Tensor:
        """For each block the place of its column among those kept, int64 [n]."""
        if blocks not in self._places:
            places = [self.columns.index(column) for column in blocks.columns]
            self._places[blocks] = torch.tensor(places, device=self.device)
        return self._places[blocks]

    def gather_from(self, start: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What copies all columns but the first `start`."""
        if self.columns[start:] == tuple(range(self.total)):
            return as_matrix  # everything is read: keep x itself, copy nothing
        if start not in self._gathers:
            self._gathers[start] = _Gather(self.width, torch.tensor(self.columns[start:], device=self.device))
        return self._gathers[start]


class _Gather:
    """x [..., in] -> its chosen block columns [tokens, chosen * width], in autocast's dtype where that is on."""

    def __init__(self, width: int, chosen: torch.Tensor):
        self.width, self.chosen = width, chosen

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, x.shape[-1] // self.width, self.width)
        return _autocast(x.index_select(1, self.chosen.to(x.device)).flatten(1))


def _saves_are_hooked() -> bool:
    """Whether something stands between autograd and what it saves. Checkpointing does: it counts on a recomputation
    to save what the first pass saved, so there nothing may be guessed. Before torch 2.8, it may be so at any time."""
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top_hooks is None or top_hooks(False) is not None


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x [..., in] -> [tokens, in], in autocast's dtype where that is on."""
    return _autocast(x.reshape(-1, x.shape[-1]))


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Record:
    """The layers that read one input tensor, from their forward until their gradients are computed."""

    def __init__(self, x: torch.Tensor, parent: str, aside: bool):
        self.x, self.version, self.parent = weakref.ref(x), x._version, parent
        self.readers: set[int] = set()  # ids of the layers
        self.anchored: set[str] = set()  # the adapters whose anchor sits on this input
        self.aside = aside  # whether the nodes stand beside x, not between it and its readers
        self.nodes = 0
        # width -> (after the first reader, after all so far, what is kept: that, or more by the guess)
        self._columns: dict[int, tuple[Columns, Columns, Columns]] = {}
        self._done: dict[int, int] = {}  # width -> how many columns are kept
        self._pieces: dict[int, tuple[torch.Tensor, ...]] = {}
        self._layout: dict[object, list[tuple[int, int]]] = {}  # key -> (node, which of its saved tensors)
        self._gradients: list[tuple[object, Consume, torch.Tensor]] = []

    def admits(self, x: torch.Tensor, reader, aside: bool) -> bool:
        same = self.x() is x and self.version == x._version and self.aside == aside
        return same and self.parent == reader.parent and id(reader) not in self.readers

    def has(self, key: object) -> bool:
        return key in self._layout

    def read(self, start: Columns, blocks) -> torch.Tensor:
        """Have the next `keep_columns` keep what `blocks` read; returns their places among all that is kept.

        Where the same layers followed the first reader the last two times, it guesses that they will again, and keeps
        the columns of all in one piece. A reader that was not expected has its own kept as a further piece.
        """
        if start.width in self._columns:
            first, seen, kept = self._columns[start.width]
            seen, kept = seen.after(blocks), kept.after(blocks)
        else:
            first = seen = start.after(blocks)
            before, last = first.ends
            kept = last.sorted() if before is last and not _saves_are_hooked() else first
            first.ends = (last, first)
        first.ends = (first.ends[0], seen)
        self._columns[start.width] = first, seen, kept
        return kept.places(blocks)

    def keep_columns(self, thread: torch.Tensor) -> torch.Tensor:
        """Save the columns that were planned and are not kept yet; returns the thread behind the node that does it."""
        gathers = {}
        for width, (*_, kept) in self._columns.items():
            done = self._done.get(width, 0)
            if len(kept.columns) > done:
                gathers[width], self._done[width] = kept.gather_from(done), len(kept.columns)
        return self.keep(thread, None, gathers) if gathers else thread

    def keep(self, thread: torch.Tensor, source: torch.Tensor | None, gathers: dict[object, Callable]) -> torch.Tensor:
        """Save pieces of x, one per key that has something new to keep; returns the thread behind the node."""
        for place, key in enumerate(gathers):
            self._layout.setdefault(key, []).append((self.nodes, place))
        self.nodes += 1
        return Keep.apply(thread, source, self, self.nodes - 1, list(gathers.values()))

    def catch(
        self, y: torch.Tensor, thread: torch.Tensor, consumers: Sequence[tuple[object, Consume]]
    ) -> torch.Tensor:
        """y; when its gradient arrives, remember it for each consumer (key of its pieces, what to do with them)."""

        def remember(dy: torch.Tensor) -> None:
            self._gradients += [(key, consume, dy.reshape(-1, dy.shape[-1])) for key, consume in consumers]

        if self.aside or y._is_view():  # a view loses its hooks where a model changes it in place
            return Catch.apply(y, thread, remember)
        y.register_hook(remember)
        return y

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
        # What the nodes of the running group hang on, behind those that are there: its input, or beside it an empty
        # tensor. (Not the record's: that would tie autograd's graph into a cycle.)
        self.alias: torch.Tensor | None = None
        self._last: Record | None = None

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

    def record(self, x: torch.Tensor, reader, aside: bool = False) -> Record:
        """The group of layers that read x: the running one if x is what the layer before read, too.

        Where x needs no gradient, a reader that takes x itself, not `alias`, may put the nodes `aside`.

        Only siblings share a group, and each joins it once, so that a group never crosses the border of a checkpointed
        segment, and a recomputation saves again exactly what the first pass saved.
        """
        if self._last is None or not self._last.admits(x, reader, aside):
            self._last, self.alias = Record(x, reader.parent, aside), x[:0] if aside else x
        self._last.readers.add(id(reader))
        return self._last

    def columns(self, width: int, total: int, device: torch.device) -> Columns:
        """Where nothing is kept yet, for blocks of `width` on inputs of `total` block columns."""
        if (width, total, device) not in self.plans:
            self.plans[width, total, device] = Columns(width, total, device)
        return self.plans[width, total, device]

    def __getstate__(self) -> dict:
        return {"homes": {}, "_settled": set(), "plans": {}, "collector": None, "alias": None, "_last": None}
