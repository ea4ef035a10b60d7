"""The block operations against dense float64 autograd, on every way to compute them.

`test_triton.py` runs this file once more where the Triton kernels can run: on CUDA or in Triton's interpreter.
"""

import os
import sys

import pytest
import torch
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from smt_peft import ops
from smt_peft.ops import reference

TRITON_RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
# Of the result's largest entry. float32 sums of 16-bit inputs must be as good as those of float32 inputs.
SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# Of a result in the dtype itself. Triton's interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# block size, block rows, block columns, tokens, blocks, dtype, layout
CASES = [
    (4, 5, 3, 37, 7, torch.float32, "contiguous"),
    (4, 3, 2, 9, 4, torch.float64, "transposed"),
    (16, 3, 2, 1, 4, torch.float32, "sliced"),
    (16, 5, 3, 70, 9, torch.bfloat16, "transposed"),
    (16, 2, 2, 0, 3, torch.float32, "contiguous"),
    (16, 2, 2, 7, 0, torch.float32, "contiguous"),
    (32, 2, 4, 65, 5, torch.float16, "sliced"),
    (48, 3, 2, 37, 5, torch.bfloat16, "contiguous"),
    (48, 2, 2, 30, 3, torch.float32, "transposed"),
    (64, 2, 3, 130, 4, torch.float32, "contiguous"),
    (64, 3, 1, 33, 3, torch.bfloat16, "sliced"),
]


@pytest.fixture(params=["gather", "dense", *["triton"] * TRITON_RUNS])
def device(request, monkeypatch) -> str:
    """Each way to compute; its value is the device that takes it."""
    if request.param == "triton":
        if torch.cuda.is_available():
            return "cuda"
        monkeypatch.setattr(ops, "interpret", True)
    else:
        monkeypatch.setattr(reference, "_GATHER_COST", {"gather": -(10**9), "dense": 10**9}[request.param])
        monkeypatch.setattr(reference, "_GATHER_ELEMENTS", 1000)  # several chunks, and of several blocks
        monkeypatch.setattr(reference, "_STRIP_ELEMENTS", 4000)
    return "cpu"


@pytest.fixture(params=CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case))
def case(request, device):
    return Case(*request.param, device)


class Case:
    """Random operands and their dense float64 counterparts. Blocks share rows, columns and now and then a place."""

    def __init__(self, block_size, block_rows, block_cols, tokens, blocks, dtype, layout, device):
        self.generator = torch.Generator().manual_seed(block_size + tokens)
        self.block_size, self.blocks, self.dtype, self.layout, self.device = block_size, blocks, dtype, layout, device
        self.grid = block_rows, block_cols
        self.out_features, self.in_features = block_rows * block_size, block_cols * block_size
        self.dy, self.x = self.matrix(tokens, self.out_features), self.matrix(tokens, self.in_features)
        self.rows, self.cols = self.integers(block_rows), self.integers(block_cols).long()
        self.slots = torch.randperm(blocks + 3, generator=self.generator)[:blocks].to(device)
        self.dense_gradient = self.dy.double().T @ self.x.double()

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, high) -> torch.Tensor:
        return torch.randint(high, (self.blocks,), generator=self.generator, dtype=torch.int32).to(self.device)

    def matrix(self, tokens, features) -> torch.Tensor:
        if self.layout == "transposed":
            return self.normal(features, tokens).T
        if self.layout == "sliced":
            return self.normal(tokens + 1, 2 * features + 1)[1:, 1::2]
        return self.normal(tokens, features)

    def delta(self) -> torch.Tensor:
        delta = self.normal(self.blocks, self.block_size, self.block_size)
        return delta if self.layout == "contiguous" else delta.mT

    def grid_of(self, dense) -> torch.Tensor:
        """[out, in] -> [R, C, b, b]."""
        (rows, cols), size = self.grid, self.block_size
        return dense.reshape(rows, size, cols, size).transpose(1, 2)

    def embed(self, delta) -> torch.Tensor:
        """Blocks -> the dense matrix they stand for."""
        (rows, cols), size = self.grid, self.block_size
        dense = delta.new_zeros(rows, cols, size, size).index_put(
            (self.rows.long(), self.cols), delta, accumulate=True
        )
        return dense.transpose(1, 2).reshape(self.out_features, self.in_features)


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"off by {error:.1e} of the largest entry"


def test_block_grad(case):
    start = torch.randn(case.blocks + 3, case.block_size, case.block_size, dtype=torch.float64, device=case.device)
    start = start.float() if case.dtype != torch.float64 else start
    grad = start.clone()
    ops.block_grad_(grad, case.dy, case.x, case.slots, case.rows, case.cols)
    expected = start.double()
    expected[case.slots] += case.grid_of(case.dense_gradient)[case.rows.long(), case.cols]
    assert_close(grad, expected, SUM_TOLERANCE[case.dtype])
    untouched = [slot for slot in range(case.blocks + 3) if slot not in case.slots.tolist()]
    assert torch.equal(grad[untouched], start[untouched])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_block_grad_rounds_a_narrow_sum_once(device, dtype):
    case = Case(16, 2, 2, 33, 3, torch.float32, "contiguous", device)
    start = torch.full((6, 16, 16), 100.0, dtype=dtype, device=device)
    exact, grad = start.float(), start.clone()
    ops.block_grad_(exact, case.dy, case.x, case.slots, case.rows, case.cols)
    ops.block_grad_(grad, case.dy, case.x, case.slots, case.rows, case.cols)
    torch.testing.assert_close(grad, exact.to(dtype), rtol=1e-6 if dtype == torch.float64 else 0, atol=0)


