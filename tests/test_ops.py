"""The block operations against dense float64 autograd, on every way to compute them.

`test_triton.py` runs this file once more where the Triton kernels can run: on CUDA or in Triton's interpreter.
"""

import os
import sys
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch
from torch import library
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from smt_peft import ops
from smt_peft.ops import reference

TRITON_RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
# Of the result's largest entry. float32 sums of 16-bit inputs must be as good as those of float32 inputs.
SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# Of a result in the dtype itself. Triton's interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# block size, block rows, block columns, tokens, blocks, dtype, layout, how the two sides name features
CASES = [
    (4, 5, 3, 37, 7, torch.float32, "contiguous", "tiles"),
    (4, 3, 2, 9, 4, torch.float64, "transposed", "lists"),
    (16, 3, 2, 1, 4, torch.float32, "sliced", "tiles"),
    (16, 5, 3, 70, 9, torch.bfloat16, "transposed", "tiles"),
    (16, 5, 3, 20, 9, torch.float32, "contiguous", "lists"),
    (16, 2, 2, 0, 3, torch.float32, "contiguous", "lists"),
    (16, 2, 2, 7, 0, torch.float32, "contiguous", "tiles"),
    (16, 2, 2, 7, 0, torch.bfloat16, "contiguous", "lists"),
    (32, 2, 4, 65, 5, torch.float16, "sliced", "tiles"),
    (32, 4, 3, 33, 1, torch.bfloat16, "contiguous", "out lists"),
    (48, 3, 2, 37, 5, torch.bfloat16, "contiguous", "in lists"),
    (48, 2, 2, 30, 3, torch.float32, "transposed", "tiles"),
    (64, 2, 3, 130, 4, torch.float32, "contiguous", "out lists"),
    (64, 3, 1, 33, 3, torch.bfloat16, "sliced", "lists"),
]


@pytest.fixture(params=["one by one", "batched", *["triton"] * TRITON_RUNS])
def device(request, monkeypatch) -> str:
    """Each way to compute; its value is the device that takes it."""
    if request.param == "triton":
        if torch.cuda.is_available():
            return "cuda"
        monkeypatch.setattr(ops, "interpret", True)
    else:
        monkeypatch.setattr(reference, "CALL_COST", {"one by one": -1, "batched": 10**9}[request.param])
        monkeypatch.setattr(reference, "_GATHER_ELEMENTS", 1000)  # several chunks, and of several blocks
        monkeypatch.setattr(reference, "_STRIP_ELEMENTS", 4000)
    return "cpu"


@pytest.fixture(params=CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case))
def case(request, device):
    return Case(*request.param, device=device)


@pytest.fixture
def small(device):
    return Case(16, 3, 4, 33, 5, device=device)


