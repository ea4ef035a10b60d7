"""The command line: smt-peft COMMAND, or python -m smt_peft COMMAND.

A command is a function from its arguments to a report, which is printed as text, or as JSON with --json. What goes
wrong ends it with exit status 2 and one line in words.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file

from smt_peft.checkpoints import local_folder
from smt_peft.combining import CombinationType, MajoritySignMethod, combine_adapters
from smt_peft.config import Arrangement
from smt_peft.conversion import adapter_of_difference, convert_to_lora_files
from smt_peft.files import adapter_config, read_adapter
from smt_peft.inspection import compare, describe
from smt_peft.merging import DTYPES, load_model, merge_files, merge_loaded
from smt_peft.patches import sparse_patch
from smt_peft.plotting import plot_adapter
from smt_peft.writing import check_is_new, written_whole

# What is said in a line; the last two are of pickled weights of other methods that are none.
ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError, StrictDataclassError)
ERRORS += (pickle.UnpicklingError, EOFError)
OTHER_WEIGHTS = ("*.bin",)  # what transformers and PEFT load, too
WHERE = "a folder, or a name on the Hugging Face hub"
NEW_FOLDER = "folder to write; must not exist, or be empty"


def info(args: argparse.Namespace) -> dict:
    """Say what an adapter is: base model, budget, where its blocks are and how they were selected, norms, size."""
    return {"adapter": args.adapter, **describe(adapter_folder(args.adapter))}


def plot(args: argparse.Namespace) -> dict:
    """Draw where an adapter's blocks lie, and how large its deltas are there."""
    picture = Path(args.picture)
    picture = picture if picture.suffix else picture.with_suffix(".png")  # as matplotlib has it
    with written_whole(picture.absolute().parent) as new:
        plot_adapter(read_adapter(adapter_folder(args.adapter)), new / picture.name)
    return {"adapter": args.adapter, "picture": str(picture)}


def diff(args: argparse.Namespace) -> dict:
    """Compare two adapters: what both train, and the cosine of their deltas."""
    return {
        "adapters": [args.adapter, args.other],
        **compare(adapter_folder(args.adapter), adapter_folder(args.other)),
    }


def merge(args: argparse.Namespace) -> dict:
    """Merge an adapter into its base model's files, shard by shard, and write a model that needs no smt_peft."""
    check_is_new(Path(args.out))  # before a base model is downloaded
    adapter, base, folder, dtype = _with_base(args, OTHER_WEIGHTS if args.load else ())
    written = (merge_loaded if args.load else merge_files)(adapter, folder, Path(args.out), dtype)
    return {"adapter": args.adapter, "base_model": base, "model": args.out, **written}


def combine(args: argparse.Namespace) -> dict:
    """Add adapters up, each times its weight, to one adapter."""
    folders = [adapter_folder(name) for name in args.adapters]
    weights = args.weights or [1.0] * len(folders)
    check_is_new(Path(args.out))
    if args.majority_sign_method and not args.type.endswith("ties"):
        raise ValueError(f"--majority_sign_method does nothing for --type {args.type}: it is for ties and dare_ties.")
    combine_adapters(folders, weights, args.type, args.out, args.density, args.majority_sign_method or "total")
    return {"adapters": args.adapters, "weights": weights, "out": args.out, **describe(Path(args.out))}


