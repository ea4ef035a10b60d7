"""Which inputs of the linear layers of the testbeds' models are outlier features, with norms far above the median's,
and how many inputs the blocks read that the gradient chooses, beside random ones.

    python scripts/studies/outliers.py tiny-llama-code smollm2-banking77 --shared ../shared

Prints a table, and writes into RESULTS/outliers.jsonl, in place of what it has of these testbeds, a line for each
linear layer (but the head and what is trained anew): how many of its inputs have a norm above 3 and 6 times the
median, over the tokens of 64 rows of training data, the largest norm over the median, and how much that input varies:
its standard deviation over its root mean square.
Then how many inputs are read by blocks of 16 (or what divides all sides), 0.9 % of the model with the same share in
each matrix, chosen by the gradient of 20 batches of 8, and at random.
"""

from __future__ import annotations

import json
import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from recipes import target_names
from testbeds import TESTBEDS, Options, Testbed, load_testbed
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from smt_peft import SMTConfig, select_blocks

ROWS, RATIOS = 64, (3, 6)
RULES = ("gradient", "random")  # by which blocks are selected
BLOCK_SIZE, SHARE, BATCHES, BATCH_SIZE = 16, 0.009, 20, 8


@dataclass
class Command:
    tokens: int = HfArg(default=128, help="per row, at most")


@torch.no_grad()
def outliers_of(testbed: Testbed) -> dict[str, dict[str, float]]:
    """By layer: inputs, how many are above each of RATIOS times the median norm, the largest, and its variation."""
    found, batch = {}, testbed.batch(testbed.train[:ROWS])
    is_token = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()

    def look(name: str):
        def hook(layer: torch.nn.Module, args: tuple) -> None:
            x = args[0].float()[is_token]
            rms = x.square().mean(0).sqrt()
            most = rms.argmax()
            found[name] = {
                "inputs": len(rms),
                **{f"above {ratio}": int((rms > ratio * rms.median()).sum()) for ratio in RATIOS},
                "largest": round((rms[most] / rms.median()).item(), 1),
                "its std / rms": round((x[:, most].std() / rms[most]).item(), 2),
            }

        return hook

    hooks = [
        testbed.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in linear_layers(testbed)
    ]
    testbed.model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return found


def linear_layers(testbed: Testbed) -> list[str]:
    return target_names(testbed.model, "all-linear", testbed.modules_to_save or [])


def inputs_read(testbed: Testbed, selection: str) -> dict[str, int]:
    """By layer, how many of its inputs are read by blocks of this rule."""
    names = linear_layers(testbed)
    size = math.gcd(BLOCK_SIZE, *(side for name in names for side in testbed.model.get_submodule(name).weight.shape))
    options = {"scope": "module", "block_size": size, "trainable_ratio": SHARE, "warmup_steps": BATCHES}
    model = get_peft_model(deepcopy(testbed.model), SMTConfig(target_modules=names, selection=selection, **options))
    if selection == "gradient":
        rows = [testbed.train[at : at + BATCH_SIZE] for at in range(0, BATCHES * BATCH_SIZE, BATCH_SIZE)]
        with testbed.autocast():
            select_blocks(model, [testbed.batch(part) for part in rows], progress_bar=False)
    chosen = model.peft_config["default"].selected_blocks
    return {name: size * len({column for _, column in chosen.get(name, ())}) for name in names}


def main(argv: list[str]) -> None:
    parser = HfArgumentParser((Command, Options))
    parser.add_argument("testbeds", nargs="+", choices=TESTBEDS, metavar="testbed", help="a name in testbeds.py")
    command, options, named = parser.parse_args_into_dataclasses(argv)
    path = Path(options.results, "outliers.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["testbed"] not in named.testbeds]
    head = [
        "",
        "layers",
        "with outliers above 6",
        "most in one",
        "largest norm / median",
        *(f"read, {rule}" for rule in RULES),
    ]
    print("".join(f"{title:24}" for title in head))
    for name in named.testbeds:
        testbed = load_testbed(TESTBEDS[name], Path(options.shared), command.tokens)
        found = outliers_of(testbed)
        for rule in RULES:
            for layer, count in inputs_read(testbed, rule).items():
                found[layer][f"read, {rule}"] = count
        counts, largest = ([layer[key] for layer in found.values()] for key in ("above 6", "largest"))
        inputs = sum(layer["inputs"] for layer in found.values())
        shares = [sum(layer[f"read, {rule}"] for layer in found.values()) / inputs for rule in RULES]
        row = [
            name,
            len(found),
            sum(map(bool, counts)),
            max(counts),
            max(largest),
            *(f"{share:.1%}" for share in shares),
        ]
        print("".join(f"{cell!s:24}" for cell in row))
        lines += [json.dumps({"testbed": name, "layer": layer, **figures}) for layer, figures in found.items()]
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
