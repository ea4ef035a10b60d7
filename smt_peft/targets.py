"""Which modules are adapted by default, how large a block is, and who competes for how many of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import regex
import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from smt_peft import bases
from smt_peft.checks import Group, Target, short
from smt_peft.config import DEFAULT_TRAINABLE_RATIO, SMTConfig
from smt_peft.diagnostics import warn

SMALLEST_FAST_BLOCK = 16  # what matrix units take
PATTERN_SECONDS = 0.5  # for one name
LARGEST_AUTO_BLOCK = 256  # the largest that divides every linear layer of the LLaMA family (11008 = 43 * 256)

SIDES = "in_features", "out_features"
USUAL_MODULES = ["q_proj", "k_proj", "v_proj"]
_DEFAULTS = {
    "qkv_proj": "phi3 codegen",
    "query_key_value": "gpt_neox bloom falcon RefinedWeb RefinedWebModel chatglm",
    "c_attn": "gpt2 gpt_bigcode btlm",
    "q k v q_proj k_proj v_proj": "blip-2",
    "q k v": "t5 mt5 umt5",
    "query key value": "bert roberta xlm-roberta camembert electra layoutlm",
    "q_proj k_proj v_proj query key value": "vit deit",  # transformers 5 renamed them
    "q_lin k_lin v_lin": "distilbert",
    "query_proj key_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
}
# model_type -> the query, key and value projections, as in the paper, where they have other names than usual
TARGET_MODULES = {
    model_type: modules.split() for modules, model_types in _DEFAULTS.items() for model_type in model_types.split()
}


def default_modules(model: nn.Module, model_type: str) -> set[str] | None:
    """The names of a model's query, key and value projections; None where they are not known, as in a model whose
    parts call them differently."""
    if model_type in TARGET_MODULES:
        return set(TARGET_MODULES[model_type])
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    others = [modules for modules in TARGET_MODULES.values() if modules != ["in_proj"]]  # Mamba's mixers have one, too
    if not there.issuperset(USUAL_MODULES) or any(map(there.issuperset, others)):
        return None
    named = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in USUAL_MODULES}
    # Gemma 4's towers have modules of these names around layers.
    kinds = BaseTunerLayer, nn.Linear
    layers = {name for name, module in named.items() if isinstance(module, kinds) or not module._modules}
    return set(USUAL_MODULES) if len(layers) == len(named) else layers or None


def name_experts(config: SMTConfig, model: nn.Module) -> None:
    """If target_modules has names that experts' layers had before transformers fused them, add the fused parameters
    to target_parameters, as PEFT does for LoRA; but not the router, whose few rows would make blocks small.

    Raises:
        ValueError: where a part of what is fused is named without the rest.
    """
    is_known = config.target_modules is not None and hasattr(getattr(model, "config", None), "model_type")
    if not is_known or config.selection == "activation":  # which asks for the inputs of modules
        return
    names = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    given, new = [*(config.target_parameters or ())], []
    for rule in get_model_conversion_mapping(model):
        fused, *others = rule.target_patterns if isinstance(rule, WeightConverter) else [""]
        if others or ".experts." not in f".{fused}":
            continue
        once = [source.removesuffix(".weight").rpartition(".")[2] for source in rule.source_patterns]
        here = [name for name in names if f".{name}".endswith(f".{fused.lstrip('.')}")]
        meant = [name for name in here if _are_named(config, name, once)]
        suffixes = {".".join(name.split(".")[-3:]) for name in here}
        new += sorted(suffixes) if meant == here else meant
    config.target_parameters = given + [name for name in new if name not in given] or config.target_parameters
    if new and config.target_modules != "all-linear":
        modules = (name for name, _ in model.named_modules())
        if not any(check_target_module_exists(config, name) for name in modules):  # PEFT would warn of them
            config.target_modules = []


def _are_named(config: SMTConfig, parameter: str, once: list[str]) -> bool:
    """Whether a config's target_modules name the layers, once called so, that are fused into a parameter."""
    like, place = copy.copy(config), parameter.rpartition(".")[0]
    if config.target_modules == "all-linear":
        like.target_modules = once
    named = [old for old in once if any(check_target_module_exists(like, f"{place}.{n}{old}") for n in ("", "0."))]
    if named and len(named) < len(once):
        raise ValueError(
            f"target_modules names {', '.join(named)} of {place} without {', '.join(sorted({*once} - {*named}))}, and "
            f"they are one weight, {parameter}: name all of them, or none."
        )
    return bool(named)


def name_linear_layers(config: SMTConfig, model: nn.Module) -> None:
    """Put names for 'all-linear', as PEFT does for LoRA; but not those of gates into which no block fits, nor of parts
    of what another adapter trains whole."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    least = 2 if config.block_size == "auto" else min(config.block_size, SMALLEST_FAST_BLOCK)
    _maybe_include_all_linear_layers(config, model)
    config.target_modules = {
        name
        for name in config.target_modules
        if not (_is_smaller(model.get_submodule(name), least) or is_in_wrapper(model, name))
    }


def _is_smaller(layer: nn.Module, side: int) -> bool:
    return min(getattr(layer, name, side) for name in SIDES) < side


def is_in_wrapper(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of what PEFT wraps to train it, or rows of it, whole."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))
    return any(isinstance(module, AuxiliaryTrainingWrapper) for module in above)


def count_base_parameters(model: nn.Module) -> int:
    """Parameters of the model without adapters; packed weights and sharded ones counted in full."""
    total, packed = 0, set()
    for module in model.modules():
        own = [one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None]
        sides = ("num_embeddings", "embedding_dim") if isinstance(module, nn.Embedding) else SIDES
        counts = [getattr(module, side, None) for side in sides]
        if all(isinstance(count, int) for count in counts) and any(map(_is_packed, own)):
            total += math.prod(counts)
            packed.update(id(one) for one in own if _is_packed(one))
    for _, parameter in bases.base_weights(model):
        if id(parameter) not in packed:
            total += getattr(parameter, "ds_numel", parameter.numel())
    return total


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether it holds a weight as integers, or in 4 bits, perhaps several to an element."""
    is_integer = tensor.ndim > 0 and not tensor.is_floating_point() and tensor.dtype != torch.bool
    return is_integer or type(tensor).__name__ == "Params4bit"


