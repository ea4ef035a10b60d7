"""Time of each op of smt_peft.ops beside what its bytes and its FLOPs would take on this machine.

    python scripts/benchmarks/bench_ops.py --output docs/results/ops_cpu.json

The machine's rates are measured first: bytes/s of a large copy, FLOP/s of a large matrix product in each dtype. Then
each op runs on operands of real shapes; its result is compared with float64 before it is timed. No implementation can
take less than the larger of bytes / rate (every operand read, every result written once) and FLOPs / rate. What the
first call takes longer, because kernels are compiled and tuned once per shape, stands apart.
Each row is printed and in the file as soon as it is made; rows that this machine and commit have written there before
are kept. Exit status 3 says that rows are missing or wrong.
`scripts/benchmarks/report_benchmarks.py` turns the JSON file into a table.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import results
import torch
from torch import Tensor
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from smt_peft import ops
from smt_peft.ops import reference
from smt_peft.selection import select

SIZES = {  # per device: [(out, in, tokens, block size, blocks, arrangement)], the most important first
    # A layer of the CPU benchmark's model: few blocks, many, small ones; sorted.
    "cpu": [(512, 512, 512, 64, 2, "tiles"), (512, 512, 512, 64, 16, "tiles"), (512, 512, 512, 64, 16, "sorted"),
            (512, 512, 512, 32, 16, "tiles"), (512, 512, 512, 32, 16, "sorted"), (1408, 512, 512, 64, 16, "tiles")],
    # q and v of Llama-3.2-3B in PEFT's setting (140 blocks of 56 layers), v of a 7B at 0.86 %, crowded, small blocks.
    "cuda": [(3072, 3072, 3072, 256, 3, "tiles"), (3072, 3072, 3072, 256, 3, "sorted"),
             (1024, 3072, 3072, 256, 5, "tiles"), (4096, 4096, 2048, 256, 28, "tiles"),
             (4096, 4096, 2048, 256, 28, "sorted"), (4096, 4096, 8192, 256, 128, "tiles"),
             (4096, 4096, 2048, 64, 448, "tiles"), (4096, 4096, 2048, 64, 448, "sorted"),
             (4096, 4096, 2048, 32, 1792, "tiles")],
}  # fmt: skip
DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}
SELECTION = "selection_of_a_million_blocks_s"
KINDS = {"tiles": "blocks", "sorted": "sorted blocks"}
CAPTURED = 50  # calls in one graph: launching the graph itself is then no part of a call's time
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass
class Command:
    output: str | None = None
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = HfArg(default=0.2, help="of timing per row")
    limit_s: float = HfArg(default=60, help="no row starts later than this")


@dataclass
class Op:
    """A call to time, the float64 truth about its first result, and the least work that it takes."""

    name: str
    call: Callable[[], Tensor]
    truth: Tensor
    bytes: int
    flops: int


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    (command,) = HfArgumentParser(Command).parse_args_into_dataclasses()
    path = Path(command.output) if command.output else None
    dtypes, sizes = DTYPES[command.device], SIZES[command.device]
    # One size is enough to see how float32 does on a GPU.
    settings = [(size, dtype) for dtype in dtypes for size in (sizes if dtype == dtypes[0] else sizes[:1])]
    result = results.kept(path, command.device, {"seconds": command.seconds}, ops=[])
    result["ops"] = [row for row in result["ops"] if "seconds" in row]
    done = [identity(row) for row in result["ops"]]
    try:
        if "bytes_per_s" not in result:
            rates = {name_of(dtype): matmul_rate(dtype, command) for dtype in dtypes}
            seconds = selection_seconds(command)
            result |= {"bytes_per_s": copy_rate(command), "flops_per_s": rates, SELECTION: seconds}
            result["launch_s"] = launch_seconds(command)
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in result["flops_per_s"].items())
        print(f"{result['bytes_per_s'] / 1e9:,.0f} GB/s, {rates}")
        print(f"{'op':16} {'dtype':8} {'size':56} {'us':>8} {'ratio':>6} {'error':>7}  first call, s", flush=True)
        for size, dtype in settings:
            for op in cases(*size, dtype, command.device):
                row = {"op": op.name, "dtype": name_of(dtype), "size": described(*size)}
                if identity(row) in done:
                    continue
                if time.monotonic() - begin > command.limit_s:
                    raise TimeoutError
                row |= measure(op, dtype, result, command)
                result["ops"].append(row)
                print(line(row), flush=True)
                results.write(result, path)
    except (TimeoutError, KeyboardInterrupt) as stop:
        print(f"Rows are missing: {'no time is left' if isinstance(stop, TimeoutError) else 'stopped'}.")
        return 3
    return 0 if all("seconds" in row for row in result["ops"]) else 3


def identity(row: dict) -> tuple[str, str, str]:
    return row["op"], row["dtype"], row["size"]


def described(out: int, in_: int, tokens: int, block: int, count: int, arrangement: str) -> str:
    return f"[{out}, {in_}], {tokens} tokens, {count} {KINDS[arrangement]} of {block}"


def cases(
    out: int, in_: int, tokens: int, block: int, count: int, arrangement: str, dtype: torch.dtype, device: str
) -> Iterator[Op]:
    """Every op with `count` distinct random blocks, float32, of a weight [out, in]."""
    torch.manual_seed(0)
    dy, x = torch.randn(tokens, out, device=device, dtype=dtype), torch.randn(tokens, in_, device=device, dtype=dtype)
    grid = (out // block, in_ // block)
    places = torch.randperm(grid[0] * grid[1])[:count].sort().values
    sides = [places // grid[1], places % grid[1]]
    orders = [torch.arange(side).view(-1, block) for side in (out, in_)]
    if arrangement == "sorted":
        orders = [order.flatten()[torch.randperm(order.numel())].view(-1, block).sort(1).values for order in orders]
        sides = [order[side] for order, side in zip(orders, sides, strict=True)]
    plan = ops.plan(*sides, keep_input=False, device=torch.device(device))
    entries = ops.entries(plan, block)
    delta = torch.randn(count, block, block, device=device)
    flops, item = 2 * tokens * count * block**2, dtype.itemsize
    written, read = (tokens * block * len(side.at) * item for side in plan[:2])

    sparse = torch.zeros(out, in_, dtype=torch.float64, device=device)
    sparse[entries] = delta.to(dtype).double()
    gather = kernels(device).gather
    for name, matrix, side, order in (("x", x, plan.inner, orders[1]), ("dy", dy, plan.out, orders[0])):
        if (matrix is dy and arrangement == "tiles") or gather(matrix, side.at, block) is matrix:
            continue  # it is read where it is
        at = side.at if side.at.ndim == 2 else order.to(device)[side.at]
        yield Op(f"gather {name}", partial(gather, matrix, side.at, block), matrix.double()[:, at.flatten()],
                 2 * (read if matrix is x else written), 0)  # fmt: skip

    y, dx = dy.clone(), torch.zeros_like(x)
    kept = reference.gather(x, plan.inner.at, block)
    back = reference.gather(dy, plan.out.at, block) if arrangement == "sorted" else dy
    yield Op("block_add_", lambda: added(y, kept, delta, plan.out, plan.kept), dy.double() + x.double() @ sparse.T,
             read + 2 * written + delta.nbytes, flops)  # fmt: skip
    yield Op("block_add_ to dx", lambda: added(dx, back, delta.mT, plan.inner, plan.read), dy.double() @ sparse,
             written + 2 * read + delta.nbytes, flops)  # fmt: skip

    dense = dy.double().T @ x.double()
    yield Op("block_grad", lambda: ops.block_grad(back, kept, plan.read, plan.kept, block), dense[entries],
             written + read + delta.nbytes, flops)  # fmt: skip
    if arrangement == "tiles":  # sorted ones are scored so, too, on dy and x in order
        scores = dense.abs().unflatten(0, (grid[0], block)).unflatten(2, (grid[1], block)).mean((1, 3))
        yield Op("block_scores", lambda: ops.block_scores(dy, x, block, "abs_mean"), scores,
                 tokens * (out + in_) * item + 4 * grid[0] * grid[1], 2 * tokens * out * in_)  # fmt: skip


def added(y: Tensor, *args) -> Tensor:
    ops.block_add_(y, *args)
    return y


def measure(op: Op, dtype: torch.dtype, rates: dict, command: Command) -> dict:
    """How far a call is from the truth and, unless that is too far, how long it takes and may take."""
    start = results.clock(command.device)
    result = op.call()
    first = results.clock(command.device) - start
    error = float((result.double() - op.truth).abs().max() / op.truth.abs().max())
    if not error <= TOLERANCE[dtype]:
        return {"error": error}
    return {
        "error": error,
        "first_call_s": first,
        "seconds": median_seconds(op.call, command),
        "bytes_s": op.bytes / rates["bytes_per_s"],
        "flops_s": op.flops / rates["flops_per_s"][name_of(dtype)],
        "tuned": tuned(op.name) if command.device == "cuda" else None,
    }


def kernels(device: str) -> ModuleType:
    if device == "cpu":
        return reference
    from smt_peft.ops import triton_kernels  # needs triton

    return triton_kernels


def tuned(op: str) -> str:
    """What the op's kernel was tuned to at last."""
    name = op.split()[0].rstrip("_").replace("gather", "copy")
    return str(getattr(kernels("cuda"), f"_{name}_kernel").best_config)


