"""Patches: what an adapter changes in its model, as values, for a process that keeps a plain copy of the model.

A patch is a flat dict of tensors, as safetensors takes it. For each parameter, and each adapter that changes it:

* `<parameter>/<number>/shape`: int64 [ndim], of the whole parameter.
* `<parameter>/<number>/rows` and `cols`: int16, or int32 where that is too small. [n], the first row and the first
  column of each block, the others being their neighbours; or [n, r] and [n, c], all of them.
* `<parameter>/<number>/values`: [n, r, c], the new values, in the parameter's dtype.

Rows and columns are those of the parameter as it is stored, all dimensions but the last taken as one: GPT-2's Conv1D
stores [in, out], experts are parts of [experts * out, in]. Values are no differences: applying a patch twice is safe.

`sparse_patch` belongs to the process that trains. The rest needs torch alone, so that this file can be copied.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class PatchedBlocks(NamedTuple):
    """Blocks of one parameter, as in the docstring of this file."""

    shape: Tensor
    rows: Tensor
    cols: Tensor
    values: Tensor


# --- the process that trains -----------------------------------------------------------------------------------------


@torch.no_grad()
def sparse_patch(
    model: nn.Module, adapter: str | Sequence[str] | None = None, safe_merge: bool = False
) -> dict[str, Tensor]:
    """What `model.merge_adapter` would write, bit for bit; nothing is written.

    Args:
        model: with SMT adapters that are not merged.
        adapter: the adapter, or several in the order in which they would be merged; None for the active ones.
        safe_merge: raise ValueError where a new value is not finite.

    Returns:
        The patch. Names are those of the model before it was wrapped; values lie on their weight's device.

    Raises:
        ValueError: where an adapter is unknown, merged, without a selection, or trains more than blocks.
        TypeError: where a base weight is quantised or sharded.
    """
    from accelerate.utils import align_module_device

    from smt_peft.experts import ParamWrapper  # here, because the rest of the file needs torch alone
    from smt_peft.layer import Linear

    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    if adapter is None:
        adapter = layers[0].active_adapters if layers else "default"
    adapters = [adapter] if isinstance(adapter, str) else list(adapter)
    for name in adapters:
        _check_adapter(model, name)
    patch = {}
    for layer in layers:
        having = list(filter(layer.has_blocks, adapters))
        if not having:
            continue
        share = layer.smt_blocks[having[0]]
        parameter = share.bank.targets[share.target].name.replace(".base_layer", "")
        if not isinstance(layer, ParamWrapper):
            parameter += ".weight"
        with align_module_device(layer.get_base_layer()):  # brings an offloaded weight in
            _check_base(layer, parameter)
            merged = _merged_blocks(layer, having)
        for number, blocks in enumerate(merged):
            if safe_merge and not blocks.values.isfinite().all():
                raise ValueError(
                    f"{parameter} would hold NaN or infinite values: its weight or the delta of {having[number]!r} is "
                    "not finite. Go back to an earlier checkpoint."
                )
            patch.update({f"{parameter}/{number}/{part}": tensor for part, tensor in blocks._asdict().items()})
    return patch


def _check_adapter(model: nn.Module, adapter: str) -> None:
    from smt_peft.banks import find_bank

    bank = find_bank(model, adapter)
    config = bank.config
    if not bank.is_selected:
        raise ValueError(
            f"Adapter {adapter!r} has no blocks yet, so there is nothing to send. Pass "
            "callbacks=[SMTWarmupCallback()] to the Trainer, or call smt_peft.select_blocks(model, dataloader)."
        )
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            f"Adapter {adapter!r} trains more than blocks (bias={config.bias!r}, modules_to_save="
            f"{config.modules_to_save!r}, trainable_token_indices={config.trainable_token_indices!r}), and a patch "
            "holds blocks alone. Train without these, or send the merged model's whole state dict."
        )


def _check_base(layer, parameter: str) -> None:
    from smt_peft.bank import is_sharded
    from smt_peft.checks import FLOATS

    weight = layer.weight
    if layer.merged:
        raise ValueError(
            f"{parameter} holds the merged adapter(s) {', '.join(layer.merged_adapters)}, and a patch is made from "
            "the base weight. Call unmerge_adapter() first."
        )
    if is_sharded(weight):
        raise TypeError(
            f"{parameter} is sharded, and a patch is made from the whole base weight. Save the adapter, load it on an "
            "unsharded base model, and make the patch there."
        )
    if layer.quantization_backend or type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        raise TypeError(
            f"{parameter} is quantised ({type(weight).__name__}), and a patch holds values of the weight's own dtype. "
            "Load the adapter on the unquantised base model, and make the patch there."
        )


def _merged_blocks(layer, adapters: list[str]) -> list[PatchedBlocks]:
    """Of each adapter, what its blocks hold once all are merged, one after the other."""
    from smt_peft.ops import rounded_sum

    weight, places = layer.weight.detach(), []
    matrix = weight.contiguous().view(-1, weight.shape[-1])
    for adapter in adapters:
        (rows, cols), delta = layer.blocks(adapter)
        rows, cols = rows[:, :, 0], cols[:, 0, :]
        if layer.is_transposed:
            rows, cols, delta = cols, rows, delta.transpose(1, 2)
        places.append((*_shorten(rows, cols), delta))
    if len(places) == 1:
        rows, cols, delta = places[0]
        values = [rounded_sum(_read(matrix, rows, cols, delta.shape), delta)]
    else:
        matrix = matrix.clone()  # the adapters' blocks may overlap
        for rows, cols, delta in places:
            _write(matrix, rows, cols, rounded_sum(_read(matrix, rows, cols, delta.shape), delta))
        values = [_read(matrix, rows, cols, delta.shape) for rows, cols, delta in places]
    small = torch.int16 if max(matrix.shape) <= 2**15 else torch.int32
    return [
        PatchedBlocks(torch.tensor(weight.shape, device="cpu"), rows.to(small), cols.to(small), new.contiguous())
        for (rows, cols, _), new in zip(places, values, strict=True)
    ]


def _shorten(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, r] and columns [n, c] on the CPU; their first ones, [n], where all are neighbours."""
    rows, cols = rows.cpu(), cols.cpu()
    if all((side == side[:, :1] + torch.arange(side.shape[1], device="cpu")).all() for side in (rows, cols)):
        return rows[:, 0], cols[:, 0]
    return rows, cols