class Case:
    """Random operands and their dense float64 counterparts. Blocks share rows, columns and now and then a place."""

    def __init__(
        self, block_size, block_rows, block_cols, tokens, blocks, dtype=torch.float32, layout="contiguous",
        sides="tiles", device="cpu",
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(block_size + tokens)
        self.block_size, self.blocks, self.dtype, self.layout, self.device = block_size, blocks, dtype, layout, device
        self.grid = block_rows, block_cols
        self.out_features, self.in_features = block_rows * block_size, block_cols * block_size
        self.dy, self.x = self.matrix(tokens, self.out_features), self.matrix(tokens, self.in_features)
        self.start = self.matrix(tokens, self.out_features)
        rows, cols = (torch.randint(high, (blocks,), generator=self.generator) for high in self.grid)
        out, self.out_lines = self.side(rows, block_rows, sides in ("lists", "out lists"))
        inner, self.in_lines = self.side(cols, block_cols, sides in ("lists", "in lists"))
        self.keeping, self.gathering = (
            ops.plan(out, inner, keep, device=device)._replace(in_order=False) for keep in (True, False)
        )
        self.out, self.inner = self.keeping[:2]
        # The features of each block, [n, b, 1] and [n, 1, b].
        self.place = self.out_lines[rows][:, :, None].to(device), self.in_lines[cols][:, None, :].to(device)
        self.dense_gradient = self.dy.double().T @ self.x.double()

    def side(self, places, lines, listed) -> tuple:
        """What a plan is made of; if `listed` features at random. Also the features of every line, [lines, b]."""
        features = torch.arange(lines * self.block_size)
        if listed:
            features = torch.randperm(len(features), generator=self.generator)
        features = features.view(lines, self.block_size)
        return (features[places] if listed else places), features

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

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
        dense = delta.new_zeros(self.out_features, self.in_features)
        return dense.index_put(self.place, delta, accumulate=True)

    def untouched(self) -> torch.Tensor:
        """The output features without a block."""
        without = torch.ones(self.out_features, dtype=torch.bool, device=self.device)
        without[self.place[0].flatten()] = False
        return without


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"off by {error:.1e} of the largest entry"


def leaves(*tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_plan():
    rows, cols = torch.tensor([5, 2, 5, 0], dtype=torch.int32), torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    plan = ops.plan(rows, cols, keep_input=False)
    out, inner = ([tensor.tolist() for tensor in side] for side in plan[:2])
    assert out == [[0, 2, 5], [2, 1, 2, 0], [5, 2, 5, 0], [3, 1, 0, 2], [0, 1, 2, 4], []]
    assert inner == [[0, 1], [1, 1, 0, 1], [1, 1, 0, 1], [2, 0, 1, 3], [0, 1, 4], []]
    assert all(tensor.dtype == torch.int64 for side in plan[:3] for tensor in side)
    lists = ops.plan(torch.tensor([[7, 1], [2, 4], [7, 1]]), torch.tensor([[0, 1]] * 3), keep_input=False)
    assert lists.out.at.tolist() == [[2, 4], [7, 1]] and lists.out.place.tolist() == [1, 0, 1]
    assert lists.out.features.tolist() == [7, 1, 2, 4, 7, 1] and not len(lists.kept.features)
    kept = ops.plan(rows, cols + 3, keep_input=False).kept
    assert kept.at.tolist() == [0, 1] and kept.place.tolist() == [1, 1, 0, 1]
    assert not plan.in_order and ops.plan(rows[:3], torch.tensor([1, 2, 4]), keep_input=False).in_order
    for keep in (True, False):
        plan = ops.plan(rows, cols, keep_input=keep)
        assert plan.gathers is not keep


# --- the operators ---------------------------------------------------------------------------------------------------


def test_block_add(case):
    y, delta = case.start.clone(), case.delta()
    ops.block_add_(y, case.x, delta, case.out, case.inner)
    expected = case.start.double() + case.x.double() @ case.embed(delta.double()).T
    assert_close(y, expected, TOLERANCE[case.dtype])
    assert torch.equal(y[:, case.untouched()], case.start[:, case.untouched()])

    dx = torch.zeros(case.x.shape, dtype=reference.sum_dtype(case.dtype), device=case.device)
    ops.block_add_(dx, case.dy, delta.mT, case.inner, case.out)
    assert_close(dx, case.dy.double() @ case.embed(delta.double()), SUM_TOLERANCE[case.dtype])


def test_block_grad(case):
    gradient = ops.block_grad(case.dy, case.x, case.out, case.inner, case.block_size)
    assert gradient.dtype == reference.sum_dtype(case.dtype)
    assert_close(gradient, case.dense_gradient[case.place], SUM_TOLERANCE[case.dtype])
    kept = reference.gather(case.x, case.inner.at, case.block_size)
    from_kept = ops.block_grad(case.dy, kept, case.out, case.gathering.kept, case.block_size)
    assert_close(from_kept, gradient.double(), SUM_TOLERANCE[case.dtype])


def test_lists_of_features_are_tiles_of_permuted_matrices(device):
    case = Case(16, 3, 4, 33, 5, sides="lists", device=device)
    coordinates = [(lines.flatten(), lines) for lines in (case.out_lines, case.in_lines)]
    # Which line of all, not only of those that have blocks.
    lines = [(whole[:, None] == side.at.cpu()[None]).all(2).int().argmax(0)
             for (_, whole), side in zip(coordinates, case.keeping[:2], strict=True)]  # fmt: skip
    rows, cols = (line[side.member.cpu()] for line, side in zip(lines, case.keeping[:2], strict=True))
    tiles = ops.plan(rows, cols, keep_input=True, device=device)
    (out, _), (inner, _) = coordinates
    delta, permuted = case.delta(), case.start[:, out].clone()
    ops.block_add_(permuted, case.x[:, inner], delta, *tiles[:2])
    y = case.start.clone()
    ops.block_add_(y, case.x, delta, *case.keeping[:2])
    torch.testing.assert_close(y[:, out], permuted)
    gradients = [
        ops.block_grad(case.dy[:, out], case.x[:, inner], *tiles[:2], 16),
        ops.block_grad(case.dy, case.x, *case.keeping[:2], 16),
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sides", ["tiles", "lists"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_y_of_another_dtype_is_rounded_once(device, dtype, sides):
    """However many blocks add to it. A wider one is not rounded at all."""
    case = Case(16, 2, 4, 33, 7, sides=sides, device=device)
    value, delta, product = 1e9 if dtype == torch.float64 else 100, case.delta(), torch.zeros_like(case.start)
    y = torch.full_like(product, value, dtype=dtype)
    for total in (product, y):
        ops.block_add_(total, case.x, delta, case.out, case.inner)
    expected = value + product.double()
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and ops.interpret else 2)
    assert ((y.double() - expected).abs() <= rounding * expected.abs() + 2e-5).all()


def test_second_operand_takes_the_dtype_of_the_first(small):
    dy, rounded = small.dy.half(), small.x.half()
    gradients = [ops.block_grad(dy, x, small.out, small.inner, 16) for x in (small.x, rounded)]
    assert torch.equal(*gradients)
    assert torch.equal(ops.block_scores(dy, small.x, 16, "l2"), ops.block_scores(dy, rounded, 16, "l2"))
    sums, delta = [torch.zeros_like(small.start) for _ in range(2)], small.delta()
    for y, values in zip(sums, (delta, delta.half()), strict=True):
        ops.block_add_(y, rounded, values, small.out, small.inner)
    assert torch.equal(*sums)


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


# --- add_blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_input", "in_place"), [(True, False), (False, True)])
def test_add_blocks(case, keep_input, in_place):
    plan = case.keeping if keep_input else case.gathering
    start, x, delta = leaves(case.start, case.x, case.delta())
    y = start * 1  # not a leaf
    before = y.detach().clone()
    total = ops.add_blocks(y, x, delta, plan, in_place)
    assert total.dtype == case.dtype
    if total.numel():
        assert (total.data_ptr() == y.data_ptr()) == (in_place and y.is_contiguous())
        assert in_place or torch.equal(y, before)
    gradients = torch.autograd.grad(total, (start, x, delta), case.dy)

    dense = leaves(start.double(), x.double(), delta.double())
    expected = dense[0] + dense[1] @ case.embed(dense[2]).T
    assert_close(total, expected.detach(), TOLERANCE[case.dtype])
    assert torch.equal(total[:, case.untouched()], start[:, case.untouched()])
    expected = torch.autograd.grad(expected, dense, case.dy.double())
    for gradient, truth, leaf in zip(gradients, expected, (start, x, delta), strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, truth, TOLERANCE[case.dtype])


@pytest.mark.parametrize("sides", ["tiles", "lists"])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("contiguous", ["dy", "x"])
def test_an_input_of_another_layout_than_the_gradient(sides, in_order, contiguous):
    """As of the first token alone, or of patches: forward and backward go different ways."""
    case = Case(4, 3, 4, 7, 2, sides=sides)
    blocks = [torch.tensor(places) for places in ([0, 2], [1, 3] if in_order else [3, 3])]
    listed = [
        lines[places] if sides == "lists" else places
        for lines, places in zip((case.out_lines, case.in_lines), blocks, strict=True)
    ]
    plan = ops.plan(*listed, keep_input=False)
    assert plan.gathers and (sides == "lists" or plan.in_order == in_order)
    place = case.out_lines[blocks[0]][:, :, None], case.in_lines[blocks[1]][:, None, :]
    x, dy = (
        (matrix if contiguous == name else matrix.T.contiguous().T)
        for name, matrix in (("x", case.x), ("dy", case.dy))
    )
    x, delta = leaves(x, case.delta())
    total = ops.add_blocks(case.start, x, delta, plan, False)
    gradients = torch.autograd.grad(total, (x, delta), dy)
    dense = torch.zeros(case.out_features, case.in_features).double()
    dense[place] = delta.detach().double()
    assert_close(total, case.start.double() + x.double() @ dense.T, 1e-5)
    assert_close(gradients[0], dy.double() @ dense, 1e-5)
    assert_close(gradients[1], (dy.double().T @ x.detach().double())[place], 1e-5)


def test_gradient_of_a_float32_delta_is_not_rounded(device):
    case = Case(16, 2, 2, 33, 3, torch.bfloat16, device=device)
    delta = case.delta().float().requires_grad_()
    ops.add_blocks(case.start, case.x, delta, case.keeping, True).backward(case.dy)
    assert_close(delta.grad, case.dense_gradient[case.place], 1e-5)


@pytest.mark.parametrize("sides", ["tiles", "lists"])
def test_gradcheck(sides):
    case = Case(4, 3, 2, 5, 4, torch.float64, "transposed", sides)
    for plan in (case.keeping, case.gathering):
        inputs = leaves(case.start, case.x, case.delta())
        assert torch.autograd.gradcheck(lambda *args, plan=plan: ops.add_blocks(*args, plan, False), inputs)


@pytest.mark.parametrize("trained", [(), ("y",), ("x",), ("delta",), ("y", "x"), ("y", "delta"), ("x", "delta")])
@pytest.mark.parametrize("keep_input", [True, False])
def test_only_what_is_trained_gets_a_gradient(small, trained, keep_input):
    plan = small.keeping if keep_input else small.gathering
    operands = dict(zip(("y", "x", "delta"), leaves(small.start, small.x, small.delta()), strict=True))
    total = ops.add_blocks(*operands.values(), plan, False)
    wanted = [operands[name] for name in trained]
    expected = torch.autograd.grad(total, wanted, small.dy) if trained else ()
    for name, tensor in operands.items():
        tensor.requires_grad_(name in trained)
    again = ops.add_blocks(*operands.values(), plan, False)
    assert torch.equal(total, again) and again.requires_grad == bool(trained)
    if trained:
        again.backward(small.dy)
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip(wanted, expected, strict=True))
    assert all(operands[name].grad is None for name in operands if name not in trained)


def kept_for_backward(*args) -> list[torch.Tensor]:
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.add_blocks(*args)
    return saved


def test_only_lines_that_are_read_are_kept(device):
    case = Case(16, 3, 8, 33, 3, device=device)
    lines = len(case.inner.at)
    assert lines < 8
    y, (x, delta) = case.start, leaves(case.x, case.delta())
    kept, saved_delta = kept_for_backward(y, x, delta, case.gathering, True)
    assert kept.numel() == 33 * lines * 16 and kept.untyped_storage().nbytes() == 33 * lines * 16 * 4
    assert saved_delta.data_ptr() == delta.data_ptr()
    kept, _ = kept_for_backward(y, x, delta, case.keeping, True)
    assert kept.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for plan in (case.keeping, case.gathering):  # a gradient of x alone needs no input
        (alone,) = kept_for_backward(y, x, delta.detach(), plan, True)
        assert alone.data_ptr() == delta.data_ptr()


def test_all_lines_are_kept_without_a_copy(device):
    case = Case(16, 3, 1, 33, 3, device=device)
    x = case.x.requires_grad_()
    kept, _ = kept_for_backward(case.start, x, case.delta().requires_grad_(), case.gathering, True)
    assert kept.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("keep_input", [True, False])
def test_a_second_derivative_is_refused(small, keep_input):
    """At once: whatever the gradients were joined with, a part of theirs could be missing."""
    plan = small.keeping if keep_input else small.gathering
    start, x, delta = leaves(small.start, small.x, small.delta())
    for trained in (delta, delta.detach()):
        total = ops.add_blocks(start * 1, x, trained, plan, True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total.sum(), x, create_graph=True)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("of", ["y", "x", "delta"])
def test_a_forward_mode_derivative_is_refused(small, of, has_grad, in_place):
    """Without a graph the tangent of the product would be left out in silence."""
    operands = {"y": small.start.clone(), "x": small.x, "delta": small.delta()}
    with torch.set_grad_enabled(has_grad), forward_ad.dual_level():
        operands[of] = forward_ad.make_dual(operands[of], torch.ones_like(operands[of]))
        with pytest.raises(NotImplementedError):
            ops.add_blocks(**operands, plan=small.keeping, in_place=in_place)
        weight = torch.zeros(small.start.shape[1], small.x.shape[1])
        if has_grad and of != "y":
            with pytest.raises(NotImplementedError):
                ops.linear_add_blocks(operands["x"], weight, None, operands["delta"], small.keeping)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0), (1, 1, 5)])
