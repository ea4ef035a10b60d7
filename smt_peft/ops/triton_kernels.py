"""The operations of `reference.py` as Triton kernels, for CUDA tensors of 16 or 32 bit and b a multiple of 16.

Every program owns its output tile and walks what adds up to it, so nothing is atomic and results are repeatable.
Nothing waits for the device: shapes alone decide the launch. Strides, and so layouts, are free.

Common names: BLOCK is b; PADDED is b rounded up to a power of two, as Triton's tiles are; TILE is the edge of an
output tile and STEP the number of summands taken at a time, both chosen by timing.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .plan import Side

# TILE, STEP, num_warps, num_stages. The last is for devices with little shared memory and for float32.
_CONFIGS = ((64, 64, 4, 4), (128, 64, 8, 3), (128, 32, 4, 4), (64, 32, 4, 2))
# Edge of the squares over which block_scores sums in registers; it divides every TILE.
_SCORE_SPAN = 64
# Programs of a 128 x 128 tile that fill a large GPU about twice. A constant, so that all devices sum in one order.
_ENOUGH_PROGRAMS = 256
# Fewest tokens worth a program of their own.
_SPLIT_TOKENS = 1024
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def _tuned(*key: str, **options):
    """Choose TILE and STEP by timing, once per `key`. The interpreter has nothing to time: it takes the first."""
    configs = [triton.Config({"TILE": c[0], "STEP": c[1]}, num_warps=c[2], num_stages=c[3]) for c in _CONFIGS]
    return triton.autotune(configs[:1] if _INTERPRETED else configs, key=list(key), **options)


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr):
    if _INTERPRETED:  # its dot takes the bits of bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _sum_over_tokens(
    dy, x, dy_mask, x_mask, first, last, dy_step, x_step, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """Sum of dy[t]^T x[t] for first <= t < last; `dy` and `x` point at token 0 of the tile's columns."""
    total = tl.zeros([dy.shape[0], x.shape[0]], dtype=tl.float32)
    for start in range(first, last, STEP):
        token = start + tl.arange(0, STEP)[:, None]
        inside = token < last
        token = token.to(tl.int64)  # a large matrix has more elements than int32 counts
        dy_tile = tl.load(dy[None, :] + token * dy_step, mask=inside & dy_mask[None, :], other=0.0)
        x_tile = tl.load(x[None, :] + token * x_step, mask=inside & x_mask[None, :], other=0.0)
        total = _add_product(total, tl.trans(dy_tile), x_tile, PRECISION)
    return total