def line(row: dict) -> str:
    start = f"{row['op']:16} {row['dtype']:8} {row['size']:56}"
    if "seconds" not in row:
        return f"{start} wrong by {row['error']:.1e} of the largest entry: not timed"
    ratio = row["seconds"] / max(row["bytes_s"], row["flops_s"])
    return f"{start} {1e6 * row['seconds']:8.1f} {ratio:6.2f} {row['error']:7.0e}  {row['first_call_s']:.2f}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def median_seconds(call: Callable[[], object], command: Command) -> float:
    """Median time of a call, warm caches, after it ran a few times.

    On a GPU many are captured in one CUDA graph, so that nothing waits for the host: what is left is the kernels, and
    the microsecond or so from one to the next.
    """
    for _ in range(5):
        call()
    seconds, calls = [], 1
    if command.device == "cuda":
        start = results.clock(command.device)
        call()
        calls = max(1, min(CAPTURED, int(0.01 / (results.clock(command.device) - start))))  # 10 ms in a graph do
        call = captured(call, calls).replay
    end = time.perf_counter() + command.seconds
    while len(seconds) < 10 or time.perf_counter() < end:
        start = results.clock(command.device)
        call()
        seconds.append((results.clock(command.device) - start) / calls)
    return statistics.median(seconds)


def captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """Calls one after the other, as one launch."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    graph.replay()
    return graph


def copy_rate(command: Command) -> float:
    source = torch.zeros(2**28 if command.device == "cuda" else 2**25, device=command.device)
    target = torch.empty_like(source)
    # By a kernel: what a graph captures as a copy is another engine's, and slower.
    return 2 * source.nbytes / median_seconds(lambda: torch.neg(source, out=target), command)


def matmul_rate(dtype: torch.dtype, command: Command) -> float:
    side = 8192 if command.device == "cuda" else 1536
    a, b = (torch.randn(side, side, device=command.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, command)


def launch_seconds(command: Command) -> float:
    """Of a call that does nearly nothing: no op of one kernel can take less."""
    return median_seconds(torch.zeros(1, device=command.device).zero_, command)


def selection_seconds(command: Command) -> float:
    """The best 1 % of a million blocks in 300 matrices."""
    scores = [torch.rand(58, 58, device=command.device) for _ in range(300)]
    start = time.perf_counter()
    select(scores, [(list(range(300)), 10_000)], "model")
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
