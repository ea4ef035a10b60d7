"""Does importance concentrate in few rows and columns, and do they stay the same? What sorted blocks live on.

    python scripts/studies/importance.py

Writes RESULTS/importance.json and RESULTS/importance.png. On a testbed of the quality study, dW of each target is
summed in absolute value over some batches: which share of it do single entries hold, blocks cut from sorted rows and
columns, and tiles? Rows are ranked by the norm of dY, columns by that of x, as the warm-up does; the ranking of one
half of the batches is compared with that of the other half, and with that of other text.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from testbeds import TESTBEDS, Options, load_testbed
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from smt_peft.ops import reduce_blocks
from smt_peft.plotting import BLUE, COLOURS, GREY, VERMILION
from smt_peft.selection import sort_lines

SHARES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]  # of the weights


@dataclass
class Command:
    testbed: str = HfArg(default="tiny-llama-code", help="a name in testbeds.py")
    block_size: int = 16
    batches: int = HfArg(default=40, help="of 8 rows of 128 tokens")


class Watched:
    """Sums of |dW|, of the norms of dY and of the norms of x of every linear layer but the head, over batches."""

    def __init__(self, model: nn.Module, batches: list[dict[str, torch.Tensor]], name: str):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        self.gradients = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
        self.rows = {name: torch.zeros(layer.out_features) for name, layer in layers.items()}
        self.cols = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}
        hooks = [layer.register_forward_hook(self._watch(name)) for name, layer in layers.items()]
        for batch in tqdm(batches, desc=name, unit="batch"):
            model.zero_grad()
            model.train()(**batch).loss.backward()
            for name, layer in layers.items():
                self.gradients[name] += layer.weight.grad.abs()
        for hook in hooks:
            hook.remove()

    def _watch(self, name: str):
        def add(rows: torch.Tensor) -> None:
            self.rows[name] += rows.flatten(0, 1).norm(dim=0)

        def watch(layer: nn.Module, args: tuple, y: torch.Tensor) -> None:
            self.cols[name] += args[0].detach().flatten(0, 1).norm(dim=0)
            y.register_hook(add)

        return watch


def held(values: torch.Tensor) -> list[float]:
    """The share of their sum that the largest SHARES of the values hold."""
    in_order = values.flatten().sort(descending=True).values.cumsum(0)
    return [float(in_order[max(1, round(share * len(in_order))) - 1] / in_order[-1]) for share in SHARES]


def concentration(seen: Watched, size: int) -> dict[str, list[float]]:
    """For each way to cut the weights, `held`, on average over the targets."""
    found: dict[str, list[list[float]]] = {"single entries": [], "sorted blocks": [], "tiles": []}
    for name, gradient in seen.gradients.items():
        in_order = sort_lines(seen.rows[name], seen.cols[name], size).in_order(gradient)
        found["single entries"].append(held(gradient))
        found["sorted blocks"].append(held(reduce_blocks(in_order, size, "l1")))
        found["tiles"].append(held(reduce_blocks(gradient, size, "l1")))
    return {way: [sum(of) / len(of) for of in zip(*lists, strict=True)] for way, lists in found.items()}


def agreement(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], share: float = 1 / 16) -> float:
    """Share of the most important features of one that are among those of the other."""
    common = [
        len(set(one[name].topk(count).indices.tolist()) & set(other[name].topk(count).indices.tolist())) / count
        for name in one
        if (count := max(1, round(share * len(one[name]))))
    ]
    return sum(common) / len(common)


def main(argv: list[str]) -> None:
    command, options = HfArgumentParser((Command, Options)).parse_args_into_dataclasses(argv)
    if command.testbed not in TESTBEDS:
        raise SystemExit(f"There is no testbed {command.testbed}; there are {', '.join(TESTBEDS)}.")
    if TESTBEDS[command.testbed].kind != "text" or not TESTBEDS[command.testbed].old:
        raise SystemExit(
            f"testbed {command.testbed} is no plain text with an old domain, which is what is looked at here."
        )
    output = Path(options.results) / "importance.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    testbed = load_testbed(TESTBEDS[command.testbed], Path(options.shared), 128)
    rows = testbed.train[: 8 * command.batches].split(8)
    half = len(rows) // 2
    first = Watched(testbed.model, [testbed.batch(part) for part in rows[:half]], "first half")
    second = Watched(testbed.model, [testbed.batch(part) for part in rows[half:]], "second half")
    old = Watched(testbed.model, [testbed.batch(part) for part in testbed.old[: 8 * half].split(8)], "other text")
    result = {
        "options": asdict(command),
        "torch": torch.__version__,
        "shares": SHARES,
        "held": concentration(second, command.block_size),
        "agreement": {
            side: {
                "the other half": agreement(getattr(first, side), getattr(second, side)),
                "other text": agreement(getattr(first, side), getattr(old, side)),
            }
            for side in ("rows", "cols")
        },
        # norms in terms of their median, the largest first, of the inputs and output gradients of one layer
        "norms": {
            name: {side: (of / of.median()).sort(descending=True).values.tolist() for side, of in sides.items()}
            for name, sides in (
                (name, {"rows": second.rows[name], "cols": second.cols[name]})
                for name in list(second.rows)[len(second.rows) // 2 :][:7]
            )
        },
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, output.with_suffix(".png"))
    print(json.dumps({key: result[key] for key in ("held", "agreement")}, indent=1))
    print(f"{output} and a picture beside it")


def draw(result: dict, path: Path) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    size = result["options"]["block_size"]
    for (way, shares), colour, marker in zip(result["held"].items(), (GREY, VERMILION, BLUE), "o^s", strict=True):
        label = way if way == "single entries" else f"{way} of {size}"
        left.plot([100 * s for s in SHARES], [100 * s for s in shares], marker=marker, color=colour, label=label)
    left.plot([0.3, 100], [0.3, 100], ":", color="black", linewidth=0.8, label="if all mattered alike")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="% of the weights",
        ylabel="% of the sum of |dW|",
        title="Does importance concentrate?",
    )
    left.legend(fontsize=8)
    for (name, sides), colour in zip(result["norms"].items(), COLOURS, strict=False):
        for side, dash in (("cols", "-"), ("rows", ":")):
            x = [100 * (i + 1) / len(sides[side]) for i in range(len(sides[side]))]
            label = name.rpartition(".")[2] if side == "cols" else None
            middle.plot(x, sides[side], dash, color=colour, label=label)
    middle.set(
        xscale="log", yscale="log", xlabel="% of the features, the most important first", ylabel="norm / median"
    )
    middle.set_title("Columns by |x| (lines), rows by |dY| (dots)")
    middle.legend(fontsize=7, ncols=2)
    bars = [(f"{'rows' if side == 'rows' else 'columns'}, {what}", 100 * value)
            for side, of in result["agreement"].items() for what, value in of.items()]  # fmt: skip
    right.barh([name for name, _ in bars][::-1], [value for _, value in bars][::-1], color=[GREY, BLUE] * 2)
    right.axvline(100 / 16, color="black", linestyle=":", linewidth=0.8)
    right.set(xlim=(0, 100), xlabel="% of the first sixteenth in common", title="Do they stay the same?")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1:])
