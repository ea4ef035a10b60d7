"""Merging an adapter into its base model's files, shard by shard: the model is never in memory.

Whatever cannot be merged as it lies in the files is refused before anything is written.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from smt_peft import ops
from smt_peft.bases import other_base, sample
from smt_peft.checkpoints import (
    BESIDE_WEIGHTS,
    STORED_FLOATS,
    TOKENIZER,
    Checkpoint,
    empty_model,
    is_model,
    stored_keys,
)
from smt_peft.contents import PREFIX
from smt_peft.files import Blocks, StoredAdapter, adapter_config, read_adapter, read_json
from smt_peft.writing import check_is_new, written_whole

TRAINING_DATA = "training_data.json"  # scripts/ name there what a model was trained on
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_FLOATS.values()}
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
CLASSIFIERS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
OR_LOAD = "merge with --load, which needs the whole model in memory"


class Change(NamedTuple):
    """What becomes of a tensor of the checkpoint: first `whole` takes its place, then `blocks` are added to it."""

    whole: Tensor | None
    blocks: Blocks | None
    transposed: bool  # Conv1D stores [in, out]


# --- what changes ----------------------------------------------------------------------------------------------------


def changes_of(adapter: StoredAdapter, checkpoint: Checkpoint) -> dict[str, Change]:
    """Key in the checkpoint -> what becomes of this tensor.

    Raises:
        ValueError: where a tensor is not in the checkpoint, is not stored as it is used, has another shape, is
            quantised, or is one with another tensor (tied).
    """
    model, base = empty_model(checkpoint.folder), checkpoint.folder
    stored = stored_keys(model, checkpoint.files)
    parameters = model.state_dict(keep_vars=True)
    uses = Counter(map(id, parameters.values()))
    whole = {key.removeprefix(PREFIX).replace(".base_layer", ""): tensor for key, tensor in adapter.others.items()}
    changes = {}
    targets = [*whole, *(name for name in adapter.blocks if f"{name}.weight" not in whole)]
    names = {name: _own_name(name, model.base_model_prefix, parameters) for name in [*targets, *adapter.base]}
    _warn_of_other_base(adapter, checkpoint, {name: stored.get(names[name]) for name in adapter.base})
    for target in targets:
        name = names[target]
        if name not in stored:
            raise ValueError(f"{target} of the adapter is not among the weights of {base}; {OR_LOAD}.")
        if stored[name] is None:
            raise ValueError(f"{base} stores {name} in a form that transformers converts on loading; {OR_LOAD}.")
        if uses[id(parameters[name])] > 1:
            raise ValueError(f"{name} is tied to another weight of {base}, which would change with it; {OR_LOAD}.")
        # A target that is a parameter, and no module, is taken as it is stored.
        is_parameter = target not in whole and (name.endswith(target) or target.endswith(name))
        transposed = not is_parameter and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        shape, dtype = checkpoint.look(stored[name])
        found, expected = ([shape], [tuple(whole[target].shape)]) if target in whole else ([], [])
        of_blocks = target.removesuffix(".weight") if target in whole else target
        blocks = adapter.blocks.get(of_blocks)
        if blocks is not None:
            matrix = torch.Size(shape[:-1]).numel(), shape[-1]
            found.append(matrix[::-1] if transposed else matrix)
            expected.append(adapter.shapes[of_blocks])
        if found != expected:
            raise ValueError(
                f"{target} has the shape {expected[-1]} in the adapter, and {found[-1]} in {base}: the adapter was "
                "made for another model; name that with --base."
            )
        if blocks is not None and dtype not in STORED_FLOATS:
            raise ValueError(f"{base} stores {name} quantised ({dtype}); merge into the model it was made from.")
        changes[stored[name]] = Change(whole.get(target), blocks, transposed)
    return changes


def kept_in_float32(checkpoint: Checkpoint, dtype: torch.dtype) -> str | None:
    """A tensor that transformers would not round to `dtype` when it loads the model."""
    lists = {torch.float16: ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"]}
    lists[torch.bfloat16] = lists[torch.float16][1:]
    model = empty_model(checkpoint.folder)
    kept = {name for names in lists.get(dtype, ()) for name in getattr(model, names, None) or ()}
    keys = (key for key in sorted(checkpoint.files) if any(re.search(rf"(^|\.){name}(\.|$)", key) for name in kept))
    return next((key for key in keys if STORED_FLOATS.get(checkpoint.look(key)[1], dtype) != dtype), None)


def _own_name(target: str, prefix: str, parameters: dict[str, Tensor]) -> str | None:
    """What the model calls a target, which may be a module or a parameter, of the model with its head or without."""
    names = [target, f"{prefix}.{target}", target.removeprefix(f"{prefix}.")]
    return next((n for name in names for n in (f"{name}.weight", name) if n in parameters), None)


def _warn_of_other_base(adapter: StoredAdapter, checkpoint: Checkpoint, keys: dict[str, str | None]) -> None:
    found = sample(((name, checkpoint.read(key)) for name, key in keys.items() if key), list(keys))
    if different := other_base(adapter.base, found):
        warnings.warn(
            f"{different} has other values in {checkpoint.folder} than in the model that the adapter was made for, "
            f"{adapter.config.base_model_name_or_path or 'which it does not name'}."
        )


def changed(key: str, tensor: Tensor, change: Change) -> Tensor:
    """A tensor of the checkpoint after the merge, as `merge_and_unload` computes it; may write to the given one.

    Raises:
        ValueError: where it is not finite.
    """
    tensor = tensor if change.whole is None else change.whole.to(tensor.dtype, copy=True)
    new = tensor
    if change.blocks is not None:
        matrix = tensor.T if change.transposed else tensor.flatten(0, -2)
        entries = change.blocks.entries
        matrix[entries] = new = ops.rounded_sum(matrix[entries], change.blocks.deltas)
    if not new.isfinite().all():
        raise ValueError(f"{key} would have NaN or infinite entries: the adapter or the base model is broken.")
    return tensor


# --- files -----------------------------------------------------------------------------------------------------------


def merge_files(adapter: Path, base: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write the base model with the adapter merged into it, one shard after the other.

    Shards that nothing changes are copied; `dtype` changes all. The result is, bit for bit, that of `merge_and_unload`
    on the model in the stored dtype, or in `dtype`.

    Returns:
        How many shards were rewritten and copied, and how many tensors changed.
    """
    if (method := adapter_config(adapter).get("peft_type")) != "SMT":
        raise ValueError(f"{adapter} is of the method {method}, not SMT; {OR_LOAD}.")
    checkpoint = Checkpoint(base)
    stored = read_adapter(adapter)
    if not stored.blocks:
        raise ValueError(f"{adapter} has no blocks yet, so there is nothing to merge; train it first.")
    changes = changes_of(stored, checkpoint)
    if dtype and (kept := kept_in_float32(checkpoint, dtype)):
        raise ValueError(
            f"transformers keeps {kept} of this model in float32 where the rest is in "
            f"{str(dtype).removeprefix('torch.')}: leave --dtype out, or {OR_LOAD}."
        )
    shards = sorted(set(checkpoint.files.values()))
    touched = set(shards) if dtype else {checkpoint.files[key] for key in changes}
    check_is_new(out)
    notes, index = _notes(adapter, base), checkpoint.index and read_json(checkpoint.index)
    with written_whole(out, only_new=True) as partial:
        _copy(base, partial, BESIDE_WEIGHTS)  # all that may be refused comes before the long work
        if dtype:
            _write(_with_dtype(read_json(partial / "config.json"), dtype), partial / "config.json")
        _copy_tokenizer_and_notes(adapter, base, partial, notes)
        size = 0  # of all tensors, where all shards are rewritten
        for name in tqdm(shards, desc="merging", unit="shard", disable=None):
            if name in touched:
                size += _write_shard(base / name, partial / name, changes, dtype)
            else:
                shutil.copyfile(base / name, partial / name)
        if index:
            if dtype:
                index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
            _write(index, partial / SAFE_WEIGHTS_INDEX_NAME)
    return {
        "shards_rewritten": len(touched),
        "shards_copied": len(shards) - len(touched),
        "tensors_changed": len(changes),
    }


