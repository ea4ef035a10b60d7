"""Warnings for what goes wrong without an error. docs/troubleshooting.md explains each, in the same words."""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections import Counter, deque
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from smt_peft.root import SMTRoot
from smt_peft.selection import Selection, places_of

logger = logging.getLogger(__name__)

CONCENTRATED = 0.8  # share of the blocks in modules that read the same input
FEWEST_BLOCKS = 20  # fewer say nothing about where a ranking leads
DOMINANT = 0.5  # share of the scores from one batch
FEWEST_BATCHES = 4
SPIKE = 100  # times the running median
FEWEST_NORMS = 5


def report_additive(root: SMTRoot, adapter: str) -> None:
    """Say once which layers are additive, and why: a warning where one would not expect it, else a log line (INFO)."""
    bank = root[adapter]
    selected = bank.selected_blocks() or {}
    found: dict[tuple[str, str], list[str]] = {}
    for layer in root.layers:
        if adapter in layer.smt_blocks:
            name = bank.targets[layer.smt_blocks[adapter].target].name
            if name in selected and not layer.is_resident:
                found.setdefault(_why_additive(layer), []).append(name)
    if not found:
        return
    reasons = [
        f"{len(names)} {why} ({names[0]}{', ...' if names[1:] else ''}){way_out}"
        for (why, way_out), names in found.items()
    ]
    message = (
        f"{sum(map(len, found.values()))} of {len(selected)} layers with selected blocks are additive: their deltas "
        "are added beside the weight instead of standing in it. Results are the same; each step computes two more "
        "block products per selected block (for experts' parameters: copies the weight). Why: "
        + "; ".join(reasons)
        + "."
    )
    if any(way_out for _, way_out in found):
        _warn(message)
    elif _is_main_process():
        logger.info(message)


def _why_additive(layer: nn.Module) -> tuple[str, str]:
    """Why a layer is not resident, and the way out; none where such models are meant to be trained like that."""
    weight = layer.weight
    if layer.quantization_backend is not None or weight.dtype.itemsize == 1:
        return "quantised", ""
    if isinstance(weight, DTensor) or hasattr(weight, "ds_id") or layer.root.is_sharded():
        return "sharded by FSDP2 or ZeRO-3", ""
    if hasattr(layer.get_base_layer(), "_hf_hook"):
        return "managed by accelerate's device_map or offloading", ", so load the model onto one device"
    if layer._shared_weight:
        return "shared with another module", ", so leave such modules out of target_modules"
    if weight.device.type == "meta":
        return "on the meta device", ", so load the model with its weights"
    return f"{type(weight).__name__} of {weight.dtype}", ", so load the model with plain float weights"


def warn_of_concentration(
    selection: Selection, groups: Sequence[tuple[Sequence[int], int]], inputs: Sequence[int]
) -> None:
    """Warn where modules of different inputs competed in one ranking and one kind of them took nearly all.

    Among modules that read one input (q, k, v) the ranking was never clearly worse than an even share: V is no fault.

    Args:
        selection: with its scores.
        groups: (positions of the targets that competed, their budget of blocks).
        inputs: a number per target, equal where targets read the same input.
    """
    counts, places = Counter(selection.index[:, 0].tolist()), places_of(selection.names)
    for members, budget in groups:
        readers: dict[int, set[str]] = {}
        for member in members:
            readers.setdefault(inputs[member], set()).add(places[member].kind)
        chosen, candidates = Counter(), Counter()
        for member in members:
            together = " ".join(sorted(readers[inputs[member]]))
            chosen[together] += counts[member]
            candidates[together] += selection.scores[member].numel()
        together, most = chosen.most_common(1)[0]
        share, fair = most / budget, candidates[together] / candidates.total()
        if budget >= FEWEST_BLOCKS and share > CONCENTRATED and fair < share / 2:
            _warn(
                f"{100 * share:.0f} % of {budget} selected blocks are in {together}, which has {100 * fair:.0f} % of "
                "the blocks that competed: a ranking over the whole model compares the scores of unlike modules "
                "directly. Where this was measured on LLaMA models, SMTConfig(scope='input') was better: only modules "
                "that read the same input compete, and each such set has its share. num_blocks_pattern gives modules "
                "budgets of their own."
            )


def warn_of_dominant_batch(selection: Selection) -> None:
    """Warn where most of all scores come from one batch of the warm-up."""
    scores, used = selection.batch_scores, selection.batches - selection.skipped
    largest = max(scores)
    share = largest / (sum(scores) or 1)
    if used >= FEWEST_BATCHES and share > DOMINANT:
        _warn(
            f"Batch {scores.index(largest) + 1} of {len(scores)} in the warm-up has {100 * share:.0f} % of all "
            "scores: it decides the selection more than all others together. Look at its data, drop rows that are "
            "broken or hardly have a label, shuffle, or raise warmup_steps."
        )


class Divergence:
    """Watches a run and warns, once, where it diverges: by its gradient norms, where they are logged, and its deltas.

    Args:
        patience: norms in a row that may be not finite; float16's loss scaler ends single overflows by itself.
    """

    def __init__(self, patience: int = 0):
        self.patience = patience
        self._recent: deque[float] = deque(maxlen=100)
        self._broken = 0  # norms in a row that are not finite
        self._warned = False

    def watch_norm(self, step: int, norm: float) -> None:
        """Warn of a norm that is not finite, or more than `SPIKE` times the median of the norms before it."""
        median = statistics.median(self._recent) if len(self._recent) >= FEWEST_NORMS else None
        if math.isfinite(norm):
            self._recent.append(norm)
            self._broken = 0
            wrong = median is not None and norm > SPIKE * median > 0
        else:
            self._broken += 1
            wrong = self._broken > self.patience
        if wrong:
            before = "" if median is None else f", after a median of {median:.3g}"
            self._warn_once(
                f"The gradient norm is {norm:.3g} at step {step}{before}: training is about to diverge, or has. Lower "
                "the learning rate, train in bfloat16 instead of float16, or set max_grad_norm=1.0; go on from a "
                "checkpoint before this step."
            )

    def watch_deltas(self, step: int, weight: nn.Parameter) -> None:
        """Warn of deltas that are not finite. Of a sharded bank this process looks at its own part."""
        part = weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)
        broken = part.numel() - int(part.isfinite().sum())
        if broken:
            self._warn_once(
                f"{broken} of {part.numel()} trained values are not finite at step {step}: training has diverged, and "
                "no later step repairs it. Go on from a checkpoint before, with a lower learning rate, in bfloat16 "
                "instead of float16, or with max_grad_norm=1.0; logging_steps=10 shows in the log when it begins."
            )

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            _warn(message)


def _warn(message: str) -> None:
    """Once in a distributed run, not once per process."""
    if _is_main_process():
        warnings.warn(message)


def _is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