def choose_block_size(config: SMTConfig, shapes: dict[str, tuple[int, int]]) -> int:
    """The side of a block for targets of these names and shapes (out_features, in_features).

    Raises:
        ValueError: where the chosen size does not divide a side.
    """
    common = _common_block_size(shapes.values())
    if config.block_size == "auto":
        _warn_of_odd_modules(shapes, common)
        return common
    odd = [name for name, shape in shapes.items() if any(side % config.block_size for side in shape)]
    if odd:
        others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        way_out = f"use {common} or block_size='auto'"
        if common < SMALLEST_FAST_BLOCK and len(odd) < len(shapes):
            way_out = f"leave {odd[0]}{others} out with exclude_modules"
        raise ValueError(
            f"block_size={config.block_size} does not divide {odd[0]}'s weight of shape {shapes[odd[0]]}; {way_out}."
        )
    return config.block_size


def _common_block_size(shapes: Iterable[tuple[int, int]]) -> int:
    return math.gcd(LARGEST_AUTO_BLOCK, *(side for shape in shapes for side in shape))  # a power of two, as that is


def _warn_of_odd_modules(shapes: dict[str, tuple[int, int]], common: int) -> None:
    """Warn where few modules, such as a head of 37 classes, make every block small."""
    odd = {name: shape for name, shape in shapes.items() if any(side % SMALLEST_FAST_BLOCK for side in shape)}
    if common < SMALLEST_FAST_BLOCK and 0 < len(odd) < len(shapes):
        without = _common_block_size(shape for name, shape in shapes.items() if name not in odd)
        name, shape = next(iter(odd.items()))
        others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        warn(
            f"block_size='auto' is {common}, because of {name} with a weight of shape {shape}{others}; without it "
            f"blocks of {without} would do, which are faster. Leave it out with exclude_modules, or train it whole "
            "with modules_to_save."
        )


def _matches(pattern: str, name: str) -> bool:
    """`re.search`, but with an end: the pattern may be a stranger's."""
    try:
        return regex.search(pattern, name, timeout=PATTERN_SECONDS) is not None
    except (TimeoutError, regex.error) as error:
        why = "takes forever" if isinstance(error, TimeoutError) else f"is no regex ({error})"
        raise ValueError(f"num_blocks_pattern {short(pattern)} {why}; fix it.") from None


def share_budget(config: SMTConfig, targets: list[Target], base_parameters: int) -> list[Group]:
    """Who competes for how many blocks; writes the resolved `num_blocks` into the config."""
    patterns = [f"num_blocks_pattern[{pattern!r}]" for pattern in config.num_blocks_pattern]
    if config.selected_blocks is not None:  # nobody competes
        patterns, given = [], sum(map(len, config.selected_blocks.values()))
        groups = [Group(list(range(len(targets))), given)]
        config.num_blocks = given - sum(config.num_blocks_pattern.values())
    else:
        groups = _groups(config, targets, base_parameters)
    config.trainable_ratio = None  # from here on the number of blocks says it
    size = config.block_size
    for (members, budget), pattern in zip(groups, [*patterns, ""], strict=False):
        candidates = sum(targets[i].rows * targets[i].cols for i in members)
        if budget > candidates:
            most = math.floor(1e4 * candidates * size**2 / base_parameters) / 1e4
            way_out = f"num_blocks or trainable_ratio (at most {most:.4f} here), or add target_modules"
            raise ValueError(
                f"A budget of {budget} blocks is above the {candidates} blocks of {size} x {size} that "
                f"{len(members)} target modules ({targets[members[0]].name}, ...) have; lower {pattern or way_out}."
            )
    return groups


def _groups(config: SMTConfig, targets: list[Target], base_parameters: int) -> list[Group]:
    """By `num_blocks_pattern`, then the rest; resolves `num_blocks`."""
    groups, rest = [], list(range(len(targets)))
    for pattern, budget in config.num_blocks_pattern.items():
        members = [i for i in rest if _matches(pattern, targets[i].name)]
        if not members:
            raise ValueError(
                f"num_blocks_pattern {pattern!r} matches none of the targets ({targets[0].name}, ...) that earlier "
                "patterns left; fix the pattern or drop it."
            )
        groups.append(Group(members, budget))
        rest = [i for i in rest if i not in set(members)]
    if not rest:
        if config.num_blocks or config.trainable_ratio:
            raise ValueError("num_blocks_pattern covers every target, so the main budget would be unused; drop it.")
        config.num_blocks = 0
    elif config.num_blocks is None:
        ratio = config.trainable_ratio or DEFAULT_TRAINABLE_RATIO
        config.num_blocks = max(1, round(ratio * base_parameters / config.block_size**2))
    return groups + ([Group(rest, config.num_blocks)] if config.num_blocks else [])
