"""Time of each op of smt_peft.ops beside what its bytes and its FLOPs would take on this machine.

    python scripts/bench_ops.py --output docs/results/ops_cpu.json

The machine's rates are measured first: bytes/s of a large copy, FLOP/s of a large matrix product in each dtype. Then
each op runs on operands of real shapes; its result is compared with float64 before it is timed. No implementation can
take less than the larger of bytes / rate (every operand read, every result written once) and FLOPs / rate.
`scripts/report_benchmarks.py` turns the JSON file into the table of docs/benchmarks.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_training import header
from report_benchmarks import ops_table
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from smt_peft import ops
from smt_peft.selection import select

SIZES = {  # per device: [(out, in, tokens, block size, blocks)]
    # A layer of the CPU benchmark's model: few blocks, many, small ones.
    "cpu": [(512, 512, 512, 64, 2), (512, 512, 512, 64, 16), (512, 512, 512, 32, 16), (1408, 512, 512, 64, 16)],
    # q of Llama-3.2-3B in PEFT's setting (140 blocks over 56 layers), v of LLaMA-7B at 0.86 %, crowded, small blocks.
    "cuda": [(3072, 3072, 3072, 256, 3), (4096, 4096, 2048, 256, 28), (4096, 4096, 8192, 256, 128),
             (4096, 4096, 2048, 64, 448), (4096, 4096, 2048, 32, 1792)],
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass
class Options:
    output: str | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 0.5  # of timing per op and size


@dataclass
class Op:
    """A call to time, the float64 truth about its result, and the least work that it takes."""

    name: str
    call: Callable[[], object]
    result: Tensor
    truth: Tensor
    bytes: int
    flops: int


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    dtypes = [torch.float32] if options.device == "cpu" else [torch.bfloat16, torch.float32]
    result = {
        **header(options.device),
        "bytes_per_s": copy_rate(options),
        "flops_per_s": {str(dtype).removeprefix("torch."): matmul_rate(dtype, options) for dtype in dtypes},
        "ops": [],
    }
    for dtype in dtypes:
        for size in tqdm(SIZES[options.device], desc=f"sizes in {dtype}"):
            result["ops"] += [measure(op, size, dtype, result, options) for op in cases(*size, dtype, options.device)]
    result["selection_of_a_million_blocks_s"] = selection_seconds(options)
    print(ops_table(result))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=1))


def cases(out: int, in_: int, tokens: int, block: int, count: int, dtype: torch.dtype, device: str) -> Iterator[Op]:
    """Every op with `count` distinct random blocks of a weight [out, in]."""
    torch.manual_seed(0)
    dy, x = torch.randn(tokens, out, device=device, dtype=dtype), torch.randn(tokens, in_, device=device, dtype=dtype)
    grid = (out // block, in_ // block)
    places = torch.randperm(grid[0] * grid[1])[:count].sort().values.to(device)
    rows, cols, slots = places // grid[1], places % grid[1], torch.arange(count, device=device)
    blocks = torch.randn(count, block, block, device=device)

    def blocks_of(matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (grid[0], block)).unflatten(2, (grid[1], block)).transpose(1, 2)

    dense = blocks_of(dy.double().T @ x.double())
    item, size = dtype.itemsize, block**2
    read_dy, read_x = (tokens * block * len(index.unique()) * item for index in (rows, cols))
    grad = torch.zeros_like(blocks)
    ops.block_grad_(grad, dy, x, slots, rows, cols)
    yield Op("block_grad_", lambda: ops.block_grad_(grad, dy, x, slots, rows, cols), grad.clone(), dense[rows, cols],
             read_dy + read_x + 8 * count * size, 2 * tokens * count * size)  # fmt: skip

    delta = blocks.to(dtype)
    sparse = torch.zeros(*grid, block, block, dtype=torch.float64, device=device)
    sparse[rows, cols] = delta.double()
    y = ops.block_matmul(x, delta, rows, cols, out)
    yield Op("block_matmul", lambda: ops.block_matmul(x, delta, rows, cols, out), y,
             x.double() @ sparse.transpose(1, 2).reshape(out, in_).T,
             read_x + (count * size + tokens * out) * item, 2 * tokens * count * size)  # fmt: skip

    scores = ops.block_scores(dy, x, block, "abs_mean")
    yield Op("block_scores", lambda: ops.block_scores(dy, x, block, "abs_mean"), scores, dense.abs().mean((2, 3)),
             tokens * (out + in_) * item + scores.nbytes, 2 * tokens * out * in_)  # fmt: skip

    weight = torch.zeros(out, in_, device=device, dtype=dtype)
    tiles = weight.unfold(0, block, block).unfold(1, block, block)
    views = [tiles[row, col] for row, col in zip(rows.tolist(), cols.tolist(), strict=True)]
    pointers = ops.block_pointers(views)
    ops.write_blocks(views, blocks, pointers)
    yield Op("write_blocks", lambda: ops.write_blocks(views, blocks, pointers), blocks_of(weight)[rows, cols],
             blocks.double(), count * size * (4 + item), 0)  # fmt: skip


def measure(op: Op, size: tuple[int, ...], dtype: torch.dtype, rates: dict, options: Options) -> dict:
    error = float((op.result.double() - op.truth).abs().max() / op.truth.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise SystemExit(f"{op.name} is wrong by {error:.1e} of the largest entry at {size} in {dtype}: not timed.")
    name = str(dtype).removeprefix("torch.")
    out, in_, tokens, block, count = size
    return {
        "op": op.name,
        "dtype": name,
        "size": f"[{out}, {in_}], {tokens} tokens, {count} blocks of {block}",
        "error": error,
        "seconds": median_seconds(op.call, options),
        "bytes_s": op.bytes / rates["bytes_per_s"],
        "flops_s": op.flops / rates["flops_per_s"][name],
    }


def median_seconds(call: Callable[[], object], options: Options) -> float:
    """Median time of a call, warm caches, after it ran a few times. On a GPU by events around each call."""
    for _ in range(5):
        call()
    seconds, end = [], time.perf_counter() + options.seconds
    while len(seconds) < 10 or time.perf_counter() < end:
        if options.device == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(200_000)  # let the host queue the call before the device comes to it
            marks[0].record()
            call()
            marks[1].record()
            torch.cuda.synchronize()
            seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
        else:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copy_rate(options: Options) -> float:
    source = torch.zeros(2**28 if options.device == "cuda" else 2**25, device=options.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), options)


def matmul_rate(dtype: torch.dtype, options: Options) -> float:
    side = 8192 if options.device == "cuda" else 1536
    a, b = (torch.randn(side, side, device=options.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, options)


def selection_seconds(options: Options) -> float:
    """The best 1 % of a million blocks in 300 matrices."""
    scores = [torch.rand(58, 58, device=options.device) for _ in range(300)]
    start = time.perf_counter()
    select(scores, [(list(range(300)), 10_000)], "model")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