def convert(args: argparse.Namespace) -> dict:
    """Make a LoRA adapter of an SMT adapter, or an SMT adapter of a fully fine-tuned model and its base."""
    check_is_new(Path(args.out))
    source = local_folder(args.source)
    is_adapter = (source / CONFIG_NAME).is_file()
    names = ("num_blocks", "trainable_ratio", "block_size", "target_modules", "arrangement")
    idle = ("base", *names) if is_adapter else ("rank", "energy")
    if given := ", ".join(f"--{name}" for name in idle if getattr(args, name) is not None):
        what = "an adapter" if is_adapter else "a model"
        raise ValueError(f"{args.source} is {what}, for which {given} would do nothing; leave it out.")
    if is_adapter:
        loss = convert_to_lora_files(source, args.out, args.rank, args.energy)
        by_module = {name: {"rank": rank, "error": loss.errors[name]} for name, rank in loss.rank.items()}
        return {"adapter": args.source, "lora": args.out, "error": loss.error, "by_module": by_module}
    if not args.base:
        raise ValueError(f"{args.source} is no adapter, but a model: name what it was fine-tuned from with --base.")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    found = adapter_of_difference(local_folder(args.base), source, args.out, **options, base_name=args.base)
    return {
        "model": args.source,
        "base_model": args.base,
        "adapter": args.out,
        "blocks": found.num_blocks,
        "block_size": found.block_size,
        "share_of_the_difference_in_targets": found.of_targets,
        "share_of_the_difference_in_all": found.of_all,
        "not_compared": found.not_compared,
    }


def patch(args: argparse.Namespace) -> dict:
    """Write what an adapter's blocks hold after merging, for a process that keeps a copy of the base model."""
    out = Path(args.out).absolute()
    if out.exists():
        raise ValueError(f"{out} is there already; name another file, or remove it.")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ValueError(f"There is no folder {out.parent} that may be written into; make it first.")
    adapter, base, folder, dtype = _with_base(args, OTHER_WEIGHTS)
    if (method := adapter_config(adapter).get("peft_type")) != "SMT":
        raise ValueError(f"{args.adapter} is of the method {method}; patches are of SMT adapters.")
    values = sparse_patch(load_model(adapter, folder, dtype), safe_merge=True)
    with written_whole(out.parent) as new:
        save_file(values, new / out.name)
    tensors = len({key.rpartition("/")[0] for key in values})
    return {"adapter": args.adapter, "base_model": base, "patch": args.out, "tensors": tensors}


def adapter_folder(name: str, formats: Sequence[str] = ()) -> Path:
    """An adapter's folder. What is none is refused before weights are downloaded: a model's may be large.

    Args:
        formats: of weights, beside safetensors.
    """
    adapter_config(local_folder(name, patterns=(CONFIG_NAME,)))
    return local_folder(name, patterns=("*.safetensors", *formats))


