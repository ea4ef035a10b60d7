"""What a method of the quality study does to a model: its adapter, its blocks, its optimizer.

Options of a method that `SMTConfig` and PEFT's configs do not have stand in `Recipe`. Research lives here: what shows
itself better moves into the package.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from peft import LoraConfig, MissConfig, ShiraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.shira.layer import ShiraLayer
from torch import nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.banks import find_bank
from smt_peft.locations import kinds_of
from smt_peft.optimizers import BlockMuon
from smt_peft.selected import Selection
from smt_peft.selection import select
from smt_peft.warmup import apply_selection

RANKED = {"lora": LoraConfig, "shira": ShiraConfig, "miss": MissConfig}
CONFIGS = {"smt": SMTConfig, **RANKED}
TYPES = ("smt", "full", "dense", *RANKED)  # dense: the target weights whole
RANKINGS = ("score", "module_rms", "adam", "weight", "movement")
OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": BlockMuon}


@dataclass
class Recipe:
    """A method of a study.

    Attributes:
        type: one of TYPES.
        warmup_testbed: select on this testbed's data instead of the run's own.
        ranking: what blocks are ranked by. 'module_rms': the score divided by the root mean square of its module's
            scores. 'adam': the first-order decrease of the loss under an Adam step, sum of (E g)^2 / sqrt(E g^2), from
            the block's l2 norms. 'weight': the score times the block's mean |w|. 'movement': how far the block moves
            in as many steps of training the target weights whole, which is what a score is to foretell.
        tile: [rows, columns] of the tiles that are selected, put together from blocks of 1 x 1.
        quantile: [low, high], keep blocks that rank between these quantiles of the score instead of the best.
        leave_out: [rows, columns] of blocks at the head of a sorted arrangement that are never selected.
        best_entries: shira: not random entries, but those of each module with the largest |gradient| over so many
            batches; as many of each as LoRA would train.
        lora_share: share of the budget that becomes LoRA factors on the same modules.
        restart: {steps, keep, warm}: select anew at these steps; what was trained is kept in the weights, or dropped;
            with `warm` the learning rate rises and falls again after each.
        optimizer: "adamw" or "muon".
        optimizer_options: of that optimizer.
        delta_scale: the weights become base + delta_scale * trained values, as with LoRA's alpha / r: a number, or
            'weight_rms', for each block the root mean square of its module's weight over the mean of all modules.
        config: everything else, for the method's config.
    """

    type: str
    warmup_testbed: str | None = None
    ranking: str = "score"
    tile: list[int] | None = None
    quantile: list[float] | None = None
    leave_out: list[int] | None = None
    best_entries: int = 0
    lora_share: float = 0.0
    restart: dict | None = None
    optimizer: str = "adamw"
    optimizer_options: dict = field(default_factory=dict)
    delta_scale: float | str = 1.0
    config: dict = field(default_factory=dict)

    @classmethod
    def parse(cls, settings: dict) -> Recipe:
        own = {f.name for f in fields(cls)} - {"config"}
        given = {key: value for key, value in settings.items() if key in own}
        recipe = cls(**given, config={key: value for key, value in settings.items() if key not in own})
        for name, allowed in {"type": TYPES, "ranking": RANKINGS, "optimizer": OPTIMIZERS}.items():
            if getattr(recipe, name) not in allowed:
                raise SystemExit(f"{name} {getattr(recipe, name)} is not one of {', '.join(allowed)}.")
        allowed = {f.name for f in fields(CONFIGS[recipe.type])} if recipe.type in CONFIGS else set()
        if unknown := recipe.config.keys() - allowed:
            raise SystemExit(f"{recipe.type} has no option {', '.join(sorted(unknown))}.")
        if recipe.type == "smt" and not isinstance(recipe.config.get("block_size"), int):
            raise SystemExit(f"smt needs a block_size, by which its budget becomes blocks: {recipe.config}")
        if isinstance(recipe.delta_scale, str) and recipe.delta_scale != "weight_rms":
            raise SystemExit(f"delta_scale {recipe.delta_scale!r} is neither a number nor weight_rms; for YAML 5e-1 "
                             "is text, 0.5 a number.")  # fmt: skip
        if recipe.restart and {"steps", "keep"} - set(recipe.restart):
            raise SystemExit(f"restart {recipe.restart} needs steps, a list, and keep, true or false.")
        if recipe.leave_out and recipe.config.get("arrangement") != "sorted":
            raise SystemExit(f"leave_out {recipe.leave_out} needs arrangement: sorted, whose head it leaves out.")
        if recipe.best_entries and recipe.type != "shira":
            raise SystemExit(f"best_entries is for shira, not for {recipe.type}.")
        if recipe.ranks_itself and recipe.config.get("scope") == "input":
            raise SystemExit("scope input is seen by the package's own warm-up; with a ranking, a tile or a quantile "
                             "of this script take model or module.")  # fmt: skip
        return recipe

    @property
    def ranks_itself(self) -> bool:
        """Whether blocks are chosen by this script from the warm-up's scores, not by the package."""
        return self.ranking != "score" or bool(self.tile or self.quantile)

    def part_of(self, step: int, steps: int) -> tuple[int, int]:
        """The first step and the end of the learning rate's schedule at a step of a training."""
        starts = [0, *self.restart["steps"]] if self.restart and self.restart.get("warm") else [0]
        return next(part for part in zip(starts, [*starts[1:], steps], strict=True) if step < part[1])

    @property
    def needs_warmup(self) -> bool:
        return self.type == "smt" and self.config.get("selection", "gradient") in ("gradient", "activation")


