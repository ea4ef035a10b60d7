"""Adapter folders: written as a whole, pushed with their card, and read with all checks through transformers' door.

PEFT and transformers offer nothing to hook into for this, so five of their public methods are wrapped. Each wrapper
acts for SMT adapters alone and calls the method it stands in for in all other cases.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import find_adapter_config_file
from transformers.utils.loading_report import LoadStateDictInfo

from smt_peft import files
from smt_peft.config import DOWNLOAD, SMTConfig
from smt_peft.files import PREFIX
from smt_peft.model import forget_unloaded
from smt_peft.selected import SELECTION_FILE, Selection

CARD = "README.md"
HOW_TO_LOAD = """

## How to load this adapter

```python
import smt_peft  # pip install smt-peft; registers SMT with PEFT (without it: KeyError: 'SMT')
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def wrap_methods() -> None:
    """Put the wrappers in their places, once."""
    for owner, wrapper in (
        (PeftModel, save_pretrained),
        (PreTrainedModel, save_pretrained),
        (PeftModel, create_or_update_model_card),
        (PeftModel, push_to_hub),
        (PeftAdapterMixin, load_adapter),
    ):
        original = getattr(owner, wrapper.__name__)
        if not hasattr(original, "_of_smt_peft"):
            setattr(owner, wrapper.__name__, _method(wrapper, original))


def _method(wrapper: Callable, original: Callable) -> Callable:
    @functools.wraps(original)
    def method(model: nn.Module, *args, **options):
        return wrapper(model, original, *args, **options)

    method._of_smt_peft = True
    return method


def _has_smt(model: nn.Module) -> bool:
    return any(isinstance(config, SMTConfig) for config in getattr(model, "peft_config", {}).values())


# --- saving ----------------------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, original: Callable, save_directory: str | Path, *args, **options) -> None:
    """PEFT's or transformers', but files take their places when all of them are written: a save that fails changes
    nothing."""
    if not _has_smt(model) or Path(save_directory).is_file() or options.get("push_to_hub"):
        return original(model, save_directory, *args, **options)
    with _whole(Path(save_directory)) as folder:
        return original(model, str(folder), *args, **options)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder beside the files of `folder`, whose files replace those in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        new, card = Path(name), None
        if (folder / CARD).is_file():
            card = (folder / CARD).read_bytes()
            (new / CARD).write_bytes(card)
        yield new
        if card is not None and (new / CARD).read_bytes() == card:
            (new / CARD).unlink()  # so that no process but the one that writes a card replaces it
        written = sorted((file for file in new.rglob("*") if file.is_file()), key=_order)
        for file in written:
            _flush(file)
        for file in written:
            place = folder / file.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)
            if file.name == SAFETENSORS_WEIGHTS_NAME and not (file.parent / SELECTION_FILE).is_file():
                _remove_selection_of_another(place.parent)


def _remove_selection_of_another(folder: Path) -> None:
    """Remove the record of a warm-up that did not choose the blocks of the adapter in a folder."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # none, or a broken one
        chosen = Selection.load(folder).features().long()
        if torch.equal(chosen, files.take_apart(files.load(folder / SAFETENSORS_WEIGHTS_NAME)).index.long()):
            return
    (folder / SELECTION_FILE).unlink(missing_ok=True)


def _order(file: Path) -> tuple[bool, bool]:
    """The weights first and the config after them: between the two, loading compares them."""
    return file.name != SAFETENSORS_WEIGHTS_NAME, file.name != CONFIG_NAME


def _flush(file: Path) -> None:
    """Have a full disk say so now."""
    try:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that have no such call
            raise


def create_or_update_model_card(model: PeftModel, original: Callable, output_dir: str) -> None:
    """PEFT's, with the one import that loading needs, which PEFT cannot name in its error."""
    original(model, output_dir)
    card = Path(output_dir, CARD)
    if _has_smt(model) and "import smt_peft" not in card.read_text(encoding="utf-8"):
        with card.open("a", encoding="utf-8") as file:
            file.write(HOW_TO_LOAD)


def push_to_hub(
    model: PeftModel,
    original: Callable,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **options,
):
    """transformers', but with the card that `save_pretrained` writes, where that one puts a blank one.

    A card that the repository has already is kept, and what is missing from it added.
    """
    commit = {"commit_description": commit_description, "revision": revision, "create_pr": create_pr, "token": token}
    if not _has_smt(model):
        options.update(commit, commit_message=commit_message, private=private, tags=tags)
        return original(model, repo_id, **options)
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr") and not create_pr:
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        card, kept = Path(folder, CARD), set(tags or [])
        with contextlib.suppress(EntryNotFoundError):
            shutil.copy(hf_hub_download(repo_id, CARD, revision=revision, token=token), card)
            kept.update(ModelCard.load(card).data.tags or [])  # which PEFT replaces
        model.save_pretrained(folder)
        content = ModelCard.load(card)
        content.data.tags = sorted(kept.union(content.data.tags or []))
        content.save(card)
        message = commit_message or "Upload model"
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **commit)


# --- transformers' load_adapter --------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    original: Callable,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: SMTConfig | None = None,
    adapter_state_dict: Mapping[str, torch.Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    local_files_only: bool = False,
    adapter_kwargs: Mapping | None = None,
    load_config: object = None,
    **options,
) -> LoadStateDictInfo:
    """transformers', but by way of PEFT's own loader: transformers' writes whatever a file names into the model, base
    weights too, and looks at nothing."""
    name = adapter_name or "default"
    load_config = LoadStateDictConfig(**{**(vars(load_config) if load_config else {}), **options})  # refuses others
    said = {**(load_config.download_kwargs or {}), **(adapter_kwargs or {})}
    said["local_files_only"] = local_files_only or said.get("local_files_only")
    download = {option: said[option] for option in DOWNLOAD if said.get(option)}
    peft_model_id = peft_model_id or load_config.pretrained_model_name_or_path
    is_taken = name in getattr(model, "peft_config", {})
    if is_taken or hotswap is True or not _is_smt(peft_model_id, peft_config, download):
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable, "hotswap": hotswap}
        options.update(local_files_only=local_files_only, adapter_kwargs=adapter_kwargs, load_config=load_config)
        return original(model, peft_model_id, adapter_name, peft_config, adapter_state_dict, **options)
    config = copy.copy(peft_config) or SMTConfig.from_pretrained(peft_model_id, **download)
    config.inference_mode, config.awaits_weights = not is_trainable, True
    if adapter_state_dict is None:
        adapter_state_dict = load_peft_weights(peft_model_id, device="cpu", **download)
    weights = {key.removeprefix(PREFIX): value for key, value in adapter_state_dict.items()}
    inject_adapter_in_model(config, model, name, low_cpu_mem_usage=low_cpu_mem_usage)
    try:
        result = set_peft_model_state_dict(model, weights, name, low_cpu_mem_usage=low_cpu_mem_usage)
    except BaseException:
        forget_unloaded(model, name)
        raise
    model._hf_peft_config_loaded = True
    if not is_trainable:
        model.eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.requires_grad_(False)
    missing = {key for key in result.missing_keys if f".{name}." in key}
    info = {"missing_keys": missing, "unexpected_keys": set(result.unexpected_keys), "mismatched_keys": set()}
    info.update(error_msgs=[], conversion_errors={}, skipped_pp_keys=set())
    known = {field.name for field in dataclasses.fields(LoadStateDictInfo)}  # the last one since transformers 5.16
    return LoadStateDictInfo(**{name: value for name, value in info.items() if name in known})


def _is_smt(peft_model_id: str | None, peft_config: object, download: Mapping) -> bool:
    if peft_config is not None or peft_model_id is None:
        return isinstance(peft_config, SMTConfig)
    file = find_adapter_config_file(peft_model_id, **download)
    if file is None:
        return False
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:  # transformers tells
        return False
    return isinstance(content, dict) and content.get("peft_type") == "SMT"
