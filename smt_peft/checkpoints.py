"""Checkpoints of models: their folders, local or on the hub, their safetensors files, and the names of their tensors.

Only transformers knows a stored tensor's name in the model, and whether it is stored as the model uses it: both are
found from an empty model (on the meta device) and its rules for renaming and converting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from smt_peft.files import read_json

TOKENIZER = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
TOKENIZER += ["*.model", "*.tiktoken", "*.spm", "bpe.codes", "target_vocab.json", "tekken.json", "entity_vocab.json"]
TOKENIZER += ["dict.txt", "normalizer.json", "emoji.json"]
BESIDE_WEIGHTS = ["config.json", "generation_config.json", "*processor_config.json", "*.py"]
STORED_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The safetensors files of a model in a folder, one or many.

    Attributes:
        files: key -> the name of its file.
        index: the file that says so; None where there is one file of weights.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = folder / SAFE_WEIGHTS_INDEX_NAME
        if (folder / SAFE_WEIGHTS_NAME).is_file():  # first, as transformers does: an index may be of an earlier save
            self.files = dict.fromkeys(_keys(folder / SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)
            self.index = None
        elif self.index.is_file():
            self.files: dict[str, str] = read_json(self.index).get("weight_map") or {}
            if not isinstance(self.files, dict) or not self.files or {*map(type, self.files.values())} != {str}:
                raise ValueError(f"{self.index} has no weight_map; download or copy it again.")
        else:
            raise ValueError(
                f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: it is no model, or one "
                f"saved in another format. Save it anew by transformers; to merge, there is --load, too."
            )
        outside = sorted(name for name in set(self.files.values()) if Path(name).name != name)
        if outside:
            raise ValueError(f"The index of {folder} names {outside[0]}, which is no file of this folder; refused.")
        missing = sorted(name for name in set(self.files.values()) if not (folder / name).is_file())
        if missing:
            raise ValueError(f"{folder} lacks {missing[0]}, which its index names; download or copy it again.")
        if self.index:
            there = {(key, name) for name in set(self.files.values()) for key in _keys(folder / name)}
            if lacking := sorted(set(self.files.items()) - there):
                raise ValueError(
                    f"{folder / lacking[0][1]} lacks {lacking[0][0]}, which the index of the folder places there."
                )
            if twice := sorted(key for key, count in Counter(key for key, _ in there).items() if count > 1):
                files = sorted(name for key, name in there if key == twice[0])
                where = " and ".join(files[:2])
                raise ValueError(
                    f"{folder} has {twice[0]} in two files, {where}; save the model anew by transformers."
                )

    def look(self, key: str) -> tuple[tuple[int, ...], str]:
        """The shape and the dtype of a tensor."""
        with safe_open(self.folder / self.files[key], "pt") as file:
            tensor = file.get_slice(key)
            return tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, key: str) -> Tensor:
        """A tensor; what is not looked at is not read."""
        with safe_open(self.folder / self.files[key], "pt") as file:
            return file.get_tensor(key)


def _keys(file: Path) -> list[str]:
    """The keys of a file, from its header; opening it checks its length, too."""
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is broken or cut off ({error}); download or copy it again.") from None


def local_folder(name: str, revision: str | None = None, patterns: Sequence[str] = ("*.safetensors",)) -> Path:
    """A folder, or a name on the Hugging Face hub: what belongs to it is downloaded, once.

    Args:
        revision: on the hub.
        patterns: of files of weights, the preferred ones first; those of the first that matches are downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        for pattern in patterns:
            wanted = [pattern, "*.json", "*.txt", *TOKENIZER, *BESIDE_WEIGHTS]
            skipped = ["*/*", "consolidated*"]
            folder = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=skipped)
            names = [path.name for path in Path(folder).glob(pattern)]
            if not all(name.startswith("consolidated") for name in names):
                break  # many repositories have the same weights in both forms
        return Path(folder)
    except Exception as error:  # of many kinds, the network's own among them, with many words
        if isinstance(error, OSError) and error.errno:  # of the disk, which may be full
            raise
        why = type(error).__name__
        raise ValueError(f"There is no folder {name}, and it could not be had from the hub ({why}).") from error


def is_model(kind: object) -> bool:
    """Whether it is a class of models; a config may name anything."""
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def empty_model(base: Path) -> PreTrainedModel:
    """The model of a checkpoint, with all its names and shapes, and without any weights."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    if kind is not transformers.AutoModel and not is_model(kind):
        raise ValueError(f"The config of {base} names {config.architectures[0]}, no model that transformers has.")
    known = getattr(kind, "config_class", None) or object  # of a text model, it may be a part of the config
    if not (isinstance(config, known) or isinstance(config.get_text_config(), known)):
        raise ValueError(
            f"The config of {base} names {kind.__name__}, and is of another model ({config.model_type}); fix its "
            "architectures."
        )
    config = config if isinstance(config, known) else config.get_text_config()
    if hasattr(config, "quantization_config"):
        raise ValueError(f"{base} is quantised; merge into the model that it was made from.")
    with torch.device("meta"):
        return kind.from_config(config) if kind is transformers.AutoModel else kind(config)


def stored_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str | None]:
    """Name of a parameter -> its key in the checkpoint, or None where it is not stored as it is used."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    parameters, stored = model.state_dict(), {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        stored[name] = None if converted else key
    return stored