# --- the process that generates --------------------------------------------------------------------------------------


@torch.no_grad()
def apply_patch(
    target: nn.Module | MutableMapping[str, Tensor],
    patch: Mapping[str, Tensor],
    keep_original: bool = True,
    mapping: Mapping[str, tuple[str, int]] | None = None,
) -> dict[str, Tensor] | None:
    """Write a patch into a plain model, or into a state dict, in place. All of it is checked before any is written.

    A parameter that is tied to another becomes one of its own, as by merging, and stays one.

    Args:
        target: the model, or tensors by the names of its parameters.
        patch: from `sparse_patch`, on any device.
        keep_original: whether to return what undoes it.
        mapping: parameter of the patch -> (parameter that holds it, its first row there), see `fused_rows`.

    Returns:
        A patch of what was written over: applied in the same way, it undoes this one bit for bit. Undo several, the
        last first; of patches with the same blocks, the first's undoes all. None without `keep_original`.

    Raises:
        ValueError: where the patch does not fit: names, shapes, dtypes; or is broken.
        TypeError: where a parameter is sharded, offloaded or not contiguous.
    """
    target = getattr(target, "_orig_mod", target)  # of torch.compile(model), which shares the tensors
    is_module, mapping, original = isinstance(target, nn.Module), mapping or {}, {}
    tensors = dict(target.named_parameters(remove_duplicate=False)) if is_module else target
    groups = _groups(patch)
    homes = {key: _check(tensors, key.rpartition("/")[0], blocks, mapping) for key, blocks in groups.items()}
    holders = {holder for holder, _ in homes.values()}
    needs_inference_mode = any(tensors[holder].is_inference() for holder in holders)
    with torch.inference_mode(needs_inference_mode or torch.is_inference_mode_enabled()):
        _untie(target, tensors, holders)
        places = {key: _matrix(tensors[holder], row, groups[key]) for key, (holder, row) in homes.items()}
        for key, blocks in groups.items() if keep_original else ():  # before any are written: they may overlap
            # Copies: a file that the patch is mapped from may be another by the time this is undone.
            shape, rows, cols = (tensor.clone() for tensor in blocks[:3])
            before = PatchedBlocks(shape, rows, cols, _read(places[key], rows, cols, blocks.values.shape))
            original.update({f"{key}/{part}": tensor for part, tensor in before._asdict().items()})
        try:
            for key, blocks in groups.items():
                _write(places[key], blocks.rows, blocks.cols, blocks.values)
        except BaseException:
            for key in groups if keep_original else ():  # all of them: who knows how far it got
                _write(places[key], *(original[f"{key}/{part}"] for part in ("rows", "cols", "values")))
            raise
    return original if keep_original else None


def fused_rows(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int]]:
    """The `mapping` to a serving engine's fused projections, from the unfused model's state dict, by LLaMA's names;
    the model may have adapters.

    q_proj, k_proj and v_proj are one after the other in qkv_proj; gate_proj and up_proj in gate_up_proj.
    """
    mapping, plain = {}, {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items()}
    for fused, parts in FUSED.items():
        for name in plain:
            path, row = name.removesuffix(f"{parts[0]}.weight"), 0
            names = [f"{path}{part}.weight" for part in parts]
            if path != name and all(part in plain for part in names):
                for part in names:
                    mapping[part] = f"{path}{fused}.weight", row
                    row += plain[part].shape[0]
    return mapping