def _with_base(args: argparse.Namespace, formats: Sequence[str]) -> tuple[Path, str, Path, torch.dtype | None]:
    """The adapter's folder, its base model's name and folder, and the dtype to load it in.

    Args:
        formats: of weights, beside safetensors.
    """
    adapter = adapter_folder(args.adapter, formats)
    about = adapter_config(adapter)
    base, revision = args.base or about.get("base_model_name_or_path"), None if args.base else about.get("revision")
    if not base:
        raise ValueError(f"{args.adapter} does not say what its base model is; name it with --base.")
    try:
        folder = local_folder(base, revision, ("*.safetensors", *formats))
    except ValueError as error:
        hint = "" if args.base else f" {args.adapter} names it as its base model; --base names another place."
        raise ValueError(f"{error}{hint}") from error
    return adapter, base, folder, None if args.dtype == "auto" else DTYPES[args.dtype]


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    smt_peft = argparse.ArgumentParser("smt-peft", description="Looks at, merges and converts SMT adapters.")
    commands = smt_peft.add_subparsers(metavar="COMMAND", required=True)

    def add(function: Callable[[argparse.Namespace], dict], *positional: str) -> argparse.ArgumentParser:
        about = function.__doc__
        command = commands.add_parser(function.__name__, help=about, description=about, allow_abbrev=False)
        command.set_defaults(function=function)
        command.add_argument("--json", action="store_true", help="print a report for machines")
        for name in positional:
            command.add_argument(name, help=WHERE)
        return command

    add(info, "adapter")
    add(plot, "adapter").add_argument("picture", help="file to write: .png, .pdf or .svg")
    add(diff, "adapter", "other")

    command = add(merge, "adapter")
    command.add_argument("--out", required=True, help=NEW_FOLDER)
    command.add_argument("--load", action="store_true", help="merge with the whole model in memory, by transformers")
    of_base = [command, add(patch, "adapter")]
    of_base[1].add_argument("--out", required=True, help="file to write: .safetensors")
    for command in of_base:
        command.add_argument("--base", help=f"base model, if not the one that the adapter names: {WHERE}")
        command.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights; auto: theirs")

    command = add(combine)
    command.add_argument("adapters", nargs="+", help=f"each {WHERE}")
    command.add_argument("--out", required=True, help=NEW_FOLDER)
    command.add_argument("--weights", nargs="+", type=float, help="one for each adapter; default: 1")
    command.add_argument("--type", choices=get_args(CombinationType), default="linear", help="default: linear")
    command.add_argument("--density", type=float, help="share of its values that each adapter keeps; not for linear")
    command.add_argument(
        "--majority_sign_method", choices=get_args(MajoritySignMethod), help="for ties; default: total"
    )

    command = add(convert, "source")
    command.add_argument("--out", required=True, help=NEW_FOLDER)
    to_lora = command.add_argument_group("from an SMT adapter to LoRA, one of")
    to_lora.add_argument("--rank", type=int, help="rank of every target")
    to_lora.add_argument("--energy", type=float, help="share of the squared singular values that each rank holds")
    to_smt = command.add_argument_group("from a fully fine-tuned model to SMT")
    to_smt.add_argument("--base", help=f"model that it was fine-tuned from: {WHERE}")
    to_smt.add_argument("--num_blocks", type=int, help="budget, in blocks ...")
    to_smt.add_argument("--trainable_ratio", type=float, help="... or as a share of the model's parameters")
    to_smt.add_argument("--block_size", type=_block_size, help="default: auto")
    to_smt.add_argument("--target_modules", type=_modules, help="names, separated by commas, or all-linear")
    to_smt.add_argument("--arrangement", choices=get_args(Arrangement), help="default: tiles")
    return smt_peft


def _block_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto")
    return text if text == "auto" else int(text)


def _modules(text: str) -> list[str] | str:
    return text if text == "all-linear" else [name.strip() for name in text.split(",")]


def text(report: dict) -> str:
    """A report for people: a line for each fact, a table for what has several."""
    width = max(map(len, report))
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += ["", *table(name.replace("_", " "), value)]
        elif value not in (None, []):
            lines.append(f"{name.replace('_', ' '):{width}}  {words(value)}")
    return "\n".join(lines)


def table(heading: str, rows: dict[str, dict]) -> list[str]:
    """Columns under the names of what each row has."""
    columns = list(next(iter(rows.values())))
    cells = [[heading, *columns], *([words(name), *map(words, row.values())] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"{first:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in cells
    ]


def words(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        return ", ".join(map(words, value))
    if value is None:
        return "-"
    if isinstance(value, str):  # a stranger's file may hold what moves the cursor
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: object) -> object:
    """A report without NaN and infinity, which JSON has not: null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(kind: str, message: object) -> str:
    return f"smt-peft: {kind}: {words(' '.join(str(message).split()))}"


def main(argv: list[str] | None = None) -> None:
    """Run a command."""
    commands = parser()
    given = sys.argv[1:] if argv is None else argv
    args = commands.parse_args([re.sub(r"^-[\d.]+[eE]", r" \g<0>", word) for word in given])  # else -1e-3 is an option
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # for those who write code, not for those who run it
            warnings.showwarning = lambda message, *_: print(_line("warning", message), file=sys.stderr)
            report = args.function(args)
        if hasattr(sys.stdout, "reconfigure"):  # else a name that the console cannot show would fail what is done
            sys.stdout.reconfigure(errors="backslashreplace")
        print(json.dumps(_finite(report), indent=2, allow_nan=False) if args.json else text(report), flush=True)
    except KeyboardInterrupt:
        commands.exit(130, "smt-peft: interrupted\n")
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ERRORS as error:
        commands.exit(2, _line("error", error) + "\n")


if __name__ == "__main__":
    main()
