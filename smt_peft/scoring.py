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

    needs_backward = True

    def __init__(self, layers: list[nn.Module], block_size: int, score: str, accumulation: str, scale: float):
        self.layers, self.block_size, self.score = layers, block_size, score
        self.scale = scale  # of the loss, for float16
        self.keeps = "scores" if accumulation == "absolute" else "sums" if score == "mean_abs" else "gradients"
        self.source = torch.zeros((), requires_grad=True, device=layers[0].device)  # see `Watch`
        self.inputs = list(range(len(layers)))  # per layer the first one that read the same input just before it
        self.skipped = 0
        self._last: tuple[torch.Tensor, int] | None = None
        self._batch: dict[int, torch.Tensor] = {}  # of each layer that has one, what is kept
        self._sums: dict[int, torch.Tensor] = {}
        self._totals: list[float] = []  # of each batch; 0 where it was left out

    @property
    def batches(self) -> int:
        return len(self._totals)

    def attach(self, undo: list[Callable[[], object]]) -> None:
        """Have every layer watched from now on; adds to `undo` what ends it."""
        for position, layer in enumerate(self.layers):
            undo.append(self._watch(layer, position))

    def _watch(self, layer: nn.Module, position: int) -> Callable[[], object]:
        if isinstance(layer, ParamWrapper):
            layer.watch = self.source, partial(self._add_gradient, position)
            return partial(setattr, layer, "watch", None)

        def watch(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
                return output
            self._read(position, args[0])
            return Watch.apply(output, args[0], self.source, partial(self._add_product, position))

        return layer.register_forward_hook(watch).remove

    def _read(self, position: int, x: torch.Tensor) -> None:
        """Note which layers read one input, one after the other."""
        if self._last is None or self._last[0] is not x:
            self._last = x, position
        self.inputs[position] = self._last[1]

    def _add_product(self, position: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Of the gradient dY^T x, which is formed only where it is kept."""
        if self.keeps == "scores":
            self._add(position, ops.block_scores(dy, x, self.block_size, self.score))
        elif self.keeps == "sums":
            self._add(position, ops.block_sums(dy, x, self.block_size))
        else:
            self._add(position, dy.float().T @ x.float())

    def _add_gradient(self, position: int, gradient: torch.Tensor) -> None:
        size, gradient = self.block_size, gradient.float()
        if self.keeps == "scores":
            gradient = ops.reduce_blocks(gradient, size, self.score)
        elif self.keeps == "sums":
            gradient = gradient.unfold(0, size, size).unfold(1, size, size).sum((2, 3))
        self._add(position, gradient)

    def _add(self, position: int, new: torch.Tensor) -> None:
        old = self._batch.get(position)
        self._batch[position] = new if old is None else old + new

    def end_batch(self) -> None:
        """Take over what the batch gave, or leave it out where it is not finite, and halve the scale."""
        new, self._batch, self._last = self._batch, {}, None
        norms = [torch.linalg.vector_norm(scores, 1) for scores in new.values()]
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).sum().item() / self.scale if norms else 0.0
        if not math.isfinite(total):
            self._totals.append(0.0)
            self.skipped += 1
            self.scale = max(1.0, self.scale / 2)
            return
        self._totals.append(total)
        for position, scores in new.items():
            old, scores = self._sums.get(position), scores / self.scale
            self._sums[position] = scores if old is None else old.add_(scores)

    def scores(self) -> list[torch.Tensor]:
        """Mean over the batches, float32 [block rows, block columns] per layer; the same on every rank."""
        size, scores = self.block_size, []
        used = torch.tensor(float(self.batches - self.skipped), device=self.layers[0].device)
        used = max(1.0, sum_over_ranks(used).item())
        for position, layer in enumerate(self.layers):
            cell = 1 if self.keeps == "gradients" else size
            total = self._sums.get(position)
            if total is None:
                total = torch.zeros(layer.out_features // cell, layer.in_features // cell, device=layer.device)
            total = sum_over_ranks(total) / used
            if self.keeps == "gradients":
                total = ops.reduce_blocks(total, size, self.score)
            scores.append(total.abs() / size**2 if self.keeps == "sums" else total)
        return scores

    def batch_scores(self) -> list[float]:
        """Per batch, the sum of its scores ('signed': of its |gradients|) over all ranks; 0 where it was left out."""
        return sum_over_ranks(torch.tensor(self._totals, device=self.layers[0].device)).tolist()


class ActivationCollector(ScoreCollector):
    """Scores a block by the mean |x| over its input columns: the same for all blocks of a block column."""

    needs_backward = False

    def _watch(self, layer: nn.Module, position: int) -> Callable[[], object]:
        def observe(layer: nn.Module, args: tuple) -> None:
            self._read(position, args[0])
            x = args[0].detach().abs().flatten(0, -2).float().mean(0)
            columns = x.view(-1, self.block_size).mean(1)
            self._batch[position] = columns.expand(layer.out_features // self.block_size, -1).clone()

        return layer.register_forward_pre_hook(observe).remove


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
