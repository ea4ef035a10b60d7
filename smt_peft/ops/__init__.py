"""Operations on selected blocks of weight matrices, and the one place that chooses how they are computed.

`reference.py` defines them in plain PyTorch; `triton_kernels.py` has the same functions for CUDA tensors, where
Triton can be imported; `plan.py` says where blocks lie. `block_add_`, `block_grad` and `block_scores` are custom
operators (`torch.ops.smt.*`): opaque to torch.compile and counted by `torch.utils.flop_counter`. Their arguments are
documented once, in `reference.py`. `add_blocks` and `linear_add_blocks` are what a layer calls.
"""

import warnings
from collections.abc import Callable
from functools import cache
from subprocess import SubprocessError
from types import ModuleType

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .plan import Plan, Side, entries, plan, tile_features
from .reference import SCORES, Score, block_sums, reduce_blocks, rounded_sum, sum_tiles

__all__ = [
    "Plan",
    "Score",
    "add_blocks",
    "block_add_",
    "block_grad",
    "block_scores",
    "block_sums",
    "entries",
    "is_autocast",
    "is_watched",
    "linear_add_blocks",
    "plan",
    "reduce_blocks",
    "rounded_sum",
    "sum_tiles",
    "tile_features",
]

# For tests: send CPU tensors to the Triton kernels too, which needs TRITON_INTERPRET=1 in the environment.
interpret = False

# PyTorch's `custom_op` would do the same for 17 microseconds more a call, which a hundred layers feel.
_operators = library.Library("smt", "DEF")
_operators.define("block_add_(Tensor(a!) y, Tensor x, Tensor delta, Tensor[] out, Tensor[] inner) -> ()")
_operators.define("block_grad(Tensor dy, Tensor x, Tensor[] out, Tensor[] inner, int block_size) -> Tensor")
_operators.define("block_scores(Tensor dy, Tensor x, int block_size, str score) -> Tensor")

block_add_ = torch.ops.smt.block_add_.default
block_grad = torch.ops.smt.block_grad.default
block_scores = torch.ops.smt.block_scores.default


def add_blocks(y: Tensor, x: Tensor, delta: Tensor, plan: Plan, in_place: bool) -> Tensor:
    """y + x @ D^T, D [out, in] being zero outside the blocks `delta`, with gradients for all three.

    For backward it keeps the part of x that `plan.kept` names, in the narrower dtype of x and y. A second derivative
    (`create_graph=True`) raises RuntimeError, and forward mode NotImplementedError.

    Args:
        y: [..., out], the base layer's output.
        x: [..., in].
        delta: [n, b, b].
        plan: where the blocks lie.
        in_place: whether y may be overwritten: nothing else holds it.
    """
    if torch.is_grad_enabled() and (delta.requires_grad or y.requires_grad or x.requires_grad):
        return AddBlocks.apply(y, x, delta, plan, in_place)
    _refuse_tangents(y, x, delta)
    total = _to_change(y, in_place)
    block_add_(total.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype), delta, plan.out, plan.inner)
    return total


def linear_add_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, plan: Plan) -> Tensor:
    """`add_blocks` to x @ weight^T + bias, with weight [out, in] and bias [out] frozen: the blocks' product is added
    in place, in backward too. Needs gradients enabled, one device, and one dtype for all but `delta`."""
    return LinearAddBlocks.apply(x, weight, bias, delta, plan)


