"""Plain PyTorch definitions of the block operations: the CPU path, the oracle of the tests and the documentation.

Notation: T tokens, block size b, n blocks, which lie as a `Side` of plan.py says along the output features (`out`) and
the input features (`inner`) of a matrix [out, in]. Matrices may have any strides. Sums run in float32, or in float64
for float64 operands (`sum_dtype`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .plan import Side

SCORES = ("abs_mean", "mean_abs", "l1", "l2")

# Elements of one gathered operand: 256 KiB of float32, so that it is still in the cache when bmm reads it back.
_GATHER_ELEMENTS = 1 << 16
# Elements of the part of dW that block_scores holds at a time (16 MiB of float32).
_STRIP_ELEMENTS = 1 << 22
# Gathering a column of a block takes as long as this many more columns of arithmetic (measured, one Xeon core).
_GATHER_COST = 48


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
    block_size, dtype = delta.shape[1], sum_dtype(x.dtype)
    delta, wide = delta.to(x.dtype).to(dtype), torch.promote_types(y.dtype, dtype)
    total, rows = _by_line(y, out.at, block_size, wide)
    if _dense_is_faster(out, inner, block_size):
        product = gather(x, inner.at, block_size).to(dtype) @ _dense(delta, out, inner).T
        total.index_add_(1, rows, _lines(product, block_size).to(wide))
    else:
        x, cols = _by_line(x, inner.at, block_size)
        row, col = rows.index_select(0, out.member), cols.index_select(0, inner.member)
        for part in _chunks(len(row), x.shape[0], block_size):
            product = torch.bmm(x.index_select(1, col[part]).transpose(0, 1).to(dtype), delta[part].mT)
            total.index_add_(1, row[part], product.transpose(0, 1).to(wide))
    if out.at.ndim == 2:
        y.index_copy_(1, out.at.flatten(), total.flatten(1).to(y.dtype))
    elif rows is not out.at:
        _lines(y, block_size).index_copy_(1, out.at, total.to(y.dtype))


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
    dtype, x = sum_dtype(dy.dtype), x.to(dy.dtype)
    if _dense_is_faster(out, inner, block_size):
        dy, x = gather(dy, out.at, block_size).to(dtype), gather(x, inner.at, block_size).to(dtype)
        dense = _lines(dy.T @ x, block_size).unflatten(0, (-1, block_size))
        return dense.transpose(1, 2)[out.member, inner.member]
    (dy, rows), (x, cols) = _by_line(dy, out.at, block_size), _by_line(x, inner.at, block_size)
    row, col = rows.index_select(0, out.member), cols.index_select(0, inner.member)
    gradient = dy.new_empty(len(row), block_size, block_size, dtype=dtype)
    for part in _chunks(len(row), dy.shape[0], block_size):
        read = x.index_select(1, col[part]).transpose(0, 1).to(dtype)
        torch.bmm(dy.index_select(1, row[part]).permute(1, 2, 0).to(dtype), read, out=gradient[part])
    return gradient


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
    dtype = sum_dtype(gradient.dtype)
    if score == "l2":
        gradient = gradient.to(dtype).square()
    elif score != "mean_abs":
        gradient = gradient.abs()
    return finish_score(sum_squares(gradient, block_size, dtype), block_size, score)


def sum_squares(matrix: Tensor, edge: int, dtype: torch.dtype) -> Tensor:
    """Sum a matrix [R * edge, C * edge] over squares: [R, C] in `dtype`."""
    return _lines(matrix, edge).unflatten(0, (-1, edge)).sum(1, dtype=dtype).sum(2)


def finish_score(sums: Tensor, block_size: int, score: str) -> Tensor:
    """Turn the sums over blocks of g^2 (for l2), of g (for mean_abs) or of |g| (for the others) into the score."""
    if score == "l2":
        return sums.sqrt()
    return sums if score == "l1" else sums.abs() / block_size**2


def _by_line(matrix: Tensor, at: Tensor, block_size: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A matrix as [T, lines, b] in `dtype`, and where in it the lines `at` are: a view where there can be one."""
    if at.ndim == 1 and dtype in (None, matrix.dtype):
        return _lines(matrix, block_size), at
    return _lines(gather(matrix, at, block_size), block_size).to(dtype), torch.arange(len(at), device=at.device)


def _lines(matrix: Tensor, block_size: int) -> Tensor:
    """View a matrix [T, k * b] as [T, k, b]."""
    return matrix.unflatten(1, (matrix.shape[1] // block_size, block_size))


def _dense(delta: Tensor, out: Side, inner: Side) -> Tensor:
    """The lines of D: [out lines * b, in lines * b] from the blocks [n, b, b]."""
    if len(delta) == 1:
        return delta[0]
    lines, read, block_size = len(out.at), len(inner.at), delta.shape[1]
    dense = delta.new_zeros(lines, block_size, read, block_size)
    dense.transpose(1, 2).index_put_((out.member, inner.member), delta, accumulate=True)
    return dense.view(lines * block_size, read * block_size)


def _chunks(blocks: int, tokens: int, block_size: int) -> Iterator[slice]:
    """Which blocks to gather at a time."""
    size = max(1, _GATHER_ELEMENTS // max(1, tokens * block_size))
    return (slice(start, start + size) for start in range(0, blocks, size))


def _dense_is_faster(out: Side, inner: Side, block_size: int) -> bool:
    """Whether one product of all lines costs less than one for each block with the copies that it needs.

    Small blocks do little arithmetic for each gathered element, so for them this happens at a few per cent.
    """
    return len(out.at) * len(inner.at) * block_size <= len(out.member) * (block_size + _GATHER_COST)
