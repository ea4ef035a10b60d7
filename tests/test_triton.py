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


def lists_of(side, block_size, lines):
    """The same blocks on features at random."""
    features = torch.randperm(lines * block_size, generator=torch.Generator().manual_seed(lines)).to(DEVICE)
    return side._replace(at=features.view(lines, block_size)[side.at], place=side.member)


def features_of(side, block_size):
    """[n, b]: the features of each block."""
    at = side.at if side.at.ndim == 2 else side.at[:, None] * block_size + torch.arange(block_size, device=DEVICE)
    return at[side.member]


def check(kernels, block_size, grid, tokens, dtype=torch.float32, lists=False):
    """All operations against dense float64 ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, size * block_size) for size in grid]
    dy, x = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    # The last block row is empty; the first has the most blocks, two of them at one place.
    rows, cols = torch.tensor([0, max(grid[0] - 2, 0), 0, 0]), torch.tensor([0, grid[1] - 1, 0, 1])
    out, inner, _ = ops.move(ops.plan(rows, cols, keep_input=True), DEVICE)
    if lists:
        out, inner = (lists_of(side, block_size, size) for side, size in zip((out, inner), grid, strict=True))
    place = features_of(out, block_size)[:, :, None], features_of(inner, block_size)[:, None, :]
    dense = dy.double().T @ x.double()
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * (1 + tokens) ** 0.5, "check_dtype": False}
    narrow = {"rtol": 2e-2 if dtype != torch.float32 else 1e-4, "atol": 1e-2, "check_dtype": False}

    gradient = watched(kernels.block_grad, dy, x, out, inner, block_size)
    torch.testing.assert_close(gradient, dense[place], **tolerance)

    delta = torch.randn(4, block_size, block_size, device=DEVICE).to(dtype).float()
    weight = torch.zeros_like(dense).index_put(place, delta.double(), accumulate=True)
    y = watched(lambda: (sums := dy.clone(), kernels.block_add_(sums, x, delta, out, inner))[0])
    torch.testing.assert_close(y, dy.double() + x.double() @ weight.T, **narrow)
    untouched = torch.ones(dy.shape[1], dtype=torch.bool, device=DEVICE)
    untouched[place[0].flatten()] = False
    assert torch.equal(y[:, untouched], dy[:, untouched])
    dx = watched(lambda: (sums := torch.zeros_like(x), kernels.block_add_(sums, dy, delta.mT, inner, out))[0])
    torch.testing.assert_close(dx, dy.double() @ weight, **narrow)

    for score in ops.SCORES:
        scores = watched(kernels.block_scores, dy, x, block_size, score)
        torch.testing.assert_close(scores, ops.reduce_blocks(dense, block_size, score), **tolerance)


@here
@pytest.mark.parametrize(("block_size", "tokens"), [(16, 20), (48, 5), (128, 9), (160, 20)])
@pytest.mark.parametrize("lists", [False, True])
def test_every_element_is_written_and_nothing_waits(kernels, block_size, tokens, lists):
    check(kernels, block_size, (3, 2), tokens, lists=lists)


@here
@pytest.mark.parametrize("config", range(4))
@pytest.mark.parametrize(("block_size", "lists"), [(16, True), (96, False)])
def test_every_tuning_choice_computes_the_same(kernels, monkeypatch, config, block_size, lists):
    tile, step, warps, stages = kernels._CONFIGS[config]
    choice = kernels.triton.Config({"TILE": tile, "STEP": step}, num_warps=warps, num_stages=stages)
    for kernel in (kernels._block_grad_kernel, kernels._block_add_kernel, kernels._block_scores_kernel):
        monkeypatch.setattr(kernel, "configs", [choice])
    check(kernels, block_size, (2, 3), 70, torch.float16, lists)


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
    near, place, delta = far.clone(), torch.zeros(1, dtype=torch.int64), torch.ones(1, size, size, device=DEVICE)
    out, inner, _ = ops.move(ops.plan(place, place, keep_input=True), DEVICE)
    results = []
    for x in (near, far):
        gradient = kernels.block_grad(x, x, out, inner, size)
        y = torch.zeros(tokens, size, device=DEVICE)
        kernels.block_add_(y, x, delta, out, inner)
        results.append((gradient, y, kernels.block_scores(x, x, size, "l1")))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    operand = near.clone()
    for y in (near, far):
        kernels.block_add_(y, operand, delta, out, inner)
    assert torch.equal(near, far)


@here
def test_features_beyond_int32(kernels):
    """The last feature lies 2^31 elements behind the first, as in a transposed matrix of many tokens."""
    tokens, stride, size = 3, 2**26, 16
    memory = torch.empty(48 * stride + tokens, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((tokens, 48), (1, stride))
    near, delta = torch.randn(tokens, 48, device=DEVICE).half(), torch.ones(1, size, size, device=DEVICE)
    far.copy_(near)
    out, inner, _ = ops.move(ops.plan(torch.tensor([2]), torch.tensor([2]), keep_input=True), DEVICE)
    lists = [lists_of(side, size, 3) for side in (out, inner)]
    for sides in ((out, inner), lists):
        assert torch.equal(kernels.block_grad(near, near, *sides, size), kernels.block_grad(far, far, *sides, size))
        operand = near.clone()
        for y in (near, far):
            kernels.block_add_(y, operand, delta, *sides)
        assert torch.equal(near, far)


@here
def test_tuning_adds_only_once(kernels, monkeypatch):
    """A tuner calls the kernel many times; here without the clocks of a GPU, which the interpreter does not have."""
    configs = [kernels.triton.Config({"TILE": tile, "STEP": 32}) for tile in (64, 128)]
    monkeypatch.setattr(kernels._block_add_kernel, "configs", configs)
    monkeypatch.setattr(kernels._block_add_kernel, "cache", {})
    monkeypatch.setattr(kernels._block_add_kernel, "_do_bench", lambda call, quantiles: [call() or call() or 1.0] * 3)
    check(kernels, 16, (2, 2), 20)
    assert kernels._block_add_kernel.cache


@here
def test_batches_of_similar_length_share_a_tuning(kernels):
    assert kernels._bucket(1) == kernels._bucket(1024) == 1024
    assert kernels._bucket(1025) == kernels._bucket(1999) == 2048
