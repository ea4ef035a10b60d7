"""Inference with an adapter: tokens per second beside the base model's, unmerged and merged; load, switch, merge.

    python scripts/benchmarks/bench_inference.py --output docs/results/inference.json

Random weights in a real shape, SMT and LoRA at equal parameters, on one base model in one process, in turns. A run is
a prompt and then greedy tokens one by one, each with the cache of those before. What this machine and commit have
written before with the same options is kept; it writes after each batch size.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import results
import torch
from bench_training import Options, attach, random_llama
from peft import PeftModel
from report_benchmarks import inference_table
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

METHODS = ["base", "smt", "lora", "smt-merged", "lora-merged"]
VERBS = ["save", "load", "switch", "merge", "unmerge"]


@dataclass
class Command:
    output: str | None = HfArg(default=None, help="JSON file; rows that it holds already are kept")
    shape: str = "llama-3.2-3b"
    dtype: str = "bfloat16"
    rank: int = 32
    block_size: int = 256
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    prompt: int = 128
    new_tokens: int = 32
    rounds: int = 3
    seconds: float = 1e9
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    rehearse: bool = HfArg(default=False, help="toy size on CPU")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    (command,) = HfArgumentParser(Command).parse_args_into_dataclasses()
    if command.rehearse:
        toy = {"shape": "tiny", "dtype": "float32", "rank": 16, "block_size": 16, "device": "cpu"}
        vars(command).update(toy, batch_sizes=[1, 2], prompt=8, new_tokens=4)
    path = Path(command.output) if command.output else None
    asked = {name: value for name, value in vars(command).items() if name not in ("output", "seconds")}
    result = results.kept(path, command.device, asked, verbs=VERBS, complete=False, speeds=[], adapters={})
    try:
        if not result["complete"]:
            measure(result, command, partial(results.write, result, path))
    except KeyboardInterrupt:
        print("Stopped.")
    print(inference_table(result))
    return 0 if result["complete"] else 3


def measure(result: dict, command: Command, write: Callable[[], None]) -> None:
    deadline = time.monotonic() + command.seconds
    same = ("rank", "block_size", "target_modules", "device")
    options = Options(**{name: getattr(command, name) for name in same})
    base = random_llama(command.shape, None, command.dtype, command.device)
    models = {}
    for method in METHODS:
        adapter = method.removesuffix("-merged")
        models[method] = base.eval() if method == "base" else attach(base, adapter, options)[0].eval()
        if method.endswith("-merged"):
            models[method].merge_adapter()
    for name in ("smt", "lora"):
        if name not in result["adapters"]:
            result["adapters"][name] = life(models[name], command)
            write()
    for batch in command.batch_sizes:
        if any(row["batch"] == batch for row in result["speeds"]):
            continue
        prompt = torch.randint(0, base.config.vocab_size, (batch, command.prompt), device=command.device)
        seconds = {method: [] for method in METHODS}
        for _ in range(command.rounds + 1):
            for method, model in models.items():
                seconds[method].append(generate(model, prompt, command))
            if time.monotonic() > deadline:
                break
        for method, (_, *rounds) in seconds.items():  # the first one tunes kernels
            if len(rounds) >= min(2, command.rounds):
                prefill, decode = (median(times) for times in zip(*rounds, strict=True))
                result["speeds"].append({
                    "batch": batch,
                    "method": method,
                    "prefill_tokens_per_s": batch * command.prompt / prefill,
                    "decode_tokens_per_s": batch * command.new_tokens / decode,
                    "decode_s": [decode for _, decode in rounds],
                })  # fmt: skip
        write()
    result["complete"] = len(result["speeds"]) == len(METHODS) * len(command.batch_sizes)
    write()


@torch.no_grad()
def generate(model: torch.nn.Module, prompt: torch.Tensor, command: Command) -> tuple[float, float]:
    """Seconds for the prompt, and for the new tokens."""
    marks = [results.clock(command.device)]
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    marks.append(results.clock(command.device))
    for _ in range(command.new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    marks.append(results.clock(command.device))
    return marks[1] - marks[0], marks[2] - marks[1]


def life(model: PeftModel, command: Command) -> dict:
    """What an adapter's life costs: bytes on disk, and seconds to save, load, switch to, merge and unmerge it."""
    seconds: dict[str, list[float]] = {verb: [] for verb in VERBS}

    @contextlib.contextmanager
    def timed(verb: str):
        start = results.clock(command.device)
        yield
        seconds[verb].append(results.clock(command.device) - start)

    with tempfile.TemporaryDirectory() as folder:
        for turn in range(3):
            with timed("save"):
                model.save_pretrained(folder, selected_adapters=["default"])
            with timed("load"):
                model.load_adapter(folder, adapter_name=f"copy{turn}")
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    for turn in range(3):
        with timed("switch"):
            model.set_adapter(f"copy{turn}")
    model.set_adapter("default")
    for turn in range(3):
        model.delete_adapter(f"copy{turn}")
        with timed("merge"):
            model.merge_adapter()
        with timed("unmerge"):
            model.unmerge_adapter()
    return {"bytes": size, **{f"{verb}_s": median(times) for verb, times in seconds.items()}}


if __name__ == "__main__":
    raise SystemExit(main())