@pytest.mark.parametrize("keep_input", [True, False])
def test_leading_dimensions(small, shape, keep_input):
    plan = small.keeping if keep_input else small.gathering
    y, x, delta = leaves(small.normal(*shape, 48), small.normal(*shape, 64), small.delta())
    flat = ops.add_blocks(y.view(-1, 48), x.view(-1, 64), delta, plan, False)
    total = ops.add_blocks(y, x, delta, plan, False)
    assert total.shape == (*shape, 48) and torch.equal(total.view(-1, 48), flat)
    expected = torch.autograd.grad(flat.square().sum(), (y, x, delta))
    gradients = torch.autograd.grad(total.square().sum(), (y, x, delta))
    assert all(map(torch.equal, gradients, expected))


def test_a_y_in_parts_of_other_memory(small):
    """Only a contiguous one is overwritten, and nothing beside it."""
    delta, plan = small.delta().requires_grad_(), small.keeping
    expected = ops.add_blocks(small.start, small.x, delta, plan, False)
    memory = torch.zeros(35, 48, device=small.device)
    memory[1:34] = small.start
    total = ops.add_blocks(memory[1:34], small.x, delta, plan, True)
    assert torch.equal(total, expected) and torch.equal(memory[1:34], total.detach())
    assert not memory[0].any() and not memory[34].any()
    for y in (small.start.T.contiguous().T, torch.cat([small.start] * 2, 1)[:, :48]):
        before = y.clone()
        assert torch.equal(ops.add_blocks(y, small.x, delta, plan, True), expected) and torch.equal(y, before)
    row = small.start[:1].expand(33, 48)  # one row of memory
    total = ops.add_blocks(row, small.x, delta, plan, True)
    torch.testing.assert_close(total, expected - small.start + row)


