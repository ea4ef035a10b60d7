"""Plain PyTorch definitions of the block operations: the CPU path, the oracle of the tests and the documentation.

Notation: T tokens, block size b, n blocks, which lie as a `Side` of plan.py says along the output features (`out`) and
the input features (`inner`) of a matrix [out, in]. Matrices may have any strides. Sums run in float32, or in float64
for float64 operands (`sum_dtype`).
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from .plan import Plan, Side

Score = Literal["abs_mean", "mean_abs", "l1", "l2"]
SCORES = get_args(Score)

# Elements of the part of dW that block_scores holds at a time (16 MiB of float32).
_STRIP_ELEMENTS = 1 << 22
# Elements of one gathered operand: 256 KiB of float32, so that it is still in a CPU's cache when bmm reads it back;
# elsewhere, where calls cost more than memory, 64 MiB.
_GATHER_ELEMENTS, _GATHER_ELEMENTS_ON_DEVICE = 1 << 16, 1 << 24
# Multiplications per block from which it pays on a CPU to take blocks one by one, where they are: no copy, but more
# calls, and places must be read.
CALL_COST = 1 << 18


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products of `dtype` operands are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather(matrix: Tensor, at: Tensor, block_size: int) -> Tensor:
    """The features of the lines `at` (see `Side`) of a matrix [T, features]: [T, m * b], or itself."""
    if at.ndim == 2:
        return matrix.index_select(1, at.flatten())
    if at.shape[0] * block_size == matrix.shape[1]:
        return matrix
    return _lines(matrix, block_size).index_select(1, at).flatten(1)


def block_add_(y: Tensor, x: Tensor, delta: Tensor, out: Side, inner: Side) -> None:
    """Add the product with a block-sparse matrix: `y += x @ D^T`, D [out, in] being zero outside the blocks `delta`.

    Args:
        y: [T, out], any float dtype; only the features of lines that have blocks are touched, and rounded once.
        x: [T, in].
        delta: [n, b, b], any strides, rounded to the dtype of `x` if it has another.
        out, inner: where the blocks lie; blocks at one place add up.
    """
    tokens, block_size, dtype = x.shape[0], delta.shape[1], y.dtype
    if not x.dtype == dtype == delta.dtype or dtype.itemsize < 4:  # else all is as it should be
        dtype = torch.promote_types(dtype, sum_dtype(x.dtype))
        delta = delta.to(x.dtype).to(dtype)
    in_y = out.at.ndim == 1 and y.dtype == dtype
    if in_y:
        total, rows = _lines(y, block_size), out.place
    else:
        total, rows = x.new_zeros(tokens, out.at.shape[0], block_size, dtype=dtype), out.member
    x, cols = _by_line(x, inner, block_size)
    blocks = delta.mT
    if y.device.type == "cpu" and tokens * block_size**2 > CALL_COST:
        x = x.to(dtype)
        for block, row, col in zip(blocks.unbind(), rows.tolist(), cols.tolist(), strict=True):
            total.select(1, row).addmm_(x.select(1, col), block)
    else:
        for block, row, col in _chunks(tokens * block_size, blocks, rows, cols):
            columns = x.index_select(1, col).transpose(0, 1)
            product = torch.bmm(columns if columns.dtype == dtype else columns.to(dtype), block)
            total.index_add_(1, row, product.transpose(0, 1))
    if not in_y:
        _add_lines_(y, out.at, total)


def block_grad(dy: Tensor, x: Tensor, out: Side, inner: Side, block_size: int) -> Tensor:
    """The gradient of the blocks of D in `y += x @ D^T`: the blocks of `dy^T @ x`.

    Args:
        dy: [T, out].
        x: [T, in], or the lines of it that were kept; rounded to the dtype of `dy` if it has another.
        out, inner: where the blocks lie in `dy` and in `x`.
        block_size: b.

    Returns:
        [n, b, b] in `sum_dtype`.
    """
    tokens, dtype = dy.shape[0], sum_dtype(dy.dtype)
    x = x if x.dtype == dy.dtype else x.to(dy.dtype)
    (x, cols), (dy, rows) = _by_line(x, inner, block_size), _by_line(dy, out, block_size)
    if dy.device.type == "cpu" and tokens * block_size**2 > CALL_COST:
        gradient = dy.new_empty(rows.shape[0], block_size, block_size, dtype=dtype)
        dy, x = dy.to(dtype), x.to(dtype)
        for block, row, col in zip(gradient.unbind(), rows.tolist(), cols.tolist(), strict=True):
            torch.mm(dy.select(1, row).T, x.select(1, col), out=block)
        return gradient
    parts = []
    for row, col in _chunks(tokens * block_size, rows, cols):
        factors = dy.index_select(1, row).permute(1, 2, 0), x.index_select(1, col).transpose(0, 1)
        parts.append(torch.bmm(*(factor if factor.dtype == dtype else factor.to(dtype) for factor in factors)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def short_forward(y: Tensor, x: Tensor, delta: Tensor, plan: Plan) -> Tensor:
    """`block_add_` to y [..., out] from x [..., in] in the fewest calls; returns what is kept: x, or the lines that
    are read, [T, m, b]."""
    kept, at, block_size = x, plan.inner.at, delta.shape[1]
    if plan.gathers and at.ndim == 2:
        kept = x.view(-1, x.shape[-1]).index_select(1, at.flatten()).view(-1, *at.shape)
    elif plan.gathers:
        kept = _lines(x, block_size)
        if kept.shape[1] > at.shape[0]:
            kept = kept.index_select(1, at)
    _put(y, plan.out, torch.bmm(_columns(kept, plan, block_size), delta.mT))
    return kept


def short_backward(dy: Tensor, dx: Tensor | None, kept: Tensor, delta: Tensor, plan: Plan) -> Tensor:
    """`block_add_` to dx [..., in] and `block_grad`, from dy [..., out] and what `short_forward` kept."""
    block_size = delta.shape[1]
    dy = _take(dy, plan.out, block_size)
    if dx is not None:
        _put(dx, plan.inner, torch.bmm(dy, delta))
    return torch.bmm(dy.mT, _columns(kept, plan, block_size))


def block_scores(dy: Tensor, x: Tensor, block_size: int, score: str) -> Tensor:
    """Score every block of `dW = dy^T @ x` without holding dW; see `reduce_blocks` for the scores.

    Args:
        dy: [T, out].
        x: [T, in], rounded to the dtype of `dy` if it has another.
        block_size: b.
        score: one of `SCORES`.

    Returns:
        [R, C] float32.
    """
    if score == "mean_abs":
        return finish_score(block_sums(dy, x, block_size), block_size, score)
    dtype = sum_dtype(dy.dtype)
    x = x.to(dy.dtype).to(dtype)
    strip = max(1, _STRIP_ELEMENTS // (block_size * x.shape[1])) * block_size
    strips = [reduce_blocks(part.to(dtype).T @ x, block_size, score) for part in dy.split(strip, dim=1)]
    return torch.cat(strips).float()


def block_sums(dy: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Signed sum over every block of `dW = dy^T @ x`: [R, C] float32, from dy [T, out] and x [T, in].

    The sum over a block of outer products is the product of the sums, so both factors shrink b times before they
    meet and dW is never formed.
    """
    dtype = sum_dtype(dy.dtype)
    dy, x = (_lines(matrix.to(dy.dtype), block_size).sum(2, dtype=dtype) for matrix in (dy, x))
    return (dy.T @ x).float()


