"""SMTConfig: what a user may choose."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from smt_peft import contents
from smt_peft.ops import Score
from smt_peft.places import Tiles, parse_sorted
from smt_peft.selected import Selection
from smt_peft.selection import Scope

SelectionRule = Literal["gradient", "activation", "magnitude", "random", "diagonal"]
Accumulation = Literal["absolute", "signed"]
Arrangement = Literal["tiles", "sorted"]
Bias = Literal["none", "all", "smt_only"]

DEFAULT_TRAINABLE_RATIO = 0.0086  # 890 blocks of 256 x 256 in LLaMA-7B, the budget of the paper's main tables
# Options of the hub's.
DOWNLOAD = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
LONGEST_MESSAGE = 600
LISTS = ("target_modules", "target_parameters", "exclude_modules", "layers_pattern", "modules_to_save")
NEVER_STRINGS = ("target_parameters", "modules_to_save")


@dataclass
class SMTConfig(PeftConfig):
    """Configuration of Sparse Matrix Tuning (arXiv 2405.15525).

    A warm-up scores every `block_size x block_size` block of the target weights; the best blocks of the whole model
    are selected; only the difference of those blocks from the frozen weight (the delta) is trained.

    Raises:
        ValueError: for a value that is impossible by itself or together with another one. What depends on the model
            (a block size that does not divide a weight, a budget above the number of blocks) is refused by
            `get_peft_model`.
    """

    target_modules: list[str] | str | None = None  # names, a regex or 'all-linear'; default: q, k and v
    target_parameters: list[str] | None = None  # of 2 dimensions or more, such as 'mlp.experts.gate_up_proj'
    exclude_modules: list[str] | str | None = None  # names, or a regex
    layers_to_transform: list[int] | int | None = None  # which layers to adapt; default: all
    layers_pattern: list[str] | str | None = None  # name of the module list that `layers_to_transform` counts in
    modules_to_save: list[str] | None = None  # trained and saved whole, such as a new classifier
    # Embedding rows trained by themselves, such as new tokens'. A list: of the input embedding; a dict: by module.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Bias = "none"  # which biases are trained; 'smt_only': those of the targets
    init_weights: bool = True  # True: the delta starts at zero. False: small random values, for tests of other code
    block_size: int | Literal["auto"] = (
        "auto"  # 'auto': the largest power of two, at most 256, that divides every side
    )
    num_blocks: int | None = None  # the budget: how many blocks are trained ...
    trainable_ratio: float | None = None  # ... or as a share of the base model's parameters; default: 0.0086
    # Regex of module names -> a budget of their own; the first that matches counts. In a file [[regex, budget], ...]:
    # JSON is written with sorted keys.
    num_blocks_pattern: dict[str, int] = field(default_factory=dict)
    selection: SelectionRule = "gradient"  # the rule that scores blocks
    # Which blocks are ranked together. 'model': all (the paper). 'input': those of modules that read one input (q, k,
    # v), 'module': those of one matrix; each such set gets the same share of its blocks.
    scope: Scope = "model"
    # What a block is. 'tiles': neighbouring rows by neighbouring columns (the paper). 'sorted': rows and columns are
    # put into the order of their importance first, so that a block is important rows by important columns.
    arrangement: Arrangement = "tiles"
    score: Score = "abs_mean"  # mean |g|, g the gradient (paper); 'mean_abs': |mean g|; 'l1': sum |g|; 'l2': l2 norm
    accumulation: Accumulation = "absolute"  # mean of every iteration's score; 'signed': score of the mean gradient
    warmup_steps: int = 100  # batches that the warm-up looks at
    seed: int = 0  # of selection='random'
    # Module name -> [[block row, block column], ...], in a file 'row,column row,column ...'. Of sorted blocks [[[row,
    # ...], [column, ...]], ...], which only the file of the weights holds. Filled by the selection; given by hand, it
    # is the selection and its length is the budget. A `Selection` sets the block size and the arrangement, too.
    selected_blocks: dict[str, list[list]] | Selection | None = None

    # No fields:
    awaits_weights = False  # read from a folder or repository whose weights are to follow
    stored_blocks = None  # the selected_blocks that it was read with
    trained_before = ()  # while it awaits its weights: which parameters were trained before the model was wrapped
    made_by = None  # the Selection that the warm-up left, or that was given; saved beside the adapter
    read_beside = None  # the folder of the weights; what made the adapter's blocks may lie there

    @property
    def needs_warmup(self) -> bool:
        """Whether the rule of selection looks at data."""
        return self.selection in ("gradient", "activation")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs) -> SMTConfig:
        """As PEFT's. The weights beside it are looked at, too: what is broken, or does not belong to this config, is
        refused before PEFT adds an adapter for it."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if not isinstance(config, SMTConfig):  # PEFT makes the config that the file is of
            return config
        config.awaits_weights, config.stored_blocks = True, config.selected_blocks
        weights = weights_beside(str(pretrained_model_name_or_path), {**kwargs, "subfolder": subfolder})
        if weights is not None:
            parts = contents.take_apart(contents.load(weights))
            contents.check_config(vars(config), parts)
            config.read_beside = weights.parent
        return config

    def record(self, blocks: Mapping[str, Sequence] | None) -> Selection | None:
        """The Selection that chose these blocks, if known: `made_by`, or the one saved beside the weights that the
        config was read with."""
        if self.made_by is None and self.read_beside is not None:
            with contextlib.suppress(FileNotFoundError, ValueError):  # none, or a broken one
                found = Selection.load(self.read_beside)
                self.made_by = found if found.has_blocks(blocks or {}) else None
            self.read_beside = None
        return self.made_by if self.made_by is not None and self.made_by.has_blocks(blocks or {}) else None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SMT
        for refusal in self._refusals_of_types():
            raise ValueError(_shortened(refusal))
        self.num_blocks_pattern = dict(self.num_blocks_pattern)
        if isinstance(rows := self.trainable_token_indices, Mapping):
            self.trainable_token_indices = {name: list(of_module) for name, of_module in rows.items()}
        elif rows is not None:
            self.trainable_token_indices = list(rows)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.selected_blocks, Selection):
            self._take_over(self.selected_blocks)
        if self.selected_blocks is not None:
            parse = Tiles.parse if self.arrangement == "tiles" else parse_sorted
            self.selected_blocks = {name: parse(name, blocks) for name, blocks in self.selected_blocks.items()}
        for refusal in self._refusals():
            raise ValueError(_shortened(refusal))

    def _take_over(self, selection: Selection) -> None:
        if self.block_size not in ("auto", selection.block_size):
            raise ValueError(
                f"block_size={self.block_size} is not the selection's {selection.block_size}; leave it out."
            )
        if self.arrangement == "sorted" and not selection.lines:
            raise ValueError("arrangement='sorted' is not the selection's, which is of tiles; leave it out.")
        self.block_size = selection.block_size
        self.arrangement = "sorted" if selection.lines else "tiles"
        self.selected_blocks, self.made_by = selection.blocks(), selection

    def to_dict(self) -> dict:
        """As a file holds it: the tiles of a module on one line, and no sorted blocks, which are long lists."""
        values = super().to_dict()
        if self.num_blocks_pattern:
            values["num_blocks_pattern"] = [list(item) for item in self.num_blocks_pattern.items()]
        if self.arrangement == "sorted":
            values["selected_blocks"] = None
        elif self.selected_blocks is not None:
            values["selected_blocks"] = {
                name: " ".join(f"{row},{col}" for row, col in blocks) for name, blocks in self.selected_blocks.items()
            }
        return values

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, with the selection of the warm-up beside it, as long as its blocks are the adapter's."""
        super().save_pretrained(save_directory, **kwargs)
        if (record := self.record(self.selected_blocks)) is not None:
            record.save(save_directory)

    def stop_waiting(self) -> None:
        """What it was read for is here: its weights were loaded, or the adapter is used without them."""
        self.awaits_weights, self.stored_blocks, self.trained_before = False, None, ()

    def _refusals_of_types(self) -> Iterator[str]:
        """What a file of JSON may hold and no option can be."""
        for name in LISTS:
            value = getattr(self, name)
            if value is None or (isinstance(value, str) and name not in NEVER_STRINGS):
                continue
            if isinstance(value, (str, Mapping)) or not _all(value, str):
                yield f"{name}={value!r} is not a list of names."
        for name in ("modules_to_save", "layers_pattern"):  # which PEFT makes regexes of
            value = getattr(self, name) or ()
            if not all(re.fullmatch(r"[\w.-]+", part) for part in ([value] if isinstance(value, str) else value)):
                yield f"{name}={value!r} holds more than names of modules."
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            try:
                re.compile(value if isinstance(value, str) else "")
            except (re.error, RecursionError, OverflowError) as error:
                yield f"{name}={value!r} is no regex ({error})."
        if not isinstance(base := self.base_model_name_or_path, (str, NoneType)):
            yield f"base_model_name_or_path={base!r} is no text."
        pairs = self.num_blocks_pattern
        if not isinstance(pairs, Mapping) and not (isinstance(pairs, list) and all(map(_is_pair, pairs))):
            yield f"num_blocks_pattern={pairs!r} is not a mapping by name."
        tokens = self.trainable_token_indices
        lists = [*tokens.values()] if isinstance(tokens, Mapping) else [[] if tokens is None else tokens]
        if not all(isinstance(rows, (list, tuple)) and all(_is_int(row, 0) for row in rows) for rows in lists):
            yield f"trainable_token_indices={tokens!r} is neither a list of tokens nor a mapping to such lists."
        elif any(len(set(rows)) < len(rows) for rows in lists):
            yield f"trainable_token_indices={tokens!r} names a token twice."
        if not isinstance(self.selected_blocks, (Mapping, Selection, NoneType)):
            yield f"selected_blocks={self.selected_blocks!r} is not a mapping by name."
        layers = self.layers_to_transform
        if layers is not None and not isinstance(layers, int) and (isinstance(layers, str) or not _all(layers, int)):
            yield f"layers_to_transform={layers!r} is neither a number nor a list of numbers."
        if not _is_int(self.seed, -(2**63)) or self.seed >= 2**64:
            yield f"seed={self.seed!r} is not an integer of 64 bits."

    def _refusals(self) -> Iterator[str]:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                yield f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}."
        if self.block_size != "auto" and not _is_int(self.block_size):
            yield f"block_size={self.block_size!r} is neither a positive integer nor 'auto'."
        blocks, ratio, patterns = self.num_blocks, self.trainable_ratio, self.num_blocks_pattern
        if blocks is not None and not _is_int(blocks, at_least=0 if patterns else 1):
            yield f"num_blocks={blocks!r} is not a positive integer."
        if ratio is not None and not (type(ratio) in (int, float) and 0 < ratio <= 1):
            yield f"trainable_ratio={ratio!r} is not in (0, 1]: it is a share, so 0.86 % is 0.0086."
        if not _is_int(self.warmup_steps):
            yield f"warmup_steps={self.warmup_steps!r} is not a positive integer."
        for pattern, budget in patterns.items():
            if not _is_int(budget):
                yield f"num_blocks_pattern[{pattern!r}]={budget!r} is not a positive integer."
        if blocks is not None and ratio is not None:
            yield f"num_blocks={blocks} and trainable_ratio={ratio} both set the budget; give one of them."
        if self.accumulation == "signed" and self.selection != "gradient":
            yield f"accumulation='signed' needs gradients, but selection={self.selection!r} has none; use 'absolute'."
        if not isinstance(self.init_weights, bool):
            yield f"init_weights={self.init_weights!r} is neither True (zeros) nor False (random); leave it out."
        if self.arrangement == "sorted" and self.selection == "diagonal":
            yield "selection='diagonal' is of tiles: sorted blocks have no diagonal. Use arrangement='tiles'."
        if self.selection == "activation" and self.target_parameters:
            yield "selection='activation' looks at the inputs of modules; target_parameters have none. Use 'gradient'."
        if self.layers_pattern and self.layers_to_transform is None:
            yield f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform; give both."
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            yield (
                f"layers_to_transform={self.layers_to_transform} needs target_modules as a list of names, "
                f"but it is the string {self.target_modules!r}; name the modules, or put the layers into a regex."
            )
        if self.selected_blocks is not None:
            given, wanted = sum(map(len, self.selected_blocks.values())), (blocks or 0) + sum(patterns.values())
            if given == 0:
                yield "selected_blocks is empty; leave it out to let the warm-up select."
            if (blocks is not None or patterns) and given != wanted:
                yield (
                    f"selected_blocks names {given} blocks but the budget is {wanted}; drop num_blocks and "
                    "num_blocks_pattern, or the list."
                )
            if ratio is not None:
                yield f"selected_blocks is the selection, so trainable_ratio={ratio} has no effect; drop one of them."


CHOICES = {name: get_args(kind) for name, kind in get_type_hints(SMTConfig).items() if get_origin(kind) is Literal}


def _is_int(value: object, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_pair(value: object) -> bool:
    """Whether a value is [name, anything], as JSON keeps an entry of a mapping in its order."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, Iterable) and all(isinstance(value, kind) for value in values)


def _shortened(message: str) -> str:
    """Without the middle of what is too long to read: a file's values may have any length."""
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def weights_beside(folder: str, options: Mapping) -> Path | None:
    """The file of the weights that belong to a config in a folder or a repository of the hub, if there is one."""
    weights = Path(folder, options.get("subfolder") or "", SAFETENSORS_WEIGHTS_NAME)
    if weights.exists() or weights.parent.exists():
        return weights if weights.is_file() else None
    found = {name: options[name] for name in DOWNLOAD if options.get(name) is not None}
    try:
        return Path(hf_hub_download(folder, SAFETENSORS_WEIGHTS_NAME, **found))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None