def test_second_operand_takes_the_dtype_of_the_first(device):
    case = Case(16, 2, 2, 33, 3, torch.float32, "contiguous", device)
    grads = torch.zeros(2, 6, 16, 16, device=device)
    dy, rounded = case.dy.bfloat16(), case.x.bfloat16()
    for grad, x in zip(grads, (case.x, rounded), strict=True):
        ops.block_grad_(grad, dy, x, case.slots, case.rows, case.cols)
    assert torch.equal(*grads)
    assert torch.equal(ops.block_scores(dy, case.x, 16, "l2"), ops.block_scores(dy, rounded, 16, "l2"))
    delta = torch.randn(3, 16, 16, device=device)
    products = [ops.block_matmul(rounded, d, case.rows, case.cols, 32) for d in (delta, delta.bfloat16())]
    assert products[0].dtype == torch.bfloat16 and torch.equal(*products)


def test_block_matmul(case):
    x, delta = case.x.requires_grad_(), case.delta().requires_grad_()
    y = ops.block_matmul(x, delta, case.rows, case.cols, case.out_features)
    assert y.dtype == x.dtype
    dx, ddelta = torch.autograd.grad(y, (x, delta), case.dy)

    dense_x, dense_delta = (tensor.detach().double().requires_grad_() for tensor in (x, delta))
    expected = dense_x @ case.embed(dense_delta).T
    expected_dx, expected_ddelta = torch.autograd.grad(expected, (dense_x, dense_delta), case.dy.double())
    assert_close(y, expected.detach(), TOLERANCE[case.dtype])
    assert_close(dx, expected_dx, TOLERANCE[case.dtype])
    assert_close(ddelta, expected_ddelta, TOLERANCE[case.dtype])


def test_block_matmul_gradient_of_a_float32_delta_is_not_rounded(device):
    case = Case(16, 2, 2, 33, 3, torch.bfloat16, "contiguous", device)
    delta = case.delta().float().requires_grad_()
    ops.block_matmul(case.x, delta, case.rows, case.cols, case.out_features).backward(case.dy)
    assert_close(delta.grad, case.grid_of(case.dense_gradient)[case.rows.long(), case.cols], 1e-5)


def test_block_matmul_gradcheck():
    case = Case(4, 3, 2, 5, 4, torch.float64, "transposed", "cpu")
    inputs = case.x.requires_grad_(), case.delta().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d: ops.block_matmul(x, d, case.rows, case.cols, 12), inputs)


def test_block_matmul_has_no_second_derivative():
    case = Case(4, 3, 2, 5, 4, torch.float64, "contiguous", "cpu")
    y = ops.block_matmul(case.x.requires_grad_(), case.delta(), case.rows, case.cols, 12)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), case.x, create_graph=True)


@pytest.mark.parametrize("score", ops.SCORES)
def test_block_scores(case, score):
    scores = ops.block_scores(case.dy, case.x, case.block_size, score)
    assert scores.dtype == torch.float32
    assert_close(scores, naive_scores(case.grid_of(case.dense_gradient), score), 1e-5)
    dense = ops.reduce_blocks(case.dense_gradient, case.block_size, score)
    assert_close(dense, naive_scores(case.grid_of(case.dense_gradient), score), 1e-12)


def naive_scores(grid, score) -> torch.Tensor:
    """[R, C, b, b] -> [R, C], block by block."""
    formulas = {
        "abs_mean": lambda g: g.abs().mean(),
        "mean_abs": lambda g: g.mean().abs(),
        "l1": lambda g: g.abs().sum(),
        "l2": lambda g: g.pow(2).sum().sqrt(),
    }
    return torch.stack([torch.stack([formulas[score](block) for block in row]) for row in grid])


def test_block_sums(case):
    expected = case.grid_of(case.dense_gradient).sum((2, 3))
    assert_close(ops.block_sums(case.dy, case.x, case.block_size), expected, 1e-5)


def test_reduce_blocks_sums_a_narrow_gradient_in_float32():
    gradient = torch.full((96, 96), 0.99, dtype=torch.bfloat16)
    assert ops.reduce_blocks(gradient, 96, "l1").item() == pytest.approx(gradient[0, 0].item() * 96**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [4, 16, 48])
