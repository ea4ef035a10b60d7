"""The operations of `reference.py` as Triton kernels, for CUDA tensors of 16 or 32 bit and b a multiple of 16.

Every program owns its output tile and walks what adds up to it, so nothing is atomic and results are repeatable.
Nothing waits for the device: shapes alone decide the launch. Strides, and so layouts, are free.

Common names: BLOCK is b; PADDED is b rounded up to a power of two, as Triton's tiles are; an output tile has ROWS x
COLS elements, of which each takes STEP summands at a time, all three chosen by timing.
"""

import os
from collections.abc import Callable
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from . import reference
from .plan import Side

# ROWS, COLS, STEP, num_warps, num_stages. The first, for wide blocks of 16 bit, reads least from the L2 cache, which
# bounds large products. The third is for small ones: those over tokens are few programs, of which each must have many
# bytes on their way. The last needs little shared memory.
_ADD_CONFIGS = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 64, 128, 4, 2), (64, 64, 32, 4, 2))
_GRAD_CONFIGS = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (64, 64, 128, 4, 4), (64, 64, 32, 4, 2))
_SCORE_CONFIGS = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 128, 4, 4), (64, 64, 32, 4, 2))
# Edge of the squares over which block_scores sums in registers; it divides every tile.
_SCORE_SPAN = 64
# Programs of a 128 x 128 tile that fill a large GPU about twice. A constant, so that all devices sum in one order.
_ENOUGH_PROGRAMS = 256
# Fewest tokens worth a program of their own: to add up what several sum is a kernel more.
_SPLIT_TOKENS = 4096
# Multiplications from which it pays to round the deltas once, and not in every program.
_CAST_PRODUCTS = 1 << 31
# What CUDA's grids end at, but for their first axis.
_MOST_TILES = 65535
# Elements that a program copies.
_COPY_ELEMENTS = 4096
# Most launches that are kept ready; a model has some ten, but strides that are token counts could make more.
_MOST_READY = 1024
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Triton compiles anew where 16 divides a number or an address, or does not. Not for these: it would gain nothing.
_UNSPECIALIZED = {
    "do_not_specialize": ["tokens", "bucket"],
    "do_not_specialize_on_alignment": ["at", "out_at", "order", "starts", "out_place", "in_place"],
}
_ready: dict[tuple, tuple] = {}  # see `_launch`
_tuned_adds: set[tuple] = set()  # under what `_block_add_kernel` has been tuned
_tuning = Lock()


def _tuned(configs: tuple[tuple[int, ...], ...], *key: str):
    """Choose among `configs` by timing, once per `key`. The interpreter has nothing to time: it takes the last."""
    choices = [
        triton.Config(dict(zip(("ROWS", "COLS", "STEP"), shape, strict=True)), num_warps=warps, num_stages=stages)
        for *shape, warps, stages in configs
    ]
    choices = choices[-1:] if _INTERPRETED else choices
    return triton.autotune(choices, list(key), prune_configs_by={"early_config_prune": _fit})


def _fit(configs: list[triton.Config], operands: dict, **constants) -> list[triton.Config]:
    """Without the tiles that are too wide: for registers where elements have 32 bit, or for small blocks."""
    most = 128 if operands["x"].dtype.itemsize > 2 else constants.get("PADDED", 256)
    return [config for config in configs if config.kwargs["COLS"] <= max(most, 128)] or configs


def check_target() -> None:
    """Raise RuntimeError, or what the C compiler fails with, where Triton cannot compile: its first step is to build a
    small program in C."""
    triton.runtime.driver.active.get_current_target()


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


