"""What only the Triton kernels can get wrong; `test_ops.py` compares their results.

Both run natively on CUDA. Elsewhere a process of its own runs them in Triton's interpreter, which must be switched on
before anything imports triton.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smt_peft import ops

pytest.importorskip("triton")
NATIVE = torch.cuda.is_available()
RUNS_HERE = NATIVE or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if NATIVE else "cpu"
here = pytest.mark.skipif(not RUNS_HERE, reason="runs in the process of test_in_the_interpreter")


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_in_the_interpreter():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    command += [folder / "test_ops.py", __file__]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]


@pytest.fixture
def kernels():
    from smt_peft.ops import triton_kernels

    return triton_kernels


class Watch(TorchDispatchMode):
    """Fills uninitialised memory with NaN, and fails where the host would wait for the device."""

    SYNCHRONOUS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.SYNCHRONOUS), f"{name} waits for the device"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask waits"
        result = func(*args, **(kwargs or {}))
        if name in ("empty", "new_empty", "empty_like", "empty_strided") and result.is_floating_point():
            result.fill_(float("nan"))
        return result


def watched(function, *args):
    if NATIVE:
        function(*args)  # tuning waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Watch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", None)  # does not pass the dispatcher
            return function(*args)
    finally:
        if NATIVE:
            torch.cuda.set_sync_debug_mode("default")


def operands(block_size, grid, tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, size * block_size) for size in grid]
    dy, x = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    # The last block row is empty; the first has the most blocks.
    rows, cols = torch.tensor([0, max(grid[0] - 2, 0), 0], device=DEVICE), torch.tensor([0, grid[1] - 1, 0]).to(DEVICE)
    return dy, x, rows.int(), cols.int()


def check(kernels, block_size, grid, tokens, dtype=torch.float32):
    """All operations against dense float64 ones."""
    dy, x, rows, cols = operands(block_size, grid, tokens, dtype)
    dense = dy.double().T @ x.double()
    blocks = dense.reshape(grid[0], block_size, grid[1], block_size).transpose(1, 2)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * (1 + tokens) ** 0.5, "check_dtype": False}

    grad = torch.ones(4, block_size, block_size, device=DEVICE)
    slots = torch.tensor([3, 0, 2], device=DEVICE)
    watched(lambda: kernels.block_grad_(grad.fill_(1), dy, x, slots, rows, cols))
    expected = torch.ones_like(grad, dtype=torch.float64)
    expected[slots] += blocks[rows.long(), cols.long()]
    torch.testing.assert_close(grad, expected, **tolerance)

    delta = torch.randn(3, block_size, block_size, device=DEVICE).to(dtype).mT
    y = watched(kernels.block_matmul, x, delta, rows, cols, dy.shape[1])
    weight = torch.zeros_like(blocks).index_put((rows.long(), cols.long()), delta.double(), accumulate=True)
    expected = x.double() @ weight.transpose(1, 2).reshape(dense.shape).T
    torch.testing.assert_close(
        y, expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-2, check_dtype=False
    )
    if grid[0] > 1:
        assert not y[:, -block_size:].any()

    for score in ops.SCORES:
        scores = watched(kernels.block_scores, dy, x, block_size, score)
        torch.testing.assert_close(scores, ops.reduce_blocks(dense, block_size, score), **tolerance)


@here
@pytest.mark.parametrize(("block_size", "tokens"), [(16, 20), (48, 5), (128, 9), (160, 20)])
def test_every_element_is_written_and_nothing_waits(kernels, block_size, tokens):
    check(kernels, block_size, (3, 2), tokens)


@here
@pytest.mark.parametrize("config", range(4))
@pytest.mark.parametrize("block_size", [16, 96])
def test_every_tuning_choice_computes_the_same(kernels, monkeypatch, config, block_size):
    tile, step, warps, stages = kernels._CONFIGS[config]
    choice = kernels.triton.Config({"TILE": tile, "STEP": step}, num_warps=warps, num_stages=stages)
    for kernel in (kernels._block_grad_kernel, kernels._block_matmul_kernel, kernels._block_scores_kernel):
        monkeypatch.setattr(kernel, "configs", [choice])
    check(kernels, block_size, (2, 3), 70, torch.float16)


@here
@pytest.mark.parametrize(("tokens", "split_tokens"), [(70, 16), (5, 1), (64, 16)])
def test_tokens_are_split_without_loss(kernels, monkeypatch, tokens, split_tokens):
    """Ragged runs, and at 5 tokens for 4 programs an empty one."""
    monkeypatch.setattr(kernels, "_SPLIT_TOKENS", split_tokens)
    check(kernels, 16, (2, 2), tokens)


@here
def test_offsets_beyond_int32(kernels):
    """The last token lies 2^31 elements behind the first; hardly any of the memory between is touched."""
    tokens, stride, size = 33, 2**26, 16
    memory = torch.empty((tokens - 1) * stride + size, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((tokens, size), (stride, 1)).copy_(torch.randn(tokens, size))
    near, index, delta = far.clone(), torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.ones(1, size, size)
    results = []
    for x in (far, near):
        grad = torch.zeros(1, size, size, device=DEVICE)
        kernels.block_grad_(grad, x, x, index, index, index)
        y = kernels.block_matmul(x, delta.to(DEVICE), index, index, size)
        results.append((grad, y, kernels.block_scores(x, x, size, "l1")))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@here
def test_batches_of_similar_length_share_a_tuning(kernels):
    assert kernels._bucket(1) == kernels._bucket(1024) == 1024
    assert kernels._bucket(1025) == kernels._bucket(1999) == 2048
