"""What an adapter's file holds: the manifest, and what is refused without a model.

docs/format.md describes the files for other readers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smt_peft.checks import (
    BANK,
    INTEGERS,
    Target,
    by_target,
    check_fingerprint,
    check_index,
    check_weight,
    fingerprint,
    form,
    is_in_order,
    short,
)
from smt_peft.places import Tiles, places_in

VERSION = 2
MOST_FEATURES = 2**24  # along a side, which reports allocate; the experts of a layer together have about a million
LONGEST_NAME = 1000  # whose ends are compared with those of all others
PREFIX = "base_model.model."  # that PEFT gives the keys of a file
PARTS = ("weight", "index", "fingerprint", "manifest")
WRAPPED = (".modules_to_save.", ".original_module.", ".token_adapter.base_layer.")  # in keys that PEFT's wrappers make
AGREED = ("arrangement", "block_size", "bias", "modules_to_save")  # what a config says and its file repeats
TOKENS = "trainable_token_indices"  # repeated, too, where there are any; in their order, which is that of the rows
ROWS = ".token_adapter.trainable_tokens_delta"  # how the keys of these rows end


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifest(config: object, targets: Sequence[Target], index: Tensor, others: Iterable[str], base: Mapping) -> Tensor:
    """What the other tensors alone do not say, as a uint8 tensor: a SHA-256 in hex, a line break, and UTF-8 JSON.

    The checksum is that of the JSON and of the index as little-endian int32. A tensor and no metadata, because PEFT
    and transformers write the file themselves.

    Args:
        config: the adapter's SMTConfig, resolved.
        index: as `DeltaBank.index`.
        others: the keys of all other tensors of the file, without `PREFIX`.
        base: a sample of the base model, see `bases.sample`.
    """
    content = {
        "version": VERSION,
        **{name: _agreed(getattr(config, name)) for name in AGREED},
        **({TOKENS: tokens} if (tokens := getattr(config, TOKENS)) else {}),
        "targets": targets,
        "others": sorted(others),
        "base": base,
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(_checksum(text, index) + b"\n" + text), dtype=torch.uint8)


def narrow(index: Tensor) -> Tensor:
    """The index as a file holds it: int16 where that suffices, 0.6 % of the values at tiles of 16."""
    return index.to(torch.int16) if index.max() <= torch.iinfo(torch.int16).max else index


def _agreed(value: object) -> object:
    """The same for what means the same, whatever JSON made of it."""
    return (sorted(map(str, set(value))) if isinstance(value, (list, tuple, set)) else value) or None


def _checksum(text: bytes, index: Tensor) -> bytes:
    digest = hashlib.sha256(text)
    digest.update(index.detach().cpu().int().contiguous().numpy().astype("<i4").tobytes())
    return digest.hexdigest().encode()


def _read_manifest(tensor: Tensor) -> tuple[bytes, bytes, dict]:
    """The checksum that it holds, its JSON, and what this says."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError(f"The file's manifest is {form(tensor)}, not bytes; the file is broken.")
    checksum, _, text = tensor.cpu().numpy().tobytes().partition(b"\n")
    try:
        content = json.loads(text)
        version = content["version"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError("The file's manifest cannot be read; the file is broken.") from None
    if version != VERSION:
        raise ValueError(
            f"The file has version {short(version)} of the format, which this smt_peft does not know (it knows 1 and "
            f"{VERSION}); update smt_peft, or the file is broken."
        )
    if not _is_sound(content):
        raise ValueError("The file's manifest lacks something, or says what cannot be; the file is broken.")
    content["targets"] = [Target(*target) for target in content["targets"]]
    return checksum, text, content


def _is_sound(content: dict) -> bool:
    size, targets, base = (content.get(name) for name in ("block_size", "targets", "base"))
    if not (type(size) is int and size > 0 and _is_list(targets, list) and isinstance(base, dict)):
        return False
    return (
        all([type(part) for part in target] == [str, int, int] for target in targets)
        and all(0 < side <= MOST_FEATURES // size for target in targets for side in target[1:])
        and all(target[0].isprintable() and len(target[0]) <= LONGEST_NAME for target in targets)
        and len({target[0] for target in targets}) == len(targets) > 0
        and all(name in content for name in AGREED)
        and _is_list(content.get("others"), str)
        and all(_is_list(values, float) for values in base.values())
    )


def _is_list(value: object, of: type) -> bool:
    return isinstance(value, list) and all(type(item) is of for item in value)


# --- the parts of a file ---------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The parts of an adapter in a file that has been checked as far as it can be without a model.

    Attributes:
        content: of the manifest; None in files of version 1.
        others: all tensors that are no part of the bank, by their keys.
    """

    weight: Tensor
    index: Tensor
    fingerprint: Tensor
    content: dict | None
    others: dict[str, Tensor]


def take_apart(tensors: Mapping[str, Tensor]) -> Parts:
    """Check what a file holds.

    Raises:
        ValueError: where a part is missing, unknown, or of another type or shape than it must be, where the parts do
            not belong together, or where deltas that are not zero have no selection.
    """
    parts, others, prefixes = {}, {}, set()
    for key, tensor in tensors.items():
        prefix, bank, part = key.rpartition(f"{BANK}.")
        if not bank:
            others[key] = tensor
        elif part not in PARTS or {prefix} != prefixes | {prefix}:
            raise ValueError(
                f"The checkpoint holds {short(key)}, which is no part of one SMT adapter; it holds several, or it is "
                "broken."
            )
        else:
            prefixes.add(prefix)
            parts[part] = tensor
    if not parts:
        found = ", ".join(map(short, sorted(others)[:3])) or "nothing"
        raise ValueError(
            f"The checkpoint holds no SMT adapter: no {BANK}.weight among its keys ({found}, ...). It belongs "
            "to another PEFT method, or it is broken."
        )
    if computed := [name for name, part in parts.items() if name != "weight" and part.is_floating_point()]:
        raise ValueError(
            f"The checkpoint's {computed[0]} is {form(parts[computed[0]])}, not the whole numbers that were saved. "
            f"Was it averaged or cast? Do that to {BANK}.weight alone, and copy the others."
        )
    if "weight" not in parts:
        raise ValueError("The checkpoint holds an index without deltas; the file is broken.")
    if "index" not in parts or "fingerprint" not in parts:
        raise ValueError("The checkpoint holds deltas without their index; the file is broken.")
    weight, index = parts["weight"], parts["index"]
    if weight.ndim != 3 or index.ndim != 2 or len(index) != len(weight) or not weight.numel() or not index.numel():
        raise ValueError(
            f"The deltas of the checkpoint are {form(weight)} and their index {form(index)}, which do not belong "
            "together; the file is broken."
        )
    check_weight(weight, len(weight), weight.shape[1])
    if index.dtype in INTEGERS and (index < 0).all() and weight.any():
        raise ValueError(
            "The checkpoint's index is -1 throughout, though it has deltas: nothing says where they belong; the file "
            "is broken."
        )
    content = None
    if "manifest" in parts:
        checksum, text, content = _read_manifest(parts["manifest"])
        size, targets = content["block_size"], content["targets"]
        width = 3 if content["arrangement"] == "tiles" else 1 + 2 * size
        check_weight(weight, len(weight), size)
        check_index(index, len(weight), width, size, targets)
        check_fingerprint(parts["fingerprint"], size, targets)
        if _checksum(text, index) != checksum:
            raise ValueError("The checksum of the index is wrong; the file is broken. Copy or download it again.")
    return Parts(weight, index, parts["fingerprint"], content, others)


def in_order_of(targets: Sequence[Target], parts: Parts) -> Parts:
    """The same adapter with its blocks in the order of a model's `targets`, which may not be the file's order;
    unchanged if the targets differ."""
    held = parts.content["targets"] if parts.content else targets  # which in version 1 the model alone knows
    if sorted(held) != sorted(targets):
        return parts
    if held != targets:
        parts = parts._replace(
            fingerprint=torch.tensor([fingerprint(parts.content["block_size"], targets)], device="cpu")
        )
        if (parts.index < 0).all():  # nothing is selected yet
            return parts
        index, position = parts.index.int(), {target: i for i, target in enumerate(targets)}  # more than int16 counts
        first = index.new_tensor([position[target] for target in held])[index[:, 0].long()]
        parts = parts._replace(index=torch.cat([first[:, None], index[:, 1:]], 1))
    if is_in_order(parts.index):
        return parts
    order = torch.argsort(parts.index[:, 0], stable=True)
    return parts._replace(weight=parts.weight[order], index=parts.index[order])


def check_config(config: Mapping, parts: Parts) -> None:
    """Refuse a config that is not the one which was saved with the weights, and weights that have lost a part.

    Args:
        config: the fields of an SMTConfig.
    """
    content, selected = parts.content, config["selected_blocks"]
    if config["num_blocks"] is not None and config["block_size"] != "auto":
        count = config["num_blocks"] + sum(config["num_blocks_pattern"].values())
        check_weight(parts.weight, count, config["block_size"])
    for name in (*AGREED, TOKENS) if content else ():
        said = config[name] or None if name == TOKENS else _agreed(config[name])
        meant = content.get(name)
        if said != meant:
            raise ValueError(
                f"adapter_config.json says {name}={short(said)}, but the weights beside it were saved with "
                f"{name}={short(meant)}: they are of two adapters. Take both files from one save."
            )
    rows = config[TOKENS] or []
    wanted = {len(of_module) for of_module in (rows.values() if isinstance(rows, Mapping) else [rows])}
    held = {len(tensor) for key, tensor in parts.others.items() if key.endswith(ROWS) and tensor.ndim}
    if rows and held != wanted:
        raise ValueError(
            f"The file holds {sorted(held)} rows where adapter_config.json names {sorted(wanted)} ({TOKENS})."
        )
    check_complete(parts)
    if selected is not None:
        names_of(parts.index, selected, content and content["targets"])


def check_complete(parts: Parts, known: Iterable[str] = ()) -> None:
    """Refuse a file that has lost a tensor which was saved with it; those of the keys `known` are there for sure."""
    present = {key.removeprefix(PREFIX) for key in (*parts.others, *known)}
    missing = next((name for name in (parts.content or {"others": ()})["others"] if name not in present), None)
    if missing is not None:
        raise ValueError(f"The file lacks {short(missing)}, which was saved with it; it is broken.")


def names_of(
    index: Tensor, selected: Mapping[str, Tiles | Sequence], targets: Sequence[Target] | None = None
) -> dict[int, list[str]]:
    """Position in the index -> names its target may have, by a config's selection; ValueError if the two differ."""
    index = index.detach().cpu().long()
    found = {position: _same(index[slots, 1:]) for position, slots in by_target(index).items()}
    given = {name: _same(places_in(blocks).long()) for name, blocks in selected.items()}
    names: dict[int, list[str]] = {}
    for position, places in found.items():
        called = given if targets is None else [target.name for target in targets[position : position + 1]]
        names[position] = [name for name in called if given.get(name) == places]
    if Counter(found.values()) != Counter(given.values()) or not all(names.values()):
        raise ValueError(
            "selected_blocks in adapter_config.json contradicts the index of the weights beside it: they are of two "
            "adapters. Take both files from one save."
        )
    return names


def _same(places: Tensor) -> bytes:
    """Equal for the same blocks in any order."""
    return hashlib.sha256(places.unique(dim=0).numpy().tobytes()).digest()


def load(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: each is read when it is used."""
    try:
        return load_file(file)
    except (SafetensorError, KeyError, AttributeError) as error:  # the last two: a dtype that PyTorch lacks
        raise ValueError(f"{file} is broken or cut off ({short(str(error))}); copy or download it again.") from None


def is_embedding(module: str) -> bool:
    """Whether PEFT saves the base weight of such a target beside the adapter."""
    return module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
