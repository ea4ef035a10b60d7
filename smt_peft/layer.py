"""The layer that stands in for a target Linear: forward, merge, unmerge, disable."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from itertools import chain

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.modules import module as all_modules
from transformers.pytorch_utils import Conv1D

from smt_peft import ops
from smt_peft.bank import is_sharded
from smt_peft.banks import Banks, Share
from smt_peft.checks import FLOATS
from smt_peft.quantized import Original, dequantized

# PyTorch's own; None where another package has put one in its place before this one was imported.
FORWARD = nn.Linear.forward if nn.Linear.forward.__globals__["__name__"] == nn.Linear.__module__ else None
# Hooks of all modules, of which PyTorch has no public question.
GLOBAL_HOOKS = [
    getattr(all_modules, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
NO_BLOCKS = (
    "Adapter {!r} has no blocks yet: training needs a selection first. Pass callbacks=[SMTWarmupCallback()] to the "
    "Trainer, or call smt_peft.select_blocks(model, dataloader)."
)


class Linear(nn.Module, BaseTunerLayer):
    """A frozen Linear (or GPT-2's Conv1D) whose selected blocks are trained: y = base_layer(x) + blocks(x, delta).

    The deltas live in the banks at the root of the model; `smt_blocks` says which of them are this layer's. All block
    coordinates are those of the matrix [out_features, in_features], also where Conv1D stores its transpose. Nothing
    but `merge` writes to the base weight.
    """

    adapter_layer_names = ("smt_blocks",)
    cast_input_dtype_enabled = False  # PEFT's `disable_input_dtype_casting` asks; nothing is cast here
    parameter_name = "weight"

    def __init__(self, base_layer: nn.Module, banks: Banks, shared_weight: bool, backend: QuantizationBackend | None):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = self._sides()
        self.quantization_backend = backend
        self.smt_blocks = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.__dict__["banks"] = banks  # not registered: their home is the root of the model
        self._shared_weight = shared_weight
        self._before: list[tuple] = []  # what merging wrote over, last written last: (entries, values [n, b, b])
        self._original: Original | None = None  # a weight while a merged one stands in for it

    def _sides(self) -> tuple[int, int]:
        if isinstance(self.base_layer, Conv1D):
            weight = self.base_layer.weight  # which DeepSpeed ZeRO-3 may have taken away
            return tuple(reversed(getattr(weight, "ds_shape", weight.shape)))
        return self.base_layer.out_features, self.base_layer.in_features

    def target_name(self, module_name: str) -> str:
        """The name of the target among the bank's, from the name of this module in the model."""
        return module_name

    def update_layer(self, adapter_name: str) -> None:
        """Make this layer a target of another adapter."""
        self.smt_blocks[adapter_name] = Share(self.banks, adapter_name)

    # --- what this layer's adapters are ----------------------------------------------------------------------------

    def has_blocks(self, adapter: str) -> bool:
        return adapter in self.smt_blocks and self.smt_blocks[adapter].has_blocks

    @property
    def device(self) -> torch.device:
        """Where this layer computes: its weight's device, or the hook's that brings an offloaded weight in."""
        hook = vars(self.get_base_layer()).get("_hf_hook")
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
        try:
            return self.weight.device
        except AttributeError:  # some quantised layers have none
            return next(chain(self.get_base_layer().parameters(), self.get_base_layer().buffers())).device

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's delta as a dense matrix in the shape of the base weight, in the delta's dtype (float32)."""
        if adapter not in self.banks:
            raise ValueError(f"There is no adapter {adapter!r}; the model has {', '.join(self.banks)}.")
        entries, blocks = self.blocks(adapter)
        delta = torch.zeros(self.out_features, self.in_features, device=blocks.device, dtype=blocks.dtype)
        if len(blocks):
            delta[entries] = blocks
        return delta.T if self.is_transposed else delta

    @property
    def is_transposed(self) -> bool:
        """Whether the base layer holds [in, out]."""
        return isinstance(self.get_base_layer(), Conv1D)

    def blocks(self, adapter: str) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The entries of `matrix` that an adapter adds to (see `ops.entries`), and what, [n, b, b]; on its device."""
        if not self.has_blocks(adapter):
            return (), torch.zeros(0, device=self.device)
        share = self.smt_blocks[adapter]
        plan, blocks = share.bank.parts(share.target, self.device)
        return ops.entries(plan, share.bank.block_size), blocks.detach().to(self.device)

    def requires_grad_(self, requires_grad: bool = True) -> Linear:
        """Also of the layer's adapters, each as a whole: the blocks of all layers are one parameter."""
        for share in self.smt_blocks.values():
            share.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    # --- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> torch.Tensor:
        """The base layer's output [..., out_features] with the active adapters' deltas."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        modules = self._modules  # quicker than attributes: each forward comes here for every layer
        base_layer, shares = modules["base_layer"], modules["smt_blocks"]._modules
        active, is_base = self.active_adapters, self._disable_adapters or self.merged_adapters
        if len(active) == 1 and active[0] in shares and not (is_base or adapter_names) and _is_plain(base_layer, x):
            plan, delta = shares[active[0]].parts(x.device)
            if plan is not None and delta.device == x.device:
                return ops.linear_add_blocks(x, base_layer.weight, base_layer.bias, delta, plan)
        y = base_layer(x, *args, **kwargs)
        if adapter_names is not None and not self._disable_adapters:
            return self._mixed_batch(x, y, adapter_names)
        for name in () if is_base else active:
            if name in shares:
                y = self._add_blocks(y, x, shares[name], base_layer)
        return y

    def _add_blocks(self, y: torch.Tensor, x: torch.Tensor, share: Share, base_layer: nn.Module) -> torch.Tensor:
        if type(base_layer) not in (nn.Linear, Conv1D):
            self._check_output(y, x, share)
        plan, delta = share.parts(y.device)
        if plan is None:
            return y if share.bank.is_selected else self._unselected(y, share)
        if delta.device != y.device or x.device != y.device:  # a model spread over devices
            delta, x = delta.to(y.device), x.to(y.device)
        in_place = type(base_layer) in (nn.Linear, Conv1D) and not _is_looked_into(base_layer)
        return ops.add_blocks(y, x, delta, plan, in_place)

    def _check_output(self, y: torch.Tensor, x: torch.Tensor, share: Share) -> None:
        """Raise TypeError where the base layer does not multiply by its weight, as a linear layer that has groups."""
        is_plain = isinstance(y, torch.Tensor) and not y.is_nested and x.shape[-1] == self.in_features
        if is_plain and y.shape == (*x.shape[:-1], self.out_features):
            return
        given = tuple(y.shape) if isinstance(y, torch.Tensor) and not y.is_nested else type(y).__name__
        name, kind = share.bank.targets[share.target].name, type(self.get_base_layer()).__name__
        raise TypeError(
            f"{name}, a {kind} of {self.in_features} to {self.out_features} features, makes {given} of an input "
            f"{tuple(x.shape)}: it does not multiply by its weight alone, and deltas of that would do something else. "
            "Leave it out with exclude_modules."
        )

    def _mixed_batch(self, x: torch.Tensor, y: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Each sample of the batch with its own adapter (inference): the base output `y` plus each one's delta."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively; give one name per row."
            )
        for name in set(adapter_names) & set(self.smt_blocks):
            rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            y = y.index_copy(0, rows, self._add_blocks(y[rows], x[rows], self.smt_blocks[name], self.base_layer))
        return y

    def _unselected(self, y: torch.Tensor, share: Share) -> torch.Tensor:
        """y, of an adapter that has no blocks yet, which is no model to train."""
        bank = share.bank
        if bank.in_warmup or not (torch.is_grad_enabled() and bank.weight.requires_grad):
            return y
        if self.training:
            raise RuntimeError(NO_BLOCKS.format(share.adapter))
        # In eval mode it may be an evaluation; which a compiler cannot tell.
        return y if torch.compiler.is_compiling() else Unselected.apply(y, bank.weight, share.adapter)

    # --- merge -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active (or named) adapters into the base weight, until `unmerge`.

        With `safe_merge`, raise ValueError and leave the weight alone where the result has NaN or infinite entries.
        Raise TypeError for weights that cannot be merged into: sharded ones, and some quantised ones.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.smt_blocks]
        if not adapter_names:
            return
        for name in adapter_names:
            self.smt_blocks[name].bank.refuse_deltas_without_blocks(name)
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(
                f"A {self.quantization_backend.backend_name} weight cannot be merged into; merge on the unquantised "
                "base model instead."
            )
        if self.quantization_backend is None and self.weight.dtype not in FLOATS:
            raise TypeError(
                f"A weight of {str(self.weight.dtype).removeprefix('torch.')} that PEFT cannot dequantise cannot be "
                "merged into; merge on the unquantised base model instead."
            )
        if is_sharded(self.weight):
            raise TypeError(
                "A sharded weight cannot be merged into; save the adapter and merge it on an unsharded base model."
            )
        if safe_merge:
            weight = self._base_weight()
            for name in adapter_names:
                weight = (weight + self.get_delta_weight(name).to(weight.device)).to(weight.dtype)
                if not weight.isfinite().all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: its delta or "
                        "the base weight is not finite."
                    )
        if self.quantization_backend is None and type(self.weight) is nn.Parameter:
            for name in adapter_names:
                self._merge_blocks(name)
        elif any(map(self.has_blocks, adapter_names)):
            self._merge_whole(adapter_names)
        else:
            self.merged_adapters += adapter_names

    @torch.no_grad()
    def _merge_blocks(self, adapter: str) -> None:
        """Write the sums of blocks and deltas, and remember the blocks first: whatever interrupts, they come back."""
        entries, delta = self.blocks(adapter)
        if len(delta):
            if self._shared_weight and self._original is None:  # the module that shares it keeps the old one
                self._original = Original(self.get_base_layer(), self.parameter_name)
                copied = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
                setattr(self.get_base_layer(), self.parameter_name, copied)
            matrix = self.matrix()
            before = matrix[entries]
            self._before.append((entries, before))
            matrix[entries] = ops.rounded_sum(before, delta)
        self.merged_adapters.append(adapter)

    def _merge_whole(self, adapters: list[str]) -> None:
        """Put a new weight in the place of one that is quantised, or of a class of its own."""
        module = self.get_base_layer()
        self._original = self._original or Original(module, self.parameter_name)  # first: dequantising may unpack it
        weight = self._base_weight()
        weight = sum((self.get_delta_weight(name).to(weight) for name in adapters), weight)
        if self._shared_weight or self.parameter_name != "weight":
            setattr(module, self.parameter_name, nn.Parameter(weight, requires_grad=False))
        else:
            self.set_base_weight(weight)
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Take merged adapters out again: the weight is what it was, bit for bit."""
        if not (self.merged or self._before or self._original):
            warnings.warn("Already unmerged. Nothing to do.")
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo `merge`, also one that was interrupted: the base weight is what it was, bit for bit."""
        if self._before or self._original:
            with onload_layer(self) if self.weight.device.type == "meta" else nullcontext():  # offloaded: comes in
                for entries, before in reversed(self._before):
                    self.matrix()[tuple(side.to(self.weight.device) for side in entries)] = before.to(self.weight)
                self._before = []
                if self._original is not None:
                    original = self._original.put_back()
                    if self.quantization_backend is not None:
                        self.base_layer = original
                    self._original = None
        self.merged_adapters.clear()

    def matrix(self) -> torch.Tensor:
        """The base weight as [out_features, in_features]; dequantised, or a view of its storage."""
        weight = self._base_weight()
        return weight.T if self.is_transposed else weight

    def _base_weight(self) -> torch.Tensor:
        return self.weight.data if self.quantization_backend is None else dequantized(self)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.banks._modules.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT asks after loading: the bank of all layers goes where the first of them is, and keeps its dtype."""
        share = self.smt_blocks._modules.get(adapter_name)
        device = device or self.device if self.device.type != "meta" else device
        if share is not None and share.target == 0 and device and share.bank.weight.device.type != "meta":
            share.bank.to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True  # as near as its rank allows, see `smt_peft.conversion`

    def __repr__(self) -> str:
        return "smt." + super().__repr__()


class Unselected(torch.autograd.Function):
    """y as it is, where an adapter has no blocks: a backward through it would train nothing, and says so."""

    @staticmethod
    def forward(ctx, y, weight, adapter):
        ctx.adapter = adapter
        return y.detach()  # as `view_as` would, but a model may change this in place

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError(NO_BLOCKS.format(ctx.adapter))


def _is_plain(base_layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a training step may compute the base layer's product itself: a frozen Linear that nobody looks into."""
    if type(base_layer) is not nn.Linear or not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and ops.is_watched():  # a compiler sees what is changed in place
        return False
    # Replicas of DataParallel and parametrised layers have none of their own.
    weight, bias = base_layer._parameters.get("weight"), base_layer._parameters.get("bias")
    hooks = base_layer._forward_pre_hooks or base_layer._backward_hooks or base_layer._backward_pre_hooks
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and weight.dtype == x.dtype
        and weight.device == x.device
        and not (hooks or _is_looked_into(base_layer))
        and not ops.is_autocast(x.device.type)
    )


def _is_looked_into(base_layer: nn.Module) -> bool:
    """Whether other code sees the base layer's output: through a hook on it or on all modules, or a forward that was
    replaced, on it (as accelerate does) or on all Linears."""
    has_own = "forward" in base_layer.__dict__ or (type(base_layer) is nn.Linear and nn.Linear.forward is not FORWARD)
    return bool(base_layer._forward_hooks) or has_own or any(GLOBAL_HOOKS)