def reduce_blocks(gradient: Tensor, block_size: int, score: str) -> Tensor:
    """Score every block of a dense `gradient` [out, in]: [R, C] in float32, or float64 for a float64 gradient.

    Over the elements g of a block, `abs_mean` is mean |g|, `mean_abs` is |mean g|, `l1` is sum |g| and `l2`
    is sqrt(sum g^2).
    """
    if score == "l2":
        gradient = gradient.to(sum_dtype(gradient.dtype)).square()
    elif score != "mean_abs":
        gradient = gradient.abs()
    return finish_score(sum_tiles(gradient, block_size), block_size, score)


def rounded_sum(before: Tensor, delta: Tensor) -> Tensor:
    """What merging writes: the sum in float32 or better, rounded once, to the dtype of the weight `before`."""
    wide = torch.promote_types(before.dtype, torch.float32)
    return (before.to(wide) + delta).to(before.dtype)


def sum_tiles(matrix: Tensor, edge: int) -> Tensor:
    """Sum a matrix [R * edge, C * edge] over squares: [R, C], in float32 or better."""
    return _lines(matrix, edge).unflatten(0, (-1, edge)).sum(1, dtype=sum_dtype(matrix.dtype)).sum(2)


def finish_score(sums: Tensor, block_size: int, score: str) -> Tensor:
    """Turn the sums over blocks of g^2 (for l2), of g (for mean_abs) or of |g| (for the others) into the score."""
    if score == "l2":
        return sums.sqrt()
    return sums if score == "l1" else sums.abs() / block_size**2