def test_the_sum_may_be_changed_in_place(small):
    start, x, delta = leaves(small.start, small.x, small.delta())
    total = ops.add_blocks(start * 1, x, delta, small.gathering, True)
    total.mul_(2)
    total[0] = 0
    gradients = torch.autograd.grad(total.sum(), (start, x, delta))
    total = ops.add_blocks(start, x, delta, small.gathering, False)
    expected = torch.autograd.grad(2 * total[1:].sum(), (start, x, delta))
    torch.testing.assert_close(gradients, expected)


def test_overwriting_what_backward_needs_is_noticed(small):
    x, delta = leaves(small.x, small.delta())
    total = ops.add_blocks(small.start.clone().requires_grad_().sigmoid(), x, delta, small.keeping, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()
    x = x * 1
    totals = [ops.add_blocks(small.start, x, delta, plan, False) for plan in (small.keeping, small.gathering)]
    x.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        totals[0].backward(small.dy)
    (gradient,) = torch.autograd.grad(totals[1], delta, small.dy)  # has a copy
    assert_close(gradient, small.dense_gradient[small.place], 1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(small, mode):
    start, x, delta = leaves(small.start, small.x, small.delta())
    expected = ops.add_blocks(start, x, delta, small.keeping, False)
    with mode():
        for plan in (small.keeping, small.gathering):
            y = start * 1
            total = ops.add_blocks(y, x, delta, plan, True)
            assert torch.equal(total, expected) and not total.requires_grad and total.data_ptr() == y.data_ptr()
            torch.testing.assert_close(ops.add_blocks(start, x * 1, delta * 1, plan, False), expected)
    assert torch.equal(start, small.start)


@pytest.mark.parametrize("keep_input", [True, False])
def test_autocast(small, keep_input):
    """Operands are rounded to bfloat16, as those of the base layer are, and sums are not."""
    plan = small.keeping if keep_input else small.gathering
    weight = small.normal(48, 64)
    # Triton's interpreter cuts bfloat16 off instead of rounding to it.
    x, delta = leaves(small.x, small.delta().bfloat16().float() if ops.interpret else small.delta())
    with torch.autocast(small.device, torch.bfloat16):
        y = torch.nn.functional.linear(x, weight)
        before, dy = y.detach().double(), small.dy.to(y.dtype)
        total = ops.add_blocks(y, x, delta, plan, True)
        (kept,) = (saved for saved in kept_for_backward(y, x, delta, plan, False) if saved.ndim == 2)
        # Often backward runs outside of autocast, but it must not matter.
        dx, ddelta = torch.autograd.grad(total - y, (x, delta), dy)
        scores = ops.block_scores(small.dy, small.x, 16, "l1")
    assert total.dtype == kept.dtype == torch.bfloat16 and dx.dtype == ddelta.dtype == torch.float32
    narrow_x, narrow_delta = (tensor.detach().bfloat16().double() for tensor in (x, delta))
    expected = before + narrow_x @ small.embed(narrow_delta).T
    error = (total.double() - expected).abs()
    assert (error <= expected.abs() * torch.finfo(torch.bfloat16).eps / (1 if ops.interpret else 2) + 1e-4).all()
    assert_close(ddelta, (dy.double().T @ narrow_x)[small.place], 1e-5)
    assert_close(dx, dy.double() @ small.embed(narrow_delta), 1e-5)
    assert torch.equal(scores, ops.block_scores(small.dy, small.x, 16, "l1"))


# --- what surrounds them ---------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_dense_product():
    """With every block listed, each operation is a dense product, which PyTorch counts itself."""
    case = Case(16, 3, 2, 37, 6)
    rows, cols = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
    plan, delta = ops.plan(rows, cols, keep_input=True), case.delta().requires_grad_()

    def flops(function, *args):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    dense = flops(torch.mm, case.dy.T, case.x)
    assert dense > 0
    assert flops(ops.block_grad, case.dy, case.x, plan.out, plan.inner, 16) == dense
    third = ops.plan(rows[:2], cols[:2], keep_input=True)
    assert flops(ops.block_grad, case.dy, case.x, third.out, third.inner, 16) * 3 == dense
    assert flops(ops.block_add_, case.start, case.x, case.delta(), plan.out, plan.inner) == dense
    assert flops(ops.block_scores, case.dy, case.x, 16, "l1") == dense
    pooled = flops(reference.block_sums, case.dy, case.x, 16)
    assert flops(ops.block_scores, case.dy, case.x, 16, "mean_abs") == pooled == dense // 16**2

    def train(x, delta):
        ops.add_blocks(case.start, x, delta, plan, False).sum().backward()

    # Forward, and the gradients that are asked for.
    assert flops(train, case.x, delta) == 2 * dense
    assert flops(train, case.x.clone().requires_grad_(), delta.detach()) == 2 * dense
    assert flops(train, case.x.clone().requires_grad_(), delta) == 3 * dense


def test_opcheck(device):
    case = Case(16, 3, 2, 9, 4, layout="transposed", sides="out lists", device=device)
    library.opcheck(ops.block_add_, (case.start, case.x, case.delta(), list(case.out), list(case.inner)))
    library.opcheck(ops.block_grad, (case.dy, case.x, list(case.out), list(case.inner), 16))
    library.opcheck(ops.block_scores, (case.dy, case.x, 16, "l2"))


@pytest.mark.parametrize("keep_input", [True, False])
def test_compiles_without_graph_break(keep_input):
    case = Case(4, 3, 2, 9, 4)
    plan = case.keeping if keep_input else case.gathering
    weight, values = case.normal(12, 8), case.delta()

    def step(x, delta):
        y = ops.add_blocks(x @ weight.T, x, delta, plan, True)
        scores = ops.block_scores(y.detach(), x.detach(), 4, "l1")
        return y, scores, ops.block_grad(y.detach(), x.detach(), plan.out, plan.inner, 4)

    def run(function, train, tokens):
        x, delta = case.x[:tokens].clone().requires_grad_(train), values.clone().requires_grad_(train)
        y, scores, gradient = function(x, delta)
        if train:
            y.square().sum().backward()
        return y, scores, gradient, x.grad, delta.grad

    # Inductor only forward: without anything to fuse it has no C++ to compile, which takes long.
    for backend, train in (("aot_eager", True), ("inductor", False)):
        torch.compiler.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
        for tokens in (9, 6):
            torch.testing.assert_close(run(compiled, train, tokens), run(step, train, tokens))


def test_errors():
    dy, x, block = torch.zeros(3, 8), torch.zeros(3, 10), torch.zeros(1, 4, 4)
    plan = ops.plan(torch.zeros(1), torch.zeros(1), keep_input=True)
    with pytest.raises(ValueError, match="4 does not divide 10"):
        ops.block_grad(dy, x, plan.out, plan.inner, 4)
    with pytest.raises(ValueError, match="4 does not divide 10"):
        ops.block_add_(x, dy, block, plan.out, plan.inner)
    with pytest.raises(ValueError, match="4 does not divide 10"):
        ops.block_scores(dy, x, 4, "l1")
    with pytest.raises(ValueError, match="'l3'; choose one of abs_mean"):
        ops.block_scores(dy, dy, 4, "l3")


def test_plain_pytorch_reads_nothing_back_from_a_device():
    """Of one that has no values, as a GPU has none for the host, nothing can be read."""
    plan = ops.plan(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1]), keep_input=True, device="meta")
    dy, x = torch.empty(9000, 24, device="meta"), torch.empty(9000, 16, device="meta")
    assert len(x) * 8**2 > reference.CALL_COST
    delta = reference.block_grad(dy, x, plan.out, plan.inner, 8)
    assert delta.shape == (3, 8, 8)
    reference.block_add_(dy, x, delta, plan.out, plan.inner)


