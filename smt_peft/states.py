"""State dicts: what of an adapter is saved, and what of a file reaches the model."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from smt_peft import contents
from smt_peft.bank import DeltaBank
from smt_peft.banks import Banks, banks_of
from smt_peft.bases import base_weights, other_base, sample
from smt_peft.checks import FLOATS, form, short
from smt_peft.config import SMTConfig
from smt_peft.contents import PREFIX
from smt_peft.diagnostics import warn

FSDP = "_fsdp_wrapped_module."  # what FSDP's first version puts before names of a model, but not of its state


def to_save(
    model: nn.Module, config: SMTConfig, adapter: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The adapter's part of a model's state dict, without the modules that are saved whole, which PEFT adds.

    Raises:
        KeyError: where the state dict lacks the deltas.
    """
    bank, (*keys, manifest_key) = _bank_and_keys(model, adapter)
    config.selected_blocks = bank.selected_blocks()
    bank.refuse_deltas_without_blocks(adapter)
    home, banks = _home(model)
    if keys[0] not in state_dict and len(banks) == 1:  # of `get_peft_model_state_dict`, which does not say whose it is
        in_file = {key: f"{home}.{part}" for key, part in zip(keys, contents.PARTS, strict=False)}
        state_dict = {**state_dict, **{key: state_dict[name] for key, name in in_file.items() if name in state_dict}}
    if keys[0] not in state_dict:
        raise KeyError(f"The state dict to save lacks {keys[0]!r}, the deltas of the SMT adapter {adapter!r}.")
    own = dict(zip(keys[1:], (bank.index, bank.fingerprint), strict=True))  # of parameters alone it has no buffers
    chosen = {key: state_dict.get(key, own.get(key)) for key in keys}
    index = chosen[keys[1]] = contents.narrow(chosen[keys[1]])
    biases = BaseTuner._get_learnable_bias_state_dict(model, state_dict, config)
    others = [*(key for key in biases if ".modules_to_save." not in key), *_whole_modules(model, adapter)]
    others = [key.removeprefix(PREFIX) for key in others]
    manifest = contents.manifest(config, bank.targets, index, others, bank.base)
    return {**chosen, manifest_key: manifest, **biases}


