"""Adapters to LoRA, and the difference of two checkpoints to an adapter, each with what it loses.

A block has full rank, so LoRA holds it only as nearly as its rank allows. PEFT's own `convert_to_lora` and
`save_as_lora` work on a model, and `lora_errors` says what they lost; `convert_to_lora_files` needs no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from smt_peft import ops
from smt_peft.bank import DeltaBank
from smt_peft.banks import find_bank
from smt_peft.bases import far_apart, sample
from smt_peft.checkpoints import STORED_FLOATS, Checkpoint, empty_model, stored_keys
from smt_peft.config import SMTConfig
from smt_peft.contents import PREFIX
from smt_peft.files import Blocks, read_adapter
from smt_peft.layer import Linear
from smt_peft.selection import Lines, arrange, select, sort_lines
from smt_peft.writing import refuse_same_folder, written_whole

KEPT = (  # by a LoRA adapter
    "modules_to_save",
    "trainable_token_indices",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
)

# --- to LoRA ---------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """What a LoRA adapter lacks of an SMT adapter.

    Attributes:
        rank: by target.
        squared_error, squared_norm: by target, of the difference between the two deltas and of SMT's.
    """

    rank: dict[str, int]
    squared_error: dict[str, float]
    squared_norm: dict[str, float]

    @property
    def error(self) -> float:
        """The Frobenius norm of what is lacking, as a share of the delta's, of all targets together."""
        return _share(sum(self.squared_error.values()), sum(self.squared_norm.values()))

    @property
    def errors(self) -> dict[str, float]:
        """The same for each target."""
        return {name: _share(self.squared_error[name], self.squared_norm[name]) for name in self.rank}

    def summary(self) -> str:
        """A table to print."""
        width = max(map(len, self.rank))
        lines = [f"{name:{width}}  rank {self.rank[name]:4}  error {error:.4f}" for name, error in self.errors.items()]
        return "\n".join([*lines, f"{'all':{width}}             error {self.error:.4f}"])


def _share(squared_error: float, squared_norm: float) -> float:
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def convert_to_lora_files(
    folder: str | Path, out: str | Path, rank: int | None = None, energy: float | None = None
) -> Loss:
    """Write the LoRA adapter nearest to the SMT adapter in a folder; PEFT loads it without this package.

    Args:
        rank: of every target; less where its blocks have fewer rows or columns, for then nothing is lost.
        energy: instead, the share of the squared singular values that each target's rank has to hold, in (0, 1].

    Raises:
        ValueError: for neither or both of these or impossible ones, and for an adapter of biases or of parameters,
            which PEFT does not convert either.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: give one of them.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is not a positive integer.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is not in (0, 1]: it is a share of the squared singular values.")
    refuse_same_folder(out, [folder])
    adapter = read_adapter(folder)
    config = adapter.config
    for option, allowed in (("bias", "none"), ("target_parameters", None)):
        if (value := getattr(config, option)) and value != allowed:
            raise ValueError(f"{folder} has {option}={value!r}, which cannot be converted to LoRA; merge it instead.")
    if not adapter.blocks:
        raise ValueError(f"{folder} has no blocks yet: train it first, or let select_blocks() choose them.")
    state, loss = dict(adapter.others), Loss({}, {}, {})
    for name, blocks in tqdm(adapter.blocks.items(), desc="converting", unit="target", disable=None):
        a, b, squares = _factors(blocks, adapter.shapes[name], rank, energy)
        state |= {f"{PREFIX}{name}.lora_{side}.weight": factor for side, factor in (("A", a), ("B", b))}
        loss.rank[name], loss.squared_norm[name] = len(a), squares.sum().item()
        loss.squared_error[name] = squares[len(a) :].sum().item()
    highest = max(loss.rank.values())
    pattern = {_only(name, loss.rank): rank for name, rank in loss.rank.items() if rank < highest}
    lora = LoraConfig(
        r=highest,
        lora_alpha=highest,
        target_modules=list(loss.rank),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        inference_mode=True,
        **{option: getattr(config, option) for option in KEPT},
    )
    with written_whole(Path(out)) as new:
        lora.save_pretrained(str(new))
        save_file(state, new / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    return loss


def _only(name: str, names: Iterable[str]) -> str:
    """A target's key in LoRA's patterns: PEFT compares it with the ends of names, which may be other targets', too."""
    is_end = any(other.endswith(f".{name}") for other in names)
    return rf"(?<![\s\S]){re.escape(name)}" if is_end or not re.fullmatch(r"[\w.]+", name) else name