@pytest.mark.parametrize(
    "fails_with", [RuntimeError("Failed to find C compiler"), CalledProcessError(1, "gcc")], ids=str
)
def test_triton_that_cannot_compile_is_left_out(monkeypatch, fails_with):
    """As on images without a C compiler or Python's headers, where all else works."""
    kernels = pytest.importorskip("smt_peft.ops.triton_kernels")

    def get_current_target():
        raise fails_with

    active = SimpleNamespace(get_current_target=get_current_target)
    monkeypatch.setattr(kernels.triton, "runtime", SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setattr(ops, "interpret", False)
    ops._triton_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch computes instead"):
            assert ops._triton_kernels() is None
        active.get_current_target = lambda: "cuda:90"
        ops._triton_kernels.cache_clear()
        assert ops._triton_kernels() is kernels
    finally:
        ops._triton_kernels.cache_clear()


def test_triton_is_optional(monkeypatch):
    monkeypatch.setattr(ops, "interpret", True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "smt_peft.ops.triton_kernels", raising=False)
    monkeypatch.delattr(ops, "triton_kernels", raising=False)
    ops._triton_kernels.cache_clear()
    try:
        assert ops._implementation(16, torch.zeros(1)) is reference
    finally:
        ops._triton_kernels.cache_clear()