def _groups(patch: Mapping[str, Tensor]) -> dict[str, PatchedBlocks]:
    """A patch's tensors by "<parameter>/<number>"."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in patch.items():
        group, _, part = key.rpartition("/")
        groups.setdefault(group, {})[part] = tensor
    for group, parts in groups.items():
        if set(parts) != set(PatchedBlocks._fields):
            raise ValueError(
                f"This is no patch, or a broken one: {group or next(iter(parts))!r} has {', '.join(sorted(parts))} in "
                f"the place of {', '.join(PatchedBlocks._fields)}. Make it by sparse_patch."
            )
    return {group: PatchedBlocks(**parts) for group, parts in groups.items()}


def _check(
    tensors: Mapping[str, Tensor], name: str, blocks: PatchedBlocks, mapping: Mapping[str, tuple[str, int]]
) -> tuple[str, int]:
    """What holds a parameter, and from which row on."""
    holder, row = mapping.get(name, (name, None))
    if holder not in tensors:
        raise ValueError(
            f"The patch changes {name}, but there is no {holder} here ({', '.join(list(tensors)[:3])}, ...). A patch "
            "is for the plain model, before PEFT wraps it; for fused projections give a mapping, see fused_rows."
        )
    tensor, shape = tensors[holder], tuple(blocks.shape.flatten().tolist())
    is_sharded = hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")
    if is_sharded or tensor.device.type == "meta" or not tensor.is_contiguous():
        what = "offloaded" if tensor.device.type == "meta" else "sharded" if is_sharded else "not contiguous"
        raise TypeError(
            f"{holder} is {what}, and a patch is written into a whole weight in memory. Apply it to a state dict, and "
            "load that."
        )
    if shape != tuple(tensor.shape if row is None else tensor[row : row + shape[0]].shape):
        raise ValueError(
            f"The patch is for {name} of the shape {shape}, which does not fit {holder} of the shape "
            f"{tuple(tensor.shape)}{'' if row is None else f' from row {row} on'}. It was made for another "
            "model, or the mapping was."
        )
    if tensor.dtype != blocks.values.dtype:
        raise ValueError(
            f"The patch holds {name} in {blocks.values.dtype}, but {holder} is {tensor.dtype}. Load both models in "
            "one dtype: what is rounded again, or quantised, is not the merged model."
        )
    if not _is_sound(blocks, shape):
        sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in blocks._asdict().items())
        raise ValueError(f"The patch is broken: its blocks of {name} ({sizes}) do not lie in the shape {shape}.")
    return holder, row or 0


def _is_sound(blocks: PatchedBlocks, shape: tuple[int, ...]) -> bool:
    """Whether there is a row and a column, or all of them, for each block, and all lie in the parameter."""
    rows, cols, values = blocks[1:]
    if values.ndim != 3 or not len(values) or rows.ndim != cols.ndim:
        return False
    if any(side.is_floating_point() or side.is_complex() or side.dtype == torch.bool for side in (rows, cols)):
        return False
    for side, size, length in ((rows, values.shape[1], math.prod(shape[:-1])), (cols, values.shape[2], shape[-1])):
        if side.shape not in (values.shape[:1], (len(values), size)):
            return False
        if int(side.min()) < 0 or int(side.max()) + (size if side.ndim == 1 else 1) > length:  # int16 would overflow
            return False
    return True


def _untie(target: nn.Module | MutableMapping, tensors: MutableMapping[str, Tensor], names: set[str]) -> None:
    """Give those of these tensors that have another name, too, a copy of their own."""
    uses = Counter(tensor.data_ptr() for tensor in tensors.values() if isinstance(tensor, Tensor))
    for name in names:
        tensor = tensors[name]
        if uses[tensor.data_ptr()] > 1:
            if not isinstance(target, nn.Module):
                raise ValueError(
                    f"{name} is tied to another tensor of the state dict, which would change with it: patch the model "
                    "itself, or give the dict a copy under this name first."
                )
            owner, _, attribute = name.rpartition(".")
            tensors[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            setattr(target.get_submodule(owner), attribute, tensors[name])


def _matrix(holder: Tensor, row: int, blocks: PatchedBlocks) -> Tensor:
    """A view of a parameter in what holds it, with all dimensions but the last as one."""
    part = holder.detach()[row : row + int(blocks.shape[0])]
    return part.view(-1, part.shape[-1])


def _read(matrix: Tensor, rows: Tensor, cols: Tensor, shape: Sequence[int]) -> Tensor:
    """The blocks of a contiguous matrix: [n, r, c]. Slices are several times quicker than single entries."""
    if rows.ndim == 1:
        places = zip(rows.tolist(), cols.tolist(), strict=True)
        return torch.stack([matrix[row : row + shape[1], col : col + shape[2]] for row, col in places])
    return matrix.view(-1).index_select(0, _entries(matrix, rows, cols)).view(shape)


def _write(matrix: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> None:
    values = values.to(matrix.device)
    if rows.ndim == 1:
        for row, col, block in zip(rows.tolist(), cols.tolist(), values, strict=True):
            matrix[row : row + block.shape[0], col : col + block.shape[1]] = block
    else:
        matrix.view(-1).index_copy_(0, _entries(matrix, rows, cols), values.flatten())


def _entries(matrix: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Where the entries of blocks with these rows and columns lie in the matrix's storage."""
    rows, cols = (side.to(matrix.device).long() for side in (rows, cols))
    return (rows[:, :, None] * matrix.shape[1] + cols[:, None, :]).flatten()
