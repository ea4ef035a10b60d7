"""Operations on selected b x b blocks of weight matrices, and the one place that chooses how they are computed.

`reference.py` defines them in plain PyTorch; `triton_kernels.py` has the same functions for CUDA tensors, where
Triton can be imported. `block_grad_`, `block_matmul` and `block_scores` are custom operators
(`torch.ops.smt.*`): opaque to torch.compile and counted by `torch.utils.flop_counter`. Their arguments are
documented once, in `reference.py`.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .reference import SCORES, block_sums, reduce_blocks

__all__ = [
    "SCORES",
    "block_grad_",
    "block_matmul",
    "block_pointers",
    "block_scores",
    "block_sums",
    "reduce_blocks",
    "write_blocks",
]

# For tests: send CPU tensors to the Triton kernels too, which needs TRITON_INTERPRET=1 in the environment.
interpret = False

# PyTorch's `custom_op` would do the same for 17 microseconds more a call, which a hundred layers feel.
_operators = library.Library("smt", "DEF")
_operators.define("block_grad_(Tensor(a!) grad, Tensor dy, Tensor x, Tensor slots, Tensor rows, Tensor cols) -> ()")
_operators.define("block_matmul(Tensor x, Tensor delta, Tensor rows, Tensor cols, SymInt out_features) -> Tensor")
_operators.define("block_scores(Tensor dy, Tensor x, int block_size, str score) -> Tensor")

block_grad_ = torch.ops.smt.block_grad_.default
block_matmul = torch.ops.smt.block_matmul.default
block_scores = torch.ops.smt.block_scores.default


def write_blocks(views: list[Tensor], values: Tensor, pointers: Tensor | None = None) -> None:
    """Copy `values[i]` into `views[i]` in one batched call, rounding to the dtype of the views.

    Args:
        views: n tensors [b, b] of one dtype and device, any strides, without overlap.
        values: [n, b, b], any float dtype, on the device of the views.
        pointers: `block_pointers` of `views`, to be kept by a caller that writes to the same places often.
    """
    triton_kernels = _triton_kernels() if values.is_cuda or interpret else None
    if triton_kernels is None:
        reference.write_blocks(views, values)
    else:
        triton_kernels.write_blocks(views, values, block_pointers(views) if pointers is None else pointers)


def block_pointers(views: list[Tensor]) -> Tensor | None:
    """What `write_blocks` needs to know of `views`, for as long as their storage stays; None if nothing."""
    triton_kernels = _triton_kernels() if views and (views[0].is_cuda or interpret) else None
    return None if triton_kernels is None else triton_kernels.block_pointers(views)


@cache
def _triton_kernels() -> ModuleType | None:
    try:
        from . import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _implementation(operand: Tensor, block_size: int) -> ModuleType:
    """The module that computes. Triton's matrix units take 16 x 16 tiles of at most 32 bits."""
    on_triton = (operand.is_cuda or interpret) and block_size % 16 == 0 and operand.dtype.itemsize <= 4
    return (on_triton and _triton_kernels()) or reference


def _check_divisible(block_size: int, *features: int) -> None:
    for size in features:
        if size % block_size:
            raise ValueError(f"The block size {block_size} does not divide {size} features.")


@library.impl(_operators, "block_grad_", "CompositeExplicitAutograd")
@torch.no_grad()
def _block_grad_(grad: Tensor, dy: Tensor, x: Tensor, slots: Tensor, rows: Tensor, cols: Tensor) -> None:
    block_size = grad.shape[1]
    _check_divisible(block_size, dy.shape[1], x.shape[1])
    _implementation(dy, block_size).block_grad_(grad, dy, x, slots, rows, cols)


@library.impl(_operators, "block_matmul", "CompositeExplicitAutograd")
def _block_matmul(x: Tensor, delta: Tensor, rows: Tensor, cols: Tensor, out_features: int) -> Tensor:
    block_size = delta.shape[1]
    _check_divisible(block_size, out_features, x.shape[1])
    return _implementation(x, block_size).block_matmul(x, delta, rows, cols, out_features)


@library.impl(_operators, "block_scores", "CompositeExplicitAutograd")
@torch.no_grad()
def _block_scores(dy: Tensor, x: Tensor, block_size: int, score: str) -> Tensor:
    if score not in SCORES:
        raise ValueError(f"Unknown score {score!r}; choose one of {', '.join(SCORES)}.")
    _check_divisible(block_size, dy.shape[1], x.shape[1])
    return _implementation(dy, block_size).block_scores(dy, x, block_size, score)


@library.register_fake("smt::block_grad_", lib=_operators)
def _block_grad_fake(grad, dy, x, slots, rows, cols):
    return None


@library.register_fake("smt::block_matmul", lib=_operators)
def _block_matmul_fake(x, delta, rows, cols, out_features):
    return x.new_empty(x.shape[0], out_features)


@library.register_fake("smt::block_scores", lib=_operators)
def _block_scores_fake(dy, x, block_size, score):
    return dy.new_empty(dy.shape[1] // block_size, x.shape[1] // block_size, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output) -> None:
    x, delta, rows, cols, _ = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, delta, rows, cols)


def _block_matmul_backward(ctx, dy):
    if torch.is_grad_enabled():  # block_grad_ keeps no graph: better no second derivative than a wrong one
        raise NotImplementedError("block_matmul has no second derivative: do not pass create_graph=True.")
    x, delta, rows, cols = ctx.saved_tensors
    dx = ddelta = None
    if ctx.needs_input_grad[0]:
        dx = block_matmul(dy, delta.mT, cols, rows, ctx.in_features)
    if ctx.needs_input_grad[1]:
        ddelta = delta.new_zeros(delta.shape, dtype=reference.sum_dtype(dy.dtype))
        block_grad_(ddelta, dy, x, torch.arange(delta.shape[0], device=dy.device), rows, cols)
        ddelta = ddelta.to(delta.dtype)
    return dx, ddelta, None, None, None


library.register_autograd(
    "smt::block_matmul", _block_matmul_backward, setup_context=_save_for_backward, lib=_operators
)


@register_flop_formula(torch.ops.smt.block_grad_)
def _block_grad_flop(grad, dy, x, slots, rows, cols, out_shape) -> int:
    return 2 * dy[0] * rows[0] * grad[1] * grad[2]


@register_flop_formula(torch.ops.smt.block_matmul)
def _block_matmul_flop(x, delta, rows, cols, out_features, out_shape) -> int:
    return 2 * x[0] * delta[0] * delta[1] * delta[2]


@register_flop_formula(torch.ops.smt.block_scores)
def _block_scores_flop(dy, x, block_size, score, out_shape) -> int:
    tokens, out_features, in_features = dy[0], dy[1], x[1]
    if score == "mean_abs":  # the sums of both factors are multiplied
        return 2 * tokens * (out_features // block_size) * (in_features // block_size)
    return 2 * tokens * out_features * in_features
