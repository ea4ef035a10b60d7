"""Collecting block scores while a model runs: from gradients, or from activations alone.

Gradient scores come from activations, not from `weight.grad`: a node behind each target layer keeps x and receives dY,
and a custom op forms dW = dY^T x a row of blocks at a time, reduces it to scores and drops it. Nothing needs
`requires_grad` on a base weight, so quantised and sharded models work, and memory is one float per block (but for
signed sums, see `ScoreCollector`, and for experts, whose dW is formed whole). A layer
scores once a batch under every kind of checkpointing: only one node for each forward sees a backward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from smt_peft import ops
from smt_peft.experts import ParamWrapper
from smt_peft.selection import Lines, sort_lines

# Up to this share of the longest gradient in a batch, a token's gradient is rounding alone: that of padding, or of the
# query of a first token, which attends to itself alone.
ROUNDED = 1e-5
MOST_WIDENED = 2**24  # values of an expert's gradient that are float32 at a time


class Watch(torch.autograd.Function):
    """Identity on y [..., out] that keeps x [..., in], and hands both dY and x to `consume` as matrices.

    `source` makes the graph exist: in the warm-up nothing is trained. Without x, y is a weight and dY its gradient.
    """

    @staticmethod
    def forward(ctx, y, x, source, consume: Callable[[torch.Tensor, torch.Tensor | None], None]):
        ctx.save_for_backward(x)
        ctx.consume = consume
        return y.detach()  # as `view_as` would, but a model may change this in place

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        device = dy.device.type
        with torch.autocast(device, enabled=False) if ops.is_autocast(device) else contextlib.nullcontext():
            ctx.consume(dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1]))
        return dy, None, None, None


class Collector:
    """Watches layers while batches run, and sums what `measure` says of each; a batch in which that is not finite
    anywhere is left out."""

    needs_backward = True

    def __init__(self, layers: list[nn.Module], scale: float = 1.0):
        self.layers = layers
        self.scale = self._usual_scale = scale  # of the loss, for float16
        self._is_backward = False
        self._is_helpable = False  # whether another scale may help where the gradient is not finite
        self.source = torch.zeros((), requires_grad=True, device=layers[0].device)  # see `Watch`
        self.inputs = list(range(len(layers)))  # per layer the first one that read the same input just before it
        self.skipped = 0
        self._last: tuple[torch.Tensor, int] | None = None
        self._batch: dict[int, torch.Tensor] = {}  # of each layer that has one, what was measured
        self._sums: dict[int, torch.Tensor] = {}
        self._totals: list[float] = []  # of each batch; 0 where it was left out

    def measure(self, position: int, dy: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """What to sum of a layer's gradient dY^T x, or of dY as the gradient where there is no x."""
        raise NotImplementedError

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        """Of what `measure` gives."""
        raise NotImplementedError

    @property
    def batches(self) -> int:
        return len(self._totals)

    def attach(self, undo: list[Callable[[], object]]) -> None:
        """Have every layer watched from now on; adds to `undo` what ends it."""
        for position, layer in enumerate(self.layers):
            undo.append(self._watch(layer, position))

    def _watch(self, layer: nn.Module, position: int) -> Callable[[], object]:
        consume = partial(self._add, position)
        if isinstance(layer, ParamWrapper):
            layer.watch = lambda weight: Watch.apply(weight, None, self.source, consume)
            return partial(setattr, layer, "watch", None)

        def watch(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
                return output
            self._read(position, args[0])
            return Watch.apply(output, args[0], self.source, consume)

        return layer.register_forward_hook(watch).remove

    def _read(self, position: int, x: torch.Tensor) -> None:
        """Note which layers read one input, one after the other; DeepSpeed ZeRO-3 hands each a view of its own."""
        last = None if self._last is None else self._last[0]
        is_same = last is x or (x.numel() and last is not None and last.data_ptr() == x.data_ptr())
        if not is_same or last.shape != x.shape:
            self._last = x, position  # held, so that nothing else comes to lie there
        self.inputs[position] = self._last[1]

    def backward(self, loss: torch.Tensor) -> None:
        """Differentiate the loss. Only this backward counts: computing the loss may have run one of its own."""
        self._is_backward, self._is_helpable = True, self.scale > 1 and bool(loss.isfinite().all())
        before = [(leaf, leaf.grad) for leaf in _leaves(loss)]  # of what is trained beside the model
        for leaf, _ in before:
            leaf.grad = None
        try:
            (loss * self.scale).backward()
        finally:
            self._is_backward = False
            for leaf, gradient in before:
                leaf.grad = gradient

    def _add(self, position: int, dy: torch.Tensor, x: torch.Tensor | None) -> None:
        if self._is_backward:
            self._take(position, self.measure(position, dy, x))

    def _take(self, position: int, new: torch.Tensor) -> None:
        old = self._batch.get(position)
        self._batch[position] = new if old is None else old + new

    def end_batch(self) -> bool:
        """Take over what the batch gave, or leave it out where it is not finite.

        Returns:
            Whether it is done with: one that overflows somewhere is to be run again on all ranks, with half the scale.
        """
        new, self._batch, self._last = self._batch, {}, None
        norms = [torch.linalg.vector_norm(scores, 1) for scores in new.values()]
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).sum().item() / self.scale if norms else 0.0
        is_finite = is_everywhere = math.isfinite(total)
        if self._usual_scale > 1:  # on all ranks or on none
            of_this_rank = torch.tensor([is_finite, is_finite or not self._is_helpable], device=self.source.device)
            is_everywhere, is_right = reduce_over_ranks(of_this_rank.float(), "min").bool().tolist()
            if self.scale > 1 and not is_right:
                self.scale = max(1.0, self.scale / 2)
                return False
        scale = self.scale
        if is_everywhere:
            self._usual_scale = scale
        else:
            self.scale = self._usual_scale  # it was the batch
        if not is_finite:
            self._totals.append(0.0)
            self.skipped += 1
            return True
        self._totals.append(total)
        for position, scores in new.items():
            old, scores = self._sums.get(position), scores / scale
            self._sums[position] = scores if old is None else old.add_(scores)
        return True

    def agree(self) -> None:
        """Have all ranks say alike which layers read one input: on a rank where nothing reached a layer, as no token
        an expert, it would stand alone."""
        self.inputs = reduce_over_ranks(torch.tensor(self.inputs, device=self.source.device), "min").tolist()

    def means(self) -> list[torch.Tensor]:
        """Of each layer what a batch gave on average, over all ranks; the same on every rank."""
        used = torch.tensor(float(self.batches - self.skipped), device=self.layers[0].device)
        used = max(1.0, reduce_over_ranks(used).item())
        sums = [self._sums.get(position) for position in range(len(self.layers))]
        for position, layer in enumerate(self.layers):
            if sums[position] is None:
                sums[position] = torch.zeros(self.shape(layer), device=layer.device)
        return [reduce_over_ranks(total) / used for total in sums]

    def batch_scores(self) -> list[float]:
        """Per batch, the sum of what was measured over all ranks; 0 where it was left out."""
        return reduce_over_ranks(torch.tensor(self._totals, device=self.layers[0].device)).tolist()


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """What a backward of `loss` would give gradients to; but for what reentrant checkpointing hides."""
    leaves, waiting = [], {loss.grad_fn} - {None}
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        new = {following for following, _ in node.next_functions} - seen - {None}
        seen |= new
        waiting |= new
        if not node.next_functions and isinstance(leaf := getattr(node, "variable", None), torch.Tensor):
            leaves.append(leaf)
    return leaves