def lora_errors(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str = "default") -> Loss:
    """What is lost in the `state_dict` that PEFT's `convert_to_lora` made of an adapter of this model."""
    loss = Loss({}, {}, {})
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and f"{name}.lora_A.weight" in state_dict:
            delta = layer.get_delta_weight(adapter_name)
            matrix = (delta.T if layer.is_transposed else delta).double()
            a, b = (state_dict[f"{name}.lora_{side}.weight"].to(matrix) for side in "AB")
            target = name.removeprefix(PREFIX)
            loss.rank[target], loss.squared_norm[target] = len(a), matrix.square().sum().item()
            loss.squared_error[target] = (matrix - b @ a).square().sum().item()
    return loss


def _factors(
    blocks: Blocks, shape: tuple[int, int], rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA's A [rank, in] and B [out, rank], float32: the nearest to a delta in the Frobenius norm. And the squares of
    all singular values, of which those from the rank on are lost."""
    (rows, i), (cols, j) = (side.unique(return_inverse=True) for side in (blocks.rows, blocks.cols))
    matrix = blocks.deltas.new_zeros(len(rows), len(cols), dtype=torch.float64)  # other rows and columns are zero
    matrix[i[:, :, None], j[:, None, :]] = blocks.deltas.double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        held = s.square().cumsum(0)
        rank = int((held < energy * held[-1]).sum()) + 1
    rank = min(rank, len(s))
    a, b = (v.new_zeros(sides, dtype=torch.float32) for sides in ((rank, shape[1]), (shape[0], rank)))
    a[:, cols], b[rows] = v[:rank].float(), (u[:, :rank] * s[:rank]).float()
    return a, b, s.square()


# --- from two checkpoints --------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """What an adapter holds of the difference between two checkpoints.

    Attributes:
        num_blocks, block_size: what it has.
        of_targets: its share of the squared difference of the target modules' weights.
        of_all: the same of all tensors that both checkpoints have.
        not_compared: tensors that only one of them has, or that have another shape or no floating-point numbers.
    """

    num_blocks: int
    block_size: int
    of_targets: float
    of_all: float
    not_compared: list[str]

    def summary(self) -> str:
        """A few lines to print."""
        rest = ", ".join(self.not_compared[:3]) + ", ..." * (len(self.not_compared) > 3)
        beside = f"\nNot compared: {len(self.not_compared)} tensors ({rest})." if rest else ""
        return (
            f"{self.num_blocks} blocks of {self.block_size} x {self.block_size} hold {self.of_targets:.1%} of the "
            f"squared difference of the target modules, {self.of_all:.1%} of that of the whole model.{beside}"
        )


class Pair:
    """Two checkpoints of one architecture, read a tensor at a time.

    Attributes:
        keys: in the base's files, of the tensors that both have, in floating-point numbers of one shape.
        tuned_keys: key in the base's files -> that in the other's.
        not_compared: the other keys.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint, model: PreTrainedModel):
        self.base, self.tuned = base, tuned
        self.tuned_keys = {key: key for key in base.files if key in tuned.files}
        of_base, of_tuned = (stored_keys(model, one.files) for one in (base, tuned))  # one may be without a prefix
        for name in of_base.keys() & of_tuned.keys():
            if of_base[name] is not None and of_tuned[name] is not None:
                self.tuned_keys.setdefault(of_base[name], of_tuned[name])
        looks = {key: [base.look(key), tuned.look(its)] for key, its in self.tuned_keys.items()}
        fits = {
            key
            for key, ((shape, kind), (other, its)) in looks.items()
            if shape == other and {kind, its} <= {*STORED_FLOATS}
        }
        self.keys = sorted(fits, key=lambda key: (base.files[key], key))
        self.not_compared = sorted({*base.files, *tuned.files} - fits - {self.tuned_keys[key] for key in fits})

    def difference(self, key: str) -> Tensor:
        """tuned - base, rounded to float32."""
        base, tuned = self.base.read(key), self.tuned.read(self.tuned_keys[key])
        wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
        return tuned.to(wide, copy=True).sub_(base.to(wide)).float()


