"""The forward of a layer as torch.compile sees it: functional, with the layer's part of the bank as an input."""

from __future__ import annotations

from collections.abc import Callable

import torch

from smt_peft import ops


class BlockGradients(torch.autograd.Function):
    """Identity on y [tokens, out] that gives the gradient of the delta which stands in the weight already."""

    @staticmethod
    def forward(ctx, y, x, delta, rows, kept, places):
        size = delta.shape[-1]
        columns = x.view(len(x), -1, size).index_select(1, kept).flatten(1)
        ctx.save_for_backward(columns, rows, places)
        ctx.shape, ctx.dtype = delta.shape, delta.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        columns, rows, places = ctx.saved_tensors
        gradient = torch.zeros(ctx.shape, dtype=torch.promote_types(ctx.dtype, torch.float32), device=dy.device)
        slots = torch.arange(len(rows), device=dy.device)
        ops.block_grad_(gradient, dy, columns, slots, rows, places)
        return dy, None, gradient.to(ctx.dtype), None, None, None


def compiled_forward(layer, x: torch.Tensor, base: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The base layer's output with the active adapters' deltas; autograd brings the gradients to the parts."""
    shares = [layer.smt_blocks[name] for name in layer.active_adapters if name in layer.smt_blocks]
    if any(share.delta is None for share in shares):
        layer.root.prepare_compiled()  # a part of the model was called without its root
    y = base(x)
    for share in shares:
        blocks = share.compiled
        if blocks is None:
            continue
        flat = x.reshape(-1, layer.in_features).to(y.dtype)
        if share.resident:
            matrix = y.reshape(-1, layer.out_features)
            matrix = BlockGradients.apply(matrix, flat, share.delta, blocks.rows, blocks.kept, blocks.places)
            y = matrix.view(y.shape)
        else:
            added = ops.block_matmul(flat, share.delta, blocks.rows, blocks.cols, layer.out_features)
            y = y + added.view(y.shape)
    return y