def adapted(recipe: Recipe, model: nn.Module, modules: str, budget: int, seed: int, save: list[str] | None):
    """The model with a method's adapter: the rank whose number of parameters is nearest to the budget.

    Args:
        modules: target modules as JSON: a list of names, or "all-linear".
        save: modules that are trained whole, such as a new classifier; not counted in the budget.
    """
    if recipe.type == "full":
        return model
    targets = target_names(model, json.loads(modules), save or [])
    common = {"target_modules": targets, "modules_to_save": save, **recipe.config}
    if recipe.type == "dense":
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            parameter.requires_grad_(module in targets or any(module.endswith(one) for one in save or []))
        return model
    if recipe.type == "smt":
        return _with_blocks(recipe, model, targets, common, budget, seed)
    rank = rank_for(model, targets, budget, recipe.type)
    if recipe.type == "lora":
        common = {"lora_alpha": 2 * rank, **common}
    return get_peft_model(model, RANKED[recipe.type](r=rank, **common))


def _with_blocks(recipe: Recipe, model: nn.Module, targets: list[str], common: dict, budget: int, seed: int):
    patterns = sum(recipe.config.get("num_blocks_pattern", {}).values())  # leave the other modules the rest
    size = recipe.config["block_size"] ** 2
    if not recipe.lora_share:
        return get_peft_model(
            model, SMTConfig(num_blocks=max(1, round(budget / size)) - patterns, seed=seed, **common)
        )
    rank = rank_for(model, targets, budget * recipe.lora_share, "lora")
    left = budget - rank * sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    model = get_peft_model(model, SMTConfig(num_blocks=max(1, round(left / size)), seed=seed, **common))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    inject_adapter_in_model(lora, model.base_model.model, "low_rank")  # around SMT's layers
    return model