def test_write_blocks(device, dtype, size):
    weights = [torch.zeros(2 * size, 3 * size, dtype=dtype, device=device) for _ in range(2)]
    expected = [weight.clone() for weight in weights]
    # Halves of small integers: every dtype has them, so that nothing depends on rounding.
    values = torch.randint(-128, 128, (3, size, size), device=device).mT / 2

    def views(first, second):
        return [first[size:, :size], second.T[size : 2 * size, size:], first[:size, 2 * size :]]

    for view, value in zip(views(*expected), values, strict=True):
        view.copy_(value)
    ops.write_blocks(views(*weights), values)
    assert all(map(torch.equal, weights, expected))
    pointers = ops.block_pointers(views(*weights))
    ops.write_blocks(views(*weights), -values, pointers)
    assert all(torch.equal(weight, -other) for weight, other in zip(weights, expected, strict=True))
    ops.write_blocks([], values[:0], ops.block_pointers([]))


def test_flops_are_those_of_the_dense_product():
    """With every block listed, each operation is a dense product, which PyTorch counts itself."""
    case = Case(16, 3, 2, 37, 6, torch.float32, "contiguous", "cpu")
    rows, cols = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
    grad, delta = torch.zeros(6, 16, 16), case.delta().requires_grad_()

    def flops(function, *args):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    dense = flops(torch.mm, case.dy.T, case.x)
    assert dense > 0
    assert flops(ops.block_grad_, grad, case.dy, case.x, torch.arange(6), rows, cols) == dense
    assert flops(ops.block_grad_, grad, case.dy, case.x, torch.arange(2), rows[:2], cols[:2]) * 3 == dense
    assert flops(ops.block_scores, case.dy, case.x, 16, "l1") == dense
    pooled = flops(reference.block_sums, case.dy, case.x, 16)
    assert flops(ops.block_scores, case.dy, case.x, 16, "mean_abs") == pooled == dense // 16**2

    def train(x, delta):
        ops.block_matmul(x, delta, rows, cols, case.out_features).sum().backward()

    # Forward, and the gradients that are asked for.
    assert flops(ops.block_matmul, case.x, delta, rows, cols, case.out_features) == dense
    assert flops(train, case.x, delta) == 2 * dense
    assert flops(train, case.x.clone().requires_grad_(), delta.detach()) == 2 * dense
    assert flops(train, case.x.clone().requires_grad_(), delta) == 3 * dense


def test_opcheck(device):
    case = Case(16, 3, 2, 9, 4, torch.float32, "transposed", device)
    grad = torch.zeros(7, 16, 16, device=device)
    library.opcheck(ops.block_grad_, (grad, case.dy, case.x, case.slots, case.rows, case.cols))
    library.opcheck(ops.block_scores, (case.dy, case.x, 16, "l2"))
    operands = case.x.requires_grad_(), case.delta().requires_grad_()
    library.opcheck(ops.block_matmul, (*operands, case.rows, case.cols, case.out_features))


def test_compiles_without_graph_break():
    case = Case(4, 3, 2, 9, 4, torch.float32, "contiguous", "cpu")

    def step(x, delta, grad):
        y = ops.block_matmul(x, delta, case.rows, case.cols, 12)
        ops.block_grad_(grad, y.detach(), x.detach(), case.slots, case.rows, case.cols)
        return y, ops.block_scores(y.detach(), x.detach(), 4, "l1")

    def run(function, train, tokens):
        x, delta, grad = case.x[:tokens].clone(), case.delta(), torch.zeros(7, 4, 4)
        x.requires_grad_(train), delta.requires_grad_(train)
        y, scores = function(x, delta, grad)
        if train:
            y.square().sum().backward()
        return y, scores, grad, x.grad, delta.grad

    # Inductor only forward: without anything to fuse it has no C++ to compile, which takes long.
    for backend, train in (("aot_eager", True), ("inductor", False)):
        torch.compiler.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
        for tokens in (9, 6):
            case.generator.manual_seed(0)
            expected = run(step, train, tokens)
            case.generator.manual_seed(0)
            torch.testing.assert_close(run(compiled, train, tokens), expected)


def test_errors():
    dy, x, index = torch.zeros(3, 8), torch.zeros(3, 10), torch.zeros(1, dtype=torch.int32)
    block = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="4 does not divide 10"):
        ops.block_grad_(block, dy, x, index, index, index)
    with pytest.raises(ValueError, match="4 does not divide 10"):
        ops.block_matmul(dy, block, index, index, 10)
    with pytest.raises(ValueError, match="4 does not divide 10"):
        ops.block_scores(dy, x, 4, "l1")
    with pytest.raises(ValueError, match="'l3'; choose one of abs_mean"):
        ops.block_scores(dy, dy, 4, "l3")


def test_triton_is_optional(monkeypatch):
    monkeypatch.setattr(ops, "interpret", True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "smt_peft.ops.triton_kernels", raising=False)
    monkeypatch.delattr(ops, "triton_kernels", raising=False)
    ops._triton_kernels.cache_clear()
    try:
        assert ops._implementation(torch.zeros(1), 16) is reference
        assert ops.block_pointers([torch.zeros(4, 4)]) is None
    finally:
        ops._triton_kernels.cache_clear()