def merge_loaded(adapter: Path, base: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, int]:
    """`merge_files` with the whole model in memory: for all that transformers loads, and adapters of any method."""
    check_is_new(out)
    notes, model = _notes(adapter, base), load_model(adapter, base, dtype)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(f"{adapter} is of a method that cannot be merged into weights.")
    with written_whole(out, only_new=True) as partial:
        _copy(base, partial, BESIDE_WEIGHTS)
        _copy_tokenizer_and_notes(adapter, base, partial, notes)
        model.merge_and_unload(safe_merge=True).save_pretrained(partial)
    return {"shards_rewritten": len(list(out.glob("*.safetensors"))), "shards_copied": 0}


def load_model(adapter: Path, base: Path, dtype: torch.dtype | None = None) -> PeftModel:
    """The base model with the adapter, of the class that the adapter was trained on, as far as it says which."""
    about = adapter_config(adapter)
    if (method := about.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{adapter} is of the method {method}, which this PEFT does not know; update it.")
    mapping, task = about.get("auto_mapping"), about.get("task_type")
    own = (AutoConfig.from_pretrained(base, trust_remote_code=False).architectures or ["AutoModel"])[0]
    generates = own.endswith(("ForCausalLM", "ForConditionalGeneration"))  # as models of vision and language do
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    name = name or (own if task == "CAUSAL_LM" and generates else CLASSES.get(task, own))
    kind = getattr(transformers, name, None)
    if not (is_model(kind) or name in CLASSES.values()):
        raise ValueError(f"{adapter} was trained on a {name}, which transformers does not have; merge it in Python.")
    options = {"dtype": dtype or "auto", **(_labels(adapter) if "Classification" in name else {})}
    return PeftModel.from_pretrained(kind.from_pretrained(base, **options), adapter)


def _labels(adapter: Path) -> dict[str, int]:
    """How many labels a new classifier has: the adapter's file has it whole, the base's config knows nothing of it."""
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():  # but one that is pickled, of another method: PEFT's own business
        return {}
    with safe_open(path, "pt") as file:
        heads = [key for key in file.keys() if key.endswith(CLASSIFIERS)]  # noqa: SIM118
        shape = file.get_slice(heads[0]).get_shape() if heads else []
        return {"num_labels": shape[0]} if shape else {}


def _write_shard(source: Path, target: Path, changes: dict[str, Change], dtype: torch.dtype | None) -> int:
    """Write a shard anew; gives the bytes of its tensors."""
    with safe_open(source, "pt") as file:  # mapped, each page is copied on the first write to it: the file stays
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in tensors.items():
        if dtype and tensor.dtype in STORED_FLOATS.values():
            tensors[key] = tensor.to(dtype)
        if key in changes:
            tensors[key] = changed(key, tensors[key], changes[key])
    save_file(tensors, target, metadata)
    return sum(tensor.nbytes for tensor in tensors.values())


def _notes(adapter: Path, base: Path) -> dict | None:
    """What model and adapter learnt, where the adapter says what it did."""
    if not (adapter / TRAINING_DATA).is_file():
        return None
    notes = [read_json(folder / TRAINING_DATA) for folder in (base, adapter) if (folder / TRAINING_DATA).is_file()]
    return {"train": list(dict.fromkeys(name for note in notes for name in note.get("train", ())))}


def _copy_tokenizer_and_notes(adapter: Path, base: Path, out: Path, notes: dict | None) -> None:
    """The adapter's own tokenizer wins, but for code: whoever trusts the base model's would run it."""
    name = "tokenizer_config.json"
    source = adapter if (adapter / name).is_file() else base
    _copy(source, out, TOKENIZER, code=source == base)
    if source == adapter and "auto_map" in (config := read_json(adapter / name)):  # names code, and where it is
        trusted = read_json(base / name) if (base / name).is_file() else {}
        own = {key: value for key, value in config.items() if key != "auto_map"}
        _write(own | {key: value for key, value in trusted.items() if key == "auto_map"}, out / name)
    if notes:
        _write(notes, out / TRAINING_DATA)


def _copy(source: Path, target: Path, patterns: list[str], code: bool = True) -> None:
    """Copy the files of these names."""
    root = source.resolve()
    places = [root, root.parent.parent / "blobs"]  # of a file of the folder, and of the hub's cache
    shared = root.parent.parent.parent / "blobs"  # of all its repositories
    if (shared / ".huggingface-shared-blobs").is_file():
        places.append(shared)
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        if not any(path.resolve().is_relative_to(place) for place in places):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of its folder; refused. Copy the folder with what its "
                f"links name: cp -rL {source} COPY."
            )
        if code or path.suffix != ".py":
            shutil.copyfile(path, target / path.name)


def _with_dtype(config: dict, dtype: torch.dtype) -> dict:
    """A config that names `dtype` wherever it named one, and at its top."""
    name = str(dtype).removeprefix("torch.")

    def replaced(part: dict) -> dict:
        parts = {key: replaced(value) if isinstance(value, dict) else value for key, value in part.items()}
        return parts | {key: name for key in ("dtype", "torch_dtype") if key in part}

    return replaced({"dtype": None, **config})


def _write(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