def _by_line(matrix: Tensor, side: Side, block_size: int) -> tuple[Tensor, Tensor]:
    """A matrix as [T, lines, b], and for each block its line there: of neighbouring features a view."""
    matrix = matrix if side.at.ndim == 1 else gather(matrix, side.at, block_size)
    return _lines(matrix, block_size), side.place


def _columns(kept: Tensor, plan: Plan, block_size: int) -> Tensor:
    """The features that each block reads, [n, T, b], from what `short_forward` keeps."""
    if not plan.gathers:
        return _take(kept, plan.inner, block_size)
    kept = _lines(kept, block_size) if kept.ndim == 2 else kept  # of an input that was not contiguous
    return (kept if plan.in_order else kept.index_select(1, plan.kept.place)).transpose(0, 1)


def _take(matrix: Tensor, side: Side, block_size: int) -> Tensor:
    """The features of each block out of a matrix [..., features]: [n, T, b]."""
    if side.at.ndim == 1:
        return _lines(matrix, block_size).index_select(1, side.place).transpose(0, 1)
    return _lines(matrix.view(-1, matrix.shape[-1]).index_select(1, side.features), block_size).transpose(0, 1)


def _put(matrix: Tensor, side: Side, values: Tensor) -> None:
    """Add values [n, T, b] to the features of each block in a matrix [..., features]."""
    values = values.transpose(0, 1)
    if side.at.ndim == 1:
        _lines(matrix, values.shape[2]).index_add_(1, side.place, values)
    else:
        matrix.view(-1, matrix.shape[-1]).index_add_(1, side.features, values.flatten(1))


def _add_lines_(matrix: Tensor, at: Tensor, values: Tensor) -> None:
    """Add values [T, m, b] to the lines `at` of a matrix [T, features], rounded once."""
    if at.ndim == 1:
        matrix = _lines(matrix, values.shape[2])
    else:
        at, values = at.flatten(), values.flatten(1)
    if matrix.dtype == values.dtype:
        matrix.index_add_(1, at, values)
    else:
        matrix.index_copy_(1, at, (matrix.index_select(1, at) + values).to(matrix.dtype))


def _chunks(elements: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Parts of tensors [n, ...], for as many blocks as may be gathered at a time with `elements` each."""
    most = _GATHER_ELEMENTS if tensors[0].device.type == "cpu" else _GATHER_ELEMENTS_ON_DEVICE
    size = max(1, most // max(1, elements))
    return [tensors] if tensors[0].shape[0] <= size else zip(*(t.split(size) for t in tensors), strict=True)


def _lines(matrix: Tensor, block_size: int) -> Tensor:
    """View a matrix [..., k * b] as [T, k, b]."""
    tokens = matrix.shape[0] if matrix.ndim == 2 else -1  # which no features at all would make ambiguous
    return matrix.view(tokens, matrix.shape[-1] // block_size, block_size)