class AddBlocks(torch.autograd.Function):
    """See `add_blocks`."""

    @staticmethod
    def forward(ctx, y, x, delta, plan, in_place):
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        total = _to_change(y, in_place)
        kept = _add(total, x, delta, plan)
        ctx.save_for_backward(kept if ctx.needs_input_grad[2] else None, delta)
        return total

    @staticmethod
    def backward(ctx, dy):
        kept, delta = ctx.saved_tensors
        dx = dy.new_zeros(ctx.shape, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return dy, dx, _backward(dy, dx, kept, delta, ctx.plan), None, None


class LinearAddBlocks(torch.autograd.Function):
    """See `linear_add_blocks`."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, plan):
        ctx.plan = plan
        total = torch.nn.functional.linear(x, weight, bias)
        if bias is not None:
            total = total.detach()  # it may be a view, which nobody may change
        kept = _add(total, x, delta, plan)
        ctx.save_for_backward(
            kept if ctx.needs_input_grad[3] else None, delta, weight if ctx.needs_input_grad[0] else None
        )
        return total

    @staticmethod
    def backward(ctx, dy):
        kept, delta, weight = ctx.saved_tensors
        dx = None if weight is None else torch.matmul(dy, weight)
        return dx, None, None, _backward(dy, dx, kept, delta, ctx.plan), None


def _add(total: Tensor, x: Tensor, delta: Tensor, plan: Plan) -> Tensor:
    """Add the product to `total` [..., out]; returns what to keep of x [..., in]."""
    if _is_short(x, total, delta, plan):
        return reference.short_forward(total, x, delta, plan)
    gather, add_, _ = _functions(delta.shape[1], x, total)
    flat, kept = x.reshape(-1, x.shape[-1]), x
    if plan.gathers:
        flat = kept = gather(flat, plan.inner.at, delta.shape[1])
    if flat.dtype.itemsize > total.dtype.itemsize:  # under autocast
        flat = kept = flat.to(total.dtype)
    add_(total.view(-1, total.shape[-1]), flat.to(total.dtype), delta, plan.out, plan.kept)
    return kept


def _backward(dy: Tensor, dx: Tensor | None, kept: Tensor | None, delta: Tensor, plan: Plan) -> Tensor | None:
    """Add to dx [..., in], if there is one, and return the gradient of `delta`, if what it needs was kept."""
    if torch.is_grad_enabled():  # better no second derivative than one that lacks a part
        raise RuntimeError("SMT's block product has no second derivative: do not pass create_graph=True.")
    if _is_short(dy, kept, delta, plan):
        return reference.short_backward(dy, dx, kept, delta, plan)
    dy, size = dy.reshape(-1, dy.shape[-1]), delta.shape[1]
    gather, add_, grad = _functions(size, dy, dy if dx is None else dx)
    if plan.out.at.ndim == 2:  # read twice, so copied out once
        dy = gather(dy, plan.out.at, size)
    if dx is not None:
        add_(dx.view(-1, dx.shape[-1]), dy, delta.mT, plan.inner, plan.read)
    if kept is None:
        return None
    features = plan.inner.at.shape[0] * size if plan.gathers else kept.shape[-1]
    kept = kept.reshape(dy.shape[0], features)
    return grad(dy, kept, plan.read, plan.kept, size).to(delta.dtype)


def _functions(block_size: int, *operands: Tensor) -> tuple[Callable, Callable, Callable]:
    """gather, block_add_ and block_grad: the operators, which cost the host time, only where something sees them (a
    compiler, a trace, a mode such as a counter of FLOPs, a subclass of Tensor, autocast); else what they call."""
    device = operands[0].device.type
    is_seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    if is_seen or is_autocast(device) or any(type(operand) is not Tensor for operand in operands):
        return reference.gather, block_add_, block_grad
    kernels = _implementation(block_size, *operands)
    return kernels.gather, kernels.block_add_, kernels.block_grad


def is_autocast(device: str) -> bool:
    """Whether autocast is on; there is none on some devices, such as meta, for which no compiler can ask."""
    is_available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return is_available and torch.is_autocast_enabled(device)


def is_watched() -> bool:
    """Whether a mode sees each operation and may keep what it gives, as selective checkpointing does: what is there is
    not to be changed in place then."""
    return is_in_torch_dispatch_mode(include_infra_modes=False)


def _is_short(matrix: Tensor, other: Tensor | None, delta: Tensor, plan: Plan) -> bool:
    """Whether the operators would cost more than what they do, as they do for few tokens on a CPU."""
    if matrix.is_cuda or interpret or type(matrix) is not Tensor or torch.compiler.is_compiling():
        return False
    return (
        other is not None
        and matrix.dtype == other.dtype == delta.dtype == torch.float32
        and matrix.is_contiguous()
        and other.is_contiguous()
        and 0 < matrix.numel() // matrix.shape[-1] * delta.shape[1] ** 2 <= reference.CALL_COST
        and not torch.is_autocast_enabled("cpu")
    )


def _to_change(y: Tensor, in_place: bool) -> Tensor:
    """What is added to: y itself or a copy. A compiler sees the copy, and leaves it out where nothing else reads y."""
    if in_place and y.is_contiguous() and not (torch.compiler.is_compiling() or is_watched()):
        return y.detach()
    return y.clone(memory_format=torch.contiguous_format)


def _refuse_tangents(*operands: Tensor) -> None:
    """Where autograd does not look it does not say either that a function has no forward mode."""
    if torch.compiler.is_compiling():
        return
    for operand in operands:
        if forward_ad.unpack_dual(operand).tangent is not None:
            raise NotImplementedError("SMT's block product has no forward-mode derivative: use reverse mode.")


@cache
def _triton_kernels() -> ModuleType | None:
    """None where Triton is not there or cannot work, as on images without a C compiler."""
    try:
        from . import triton_kernels
    except ImportError:
        return None
    try:
        if not interpret:
            triton_kernels.check_target()
    except (RuntimeError, OSError, AssertionError, SubprocessError) as error:  # Triton's own look-ups assert
        warnings.warn(
            f"Triton cannot compile SMT's kernels here ({error}); plain PyTorch computes instead, which is slower.",
            stacklevel=2,
        )
        return None
    return triton_kernels


def _implementation(block_size: int, *operands: Tensor) -> ModuleType:
    """The module that computes. Triton's matrix units take 16 x 16 tiles of at most 32 bits."""
    on_triton = (operands[0].is_cuda or interpret) and block_size % 16 == 0
    on_triton = on_triton and all(operand.dtype.itemsize <= 4 for operand in operands)
    return (on_triton and _triton_kernels()) or reference


def _check_divisible(block_size: int, *features: int) -> None:
    for size in features:
        if size % block_size:
            raise ValueError(f"The block size {block_size} does not divide {size} features.")


def _operator(name: str) -> Callable:
    """Register the decorated function as what the operator computes, without autograd and without autocast."""

    def register(compute: Callable) -> Callable:
        @library.impl(_operators, name, "CompositeExplicitAutograd")
        @torch.no_grad()
        def run(*args):
            device = args[0].device.type
            if not is_autocast(device):
                return compute(*args)
            with torch.autocast(device, enabled=False):  # it would round what is summed in a wider dtype
                return compute(*args)

        return compute

    return register


@_operator("block_add_")
def _block_add_(y: Tensor, x: Tensor, delta: Tensor, out: list[Tensor], inner: list[Tensor]) -> None:
    block_size = delta.shape[1]
    _check_divisible(block_size, y.shape[1], x.shape[1])
    _implementation(block_size, y, x).block_add_(y, x, delta, Side(*out), Side(*inner))


@_operator("block_grad")
def _block_grad(dy: Tensor, x: Tensor, out: list[Tensor], inner: list[Tensor], block_size: int) -> Tensor:
    _check_divisible(block_size, dy.shape[1], x.shape[1])
    return _implementation(block_size, dy).block_grad(dy, x, Side(*out), Side(*inner), block_size)


@_operator("block_scores")
def _block_scores(dy: Tensor, x: Tensor, block_size: int, score: str) -> Tensor:
    if score not in SCORES:
        raise ValueError(f"Unknown score {score!r}; choose one of {', '.join(SCORES)}.")
    _check_divisible(block_size, dy.shape[1], x.shape[1])
    return _implementation(block_size, dy).block_scores(dy, x, block_size, score)


@library.register_fake("smt::block_add_", lib=_operators)
def _block_add_fake(y, x, delta, out, inner):
    return None


@library.register_fake("smt::block_grad", lib=_operators)
def _block_grad_fake(dy, x, out, inner, block_size):
    return dy.new_empty(out[1].shape[0], block_size, block_size, dtype=reference.sum_dtype(dy.dtype))


@library.register_fake("smt::block_scores", lib=_operators)
def _block_scores_fake(dy, x, block_size, score):
    return dy.new_empty(dy.shape[1] // block_size, x.shape[1] // block_size, dtype=torch.float32)


@register_flop_formula(torch.ops.smt.block_add_)
def _block_add_flop(y, x, delta, out, inner, out_shape) -> int:
    return 2 * x[0] * delta[0] * delta[1] * delta[2]


@register_flop_formula(torch.ops.smt.block_grad)
def _block_grad_flop(dy, x, out, inner, block_size, out_shape) -> int:
    return 2 * dy[0] * out[1][0] * block_size**2


@register_flop_formula(torch.ops.smt.block_scores)
def _block_scores_flop(dy, x, block_size, score, out_shape) -> int:
    tokens, out_features, in_features = dy[0], dy[1], x[1]
    if score == "mean_abs":  # the sums of both factors are multiplied
        return 2 * tokens * (out_features // block_size) * (in_features // block_size)
    return 2 * tokens * out_features * in_features