@triton.jit
def _features(place, i, at, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The features `i` of a place."""
    return place * BLOCK + i if TILES else tl.load(at + place * BLOCK + i, mask=i < BLOCK, other=0)


@_tuned("bucket", "BLOCK", "SPLITS")
@triton.jit(do_not_specialize=["tokens", "bucket"])
def _block_grad_kernel(
    product,  # [SPLITS, n, b, b] float32
    dy,
    x,
    out_at,
    out_place,
    in_at,
    in_place,
    tokens,
    bucket,  # only a key for the tuner
    dy_token,  # strides
    dy_feature,
    x_token,
    x_feature,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    OUT_TILES: tl.constexpr,
    IN_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of one block's gradient, summed over one of SPLITS runs of tokens."""
    SPAN: tl.constexpr = TILE if TILE < PADDED else PADDED
    PARTS: tl.constexpr = (BLOCK + SPAN - 1) // SPAN
    block = tl.program_id(0)
    split = tl.program_id(2)
    i = tl.program_id(1) // PARTS * SPAN + tl.arange(0, SPAN)
    j = tl.program_id(1) % PARTS * SPAN + tl.arange(0, SPAN)
    dy += _features(tl.load(out_place + block), i, out_at, BLOCK, OUT_TILES) * dy_feature
    x += _features(tl.load(in_place + block), j, in_at, BLOCK, IN_TILES) * x_feature
    run = tl.cdiv(tokens, SPLITS)
    last = tl.minimum(split * run + run, tokens)
    total = _sum_over_tokens(dy, x, i < BLOCK, j < BLOCK, split * run, last, dy_token, x_token, STEP, PRECISION)
    product += (split * tl.num_programs(0) + block).to(tl.int64) * BLOCK * BLOCK
    tl.store(product + i[:, None] * BLOCK + j[None, :], total, mask=(i < BLOCK)[:, None] & (j < BLOCK)[None, :])


@_tuned("bucket", "BLOCK", restore_value=["y"])  # or tuning would add the product many times
@triton.jit(do_not_specialize=["tokens", "bucket"])
def _block_add_kernel(
    y,
    x,
    delta,
    out_at,
    order,
    starts,
    in_at,
    in_place,
    tokens,
    bucket,  # only a key for the tuner
    y_token,  # strides
    y_feature,
    x_token,
    x_feature,
    delta_block,
    delta_row,
    delta_col,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    OUT_TILES: tl.constexpr,
    IN_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of y: some tokens by (part of) one line that has blocks."""
    SPAN: tl.constexpr = TILE if TILE < PADDED else PADDED
    PARTS: tl.constexpr = (BLOCK + SPAN - 1) // SPAN
    DEPTH: tl.constexpr = STEP if STEP < PADDED else PADDED
    STEPS: tl.constexpr = (BLOCK + DEPTH - 1) // DEPTH
    line = tl.program_id(0) // PARTS
    i = tl.program_id(0) % PARTS * SPAN + tl.arange(0, SPAN)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    inside = token < tokens
    token = token.to(tl.int64)
    total = tl.zeros([SPAN, TILE], dtype=tl.float32)
    # One loop over the steps of all blocks of the line, and not one in another, so that loads run ahead across blocks.
    # They run further ahead if they wait for no others, so each step looks up where the next one reads.
    first = tl.load(starts + line).to(tl.int32) * STEPS
    last = tl.load(starts + line + 1).to(tl.int32) * STEPS
    block = tl.load(order + first // STEPS)
    place = tl.load(in_place + block)
    for step in range(first, last):
        j = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        x_tile = x + token * x_token + _features(place, j, in_at, BLOCK, IN_TILES)[None, :] * x_feature
        x_tile = tl.load(x_tile, mask=inside & (j < BLOCK)[None, :], other=0.0)
        delta_tile = delta + block * delta_block + i[:, None] * delta_row + j[None, :] * delta_col
        delta_tile = tl.load(delta_tile, mask=(i < BLOCK)[:, None] & (j < BLOCK)[None, :], other=0.0)
        total = _add_product(total, delta_tile.to(x_tile.dtype), tl.trans(x_tile), PRECISION)
        block = tl.load(order + tl.minimum(step + 1, last - 1) // STEPS)
        place = tl.load(in_place + block)
    place = tl.load(out_at + line) if OUT_TILES else line
    y += token * y_token + _features(place, i, out_at, BLOCK, OUT_TILES)[None, :] * y_feature
    mask = inside & (i < BLOCK)[None, :]
    tl.store(y, tl.load(y, mask=mask, other=0.0).to(tl.float32) + tl.trans(total), mask=mask)


@_tuned("bucket", "BLOCK")
@triton.jit(do_not_specialize=["tokens", "bucket"])
def _block_scores_kernel(
    sums,  # [R * PARTS, C * PARTS] float32, PARTS = ceil(b / SPAN)
    dy,
    x,
    tokens,
    bucket,  # only a key for the tuner
    out_spans,  # R * PARTS
    in_spans,  # C * PARTS
    dy_token,  # strides
    dy_feature,
    x_token,
    x_feature,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    SQUARE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums of |g| or g^2 over the SPAN x SPAN squares in one tile of dW. A block is PARTS x PARTS squares."""
    PARTS: tl.constexpr = (BLOCK + SPAN - 1) // SPAN
    SPANS: tl.constexpr = TILE // SPAN
    out_tiles = tl.cdiv(out_spans, SPANS)
    in_tiles = tl.cdiv(in_spans, SPANS)
    # Neighbouring programs share columns of both operands, which then stay in the L2 cache.
    m, n = tl.swizzle2d(tl.program_id(0) // in_tiles, tl.program_id(0) % in_tiles, out_tiles, in_tiles, 8)
    lane = tl.arange(0, TILE)
    out_span = m * SPANS + lane // SPAN
    in_span = n * SPANS + lane // SPAN
    i = out_span % PARTS * SPAN + lane % SPAN
    j = in_span % PARTS * SPAN + lane % SPAN
    dy += ((out_span // PARTS).to(tl.int64) * BLOCK + i) * dy_feature
    x += ((in_span // PARTS).to(tl.int64) * BLOCK + j) * x_feature
    dy_mask = (i < BLOCK) & (out_span < out_spans)
    x_mask = (j < BLOCK) & (in_span < in_spans)
    g = _sum_over_tokens(dy, x, dy_mask, x_mask, 0, tokens, dy_token, x_token, STEP, PRECISION)
    g = g * g if SQUARE else tl.abs(g)
    g = tl.sum(tl.sum(tl.reshape(g, [SPANS, SPAN, SPANS, SPAN]), axis=3), axis=1)
    out_span = (m * SPANS + tl.arange(0, SPANS))[:, None]
    in_span = (n * SPANS + tl.arange(0, SPANS))[None, :]
    tl.store(sums + out_span * in_spans + in_span, g, mask=(out_span < out_spans) & (in_span < in_spans))


def block_add_(y: Tensor, x: Tensor, delta: Tensor, out: Side, inner: Side) -> None:
    """See `reference.block_add_`."""
    tokens, block_size = x.shape[0], delta.shape[1]
    lines = out.at.shape[0]
    if not tokens or not lines:
        return
    args = y, x, delta, out.at, out.order, out.starts, inner.at, inner.place, tokens, _bucket(tokens)
    tiles = {"OUT_TILES": out.at.ndim == 1, "IN_TILES": inner.at.ndim == 1}
    with torch.cuda.device_of(x):
        _block_add_kernel[lambda meta: (lines * _parts(block_size, meta), triton.cdiv(tokens, meta["TILE"]))](
            *args, *y.stride(), *x.stride(), *delta.stride(),
            BLOCK=block_size, PADDED=_padded(block_size), PRECISION=_precision(), **tiles,
        )  # fmt: skip
    torch.autograd.graph.increment_version(y)  # PyTorch does not see that a kernel writes


def block_grad(dy: Tensor, x: Tensor, out: Side, inner: Side, block_size: int) -> Tensor:
    """See `reference.block_grad`."""
    tokens, blocks, x = dy.shape[0], out.member.shape[0], x.to(dy.dtype)
    if not tokens or not blocks:
        return dy.new_zeros(blocks, block_size, block_size, dtype=torch.float32)
    # Few blocks make few programs, each with a long sum: split the tokens until there are enough programs.
    splits = min(_ENOUGH_PROGRAMS // (blocks * triton.cdiv(block_size, 128) ** 2), tokens // _SPLIT_TOKENS)
    splits = triton.next_power_of_2(max(splits, 1) + 1) // 2  # rounded down, to tune for few values
    product = dy.new_empty(splits, blocks, block_size, block_size, dtype=torch.float32)
    args = product, dy, x, out.at, out.place, inner.at, inner.place, tokens, _bucket(tokens)
    tiles = {"OUT_TILES": out.at.ndim == 1, "IN_TILES": inner.at.ndim == 1}
    with torch.cuda.device_of(dy):
        _block_grad_kernel[lambda meta: (blocks, _parts(block_size, meta) ** 2, splits)](
            *args, *dy.stride(), *x.stride(),
            BLOCK=block_size, PADDED=_padded(block_size), SPLITS=splits, PRECISION=_precision(), **tiles,
        )  # fmt: skip
    return product[0] if splits == 1 else product.sum(0)


def block_scores(dy: Tensor, x: Tensor, block_size: int, score: str) -> Tensor:
    """See `reference.block_scores`."""
    if score == "mean_abs":
        return reference.block_scores(dy, x, block_size, score)  # two small sums and a small product
    tokens, span, x = dy.shape[0], min(_SCORE_SPAN, _padded(block_size)), x.to(dy.dtype)
    parts = triton.cdiv(block_size, span)
    out_spans, in_spans = (matrix.shape[1] // block_size * parts for matrix in (dy, x))
    sums = dy.new_empty(out_spans, in_spans, dtype=torch.float32)
    args = sums, dy, x, tokens, _bucket(tokens), out_spans, in_spans, *dy.stride(), *x.stride()
    with torch.cuda.device_of(dy):
        _block_scores_kernel[
            lambda meta: (triton.cdiv(out_spans * span, meta["TILE"]) * triton.cdiv(in_spans * span, meta["TILE"]),)
        ](*args, BLOCK=block_size, SPAN=span, SQUARE=score == "l2", PRECISION=_precision())
    return reference.finish_score(reference.sum_squares(sums, parts, torch.float32), block_size, score)


def _parts(block_size: int, meta: dict) -> int:
    """Output tiles along one side of a block."""
    return triton.cdiv(block_size, min(meta["TILE"], _padded(block_size)))


def _padded(block_size: int) -> int:
    return triton.next_power_of_2(block_size)


def _bucket(tokens: int) -> int:
    """Batches of any length up to a power of two share a tuning; short ones, which cost little, all do."""
    return triton.next_power_of_2(max(tokens, 1024))


def _precision() -> str:
    """How float32 is multiplied: as PyTorch's own matmul does (before torch 2.9, exactly)."""
    return "tf32" if getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32" else "ieee"