def target_names(model: nn.Module, modules: list[str] | str, save: list[str]) -> list[str]:
    """Full names of the target modules. "all-linear" leaves out the head, as PEFT does, and the pooler before it."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if modules != "all-linear":
        return [name for name in names if any(name == one or name.endswith(f".{one}") for one in modules)]
    return [name for name in names if not any(part in ("lm_head", "pooler", *save) for part in name.split("."))]


def rank_for(model: nn.Module, targets: list[str], budget: float, method: str) -> int:
    shapes = [model.get_submodule(name).weight.shape for name in targets]
    per_rank = sum(shape[0] if method == "miss" else sum(shape) for shape in shapes)
    return max(1, round(budget / per_rank))


def warm_up(recipe: Recipe, model: nn.Module, batches: Callable[[int], list[dict]]) -> Selection | None:
    """Select, by the package's rule or by one of this script's. `batches(count)` gives the first batches."""
    if recipe.best_entries:
        choose_entries(model, batches(recipe.best_entries))
    if not recipe.needs_warmup:
        return None
    bank = find_bank(model, "default")
    config = bank.config
    data = batches(config.warmup_steps)
    selection = select_blocks(model, data, progress_bar=False)
    if recipe.leave_out:
        for score in selection.scores:
            score[: recipe.leave_out[0]] = score[:, : recipe.leave_out[1]] = -1.0
        selection = selection.rebudget()
        apply_selection(model, "default", selection)
    if not recipe.ranks_itself:
        return selection
    scores = [score.double() for score in selection.scores]
    if recipe.ranking == "module_rms":
        scores = [score / score.square().mean().sqrt() for score in scores]
    elif recipe.ranking == "adam":
        config.accumulation = "signed"
        signed = select_blocks(model, data, progress_bar=False).scores
        config.accumulation = "absolute"
        scores = [mean.double().square() / score.clamp_min(1e-30) for mean, score in zip(signed, scores, strict=True)]
    elif recipe.ranking == "weight":
        scores = [score * blocks_of(model, name, bank.block_size).abs().mean((2, 3)) for name, score in
                  zip(selection.names, scores, strict=True)]  # fmt: skip
    elif recipe.ranking == "movement":
        scores = movements(model, selection.names, bank.block_size, data)
    if recipe.tile:
        scores = [pooled(score, *recipe.tile) for score in scores]
    if recipe.quantile:
        low, high = (torch.cat([score.flatten() for score in scores]).quantile(q) for q in recipe.quantile)
        scores = [torch.where((score >= low) & (score <= high), score, 0) for score in scores]
    index = select(scores, bank.groups, config.scope, kinds=kinds_of(selection.names))
    selection = Selection(selection.names, bank.block_size, index)
    apply_selection(model, "default", selection)
    return selection


def choose_entries(model: nn.Module, data: list[dict]) -> None:
    """Give SHiRA's layers the entries of their weights with the largest sum of |gradient|."""
    layers = [module for module in model.modules() if isinstance(module, ShiraLayer)]
    weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    with model.disable_adapter():  # computes with the weights themselves; the adapter is zero
        for batch in data:
            for total, gradient in zip(sums, torch.autograd.grad(model(**batch).loss, weights), strict=True):
                total += gradient.abs()
    for layer, weight, total in zip(layers, weights, sums, strict=True):
        weight.requires_grad_(False)
        best = total.flatten().topk(len(layer.shira_weight["default"])).indices.sort().values
        layer.shira_indices["default"] = torch.stack([best // total.shape[1], best % total.shape[1]]).int()


def movements(model: nn.Module, names: list[str], size: int, data: list[dict]) -> list[torch.Tensor]:
    """For each target the mean |change| of its blocks, [block rows, block columns], when all target weights train."""
    dense = copy.deepcopy(model).unload().requires_grad_(False).train()
    weights = [dense.get_submodule(name).weight.requires_grad_() for name in names]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for batch in data:
        dense(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = [(weight.detach() - old).abs() for weight, old in zip(weights, before, strict=True)]
    return [change.double().unfold(0, size, size).unfold(1, size, size).mean((2, 3)) for change in changes]


def pooled(scores: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Every score replaced by the mean of its tile; 0 stands for the whole side. Ties break tile by tile."""
    rows, cols = rows or scores.shape[0], cols or scores.shape[1]
    mean = scores.unfold(0, rows, rows).unfold(1, cols, cols).mean((2, 3))
    mean = mean * (1 + 1e-9 * torch.arange(mean.numel(), dtype=mean.dtype).view_as(mean))
    return mean.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def blocks_of(model: nn.Module, name: str, size: int) -> torch.Tensor:
    """A target's frozen weight, [block rows, block columns, size, size]."""
    layer = next(module for path, module in model.named_modules() if path.endswith(name))
    return layer.get_base_layer().weight.detach().unfold(0, size, size).unfold(1, size, size)


def make_optimizer(
    recipe: Recipe, model: nn.Module, learning_rate: float, heads: list[str] | None, head_learning_rate: float
) -> torch.optim.Optimizer:
    """Over all that is trained; `heads` names modules with a learning rate of their own."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_head = {name for name in trained if set(name.split(".")) & set(heads or [])}
    groups = [
        {"params": [parameter for name, parameter in trained.items() if name not in in_head]},
        {"params": [trained[name] for name in sorted(in_head)], "lr": head_learning_rate},
    ]
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, **recipe.optimizer_options}
    groups = [group for group in groups if group["params"]]
    optimizer = OPTIMIZERS[recipe.optimizer](groups, lr=learning_rate, **options)
    if recipe.delta_scale != 1.0:
        scale_delta(optimizer, model, recipe.delta_scale)
    return optimizer


def scale_delta(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float | str) -> None:
    """Train delta / scale: by the chain rule its gradient is scale times the delta's. The bank holds the delta."""
    bank = find_bank(model, "default")
    if scale == "weight_rms":
        rms = torch.stack([blocks_of(model, target.name, 1).square().mean().sqrt() for target in bank.targets])
        scale = (rms / rms.mean())[bank.index[:, 0].long()][:, None, None]

    def to_values(*_: object) -> None:
        bank.weight.data.div_(scale)

    def to_delta(*_: object) -> None:
        bank.weight.data.mul_(scale)

    bank.weight.register_hook(lambda gradient: gradient * scale)
    optimizer.register_step_pre_hook(to_values)
    optimizer.register_step_post_hook(to_delta)
