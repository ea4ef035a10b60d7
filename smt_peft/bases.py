"""How a base model is known again, when another has the same shapes: by a sample of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from smt_peft.checks import BANK, FLOATS

WEIGHTS, VALUES, ROWS = 4, 8, 64  # how many are looked at, of each how many values, in how many of the first rows
ROUNDING = 2**-7  # how far a value may move when its model is loaded in another dtype, bfloat16 being the coarsest


OF_ADAPTERS = (f"{BANK}.", ".modules_to_save.", ".trainable_tokens_delta.")  # in the names of parameters
WRAPPERS = (".base_layer", ".original_module", ".token_adapter")  # that stand in for modules


def base_weights(model: nn.Module, with_heads: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The base model's own parameters, by the names they had before anything was wrapped.

    Args:
        with_heads: also those of modules that an adapter has copies of. A new head has other values in each process.
    """
    for name, parameter in model.named_parameters():
        if not any(part in name for part in OF_ADAPTERS) and (with_heads or ".original_module." not in name):
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            yield name, parameter


def sample(weights: Iterable[tuple[str, Tensor]], names: Collection[str] | None = None) -> dict[str, list[float]]:
    """Eight values of each of four weights, by which another base model of the same shapes is known.

    They lie in the first rows, which resizing an embedding leaves where they are. What is quantised, sharded, or not
    in memory is left out.

    Args:
        weights: of the base model, by name.
        names: which to take. Default: four of them, from the first to the last.
    """
    usable = {
        name: weight
        for name, weight in weights
        if weight.ndim >= 2
        and weight.dtype in FLOATS
        and type(weight.data) is Tensor  # no DTensor; what ZeRO-3 has taken away has one dimension
        and weight.numel()
        and weight.device.type != "meta"
    }
    names = far_apart(list(usable)) if names is None else names
    return {name: _values(usable[name]) for name in names if name in usable}


def far_apart(names: list[str]) -> list[str]:
    """Four of these, from the first to the last."""
    return list(dict.fromkeys(names[i * (len(names) - 1) // (WEIGHTS - 1)] for i in range(WEIGHTS) if names))


@torch.no_grad()
def _values(weight: Tensor) -> list[float]:
    steps = torch.arange(VALUES, device="cpu")
    places = [steps * min(side, ROWS) // VALUES for side in weight.shape]
    values = weight.detach()[tuple(place.to(weight.device) for place in places)]
    return [float(f"{value:.4g}") for value in values.nan_to_num().tolist()]


def other_base(stored: Mapping[str, list[float]], found: Mapping[str, list[float]]) -> str | None:
    """The first sampled weight that is another one in this model, if any."""
    for name, values in found.items():
        pairs = zip(stored[name], values, strict=False)
        if any(abs(one - other) > ROUNDING * abs(one) + 1e-6 for one, other in pairs):
            return name
    return None