@_tuned(_GRAD_CONFIGS, "bucket", "BLOCK", "SPLITS")
@triton.jit(**_UNSPECIALIZED)
def _block_grad_kernel(
    product,  # [SPLITS, n, b, b] float32
    dy,
    x,
    out_place,
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
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of one block's gradient, summed over one of SPLITS runs of tokens."""
    HEIGHT: tl.constexpr = ROWS if ROWS < PADDED else PADDED
    WIDTH: tl.constexpr = COLS if COLS < PADDED else PADDED
    PARTS: tl.constexpr = (BLOCK + WIDTH - 1) // WIDTH
    block = tl.program_id(0)
    split = tl.program_id(2)
    i = tl.program_id(1) // PARTS * HEIGHT + tl.arange(0, HEIGHT)
    j = tl.program_id(1) % PARTS * WIDTH + tl.arange(0, WIDTH)
    dy += (tl.load(out_place + block) * BLOCK + i) * dy_feature
    x += (tl.load(in_place + block) * BLOCK + j) * x_feature
    run = tl.cdiv(tokens, SPLITS)
    last = tl.minimum(split * run + run, tokens)
    total = _sum_over_tokens(dy, x, i < BLOCK, j < BLOCK, split * run, last, dy_token, x_token, STEP, PRECISION)
    product += (split * tl.num_programs(0) + block).to(tl.int64) * BLOCK * BLOCK
    tl.store(product + i[:, None] * BLOCK + j[None, :], total, mask=(i < BLOCK)[:, None] & (j < BLOCK)[None, :])


@_tuned(_ADD_CONFIGS, "bucket", "BLOCK")
@triton.jit(**_UNSPECIALIZED)
def _block_add_kernel(
    y,
    x,
    delta,
    out_at,
    order,
    starts,
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
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of y: ROWS tokens by (part of) one line that has blocks. APART: y has these lines alone."""
    SPAN: tl.constexpr = COLS if COLS < PADDED else PADDED
    PARTS: tl.constexpr = (BLOCK + SPAN - 1) // SPAN
    DEPTH: tl.constexpr = STEP if STEP < PADDED else PADDED
    STEPS: tl.constexpr = (BLOCK + DEPTH - 1) // DEPTH
    line = tl.program_id(0) // PARTS
    i = tl.program_id(0) % PARTS * SPAN + tl.arange(0, SPAN)
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    token = tile * ROWS + tl.arange(0, ROWS)[:, None]
    inside = token < tokens
    token = tl.minimum(token, tokens - 1).to(tl.int64)  # reads need no mask: what is beyond is not stored
    # Deltas of 32 bit are rounded on their way: in registers, which only a product's first operand may be in.
    DELTA_FIRST: tl.constexpr = delta.dtype.element_ty.primitive_bitwidth == 32
    total = tl.zeros([SPAN, ROWS] if DELTA_FIRST else [ROWS, SPAN], dtype=tl.float32)
    # One loop over the steps of all blocks of the line, and not one in another, so that loads run ahead across blocks.
    # They run further ahead if they wait for no others, so each step looks up where the next one reads.
    first = tl.load(starts + line).to(tl.int32) * STEPS
    last = tl.load(starts + line + 1).to(tl.int32) * STEPS
    block = tl.load(order + first // STEPS)
    place = tl.load(in_place + block)
    for step in range(first, last):
        j = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        x_tile = x + token * x_token + (place * BLOCK + j)[None, :] * x_feature
        delta_tile = delta + block * delta_block + i[:, None] * delta_row + j[None, :] * delta_col
        if BLOCK == PADDED:
            x_tile = tl.load(x_tile)
            delta_tile = tl.load(delta_tile)
        else:
            x_tile = tl.load(x_tile, mask=(j < BLOCK)[None, :], other=0.0)
            delta_tile = tl.load(delta_tile, mask=(i < BLOCK)[:, None] & (j < BLOCK)[None, :], other=0.0)
        delta_tile = delta_tile.to(x_tile.dtype)
        if DELTA_FIRST:
            total = _add_product(total, delta_tile, tl.trans(x_tile), PRECISION)
        else:
            total = _add_product(total, x_tile, tl.trans(delta_tile), PRECISION)
        block = tl.load(order + tl.minimum(step + 1, last - 1) // STEPS)
        place = tl.load(in_place + block)
    place = line if APART else tl.load(out_at + line)
    y += token * y_token + (place * BLOCK + i)[None, :] * y_feature
    mask = inside & (i < BLOCK)[None, :]
    total = tl.trans(total) if DELTA_FIRST else total
    tl.store(y, tl.load(y, mask=mask, other=0.0).to(tl.float32) + total, mask=mask)


@_tuned(_SCORE_CONFIGS, "bucket", "BLOCK")
@triton.jit(**_UNSPECIALIZED)
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums of |g| or g^2 over the SPAN x SPAN squares in one tile of dW. A block is PARTS x PARTS squares."""
    PARTS: tl.constexpr = (BLOCK + SPAN - 1) // SPAN
    OUT_SPANS: tl.constexpr = ROWS // SPAN  # in a tile
    IN_SPANS: tl.constexpr = COLS // SPAN
    out_tiles = tl.cdiv(out_spans, OUT_SPANS)
    in_tiles = tl.cdiv(in_spans, IN_SPANS)
    # Neighbouring programs share columns of both operands, which then stay in the L2 cache.
    m, n = tl.swizzle2d(tl.program_id(0) // in_tiles, tl.program_id(0) % in_tiles, out_tiles, in_tiles, 8)
    out_lane = tl.arange(0, ROWS)
    in_lane = tl.arange(0, COLS)
    out_span = m * OUT_SPANS + out_lane // SPAN
    in_span = n * IN_SPANS + in_lane // SPAN
    i = out_span % PARTS * SPAN + out_lane % SPAN
    j = in_span % PARTS * SPAN + in_lane % SPAN
    dy += ((out_span // PARTS).to(tl.int64) * BLOCK + i) * dy_feature
    x += ((in_span // PARTS).to(tl.int64) * BLOCK + j) * x_feature
    dy_mask = (i < BLOCK) & (out_span < out_spans)
    x_mask = (j < BLOCK) & (in_span < in_spans)
    g = _sum_over_tokens(dy, x, dy_mask, x_mask, 0, tokens, dy_token, x_token, STEP, PRECISION)
    g = g * g if SQUARE else tl.abs(g)
    g = tl.sum(tl.sum(tl.reshape(g, [OUT_SPANS, SPAN, IN_SPANS, SPAN]), axis=3), axis=1)
    out_span = (m * OUT_SPANS + tl.arange(0, OUT_SPANS))[:, None]
    in_span = (n * IN_SPANS + tl.arange(0, IN_SPANS))[None, :]
    tl.store(sums + out_span * in_spans + in_span, g, mask=(out_span < out_spans) & (in_span < in_spans))


@triton.autotune([triton.Config({}, num_warps=4)], [])
@triton.jit(**_UNSPECIALIZED)
def _copy_kernel(
    lines,  # [T, m * b]
    matrix,
    at,
    tokens,
    matrix_token,  # strides
    matrix_feature,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    TILES: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS tokens of one line, out of the matrix or back into it."""
    line = tl.program_id(1)
    i = tl.arange(0, PADDED)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (token < tokens) & (i < BLOCK)[None, :]
    token = token.to(tl.int64)
    feature = tl.load(at + line) * BLOCK + i if TILES else tl.load(at + line * BLOCK + i, mask=i < BLOCK, other=0)
    matrix += token * matrix_token + feature[None, :] * matrix_feature
    lines += token * (tl.num_programs(1) * BLOCK) + line * BLOCK + i[None, :]
    if BACK:
        tl.store(matrix, tl.load(lines, mask=mask), mask=mask)
    else:
        tl.store(lines, tl.load(matrix, mask=mask), mask=mask)


def gather(matrix: Tensor, at: Tensor, block_size: int) -> Tensor:
    """See `reference.gather`."""
    if at.ndim == 1 and at.shape[0] * block_size == matrix.shape[1]:
        return matrix
    lines = matrix.new_empty(matrix.shape[0], at.shape[0] * block_size)
    _copy(lines, matrix, at, block_size, back=False)
    return lines


def _copy(lines: Tensor, matrix: Tensor, at: Tensor, block_size: int, back: bool) -> None:
    """Fill `lines` [T, m * b] with the features of the lines `at` of a matrix, or these with `lines`."""
    if lines.numel():
        tokens, padded = lines.shape[0], _padded(block_size)
        rows = max(1, _COPY_ELEMENTS // padded)
        constants = block_size, padded, at.ndim == 1, back, rows
        grid = -(-tokens // rows), at.shape[0], 1
        _launch(_copy_kernel, (lines, matrix), (at,), tokens, matrix.stride(), constants, lambda meta: grid)


def block_add_(y: Tensor, x: Tensor, delta: Tensor, out: Side, inner: Side) -> None:
    """See `reference.block_add_`."""
    tokens, block_size = x.shape[0], delta.shape[1]
    lines = out.at.shape[0]
    if not tokens or not lines:
        return
    x, in_place = _by_line(x, inner, block_size)
    matrix, apart = y, out.at.ndim == 2
    if apart:
        y = gather(matrix, out.at, block_size)
    if delta.dtype != x.dtype and tokens * delta.numel() >= _CAST_PRODUCTS:
        delta = delta.to(x.dtype)

    def grid(meta: dict) -> tuple[int, int, int]:
        tiles = -(-tokens // meta["ROWS"])
        return lines * -(-block_size // meta["COLS"]), min(tiles, _MOST_TILES), -(-tiles // _MOST_TILES)

    _launch(
        _block_add_kernel,
        (y, x, delta),
        (out.at, out.order, out.starts, in_place),
        tokens,
        (_bucket(tokens), *y.stride(), *x.stride(), *delta.stride()),
        (block_size, _padded(block_size), apart, _precision(x.dtype)),
        grid,
    )
    if apart:
        _copy(y, matrix, out.at, block_size, back=True)
    torch.autograd.graph.increment_version(matrix)  # PyTorch does not see that a kernel writes


def block_grad(dy: Tensor, x: Tensor, out: Side, inner: Side, block_size: int) -> Tensor:
    """See `reference.block_grad`."""
    tokens, blocks = dy.shape[0], out.member.shape[0]
    if not tokens or not blocks:
        return dy.new_zeros(blocks, block_size, block_size, dtype=torch.float32)
    x = x if x.dtype == dy.dtype else x.to(dy.dtype)
    (dy, out_place), (x, in_place) = _by_line(dy, out, block_size), _by_line(x, inner, block_size)
    # Few blocks make few programs, each with a long sum: split the tokens until there are enough programs.
    splits = min(_ENOUGH_PROGRAMS // (blocks * (-(-block_size // 128)) ** 2), tokens // _SPLIT_TOKENS)
    splits = 1 << max(splits, 1).bit_length() - 1  # rounded down, to tune for few values
    product = dy.new_empty(splits, blocks, block_size, block_size, dtype=torch.float32)

    def grid(meta: dict) -> tuple[int, int, int]:
        return blocks, -(-block_size // meta["ROWS"]) * -(-block_size // meta["COLS"]), splits

    _launch(
        _block_grad_kernel,
        (product, dy, x),
        (out_place, in_place),
        tokens,
        (_bucket(tokens), *dy.stride(), *x.stride()),
        (block_size, _padded(block_size), splits, _precision(x.dtype)),
        grid,
    )
    return product[0] if splits == 1 else product.sum(0)


def block_scores(dy: Tensor, x: Tensor, block_size: int, score: str) -> Tensor:
    """See `reference.block_scores`."""
    if score == "mean_abs":
        return reference.block_scores(dy, x, block_size, score)  # two small sums and a small product
    if not dy.shape[0]:  # an expert without tokens would tune on nothing
        return dy.new_zeros(dy.shape[1] // block_size, x.shape[1] // block_size, dtype=torch.float32)
    span, x = min(_SCORE_SPAN, _padded(block_size)), x if x.dtype == dy.dtype else x.to(dy.dtype)
    parts = -(-block_size // span)
    out_spans, in_spans = (matrix.shape[1] // block_size * parts for matrix in (dy, x))
    sums = dy.new_empty(out_spans, in_spans, dtype=torch.float32)

    def grid(meta: dict) -> tuple[int, int, int]:
        return -(-out_spans * span // meta["ROWS"]) * -(-in_spans * span // meta["COLS"]), 1, 1

    tokens = dy.shape[0]
    numbers = _bucket(tokens), out_spans, in_spans, *dy.stride(), *x.stride()
    constants = block_size, span, score == "l2", _precision(x.dtype)
    _launch(_block_scores_kernel, (sums, dy, x), (), tokens, numbers, constants, grid)
    return reference.finish_score(reference.sum_tiles(sums, parts), block_size, score)


def _by_line(matrix: Tensor, side: Side, block_size: int) -> tuple[Tensor, Tensor]:
    """A matrix to read blocks' features from, and each block's line there. Features in any order are copied out first:
    a product that reads them one by one cannot load ahead while it computes, and one that writes them so lacks the
    registers that their addresses take."""
    return matrix if side.at.ndim == 1 else gather(matrix, side.at, block_size), side.place


def _launch(
    kernel: triton.runtime.Autotuner,
    tensors: tuple[Tensor, ...],
    places: tuple[Tensor, ...],
    tokens: int,
    numbers: tuple[int, ...],
    constants: tuple,
    grid: Callable[[dict], tuple[int, int, int]],
) -> None:
    """Launch a kernel whose parameters are, in this order, the arguments from `tensors` to `constants`, then the tuned
    ones. `places` are int64.

    Triton looks up its compiled kernel at every launch, which takes the host longer than most kernels take the device.
    So the kernel is kept in `_ready`, under all that Triton compiles for: the device, the constants, and, of arguments
    that are not exempt (`_UNSPECIALIZED`), the dtype and whether 16 divides them.
    """
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, tensors, places, tokens, numbers, constants, grid)
    pointers = [tensor.data_ptr() for tensor in tensors]
    key = (kernel, device, *numbers, *constants, *[pointer % 16 for pointer in pointers], *[t.dtype for t in tensors])
    ready = _ready.get(key)
    if ready is None:
        _first_launch(kernel, key, (*tensors, *places, tokens, *numbers), constants, grid)
    else:
        compiled, tail, meta = ready
        compiled[grid(meta)](*pointers, *[place.data_ptr() for place in places], tokens, *numbers, *tail)


def _first_launch(kernel: triton.runtime.Autotuner, key: tuple, args: tuple, constants: tuple, grid: Callable) -> None:
    """Have Triton launch, and keep what it compiled. The interpreter compiles nothing."""
    names, output = kernel.arg_names[len(args) :], args[0]
    options = dict(zip(names, constants, strict=False))
    with _tuning:  # a tuner keeps the tensors that it works on in itself
        if kernel is _block_add_kernel and len(kernel.configs) > 1:
            dtypes = [one.dtype for one in args if isinstance(one, Tensor)]  # as Triton's own key
            tuned = args[kernel.arg_names.index("bucket")], options["BLOCK"], *dtypes
            if tuned not in _tuned_adds:  # tuning launches many times, and each would add
                scratch = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device=output.device)
                kernel[grid](scratch, *args[1:], **options)
                _tuned_adds.add(tuned)
        compiled = kernel[grid](*args, **options)
        meta = kernel.best_config.kwargs
    if not isinstance(compiled, CompiledKernel) or torch.version.hip:  # which specialises on more
        return
    tail = (*constants, *[meta[name] for name in names[len(constants) :]])
    if len(_ready) == _MOST_READY:
        _ready.clear()
    # Triton 3.2 wants no constants, and does not name them in the signature.
    _ready[key] = compiled, tail[: len(compiled.src.signature) - len(args)], meta


def _padded(block_size: int) -> int:
    """The next power of two."""
    return 1 << (block_size - 1).bit_length()


def _bucket(tokens: int) -> int:
    """Batches of any length up to a power of two share a tuning; short ones, which cost little, all do."""
    return _padded(max(tokens, 1024))


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own matmul does (before torch 2.9, exactly)."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32" else "ieee"
