"""Cost of a training step: SMT beside the floor, LoRA and other PEFT methods at equal trainable parameters.

    python scripts/bench_training.py --setting cpu-small --output docs/results/training_cpu-small.json
    bash scripts/bench_gpu.sh                                                              # all settings for one GPU

Weights are random in real shapes: cost does not depend on values. The floor is the same model, frozen, with gradients
flowing down to the outputs of the lowest adapted layers: no method that trains inside the layers can be cheaper.
Methods take turns within one process (rounds), so that a slow moment of the machine hits all of them; compare ratios.
`scripts/report_benchmarks.py` turns the JSON files into the tables and pictures of docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, MissConfig, PeftModel, ShiraConfig, get_peft_model
from report_benchmarks import training_table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from smt_peft import SMTConfig, select_blocks

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size")  # fmt: skip
SHAPES = {  # in the order of SIZES
    "tiny": (64, 128, 2, 4, 2, 64),
    "cpu-small": (512, 1408, 6, 8, 4, 4096),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
}
METHODS = ["floor", "smt", "smt-additive", "smt-warmup", "lora", "rslora", "dora", "miss", "shira", "full"]


@dataclass
class Options:
    """What is measured. `--setting` gives a starting point; every option named on the command line overrides it."""

    setting: str = "cpu-small"
    output: str | None = field(default=None, metadata={"help": "JSON file to write; default: print only"})
    shape: str = "cpu-small"
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = field(default=8, metadata={"help": "LoRA's rank; its parameters are the budget of every method"})
    trainable_ratio: float | None = field(default=None, metadata={"help": "sets the rank: share of the base model"})
    block_size: int = 64
    batch_size: int = 2
    tokens: int = 256
    dtype: str = "float32"
    checkpointing: str = "none"  # or non-reentrant, or reentrant
    steps: int = field(default=4, metadata={"help": "timed steps per method and round"})
    rounds: int = 8
    sweep: str | None = field(default=None, metadata={"help": "option to vary: one run for each of `values`"})
    values: list[str] = field(default_factory=list)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    rehearse: bool = field(default=False, metadata={"help": "run the setting at toy size on CPU"})


QKV = ["q_proj", "k_proj", "v_proj"]
PEFT = {"shape": "llama-3.2-3b", "rank": 32, "block_size": 256, "batch_size": 4, "tokens": 768, "dtype": "bfloat16"}
GPU_SWEEP = {**PEFT, "steps": 3, "rounds": 3, "methods": ["floor", "smt", "smt-additive", "lora", "lora-bf16"]}
SEVEN = {**GPU_SWEEP, "shape": "llama-7b", "trainable_ratio": 0.0086, "target_modules": QKV, "batch_size": 2,
         "tokens": 1024, "methods": [*GPU_SWEEP["methods"], "smt-warmup", "dora"]}  # fmt: skip
CPU_SWEEP = {"steps": 3, "rounds": 4, "methods": ["floor", "smt", "lora"]}
BUDGETS = {"sweep": "trainable_ratio", "values": ["0.001", "0.0025", "0.0086", "0.025", "0.05"], "target_modules": QKV}
SETTINGS = {
    "cpu-small": {},
    "cpu-budgets": {**CPU_SWEEP, **BUDGETS, "block_size": 32},
    "cpu-blocks": {**CPU_SWEEP, "sweep": "block_size", "values": ["32", "64", "128"], "trainable_ratio": 0.0086},
    "cpu-context": {**CPU_SWEEP, "sweep": "tokens", "values": ["64", "256", "1024"], "batch_size": 1},
    "peft": {**PEFT, "rounds": 3, "methods": [*METHODS, "lora-bf16"]},
    "7b": SEVEN,
    "7b-checkpointing": {**SEVEN, "checkpointing": "non-reentrant", "batch_size": 4},
    "7b-paper": {**SEVEN, "checkpointing": "non-reentrant", "methods": ["floor", "smt", "full"]},
    "context": {**GPU_SWEEP, "sweep": "tokens", "values": ["512", "1024", "2048", "4096", "8192"], "batch_size": 1},
    "budgets": {**GPU_SWEEP, **BUDGETS, "block_size": 128},
    "blocks": {**GPU_SWEEP, "sweep": "block_size", "values": ["32", "64", "128", "256"]},
    "sizes": {**GPU_SWEEP, "sweep": "shape", "values": ["llama-3.2-1b", "llama-3.2-3b", "llama-7b", "llama-13b"],
              "trainable_ratio": 0.0086, "target_modules": QKV, "batch_size": 1},
}  # fmt: skip
TOY = {"shape": "tiny", "trainable_ratio": None, "rank": 16, "block_size": 16, "batch_size": 1, "tokens": 32,
       "steps": 2, "rounds": 1, "device": "cpu"}  # fmt: skip
TOY_VALUES = {"trainable_ratio": ["0.05"], "block_size": ["8", "16"], "tokens": ["16", "32"], "shape": ["tiny"]}


def main() -> None:
    parser = HfArgumentParser(Options)
    setting = parser.parse_args_into_dataclasses()[0].setting
    if setting not in SETTINGS:
        raise SystemExit(f"--setting {setting} is not one of {', '.join(SETTINGS)}.")
    parser.set_defaults(**SETTINGS[setting])
    (options,) = parser.parse_args_into_dataclasses()
    if options.rehearse:
        options = replace(options, **TOY, values=TOY_VALUES.get(options.sweep, []))
    kind = {"trainable_ratio": float, "shape": str}.get(options.sweep, int)
    points = [replace(options, **{options.sweep: kind(value)}) for value in options.values] or [options]
    result = {**header(options.device), "sweep": options.sweep, "runs": [run(point) for point in points]}
    print(training_table(result))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=1))


def header(device: str) -> dict:
    """What stands beside a number: command, machine, versions, and how busy the machine was with other things."""
    on_gpu, threads = device == "cuda", torch.get_num_threads()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()}), threads: {threads}",
        "load_average": None if on_gpu else round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **versions},
    }


def run(options: Options) -> dict:
    """All methods, in turns, for one combination of options."""
    base = random_llama(options)
    batch = torch.randint(0, base.config.vocab_size, (options.batch_size, options.tokens), device=options.device)
    figures: dict[str, dict] = {method: {"step_s": [], "trainable_parameters": 0} for method in options.methods}
    with tqdm(total=options.rounds * len(options.methods), desc="rounds x methods") as bar:
        for turn in range(options.rounds):
            for method, figure in figures.items():
                try:
                    with adapted(base, method, options) as model:
                        if turn == 0 and method != "smt-warmup":
                            figure |= count(model, method, batch, options)
                        take_steps(model, method, batch, options, figure)
                except torch.OutOfMemoryError:
                    figure["out_of_memory"] = True
                bar.update()
            check_budgets(figures, rank_of(base, options)[1])
    return {"options": asdict(options), "base_parameters": base.num_parameters(), "methods": figures}


def random_llama(options: Options) -> LlamaForCausalLM:
    sizes = dict(zip(SIZES, SHAPES[options.shape], strict=True))
    tied = sizes["vocab_size"] > 100_000  # as in the small LLaMA 3.2
    config = LlamaConfig(**sizes, tie_word_embeddings=tied, max_position_embeddings=8192, use_cache=False)
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device(options.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if options.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model


def targets(base: nn.Module, options: Options) -> list[nn.Module]:
    return [module for name, module in base.named_modules() if name.rpartition(".")[2] in options.target_modules]


def rank_of(base: LlamaForCausalLM, options: Options) -> tuple[int, int]:
    """LoRA's rank, and its parameters: the budget that the other methods get, as near as they can."""
    sides = sum(sum(module.weight.shape) for module in targets(base, options))
    if options.trainable_ratio is None:
        return options.rank, options.rank * sides
    rank = max(1, round(options.trainable_ratio * base.num_parameters() / sides))
    return rank, rank * sides


