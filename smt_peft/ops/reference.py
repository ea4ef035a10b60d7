"""Plain PyTorch definitions of the block operations: the CPU path, the oracle of the tests and the documentation.

Notation: T tokens, block size b, a weight [out, in] of R = out / b by C = in / b blocks, n listed blocks. Block i
stands at block row `rows[i]` and block column `cols[i]`; index tensors are int32 or int64, of shape [n]. Matrices
may have any strides. Sums run in float32, or in float64 for float64 operands (`sum_dtype`).
"""

import torch
from torch import Tensor

SCORES = ("abs_mean", "mean_abs", "l1", "l2")

# Elements of one gathered operand: 256 KiB of float32, so that it is still in the cache when bmm reads it back.
_GATHER_ELEMENTS = 1 << 16
# Elements of the part of dW that block_scores holds at a time (16 MiB of float32).
_STRIP_ELEMENTS = 1 << 22
# Gathering a column of a block takes as long as this many more columns of arithmetic (measured, one Xeon core).
_GATHER_COST = 128


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which products of `dtype` operands are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_grad_(grad: Tensor, dy: Tensor, x: Tensor, slots: Tensor, rows: Tensor, cols: Tensor) -> None:
    """Add the gradient of the listed blocks: `grad[slots[i]] += dy_i^T @ x_i`.

    Args:
        grad: [N, b, b], any float dtype; changed in place. The sum is rounded to its dtype once per call.
        dy: [T, out], gradient of the layer's output; dy_i is its columns `rows[i] * b` to `(rows[i] + 1) * b`.
        x: [T, K], (kept block columns of) the layer's input, rounded to the dtype of `dy` if it has another;
            x_i is its columns `cols[i] * b` to `(cols[i] + 1) * b`.
        slots: [n], where in `grad` block i goes; no slot may appear twice in one call.
        rows: [n], block columns of `dy`.
        cols: [n], block columns of `x`.
    """
    block_size, dtype = grad.shape[1], sum_dtype(dy.dtype)
    x = x.to(dy.dtype)
    if _dense_is_faster(rows.shape[0], block_size, dy.shape[1], x.shape[1]):
        dense = _column_blocks(dy.to(dtype).T @ x.to(dtype), block_size).unflatten(0, (-1, block_size))
        add_at_(grad, slots, dense.transpose(1, 2)[rows, cols])
        return
    size = _chunk_size(dy.shape[0], block_size)
    for slot, row, col in zip(slots.split(size), rows.split(size), cols.split(size), strict=True):
        product = torch.bmm(_gather(dy, row, block_size, dtype).mT, _gather(x, col, block_size, dtype))
        add_at_(grad, slot, product)


def block_matmul(x: Tensor, delta: Tensor, rows: Tensor, cols: Tensor, out_features: int) -> Tensor:
    """Multiply by a block-sparse matrix: `x @ D^T`, D [out, in] being zero outside the blocks `delta`.

    Args:
        x: [T, in].
        delta: [n, b, b], any strides, rounded to the dtype of `x` if it has another.
        rows: [n], block rows of D; blocks may share a row or a column, and blocks at one place add up.
        cols: [n], block columns of D.
        out_features: rows of D.

    Returns:
        [T, out_features] in the dtype of `x`.
    """
    block_size, dtype = delta.shape[1], sum_dtype(x.dtype)
    delta = delta.to(x.dtype).to(dtype)
    if _dense_is_faster(rows.shape[0], block_size, out_features, x.shape[1]):
        dense = delta.new_zeros(out_features // block_size, x.shape[1] // block_size, block_size, block_size)
        dense.index_put_((rows, cols), delta, accumulate=True)
        return (x.to(dtype) @ dense.transpose(1, 2).reshape(out_features, -1).T).to(x.dtype)
    y = x.new_zeros(x.shape[0], out_features, dtype=dtype)
    size = _chunk_size(x.shape[0], block_size)
    for block, row, col in zip(delta.split(size), rows.split(size), cols.split(size), strict=True):
        product = torch.bmm(_gather(x, col, block_size, dtype), block.mT)
        _column_blocks(y, block_size).index_add_(1, row, product.transpose(0, 1))
    return y.to(x.dtype)


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
    dy, x = (_column_blocks(matrix.to(dy.dtype), block_size).sum(2, dtype=dtype) for matrix in (dy, x))
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
    return _column_blocks(matrix, edge).unflatten(0, (-1, edge)).sum(1, dtype=dtype).sum(2)


def finish_score(sums: Tensor, block_size: int, score: str) -> Tensor:
    """Turn the sums over blocks of g^2 (for l2), of g (for mean_abs) or of |g| (for the others) into the score."""
    if score == "l2":
        return sums.sqrt()
    return sums if score == "l1" else sums.abs() / block_size**2


def write_blocks(views: list[Tensor], values: Tensor) -> None:
    """Copy `values[i]` into `views[i]`.

    Args:
        views: n tensors [b, b] of one dtype and device, any strides.
        values: [n, b, b], any float dtype.
    """
    if views:  # PyTorch refuses an empty list
        torch._foreach_copy_(views, values.unbind())


def add_at_(grad: Tensor, slots: Tensor, product: Tensor) -> None:
    """`grad[slots] += product` for distinct `slots`, added in the wider dtype of the two and rounded once."""
    if grad.dtype == product.dtype:
        grad.index_add_(0, slots, product)
    else:
        grad.index_copy_(0, slots.long(), (grad.index_select(0, slots) + product).to(grad.dtype))


def _column_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """View a matrix [m, k * b] as [m, k, b]."""
    return matrix.unflatten(1, (matrix.shape[1] // block_size, block_size))


def _gather(matrix: Tensor, index: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Copy the column blocks `index` of a matrix [T, k * b] to a batch [n, T, b]."""
    return _column_blocks(matrix, block_size).index_select(1, index).transpose(0, 1).to(dtype)


def _chunk_size(tokens: int, block_size: int) -> int:
    """How many blocks to gather at a time."""
    return max(1, _GATHER_ELEMENTS // max(1, tokens * block_size))


def _dense_is_faster(blocks: int, block_size: int, out_features: int, in_features: int) -> bool:
    """Whether one dense product costs less than `blocks` small ones with the copies they need.

    Small blocks do little arithmetic for each gathered element, so for them this happens at a few per cent.
    """
    return blocks * block_size * (block_size + _GATHER_COST) > out_features * in_features