def to_load(
    model: nn.Module, config: SMTConfig, adapter: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those tensors of a file that are the adapter's, under the model's keys. Every file is checked here before any of
    its values is used.

    Raises:
        ValueError: where the file is broken, or does not belong to this model and config.
    """
    bank, keys = _bank_and_keys(model, adapter)
    parts = contents.in_order_of(bank.targets, contents.take_apart(state_dict))
    _refuse_other_names(bank, parts)
    bank.check(parts.weight, parts.index, parts.fingerprint)
    if config.stored_blocks is not None:
        contents.names_of(parts.index, config.stored_blocks, bank.targets)
    if parts.content and (config.trainable_token_indices or None) != parts.content.get(contents.TOKENS):
        raise ValueError(
            f"The file was saved with {contents.TOKENS}={short(parts.content.get(contents.TOKENS))}, and the adapter "
            f"has {short(config.trainable_token_indices)}: its rows would be other tokens'."
        )
    others = _own_weights(model, config, adapter, parts, [target.name for target in bank.targets])
    config.stop_waiting()
    values = [parts.weight, *(value for value in others.values() if value.is_floating_point())]
    if not all(value.isfinite().all() for value in values):
        warn(f"Adapter {adapter!r} holds values that are NaN or infinite, and so will what it computes.")
    if (parts.index < 0).all():
        warn(f"Adapter {adapter!r} was saved before its blocks were selected: it does nothing yet.")
    if parts.content:
        _warn_of_other_base(model, adapter, config, parts.content["base"])
    return {**dict(zip(keys, parts[:3], strict=False)), **others}  # the manifest is no part of the model


def _refuse_other_names(bank: DeltaBank, parts: contents.Parts) -> None:
    here = {target.name for target in bank.targets}
    missing = [target.name for target in parts.content["targets"] if target.name not in here] if parts.content else []
    if missing:
        raise ValueError(
            f"The checkpoint was made for other target modules: it has {short(missing[0])}, and this adapter's "
            f"{len(here)} targets are {short(bank.targets[0].name)}, ... Load it with the adapter_config.json saved "
            "beside it, on its own base model, by a class and a version of transformers that give modules those names."
        )


def _own_weights(
    model: nn.Module, config: SMTConfig, adapter: str, parts: contents.Parts, targets: list[str]
) -> dict[str, torch.Tensor]:
    """Of a file's further tensors those that are the adapter's: biases that it was saved with, and modules that are
    saved whole."""
    others, whole = parts.others, _whole_modules(model, adapter)
    contents.check_complete(parts, known=whole)  # PEFT has looked for whole modules
    state = model.state_dict() if others else {}
    own = set(whole.values())
    for bias in {config.bias, (parts.content or {}).get("bias") or "none"}:
        own.update(BaseTuner._get_learnable_bias_state_dict(model, state, SimpleNamespace(bias=bias)))
    found = {key if key in own else key.removeprefix(PREFIX): key for key in others}
    # PEFT saves the base weight of an lm_head that is a target, too: left out like others, but nothing to warn of.
    own_base = tuple(f"{target}.base_layer." for target in targets if contents.is_embedding(target))
    foreign = [key for name, key in found.items() if name not in own and not name.startswith(own_base)]
    # Beside an adapter's rows and whole modules it saves what they stand in for, where embeddings were resized.
    foreign = [key for key in foreign if not any(part in key for part in contents.WRAPPED)]
    if foreign:
        warn(
            f"The file of adapter {adapter!r} holds {short(foreign[0])}, which is not the adapter's "
            f"and was left out{' with others' * (len(foreign) > 1)}: weights of the base model are not read from "
            "adapters. To train and save one of its modules, such as resized embeddings, use modules_to_save."
        )
    for name in own & set(found):
        held, wanted = others[found[name]], state[name]
        is_float = held.dtype in FLOATS or not wanted.is_floating_point()
        if not is_float or (wanted.numel() and held.shape != wanted.shape):
            raise ValueError(
                f"The file holds {short(name)} as {form(held)}, where the model has "
                f"{form(wanted)}; the file is broken, or belongs to another model."
            )
    return {name: others[key] for name, key in found.items() if name in own}


def _home(model: nn.Module) -> tuple[str, Banks]:
    for home, banks in banks_of(model).items():
        return home.removeprefix(FSDP), banks
    raise ValueError("The model has no SMT adapter (any more).")


def _bank_and_keys(model: nn.Module, adapter: str) -> tuple[DeltaBank, list[str]]:
    """An adapter's bank, and the keys of `contents.PARTS`."""
    home, banks = _home(model)
    return banks[adapter], [f"{home}.{adapter}.{part}" for part in contents.PARTS]


def _whole_modules(model: nn.Module, adapter: str) -> dict[str, str]:
    """Of modules that are saved whole: key in a file -> key in the model."""
    keys = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix(FSDP)
            for saved, own in module.adapter_state_dict_load_map(adapter).items():
                keys[f"{name}.{saved}"] = f"{name}.{own}"
    return keys


def _warn_of_other_base(model: nn.Module, adapter: str, config: SMTConfig, stored: dict[str, list[float]]) -> None:
    root = model.get_submodule(_home(model)[0].rpartition(".")[0])
    different = other_base(stored, sample(base_weights(root, with_heads=False), list(stored)))
    if different:
        here = getattr(root, "name_or_path", "")
        warn(
            f"Adapter {adapter!r} was made for another base model than this{here and f' ({here})'}: "
            f"{short(different)} has other values here. What it learnt is a difference from the weights of "
            f"{config.base_model_name_or_path or 'its own base model'}; load it on that."
        )