def adapter_of_difference(
    base_folder: str | Path,
    tuned_folder: str | Path,
    out: str | Path,
    num_blocks: int | None = None,
    trainable_ratio: float | None = None,
    block_size: int | str = "auto",
    target_modules: list[str] | str | None = None,
    arrangement: str = "tiles",
    base_name: str | None = None,
) -> Difference:
    """Write the adapter of the blocks in which a fully fine-tuned model differs most from its base (squared sums).

    Reads the safetensors files of both a tensor at a time; neither model is ever in memory. For the options see
    `SMTConfig`; `base_name` is what the adapter calls its base model (default: its folder).

    Raises:
        ValueError: where a target is in only one of the checkpoints or not stored as it is used, or where no target
            differs.
    """
    refuse_same_folder(out, [base_folder, tuned_folder])
    empty = empty_model(Path(base_folder))
    pair = Pair(Checkpoint(Path(base_folder)), Checkpoint(Path(tuned_folder)), empty)
    keys = stored_keys(empty, pair.keys)
    config = SMTConfig(
        num_blocks=num_blocks,
        trainable_ratio=trainable_ratio,
        block_size=block_size,
        target_modules=target_modules,
        arrangement=arrangement,
    )
    model = get_peft_model(empty, config)
    bank = find_bank(model, "default")
    targets = {}  # key -> whether the matrix is stored as [in, out]
    for target in bank.targets:
        key = keys.get(f"{target.name}.weight")
        if key is None:
            raise ValueError(
                f"{target.name}.weight is not in both checkpoints, with one shape and stored as the model uses it; "
                f"leave it out of target_modules. Not compared: {', '.join(pair.not_compared[:5]) or 'nothing'}."
            )
        targets[key] = model.base_model.model.get_submodule(target.name).is_transposed
    scores, lines, of_all = _score(pair, targets, bank.block_size, arrangement == "sorted")
    of_targets = sum(score.sum(dtype=torch.float64).item() for score in scores)
    if not of_targets:
        raise ValueError(
            f"The {len(targets)} target modules of {tuned_folder} do not differ from those of {base_folder}; choose "
            "others by target_modules."
        )
    index = select(scores, bank.groups, "model")
    held = sum(scores[target][row, col].item() for target, row, col in index.tolist())
    bank.set_index(arrange(index, lines) if lines else index)
    deltas = torch.cat(list(_read_blocks(pair, targets, bank)))
    bank.weight = nn.Parameter(deltas)
    bank.base = _sample(pair, keys)
    bank.config.base_model_name_or_path = base_name or str(base_folder)
    model.save_pretrained(str(out), save_embedding_layers=False)  # which have no values here
    return Difference(len(index), bank.block_size, held / of_targets, held / of_all, pair.not_compared)


def _sample(pair: Pair, keys: Mapping[str, str | None]) -> dict[str, list[float]]:
    """What tells the base model from others, of four weights as far apart as can be."""
    matrices = [name for name, key in keys.items() if key and len(pair.base.look(key)[0]) > 1]
    return sample((name, pair.base.read(keys[name])) for name in far_apart(matrices))  # of each, values are read


def _score(
    pair: Pair, targets: dict[str, bool], block_size: int, is_sorted: bool
) -> tuple[list[Tensor], list[Lines] | None, float]:
    """The squared sums of the targets' blocks, their lines if they are sorted, and the squared sum of everything."""
    scores, lines, of_all = {}, {}, 0.0
    for key in tqdm(pair.keys, desc="comparing", unit="tensor", disable=None):
        squares = pair.difference(key).square_()
        of_all += squares.sum(dtype=torch.float64).item()
        if key in targets:
            matrix = squares.T if targets[key] else squares
            if is_sorted:
                lines[key] = sort_lines(matrix.sum(1), matrix.sum(0), block_size)
                matrix = lines[key].in_order(matrix)
            scores[key] = ops.reduce_blocks(matrix, block_size, "l1")
    in_order = [lines[key] for key in targets] if is_sorted else None
    return [scores[key] for key in targets], in_order, of_all


def _read_blocks(pair: Pair, targets: dict[str, bool], bank: DeltaBank) -> Iterator[Tensor]:
    """The deltas of the selected blocks, target after target."""
    for position, (key, is_transposed) in enumerate(targets.items()):
        plan = bank.plan(position, torch.device("cpu"))
        if plan is not None:
            difference = pair.difference(key)
            matrix = difference.T if is_transposed else difference
            yield matrix[ops.entries(plan, bank.block_size)]
