"""The warm-up: score every block by the gradient of the loss, select, and leave everything else as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from smt_peft import ops
from smt_peft.bank import DeltaBank
from smt_peft.banks import banks_of, find_bank
from smt_peft.diagnostics import warn, warn_of_concentration, warn_of_dominant_batch
from smt_peft.layer import Linear
from smt_peft.locations import kinds_of
from smt_peft.scoring import ActivationCollector, Collector, FeatureCollector, ScoreCollector, reduce_over_ranks
from smt_peft.selected import Selection
from smt_peft.selection import Lines, select
from smt_peft.untouched import apart, module_as_before, put_back_afterwards, random_states, same_order_afterwards


def select_blocks(
    model: nn.Module,
    dataloader: Iterable,
    adapter_name: str = "default",
    loss_function: Callable[[nn.Module, object], torch.Tensor] | None = None,
    loss_scale: float = 1.0,
    progress_bar: bool = True,
    avoid: Sequence[str] = (),
) -> Selection:
    """Run the warm-up by hand and apply its selection: what `SMTWarmupCallback` does inside a Trainer.

    Base weights, buffers, `requires_grad`, gradients, train/eval mode, random states and the generators of the
    dataloader's parts are afterwards what they were, whatever interrupts it. The model runs in train mode. In a
    distributed run every rank calls this with its own batches; all get the selection of the summed scores.

    Args:
        dataloader: batches; iterated again from the start where it is shorter than `warmup_steps`.
        loss_function: (model, batch) -> scalar loss. Default: `model(**batch).loss`, the batch moved to the model.
        loss_scale: multiplies the loss, for float16; halved where a batch overflows, which is then run again.
        avoid: names of other adapters; no weight in their blocks is selected (for tasks learnt one after the other).

    Returns:
        The selection, with the scores it was made from. It is already applied.

    Raises:
        ValueError: where the adapter is missing, not active, trained already or needs no warm-up, where one to avoid
            has no blocks, where there is no data or no loss, where half of the batches or more are not finite, or
            where every score is zero.
    """
    bank = find_bank(model, adapter_name)
    config = bank.config
    if not config.needs_warmup:
        if not bank.is_selected:
            raise ValueError(
                f"Adapter {adapter_name!r} awaits the file that its config was read beside, which has its blocks: "
                "load that by PeftModel.from_pretrained, or make a new SMTConfig."
            )
        raise ValueError(
            f"selection={config.selection!r} needs no data: the blocks of adapter {adapter_name!r} were selected when "
            "it was made. Use selection='gradient' to select by a warm-up."
        )
    if reduce_over_ranks(bank.local().count_nonzero().to(bank.index.device)):
        why = "it has been trained" if config.init_weights else "it was made with init_weights=False"
        raise ValueError(
            f"The deltas of adapter {adapter_name!r} are not zero: {why}, and other blocks would get what "
            "these have learnt. Merge it and wrap the merged model again, or add a new adapter: "
            "model.add_adapter(name, SMTConfig(...))."
        )
    avoided = {name: find_bank(model, name) for name in avoid}
    for name, other in avoided.items():
        if not other.is_selected:
            raise ValueError(f"There is nothing to avoid in adapter {name!r}: it has no blocks yet. Select its first.")
    layers = [module for module in model.modules() if isinstance(module, Linear) and adapter_name in module.smt_blocks]
    layers.sort(key=lambda layer: layer.smt_blocks[adapter_name].target)
    if adapter_name not in layers[0].active_adapters:
        raise ValueError(
            f"Adapter {adapter_name!r} is not active ({', '.join(layers[0].active_adapters)} is): the warm-up would "
            f"score another model than the one that it trains in. Call model.set_adapter({adapter_name!r}) first."
        )
    size, steps, lines = bank.block_size, config.warmup_steps, None
    batches, is_sorted = _endless(apart(dataloader), steps), config.arrangement == "sorted"
    run = partial(_run, model, bank, batches, loss_function=loss_function or _model_loss, progress_bar=progress_bar)
    with same_order_afterwards(dataloader):
        if config.selection == "activation":
            collector = ActivationCollector(layers)
            run(collector, steps)
            lines = collector.lines(size) if is_sorted else None
            scores = collector.scores(size, lines)
        else:
            if is_sorted:
                ranking = FeatureCollector(layers, loss_scale)
                run(ranking, max(1, steps // 2))
                lines, steps, loss_scale = ranking.lines(size), max(1, steps - steps // 2), ranking.scale
            collector = ScoreCollector(layers, size, config.score, config.accumulation, loss_scale, lines)
            run(collector, steps)
            scores = collector.scores()
    scores = [score.float().cpu() for score in scores]
    if is_sorted:
        lines = [Lines(*(side.cpu() for side in line)) for line in lines]
    for other in avoided.values():
        _rule_out(other, bank, scores, lines)
    names = [target.name for target in bank.targets]
    selection = Selection(
        names=names,
        block_size=size,
        index=select(scores, bank.groups, config.scope, collector.inputs, kinds_of(names)),
        scores=scores,
        batch_scores=collector.batch_scores(),
        skipped=collector.skipped,
        lines=lines,
        groups=[tuple(group) for group in bank.groups],
        patterns=len(config.num_blocks_pattern),
        inputs=collector.inputs,
        scope=config.scope,
        base_parameters=bank.base_parameters,
    )
    apply_selection(model, adapter_name, selection)
    warn_of_dominant_batch(selection, config.warmup_steps)
    warn_of_concentration(selection)
    return selection


def apply_selection(model: nn.Module, adapter_name: str, selection: Selection) -> None:
    """Give an adapter the blocks of rank 0's selection, and mirror them in its config.

    Raises:
        ValueError: where the selection is of other targets, blocks or budget than the adapter's.
    """
    bank = find_bank(model, adapter_name)
    config = bank.config
    names, arrangement = [target.name for target in bank.targets], "tiles" if selection.lines is None else "sorted"
    counts = selection.index[:, 0].bincount(minlength=len(names))
    spent = [int(counts[group.members].sum()) for group in bank.groups]
    for what, theirs, ours in (
        ("targets", selection.names, names),
        ("block_size", selection.block_size, bank.block_size),
        ("arrangement", arrangement, config.arrangement),
        ("number of blocks", len(selection.index), bank.num_blocks),
        ("budgets", spent, [group.budget for group in bank.groups]),
    ):
        if theirs != ours:
            if isinstance(ours, list) and len(theirs) == len(ours):
                theirs, ours = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
            theirs, ours = (f"{len(of)} ({of[0]}, ...)" if isinstance(of, list) else of for of in (theirs, ours))
            raise ValueError(
                f"The selection's {what}, {theirs}, are not those of adapter {adapter_name!r}, {ours}. Configure the "
                "adapter as the one that the selection was made for; selection.rebudget() gives it another budget."
            )
    selection.check_shapes(bank.targets)
    index = selection.features().to(bank.index)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(index, src=0)
    bank.set_index(index)
    config.selected_blocks, config.made_by = bank.selected_blocks(), selection


def _rule_out(other: DeltaBank, bank: DeltaBank, scores: list[torch.Tensor], lines: list[Lines] | None) -> None:
    """Set the score of every block that overlaps a block of `other` to -1, so that none is selected."""
    position = {target.name: i for i, target in enumerate(other.targets)}
    for i, target in enumerate(bank.targets):
        plan = other.plan(position[target.name], torch.device("cpu")) if target.name in position else None
        if plan is not None:
            taken = torch.zeros(target.rows * bank.block_size, target.cols * bank.block_size, device="cpu")
            taken[ops.entries(plan, other.block_size)] = 1
            taken = taken if lines is None else lines[i].in_order(taken)
            scores[i][ops.sum_tiles(taken, bank.block_size) > 0] = -1


def _run(
    model: nn.Module, bank: DeltaBank, batches: Iterator, collector: Collector, steps: int, loss_function, progress_bar
) -> None:
    bar = tqdm(range(steps), desc="SMT warm-up", disable=not progress_bar, unit="batch")
    stance = contextlib.nullcontext() if _needs_compiler(model) else torch.compiler.set_stance("force_eager")
    with stance, _untouched(model, bank, collector) as freeze:
        for _ in bar:
            batch, is_done = next(batches), False
            while not is_done:
                freeze()
                with torch.set_grad_enabled(collector.needs_backward):
                    loss = loss_function(model, copy.copy(batch) if isinstance(batch, MutableMapping) else batch)
                    freeze()  # again, for what is computed once more in the backward
                    if collector.needs_backward:
                        collector.backward(loss)
                is_done = collector.end_batch()
            if collector.skipped:
                bar.set_postfix(skipped=collector.skipped)
    if not collector.needs_backward:  # FSDP frees the gathered weights, frozen now, only after a backward
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    collector.agree()
    counts = torch.tensor([collector.skipped, collector.batches], device=collector.source.device)
    skipped, count = reduce_over_ranks(counts).tolist()
    if 2 * skipped >= count:
        raise ValueError(
            f"{skipped} of {count} warm-up batches had a gradient that is not finite, too many "
            "to select from; lower the loss scale or use bfloat16, and look for NaN in the data."
        )


def _endless(dataloader: Iterable, steps: int) -> Iterator:
    seen = 0
    while True:
        before = seen
        for batch in dataloader:
            seen += 1
            yield batch
        if seen == before:
            raise ValueError(
                f"The warm-up got {seen} of {steps} batches, and then none: the dataloader is empty, or it can be "
                "iterated only once. Give it data, or a dataset that can be iterated again."
            )
        if before == 0 and seen < steps:
            warn(f"The data has {seen} batches, fewer than warmup_steps={steps}: the warm-up goes through them again.")


def _model_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    device = next(model.parameters()).device
    if device.type != "meta":  # offloaded: accelerate's hooks move the inputs
        batch = send_to_device(batch, device)
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(
            f"The model gave no loss for a warm-up batch of {', '.join(batch)}: add labels to the batches, or pass "
            "loss_function=lambda model, batch: ..."
        )
    return loss


def _needs_compiler(model: nn.Module) -> bool:
    """Whether it has flex attention, which without a compiler keeps all scores [batch, heads, tokens, tokens]; where
    the whole model is compiled, the collectors need it eager all the same."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    is_flex = any(getattr(config, "_attn_implementation", None) == "flex_attention" for config in configs)
    return is_flex and not any(hasattr(module, "_orig_mod") for module in model.modules())  # as torch.compile wraps


@contextlib.contextmanager
def _untouched(model: nn.Module, bank: DeltaBank, collector: Collector) -> Iterator[Callable[[], None]]:
    """Train mode with nothing trainable and every target watched; then everything as it was, also when interrupted:
    modes, counters, requires_grad, gradients, buffers (BatchNorm's statistics) and random states."""
    own = {id(buffer) for banks in banks_of(model).values() for buffer in banks.buffers()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    undo: list[Callable[[], object]] = [partial(setattr, bank, "in_warmup", False)]
    for module in model.modules():
        undo += module_as_before(module, own)
    for parameter in trainable:
        undo += [partial(setattr, parameter, name, getattr(parameter, name)) for name in ("requires_grad", "grad")]
    undo += random_states()

    def freeze(*_: object) -> None:
        for parameter in trainable:
            parameter.requires_grad_(False)

    with put_back_afterwards(undo):
        bank.in_warmup = True
        model.train()
        # What leaves `disable_adapter()`, as TRL's reference passes do, thaws PEFT's modules.
        undo.append(model.register_forward_pre_hook(freeze).remove)
        freeze()
        collector.attach(undo)
        yield freeze
