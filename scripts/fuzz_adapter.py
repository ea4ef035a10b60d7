"""Break adapter files in every way a disk, a download or a stranger might, and count what loading makes of them.

    python scripts/fuzz_adapter.py                  # 9,000 cases, some minutes
    python scripts/fuzz_adapter.py --cases 30000    # all of them

Each case is loaded into a small LLaMA, by PEFT or by transformers. What may come of it:

    refused     ValueError, or safetensors' error, before anything is changed
    by others   another error from PEFT's or transformers' own code, which reads the config first
    harmless    loaded, and the model computes what it must
    warned      loaded, computes something else, and a warning says that something is wrong
    CHANGED     loaded, computes something else, and nothing says so
    CRASH       another error from smt_peft
    BASE        a weight of the base model is another one afterwards

Values of deltas are not broken here: any bits are a value.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from smt_peft import SMTConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OUTCOMES = ["refused", "by others", "harmless", "warned", "CHANGED", "CRASH", "BASE"]
WRONG = ["CHANGED", "CRASH", "BASE"]
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "bool", "float64", "complex64", "float8_e4m3fn"]
TOKENS = torch.arange(1, 9)[None]


class Case(NamedTuple):
    """What to do to a folder, and a line about it."""

    kind: str
    what: str
    door: str
    apply: Callable[[Path], None]


class Result(NamedTuple):
    case: Case
    outcome: str
    message: str


# --- cases -----------------------------------------------------------------------------------------------------------


def flips(file: str, bits: range) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each of these bits, counted from the beginning of a file."""
    for bit in bits:

        def flip(folder: Path, bit: int = bit) -> None:
            content = bytearray((folder / file).read_bytes())
            content[bit // 8] ^= 1 << bit % 8
            (folder / file).write_bytes(content)

        yield f"bit {bit % 8} of byte {bit // 8}", flip


def tensor_bits(file: Path, part: str) -> range:
    """Where a tensor lies in a file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    first, last = next(entry["data_offsets"] for key, entry in header.items() if key.endswith(f"smt_bank.{part}"))
    return range(8 * (start + first), 8 * (start + last))


def truncations(file: str, size: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for length in range(size):
        yield (
            f"{length} bytes left",
            lambda folder, length=length: (folder / file).write_bytes((folder / file).read_bytes()[:length]),
        )


def edits(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)

    return edit


def swaps(keys: list[str]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each pair of tensors under each other's name, each tensor twice, and each left out."""
    for one in keys:
        yield f"without {one}", edits(lambda tensors, one=one: tensors.pop(one))
        for other in keys:

            def swap(tensors: dict, one: str = one, other: str = other) -> None:
                tensors[one], tensors[other] = tensors[other], tensors[one]

            def double(tensors: dict, one: str = one, other: str = other) -> None:
                tensors[one] = tensors[other].clone()

            if one < other:
                yield f"{one} and {other} swapped", edits(swap)
            if one != other:
                yield f"{other} also as {one}", edits(double)


def casts(keys: list[str]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for key in keys:
        for dtype in DTYPES:

            def cast(tensors: dict, key: str = key, dtype: str = dtype) -> None:
                tensors[key] = tensors[key].to(getattr(torch, dtype))

            yield f"{key} as {dtype}", edits(cast)


def strangers(base: nn.Module) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """A key for each weight of the base model, and for parts of other banks."""
    for name, weight in base.state_dict().items():
        for key in (name, f"base_model.model.{name}", f"base_model.model.{name}".replace("proj.", "proj.base_layer.")):
            change = edits(lambda tensors, key=key, weight=weight: tensors.setdefault(key, weight + 1))
            yield f"also {key}", change
    for bank in ("smt_bank.other", "smt_bank.default", "base_model.model.smt_bank.other", "model.smt_bank"):
        for part in ("weight", "index", "fingerprint", "manifest"):
            yield (
                f"also {bank}.{part}",
                edits(lambda tensors, key=f"{bank}.{part}": tensors.update({key: torch.ones(3)})),
            )


def cases_of(name: str, folder: Path, base: nn.Module) -> Iterator[Case]:
    """The cases of an adapter; of the kinds that have most, a share, chosen by the global random state."""
    file, keys = folder / WEIGHTS, list(load_file(folder / WEIGHTS))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    kinds = {
        "header, bit flips": flips(WEIGHTS, range(8 * header)),
        "index, bit flips": flips(WEIGHTS, tensor_bits(file, "index")),
        "fingerprint, bit flips": flips(WEIGHTS, tensor_bits(file, "fingerprint")),
        "config, bit flips": flips(CONFIG, range(8 * (folder / CONFIG).stat().st_size)),
        "config, cut off": truncations(CONFIG, (folder / CONFIG).stat().st_size),
        "weights, cut off": truncations(WEIGHTS, file.stat().st_size),
        "keys swapped, doubled, missing": swaps(keys),
        "dtypes": casts(keys),
        "foreign keys": strangers(base),
    }
    if any(key.endswith("manifest") for key in keys):
        kinds["manifest, bit flips"] = flips(WEIGHTS, tensor_bits(file, "manifest"))
    often = {"config, bit flips": 0.2, "config, cut off": 0.1, "weights, cut off": 0.02, "manifest, bit flips": 0.2}
    for kind, everything in kinds.items():
        for what, apply in everything:
            if random.random() < often.get(kind, 1):
                yield Case(kind, f"{name}: {what}", random.choice(["PEFT", "transformers"]), apply)


# --- running them ----------------------------------------------------------------------------------------------------


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()


def make_adapters(base: nn.Module, folder: Path) -> dict[str, Path]:
    """Small adapters: tiles with biases and a whole module, sorted blocks, and tiles as version 1 wrote them."""
    common = {"block_size": 4, "num_blocks": 6, "selection": "random", "init_weights": False}
    forms = {"tiles": {"bias": "smt_only", "modules_to_save": ["lm_head"]}, "sorted": {"arrangement": "sorted"}}
    for name, options in [*forms.items(), ("version 1", {})]:
        model = get_peft_model(deepcopy(base), SMTConfig(**common, **options))
        model.save_pretrained(folder / name)
    edits(lambda tensors: tensors.pop("base_model.model.smt_bank.manifest"))(folder / "version 1")
    return {name: folder / name for name in [*forms, "version 1"]}


@torch.no_grad()
def run(case: Case, folder: Path, base: nn.Module, expected: torch.Tensor) -> Result:
    """Load what a case makes of a copy of `folder`."""
    with tempfile.TemporaryDirectory() as at, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broken, model = Path(shutil.copytree(folder, Path(at, "adapter"))), deepcopy(base)
        case.apply(broken)
        try:
            if case.door == "PEFT":
                logits = PeftModel.from_pretrained(model, broken)(TOKENS).logits
            else:
                model.load_adapter(str(broken))
                logits = model(TOKENS).logits
        except (ValueError, SafetensorError) as error:
            outcome, message = "refused", str(error)
            if len(message) > 1000 or len(message.split()) < 4:
                outcome = "CRASH"
        except Exception as error:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            outcome, message = "by others", repr(error)
            if "smt_peft" in Path(frames[-1]).parts:
                outcome, message = "CRASH", traceback.format_exc()
        else:
            said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
            message = "; ".join(said)
            outcome = "harmless" if torch.equal(logits, expected) else "warned" if said else "CHANGED"
    if not is_untouched(model, base):
        outcome = "BASE"
    return Result(case, outcome, message)


def is_untouched(model: nn.Module, base: nn.Module) -> bool:
    """Whether all weights of the base are there; the biases that an adapter trains are its own."""
    wrapped = dict(model.named_parameters())
    found = {name.replace(".base_layer", "").replace(".original_module", ""): wrapped[name] for name in wrapped}
    return all(torch.equal(found[name], weight) for name, weight in base.named_parameters() if "bias" not in name)


def fuzz(limit: int | None = None, seed: int = 0) -> list[Result]:
    """Run all cases, or `limit` of them."""
    random.seed(seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = make_base()
    with tempfile.TemporaryDirectory() as at:
        adapters, cases, expected = make_adapters(base, Path(at)), [], {}
        for name, folder in adapters.items():
            cases += [(name, case) for case in cases_of(name, folder, base)]
            with torch.no_grad():
                expected[name] = PeftModel.from_pretrained(deepcopy(base), folder)(TOKENS).logits
        random.shuffle(cases)
        bar = tqdm(cases[:limit], desc="loading", unit="case", dynamic_ncols=True)
        return [run(case, adapters[name], base, expected[name]) for name, case in bar]


def table(results: list[Result]) -> str:
    """Markdown: outcomes per kind of case."""
    counts: dict[str, Counter] = {}
    for result in results:
        counts.setdefault(result.case.kind, Counter())[result.outcome] += 1
    lines = ["| | cases | " + " | ".join(OUTCOMES) + " |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for kind, of in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        lines.append(f"| {kind} | {of.total():,} | " + " | ".join(f"{of[outcome]:,}" for outcome in OUTCOMES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=9000, help="how many cases, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    parser.add_argument("--show", nargs="*", default=WRONG, choices=OUTCOMES, help="print cases with these outcomes")
    args = parser.parse_args()
    results = fuzz(limit=args.cases, seed=args.seed)
    for result in results:
        if result.outcome in args.show:
            print(f"{result.outcome}: {result.case.kind}: {result.case.what}, by {result.case.door}: {result.message}")
    print(table(results))
    raise SystemExit(any(result.outcome in WRONG for result in results))


if __name__ == "__main__":
    main()
