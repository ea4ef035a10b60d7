"""What quantised base layers need beyond PEFT's back ends: to be read rightly, and to come back exactly."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn


def dequantized(layer: BaseTunerLayer) -> torch.Tensor:
    """The float weight of a layer's quantised base layer.

    On some CPUs bitsandbytes repacks 4-bit weights for inference, in an order that its own dequantisation reads
    wrongly; asking for the state dict makes it unpack them.
    """
    base_layer = layer.get_base_layer()
    if getattr(getattr(base_layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        base_layer.state_dict()
    return layer.get_base_weight()


def backend_of(layer: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's back end for a quantised layer; one that cannot merge where torchao itself has quantised it, and no
    quantiser of transformers says how to make such a weight anew."""
    how = get_quantization_kwargs(model)
    backend = resolve_quantization_backend(layer, **({"get_apply_tensor_subclass": _unknown} | how))
    if backend is not None and backend.backend_name == "torchao" and not how:
        backend.supports_merge = False
    return backend


def _unknown() -> None:
    """In place of what makes torchao's weights anew."""


class Original:
    """A weight, with what the library of a quantised one keeps beside it. Merging makes a new one; `put_back` undoes
    that."""

    def __init__(self, base_layer: nn.Module, name: str):
        self.base_layer, self.name, self.weight = base_layer, name, getattr(base_layer, name)
        self.data = self.weight.data
        # bitsandbytes: flags on the weight, 8-bit data and scale in `state`, 4-bit scales in `quant_state`
        owners = [self.weight, getattr(base_layer, "state", None), getattr(self.weight, "quant_state", None)]
        self._kept = [(owner, dict(vars(owner))) for owner in owners if owner is not None]

    def put_back(self) -> nn.Module:
        """Restore the base layer and return it (HQQ replaces the module itself)."""
        setattr(self.base_layer, self.name, self.weight)
        if type(self.weight) is not nn.Parameter:  # `dequantized` may have unpacked it, or merging put another there
            self.weight.data = self.data
        for owner, attributes in self._kept:
            vars(owner).clear()
            vars(owner).update(attributes)
        return self.base_layer