def check_budgets(figures: dict[str, dict], budget: int) -> None:
    for method, figure in figures.items():
        trained = figure["trainable_parameters"]
        if trained and method != "full" and abs(trained / budget - 1) > 0.06:  # DoRA's magnitudes are some 5 %
            message = f"{method} trains {trained:,} parameters, but the budget is {budget:,}"
            raise ValueError(f"{message}: not comparable. Choose another rank, or smaller blocks.")


@contextlib.contextmanager
def adapted(base: LlamaForCausalLM, method: str, options: Options):
    """The base model with one method's adapter, trainable; afterwards the base model as it was."""
    base.requires_grad_(method == "full")
    rank, budget = rank_of(base, options)
    common = {"target_modules": options.target_modules}
    lora = LoraConfig(r=rank, **common)
    smt = SMTConfig(block_size=options.block_size, num_blocks=max(1, round(budget / options.block_size**2)),
                    selection="random", scope="module", warmup_steps=options.steps + 2, **common)  # fmt: skip
    outs = sum(len(module.weight) for module in targets(base, options))
    configs = {
        "smt": smt,
        "smt-additive": smt,
        "smt-warmup": replace(smt, selection="gradient"),
        "lora": lora,
        "lora-bf16": lora,
        "rslora": replace(lora, use_rslora=True),
        "dora": replace(lora, use_dora=True),
        "miss": MissConfig(r=max(1, round(budget / outs)), **common),
        "shira": ShiraConfig(r=rank, **common),
    }
    model, hooks = base, []
    if method in configs:  # PEFT's default holds the adapters of 16-bit models in float32
        model = get_peft_model(base, configs[method], autocast_adapter_dtype=method != "lora-bf16")
    for layer in base.smt_bank.layers if method == "smt-additive" else ():
        layer._shared_weight = True  # treated as a weight that two modules share
    if method == "floor":
        hooks = [module.register_forward_hook(require_gradient) for module in targets(base, options)]
    model.train()
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        if isinstance(model, PeftModel):
            model.unload()
        base.zero_grad()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def require_gradient(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_()


def take_steps(model, method: str, batch: torch.Tensor, options: Options, figure: dict) -> None:
    """Time training steps, after one untimed; on a GPU also the peak of allocated memory."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if method == "smt-warmup":
        marks = []
        select_blocks(model, [{"input_ids": batch, "labels": batch}] * (options.steps + 2), progress_bar=False,
                      loss_function=lambda m, b: marks.append(clock(options)) or m(**b).loss)  # fmt: skip
        figure["step_s"] += [after - before for before, after in pairwise(marks[1:])]
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None  # as the Trainer's
        for step in range(options.steps + 1):
            start = clock(options)
            model(input_ids=batch, labels=batch).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if step:
                figure["step_s"].append(clock(options) - start)
        state = [t for s in optimizer.state.values() for t in s.values()] if optimizer is not None else []
        figure["optimizer_bytes"] = sum(t.nbytes for t in state if t.dim())
    if options.device == "cuda":
        figure["peak_bytes"] = torch.cuda.max_memory_allocated()


def clock(options: Options) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class CountLaunches(TorchDispatchMode):
    """Counts operators that do more than make a view: what would be a kernel launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count(model, method: str, batch: torch.Tensor, options: Options) -> dict:
    """What does not depend on the machine: parameters, bytes, FLOPs, launches; and the adapter's life on disk."""

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()

    step()  # once, so that lazy set-up is not counted
    with FlopCounterMode(display=False) as flops:
        step()
    if options.device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            clock(options)
        launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())
    else:
        with CountLaunches() as counter:
            step()
        launches = counter.count
    model.zero_grad()
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "saved_bytes": saved_bytes(model, batch),
        "flops": flops.get_total_flops(),
        "launches": launches,
        **(on_disk(model, options) if isinstance(model, PeftModel) else {}),
    }


def saved_bytes(model, batch: torch.Tensor) -> int:
    """Bytes of the distinct storages, other than weights, that a forward saves for its backward."""
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = (tensor.coalesce().values() if tensor.is_sparse else tensor).untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=batch, labels=batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


def on_disk(model: PeftModel, options: Options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        marks = [clock(options)]
        model.save_pretrained(folder)
        marks.append(clock(options))
        model.load_adapter(folder, adapter_name="default")
        marks.append(clock(options))
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    model.merge_adapter()
    merge = clock(options) - marks[-1]
    model.unmerge_adapter()
    return {"adapter_bytes": size, "save_s": marks[1] - marks[0], "load_s": marks[2] - marks[1], "merge_s": merge}


if __name__ == "__main__":
    main()
