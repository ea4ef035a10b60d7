"""Adapter folders: written as a whole, pushed with their card, and read with all checks through transformers' door.

PEFT and transformers offer nothing to hook into for this, so six of their public methods are wrapped, and one function
of PEFT's without a public name, which another PEFT may lack. Each wrapper acts for SMT adapters alone and calls what
it stands in for in all other cases.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from accelerate.hooks import remove_hook_from_module
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights, save_and_load, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import find_adapter_config_file
from transformers.utils.loading_report import LoadStateDictInfo

from smt_peft import contents
from smt_peft.banks import banks_of
from smt_peft.checks import BANK
from smt_peft.config import DOWNLOAD, SMTConfig, weights_beside
from smt_peft.contents import PREFIX
from smt_peft.files import read_json
from smt_peft.model import forget_unloaded
from smt_peft.selected import SELECTION_FILE, Selection
from smt_peft.writing import written_whole

CARD = "README.md"
BLOCKS = "\n## Selected blocks\n\n"
HOW_TO_LOAD = """

## How to load this adapter

```python
import smt_peft  # registers SMT with PEFT (without it: KeyError: 'SMT')
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def wrap_methods() -> None:
    """Put the wrappers in their places, once."""
    for owner, name, wrapper in (
        (PeftModel, "save_pretrained", save_pretrained),
        (PreTrainedModel, "save_pretrained", save_pretrained),
        (PeftModel, "create_or_update_model_card", create_or_update_model_card),
        (PeftModel, "push_to_hub", push_to_hub),
        (PeftModel, "load_adapter", load_adapter_into_peft),
        (PeftAdapterMixin, "load_adapter", load_adapter),
        (save_and_load, "_get_adapter_state_dict_key_prefixes", adapter_key_prefixes),
    ):
        original = getattr(owner, name, None) if owner is save_and_load else getattr(owner, name)
        if original is not None and not hasattr(original, "_of_smt_peft"):
            setattr(owner, name, _method(wrapper, original))


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
    folder = Path(save_directory)
    if not _has_smt(model) or folder.is_file() or options.get("push_to_hub"):
        return original(model, save_directory, *args, **options)
    with written_whole(folder) as new:
        card = (folder / CARD).read_bytes() if (folder / CARD).is_file() else None
        if card is not None:
            (new / CARD).write_bytes(card)
        original(model, str(new), *args, **options)
        if card is not None and (new / CARD).read_bytes() == card:
            (new / CARD).unlink()  # so that no process but the one that writes a card replaces it
        adapters = [file.parent for file in new.rglob(SAFETENSORS_WEIGHTS_NAME)]
        without = [one.relative_to(new) for one in adapters if not (one / SELECTION_FILE).is_file()]
    for adapter in without:
        _remove_selection_of_another(folder / adapter)


def _remove_selection_of_another(folder: Path) -> None:
    """Remove the record of a warm-up that did not choose the blocks of the adapter in a folder."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # none, or a broken one
        chosen = Selection.load(folder).features().long()
        if torch.equal(chosen, contents.take_apart(contents.load(folder / SAFETENSORS_WEIGHTS_NAME)).index.long()):
            return
    (folder / SELECTION_FILE).unlink(missing_ok=True)


def create_or_update_model_card(model: PeftModel, original: Callable, output_dir: str) -> None:
    """PEFT's, with the import that loading needs, which PEFT cannot name in its error, and where the blocks are."""
    original(model, output_dir)
    if not _has_smt(model):
        return
    card = Path(output_dir, CARD)
    text = card.read_text(encoding="utf-8") + "\n"
    text = re.sub(f"{BLOCKS}```\n.*?\n```\n", "", text, flags=re.DOTALL).rstrip() + "\n"  # without an earlier one's
    if "import smt_peft" not in text:
        text += HOW_TO_LOAD
    if lines := _where_blocks_are(model):
        text += f"{BLOCKS}```\n{lines}\n```\n"
    card.write_text(text, encoding="utf-8")


def _where_blocks_are(model: PeftModel) -> str:
    found = []
    for name, bank in [(name, bank) for banks in banks_of(model).values() for name, bank in banks.items()]:
        if bank.is_selected:
            names = [target.name for target in bank.targets]
            record = bank.config.record(bank.selected_blocks())
            chosen = record or Selection(names, bank.block_size, bank.index.cpu())
            found.append((f"{name}: " if name != "default" else "") + chosen.summary())
    return "\n".join(found)


def _said(original: Callable, *args, **options) -> SimpleNamespace:
    """What a call of a method says, by the names of its parameters."""
    call = inspect.signature(original).bind(*args, **options)
    call.apply_defaults()
    return SimpleNamespace(**call.arguments)


def push_to_hub(model: PeftModel, original: Callable, *args, **options):
    """transformers', but with the card that `save_pretrained` writes, where that one puts a blank one.

    A card that the repository has already is kept, and what is missing from it added.
    """
    if not _has_smt(model):
        return original(model, *args, **options)
    said = _said(original, model, *args, **options)
    hub = HfApi(token=said.token)
    repo_id = hub.create_repo(said.repo_id, private=said.private, exist_ok=True).repo_id
    if said.revision is not None and not said.revision.startswith("refs/pr") and not said.create_pr:
        hub.create_branch(repo_id, branch=said.revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        card, kept = Path(folder, CARD), set(said.tags or [])
        with contextlib.suppress(EntryNotFoundError):
            shutil.copy(hf_hub_download(repo_id, CARD, revision=said.revision, token=said.token), card)
            kept.update(ModelCard.load(card).data.tags or [])  # which PEFT replaces
        model.save_pretrained(folder)
        content = ModelCard.load(card)
        content.data.tags = sorted(kept.union(content.data.tags or []))
        content.save(card)
        commit = {name: vars(said)[name] for name in ("commit_description", "revision", "create_pr", "token")}
        message = said.commit_message or "Upload model"
        return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **commit)


def adapter_key_prefixes(model: PeftModel, original: Callable) -> set[str]:
    """PEFT's, with the bank: it looks for adapters' state in layers alone, and takes all else for the base model's."""
    return original(model) | banks_of(model.base_model.model).keys()


# --- loading -------------------------------------------------------------------------------------------------------


def load_adapter_into_peft(model: PeftModel, original: Callable, *args, **options) -> object:
    """PEFT's, but a load that fails leaves no adapter behind."""
    if not _has_smt(model):
        return original(model, *args, **options)
    said, home = _said(original, model, *args, **options), f"base_model.model.{BANK}"
    places = options.get("device_map")
    if isinstance(places, dict) and not any(name in ("", home) or home.startswith(f"{name}.") for name in places):
        options["device_map"] = {**places, home: "cpu"}  # which accelerate asks for, and LoRA has in its layers
    with _forgotten_if_refused(model, said.adapter_name):
        result = original(model, *args, **options)
    _bring_back(model, said)
    return result


def _bring_back(model: PeftModel, said: SimpleNamespace) -> None:
    """Where parts of the model lie on a disk, PEFT has accelerate put the bank there as well, and without its values:
    it looks for adapters' state in layers alone. The bank is small, and stays in memory."""
    for banks in banks_of(model).values():
        bank = banks._modules.get(said.adapter_name)
        if bank is not None and bank.weight.device.type == "meta":
            weights = contents.load(weights_beside(str(said.model_id), said.kwargs))
            parts = contents.in_order_of(bank.targets, contents.take_apart(weights))
            bank.weight = nn.Parameter(parts.weight.float(), requires_grad=bank.weight.requires_grad)
            remove_hook_from_module(bank)
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer._move_adapter_to_device_of_base_layer(said.adapter_name)


@contextlib.contextmanager
def _forgotten_if_refused(model: nn.Module, adapter: str) -> Iterator[None]:
    """Leave no adapter behind where a load fails, and say in words what PEFT says by a key alone."""
    try:
        yield
    except BaseException as error:
        forget_unloaded(model, adapter)
        if isinstance(error, KeyError):
            raise ValueError(f"The adapter's file lacks {error}; it is broken, or of another model.") from error
        raise


# --- transformers' load_adapter --------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, original: Callable, *args, **options) -> LoadStateDictInfo:
    """transformers', but by way of PEFT's own loader: transformers' writes whatever a file names into the model, base
    weights too, and looks at nothing."""
    said = _said(original, model, *args, **options)
    name = said.adapter_name or "default"
    load_config = {**(vars(said.load_config) if said.load_config else {}), **said.kwargs}
    load_config = LoadStateDictConfig(**load_config)  # refuses others
    asked = {**(load_config.download_kwargs or {}), **(said.adapter_kwargs or {})}
    asked["local_files_only"] = said.local_files_only or asked.get("local_files_only")
    if asked.get("revision"):  # transformers may have looked up the base model's commit for it
        asked["revision"] = str(asked["revision"])
    download = {option: asked[option] for option in DOWNLOAD if asked.get(option)}
    where = said.peft_model_id or load_config.pretrained_model_name_or_path
    is_taken = name in getattr(model, "peft_config", {})
    if is_taken or said.hotswap is True or not _is_smt(where, said.peft_config, download):
        return original(model, *args, **options)
    config = copy.copy(said.peft_config) or SMTConfig.from_pretrained(where, **download)
    config.inference_mode, config.awaits_weights = not said.is_trainable, True
    weights = said.adapter_state_dict
    if weights is None:  # PEFT asks the hub even where it must not
        file = weights_beside(str(where), download)
        weights = contents.load(file) if file else load_peft_weights(where, device="cpu", **download)
    weights = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    inject_adapter_in_model(config, model, name, low_cpu_mem_usage=said.low_cpu_mem_usage)
    with _forgotten_if_refused(model, name):
        result = set_peft_model_state_dict(model, weights, name, low_cpu_mem_usage=said.low_cpu_mem_usage)
    model._hf_peft_config_loaded = True
    if not said.is_trainable:
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
    with contextlib.suppress(ValueError):  # transformers tells
        return file is not None and read_json(Path(file)).get("peft_type") == "SMT"
    return False
