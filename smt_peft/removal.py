"""How a model gets rid of an adapter, or of an injection that failed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from smt_peft.banks import Banks
from smt_peft.checks import BANK
from smt_peft.layer import Linear


def layers_of(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def snapshot(model: nn.Module) -> list[Callable[[], object]]:
    """What puts back all that an injection changes: which modules there are, what PEFT's wrappers of whole modules and
    of rows hold, and what is trained."""
    # A module's children at once: an interrupt may fall between any two lines.
    undo = [partial(vars(module).update, _modules=dict(module._modules)) for module in model.modules()]
    hooks = vars(nn.Module()).keys() - {"_modules", "_parameters", "_buffers"}
    for wrapper in (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)):
        for held in map(vars, wrapper.modules()):
            containers = {name for name in held.keys() - hooks if isinstance(held[name], (dict, list, set, str))}
            undo.append(partial(held.update, {name: copy.copy(held[name]) for name in containers}))
    return undo + [partial(parameter.requires_grad_, parameter.requires_grad) for parameter in model.parameters()]


def take_out(model: nn.Module, adapter: str) -> None:
    """Take an adapter out, and the layers that have none left."""
    for layer in layers_of(model):
        layer.smt_blocks._modules.pop(adapter, None)
    banks: Banks = getattr(model, BANK)
    banks._modules.pop(adapter, None)
    for name, layer in reversed(list(model.named_modules())):
        if isinstance(layer, Linear) and not len(layer.smt_blocks):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base_layer)


def take_out_of_wrappers(root: nn.Module, adapter: str) -> None:
    """Take an adapter out of PEFT's wrappers of whole modules and of rows, and the wrappers that have none left."""
    for name, module in list(root.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            active = module._active_adapter if module.active_adapters != [adapter] else []
            module.delete_adapter(adapter, None)
            module._adapters.discard(adapter)  # which PEFT keeps where its module is gone already
            module._active_adapter = active  # which PEFT empties
            if not module._adapters:
                parent, _, child = name.rpartition(".")
                setattr(root.get_submodule(parent), child, module.original_module)


def remove_banks(model: nn.Module) -> None:
    model = getattr(model, "_orig_mod", model)  # PyTorch 2.7's compiled model cannot delete what is inside of it
    if hasattr(model, BANK):
        getattr(model, BANK).let_go()
        delattr(model, BANK)
