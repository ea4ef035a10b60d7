"""Warnings for what goes wrong without an error. docs/troubleshooting.md explains each, in the same words."""

from __future__ import annotations

import warnings
from collections import Counter

import torch.distributed as dist

from smt_peft.locations import locations_of
from smt_peft.selected import Selection

CONCENTRATED = 0.8  # share of the blocks in modules that read the same input
FEWEST_BLOCKS = 20  # fewer say nothing about where a ranking leads
DOMINANT = 0.5  # share of the scores from one batch
FEWEST_BATCHES = 4


def warn_of_concentration(selection: Selection) -> None:
    """Warn where modules of different inputs competed in one ranking and one kind of them took nearly all.

    Modules that read one input (q, k, v) count as one kind: ranking them was never clearly worse than an even share,
    even where V took most.
    """
    inputs = selection.inputs
    counts, locations = Counter(selection.index[:, 0].tolist()), locations_of(selection.names)
    for members, budget in selection.groups:
        readers: dict[int, set[str]] = {}
        for member in members:
            readers.setdefault(inputs[member], set()).add(locations[member].kind)
        chosen, candidates = Counter(), Counter()
        for member in members:
            together = " ".join(sorted(readers[inputs[member]]))
            chosen[together] += counts[member]
            candidates[together] += selection.scores[member].numel()
        together, most = chosen.most_common(1)[0]
        share, fair = most / budget, candidates[together] / candidates.total()
        if budget >= FEWEST_BLOCKS and share > CONCENTRATED and fair < share / 2:
            warn(
                f"{100 * share:.0f} % of {budget} selected blocks are in {together}, which has {100 * fair:.0f} % of "
                "the blocks that competed: a ranking over the whole model compares the scores of unlike modules "
                "directly. Where this was measured on LLaMA models, SMTConfig(scope='input') was better: only modules "
                "that read the same input compete, and each such set has its share. num_blocks_pattern gives modules "
                "budgets of their own."
            )


def warn_of_dominant_batch(selection: Selection, warmup_steps: int) -> None:
    """Warn where most of all scores come from one batch. The warm-up's last `len(batch_scores)` scored."""
    scores, used = selection.batch_scores, selection.batches - selection.skipped
    largest = max(scores)
    share = largest / (sum(scores) or 1)
    if used >= FEWEST_BATCHES and share > DOMINANT:
        number = warmup_steps - len(scores) + scores.index(largest) + 1
        warn(
            f"Batch {number} of {warmup_steps} in the warm-up has {100 * share:.0f} % of all "
            "scores: it decides the selection more than all others together. Look at its data, drop rows that are "
            "broken or hardly have a label, shuffle, or raise warmup_steps."
        )


def warn(message: str) -> None:
    """Once in a distributed run, not once per process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(message)
