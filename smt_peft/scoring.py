"""Collecting block scores while a model runs: from gradients, or from activations alone.

Gradient scores come from activations, not from `weight.grad`: a node behind each target layer keeps x and receives dY,
and a custom op forms dW = dY^T x a row of blocks at a time, reduces it to scores and drops it. Nothing needs
`requires_grad` on a base weight, so quantised and sharded models work, and memory is one float per block. A layer
scores once a batch under every kind of checkpointing: only one node for each forward sees a backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from smt_peft import ops
from smt_peft.experts import ParamWrapper


class Watch(torch.autograd.Function):
    """Identity on y [..., out] that keeps x [..., in], and hands both dY and x to `consume` as matrices.

    `source` makes the graph exist: in the warm-up nothing is trained.
    """

    @staticmethod
    def forward(ctx, y, x, source, consume: Callable[[torch.Tensor, torch.Tensor], None]):
        ctx.save_for_backward(x)
        ctx.consume = consume
        return y.detach()  # as `view_as` would, but a model may change this in place

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        ctx.consume(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dy, None, None, None


class ScoreCollector:
    """Sums block scores over batches; a batch with a non-finite score anywhere is left out.

    * accumulation 'absolute': the sum of each batch's score.
    * accumulation 'signed': the score of the summed gradient. Needs a dense float32 gradient per target, except for
      'mean_abs': the mean of a block is linear, so block sums suffice.
    """

    def __init__(self, layers: list[nn.Module], block_size: int, score: str, accumulation: str):
        self.layers, self.block_size, self.score, self.accumulation = layers, block_size, score, accumulation
        self.source = torch.zeros((), requires_grad=True, device=layers[0].device)  # see `Watch`
        self.scale = 1.0  # of the loss, for float16
        self.inputs = list(range(len(layers)))  # per layer the first one that read the same input just before it
        self._last: tuple[torch.Tensor, int] | None = None
        self._batch: list[torch.Tensor | None] = [None] * len(layers)
        self._sums: list[torch.Tensor | None] = [None] * len(layers)
        self.skipped = 0
        self._totals: list[float] = []  # of each batch's scores; 0 where it was left out

    @property
    def batches(self) -> int:
        return len(self._totals)

    def attach(self, handles: list) -> None:
        """Have every layer watched from now on; adds to `handles` what ends it by `remove()`."""
        for position, layer in enumerate(self.layers):
            handles.append(self._watch(layer, position))

    def _watch(self, layer: nn.Module, position: int):
        if isinstance(layer, ParamWrapper):
            layer.watch = self.source, partial(self._add_gradient, position)
            return _Watched(layer)

        def watch(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
                return output
            self._read(position, args[0])
            return Watch.apply(output, args[0], self.source, partial(self._add, position))

        return layer.register_forward_hook(watch)

    def _read(self, position: int, x: torch.Tensor) -> None:
        """Note which layers read one input, one after the other."""
        if self._last is None or self._last[0] is not x:
            self._last = x, position
        self.inputs[position] = self._last[1]

    def _add_gradient(self, position: int, gradient: torch.Tensor) -> None:
        if self.accumulation == "absolute":
            new = ops.reduce_blocks(gradient, self.block_size, self.score).float()
        elif self.score == "mean_abs":
            new = gradient.float().unfold(0, *[self.block_size] * 2).unfold(1, *[self.block_size] * 2).sum((2, 3))
        else:
            new = gradient.float()
        old = self._batch[position]
        self._batch[position] = new if old is None else old + new

    def _add(self, position: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        if self.accumulation == "absolute":
            new = ops.block_scores(dy, x, self.block_size, self.score)
        elif self.score == "mean_abs":
            new = ops.block_sums(dy, x, self.block_size)
        else:
            new = dy.float().T @ x.float()
        old = self._batch[position]
        self._batch[position] = new if old is None else old + new

    def end_batch(self) -> bool:
        """Take the batch's scores over; False where they were not finite."""
        self._last = None
        new, self._batch = self._batch, [None] * len(self.layers)
        total = sum(_totals(new)) / self.scale
        finite = math.isfinite(total)
        self._totals.append(total if finite else 0.0)
        if not finite:
            self.skipped += 1
            return False
        for position, scores in enumerate(new):
            if scores is not None:
                scores = scores / self.scale
                old = self._sums[position]
                self._sums[position] = scores if old is None else old.add_(scores)
        return True

    def scores(self) -> list[torch.Tensor]:
        """Mean over the batches, float32 [block rows, block columns] per layer; the same on every rank."""
        used = self.batches - self.skipped
        sums = []
        for layer, total in zip(self.layers, self._sums, strict=True):
            grid = (layer.out_features // self.block_size, layer.in_features // self.block_size)
            if self.accumulation == "signed" and self.score != "mean_abs":
                if total is None:
                    total = torch.zeros(layer.out_features, layer.in_features, device=layer.device)
                total = ops.reduce_blocks(_sum_over_ranks(total), self.block_size, self.score)
            else:
                total = torch.zeros(grid, device=layer.device) if total is None else total
                total = _sum_over_ranks(total)
                if self.accumulation == "signed":
                    total = total.abs() / self.block_size**2
            sums.append(total)
        used = int(_sum_over_ranks(torch.tensor(float(used), device=sums[0].device)))
        return [total / max(used, 1) for total in sums]

    def batch_scores(self) -> list[float]:
        """Per batch, the sum of its scores ('signed': of its |gradients|) over all ranks; 0 where it was left out."""
        return _sum_over_ranks(torch.tensor(self._totals, device=self.layers[0].device)).tolist()


class ActivationCollector(ScoreCollector):
    """Scores a block by the mean |x| over its input columns: the same for all blocks of a block column."""

    def _watch(self, layer: nn.Module, position: int):
        def observe(layer: nn.Module, args: tuple) -> None:
            self._read(position, args[0])
            x = args[0].detach().abs().flatten(0, -2).float().mean(0)
            columns = x.view(-1, self.block_size).mean(1)
            self._batch[position] = columns.expand(layer.out_features // self.block_size, -1).clone()

        return layer.register_forward_pre_hook(observe)


class _Watched:
    """The handle of a layer that watches its own weight."""

    def __init__(self, layer: ParamWrapper):
        self.layer = layer

    def remove(self) -> None:
        self.layer.watch = None


def _totals(scores: list[torch.Tensor | None]) -> list[float]:
    """The sum of |score| on each device, so that a batch costs one look at the device."""
    sums: dict[torch.device, torch.Tensor] = {}
    for score in scores:
        if score is not None:
            sums[score.device] = sums.get(score.device, 0) + torch.linalg.vector_norm(score, 1)
    return [total.item() for total in sums.values()]


def _sum_over_ranks(scores: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(scores)
    return scores
