"""Which inputs of the linear layers of the testbeds' models are outlier features: norms far above the median's.

    python scripts/studies/outliers.py tiny-llama-code smollm2-banking77 --shared ../shared

Prints a table, and writes RESULTS/outliers.jsonl: for each testbed a line for each linear layer (but the head and what
is trained anew): how many of its inputs have a norm above 3 and 6 times the median, over 64 rows of training data, the
largest norm over the median, and how much that input varies: its standard deviation over its root mean square.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from recipes import target_names
from testbeds import TESTBEDS, Options, Testbed, load_testbed
from transformers import HfArgumentParser

ROWS, RATIOS = 64, (3, 6)


@dataclass
class Command:
    testbeds: list[str] = field(metadata={"help": "names in testbeds.py"})
    tokens: int = field(default=128, metadata={"help": "per row, at most"})


@torch.no_grad()
def outliers_of(testbed: Testbed) -> dict[str, dict[str, float]]:
    """By layer: inputs, how many are above each of RATIOS times the median norm, the largest, and its variation."""
    found = {}

    def look(name: str):
        def hook(layer: torch.nn.Module, args: tuple) -> None:
            x = args[0].float().flatten(0, -2)
            rms = x.square().mean(0).sqrt()
            most = rms.argmax()
            found[name] = {
                "inputs": len(rms),
                **{f"above {ratio}": int((rms > ratio * rms.median()).sum()) for ratio in RATIOS},
                "largest": round((rms[most] / rms.median()).item(), 1),
                "its std / rms": round((x[:, most].std() / rms[most]).item(), 2),
            }

        return hook

    names = target_names(testbed.model, "all-linear", testbed.modules_to_save or [])
    hooks = [testbed.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    testbed.model.eval()(**testbed.batch(testbed.train[:ROWS]))
    for hook in hooks:
        hook.remove()
    return found


def main(argv: list[str]) -> None:
    command, options = HfArgumentParser((Command, Options)).parse_args_into_dataclasses(["--testbeds", *argv])
    print(f"{'':24}{'layers':>8}{'with outliers above 6':>24}{'most in one':>14}{'largest norm / median':>24}")
    lines = []
    for name in command.testbeds:
        found = outliers_of(load_testbed(TESTBEDS[name], Path(options.shared), command.tokens))
        counts = [layer["above 6"] for layer in found.values()]
        largest = max(layer["largest"] for layer in found.values())
        print(f"{name:24}{len(found):8}{sum(map(bool, counts)):24}{max(counts):14}{largest:24}")
        lines += [json.dumps({"testbed": name, "layer": layer, **figures}) for layer, figures in found.items()]
    Path(options.results, "outliers.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
