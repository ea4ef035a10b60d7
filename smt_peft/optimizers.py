"""Muon for the bank: every block's update is orthogonalised, many blocks in one batched product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

# Newton-Schulz iteration X <- a X + (b A + c A A) X with A = X X^T; Keller Jordan's coefficients (Muon, 2024), which
# pull the singular values of X (at most 1) into about [0.7, 1.2] in 5 steps, very small ones into less.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# The root mean square of an AdamW update, which the orthogonalised update is scaled to (Liu et al., arXiv 2502.16982),
# so that learning rates have AdamW's size.
ADAMW_RMS = 0.2
# Elements that are orthogonalised at a time: what a step holds beside its state stays small.
CHUNK = 1 << 23


class BlockMuon(torch.optim.Optimizer):
    """Muon's update for each matrix of a parameter [n, b, b] (SMT's bank), AdamW's for every other parameter.

    m <- momentum m + g,   W <- (1 - lr weight_decay) W - lr 0.2 sqrt(b) orthogonal(g + momentum m).

    Blocks are square matrices, which LoRA's thin factors are not, so that an orthogonal update uses all of their
    directions alike. The state is one float32 per trained value (AdamW: two); a step costs 30 b^3 operations per
    block. Works on whole blocks: with DDP and FSDP2 (which shards between blocks), not with DeepSpeed ZeRO, which
    hands its optimizer flat slices.

        Trainer(..., optimizer_cls_and_kwargs=(BlockMuon, {"lr": 3e-2}))

    There the learning rate is the one given here, the weight decay that of `TrainingArguments`.

    Args:
        lr, weight_decay: of both; on the bank the decay is towards a zero delta.
        momentum, steps: of Muon: with Nesterov's look-ahead; Newton-Schulz iterations.
        betas, eps: of AdamW.

    Raises:
        ValueError: where there is no bank among the parameters, now or in a step.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        steps: int = 5,
    ):
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "steps": steps})
        self._check()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        self._check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for bank in filter(_is_bank, trained):
                self._step_muon(bank, group)
            self._step_adamw([p for p in trained if not _is_bank(p)], group)
        return loss

    def _check(self) -> None:
        """In every step, too: ZeRO-2 puts its slices into the groups later, and AdamW would take them silently."""
        if not any(_is_bank(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "BlockMuon found no parameter of shape [n, b, b], so no SMT bank. DeepSpeed ZeRO flattens it: use "
                "AdamW there."
            )

    def _step_muon(self, bank: torch.Tensor, group: dict) -> None:
        state = self.state[bank]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(bank)
        size, lr, momentum = bank.shape[1], group["lr"], group["momentum"]
        parts = [_own(of).split(max(1, CHUNK // size**2)) for of in (bank, bank.grad, state["momentum_buffer"])]
        for delta, gradient, average in zip(*parts, strict=True):
            average.mul_(momentum).add_(gradient)
            update = orthogonalize(gradient.add(average, alpha=momentum), group["steps"])
            delta.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * ADAMW_RMS * math.sqrt(size))

    def _step_adamw(self, parameters: list[torch.Tensor], group: dict) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{name: group[name] for name in ("lr", "eps", "weight_decay")},
            amsgrad=False,
            maximize=False,
        )


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """For each of the square matrices, float [n, b, b], nearly the closest orthogonal one: U V^T of its SVD.

    A zero matrix stays zero. Runs in float32 or better; on CUDA in bfloat16, which is stable here and much faster.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))  # squares of small numbers underflow in others
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-15)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _is_bank(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 3 and parameter.shape[1] == parameter.shape[2]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The blocks that this process holds of a sharded bank; a view."""
    if not isinstance(tensor, DTensor):
        return tensor
    own = tensor.to_local()
    if own.shape[1:] != tensor.shape[1:]:
        raise ValueError(
            f"BlockMuon needs whole blocks, but a bank of shape {list(tensor.shape)} is sharded as "
            f"{tensor.placements}; shard dimension 0, as FSDP2 does by default."
        )
    return own