class ScoreCollector(Collector):
    """Block scores, where blocks are tiles, or cut from `lines`.

    * accumulation 'absolute': the mean of each batch's score.
    * accumulation 'signed': the score of the mean gradient. Needs a dense float32 gradient per target, except for
      'mean_abs': the mean of a block is linear, so block sums suffice.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        block_size: int,
        score: str,
        accumulation: str,
        scale: float,
        lines: list[Lines] | None = None,
    ):
        super().__init__(layers, scale)
        self.block_size, self.score, self.lines = block_size, score, lines
        self.keeps = "scores" if accumulation == "absolute" else "sums" if score == "mean_abs" else "gradients"

    def measure(self, position: int, dy: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        if self.keeps == "gradients":
            return dy.float() if x is None else dy.float().T @ x.float()
        size = self.block_size
        if x is None:
            reduce = ops.sum_tiles if self.keeps == "sums" else partial(ops.reduce_blocks, score=self.score)
            count = max(1, MOST_WIDENED // (size * dy.shape[1]))  # of lines of blocks at a time
            if self.lines is None:
                strips = dy.split(count * size)
            else:
                rows, cols = self.lines[position]
                strips = (Lines(some, cols).in_order(dy) for some in rows.split(count))
            return torch.cat([reduce(strip.float(), size) for strip in strips])
        if self.lines is not None:
            rows, cols = self.lines[position]
            dy, x = dy.index_select(1, rows.flatten()), x.index_select(1, cols.flatten())
        return ops.block_sums(dy, x, size) if self.keeps == "sums" else ops.block_scores(dy, x, size, self.score)

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        edge = 1 if self.keeps == "gradients" else self.block_size
        return layer.out_features // edge, layer.in_features // edge

    def scores(self) -> list[torch.Tensor]:
        """Of each layer, float32 [block rows, block columns]; the same on every rank."""
        means = self.means()
        if self.keeps == "sums":
            return [mean.abs() / self.block_size**2 for mean in means]
        if self.keeps == "gradients":
            if self.lines is not None:
                means = [lines.in_order(mean) for lines, mean in zip(self.lines, means, strict=True)]
            return [ops.reduce_blocks(mean, self.block_size, self.score) for mean in means]
        return means


class FeatureCollector(Collector):
    """How much the rows and columns of each target matter: the norms of dY and of x over the tokens of a batch that
    have a gradient, which needs no dW; of a parameter, which has dW alone, the norms of its rows and columns. Modules
    that read one input rank its columns alike, by the sum of their norms."""

    def measure(self, position: int, dy: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        if x is None:  # of all experts at once: no float32 copy
            wide = torch.promote_types(dy.dtype, torch.float32)
            return torch.cat([torch.linalg.vector_norm(dy, dim=side, dtype=wide).float() for side in (1, 0)])
        dy = dy.float()
        length = dy.norm(dim=1, keepdim=True)
        least = ROUNDED * length.max() if len(length) else 0  # no token may be routed to an expert
        x = x.float().masked_fill(length <= least, 0)  # adds nothing to dW, large as it may be
        return torch.cat([dy.norm(dim=0), self.scale * x.norm(dim=0)])

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return (layer.out_features + layer.in_features,)

    def lines(self, block_size: int) -> list[Lines]:
        shapes = [(layer.out_features, layer.in_features) for layer in self.layers]
        rows, cols = zip(*(mean.split(shape) for mean, shape in zip(self.means(), shapes, strict=True)), strict=True)
        of_input: dict[int, torch.Tensor] = {}
        for first, norms in zip(self.inputs, cols, strict=True):
            of_input[first] = of_input[first] + norms if first in of_input else norms
        return [sort_lines(row, of_input[first], block_size) for row, first in zip(rows, self.inputs, strict=True)]


class ActivationCollector(Collector):
    """Scores a block by the mean |x| over its input columns: the same for all blocks of a block column."""

    needs_backward = False

    def _watch(self, layer: nn.Module, position: int) -> Callable[[], object]:
        def observe(layer: nn.Module, args: tuple) -> None:
            if layer.disable_adapters:  # a reference's pass
                return
            self._read(position, args[0])
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if len(x):  # no token may be routed to an expert
                self._take(position, x.abs().float().mean(0))

        return layer.register_forward_pre_hook(observe).remove

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return (layer.in_features,)

    def scores(self, block_size: int, lines: list[Lines] | None) -> list[torch.Tensor]:
        """Of each layer, float32 [block rows, block columns]; the same on every rank."""
        means = [mean if lines is None else mean[lines[i].cols.flatten()] for i, mean in enumerate(self.means())]
        return [
            mean.view(-1, block_size).mean(1).expand(layer.out_features // block_size, -1).contiguous()
            for layer, mean in zip(self.layers, means, strict=True)
        ]

    def lines(self, block_size: int) -> list[Lines]:
        """Rows stay where they are: activations say nothing about them."""
        return [
            sort_lines(mean.new_zeros(layer.out_features), mean, block_size)
            for layer, mean in zip(self.layers, self.means(), strict=True)
        ]


def reduce_over_ranks(values: torch.Tensor, operation: Literal["sum", "min"] = "sum") -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MIN if operation == "min" else dist.ReduceOp.SUM)
    return values
