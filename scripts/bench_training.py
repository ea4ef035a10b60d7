"""Cost of a training step: SMT beside the floor, LoRA and other PEFT methods at equal trainable parameters.

    python scripts/bench_training.py --setting cpu-small --output docs/results/training_cpu-small.json
    python scripts/bench_training.py --setting peft --output docs/results/training_peft.json          # one GPU

Weights are random in real shapes: cost does not depend on values. The floor is the same model, frozen, with gradients
flowing down to the input of the lowest adapted layer: no method that trains inside the layers can be cheaper. Methods
take turns within one process (rounds), so that a slow moment of the machine hits all of them; compare ratios.
`scripts/report_benchmarks.py` turns the JSON files into docs/benchmarks.md and its picture.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, MissConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from smt_peft import SMTConfig, select_blocks

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "cpu-small": (512, 1408, 6, 8, 4, 4096),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
}


@dataclass
class Options:
    """What is measured. `--setting` gives a starting point; every option named on the command line overrides it."""

    setting: str = field(default="cpu-small", metadata={"help": "cpu-small, peft, 7b, 7b-checkpointing or 7b-paper"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write; default: print only"})
    shape: str = "cpu-small"
    methods: list[str] = field(
        default_factory=lambda: [
            "floor",
            "smt",
            "smt-additive",
            "smt-warmup",
            "lora",
            "rslora",
            "dora",
            "miss",
            "shira",
            "full",
        ]
    )
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = field(default=8, metadata={"help": "LoRA's rank; sets the budget unless trainable_ratio is given"})
    trainable_ratio: float | None = field(default=None, metadata={"help": "budget as a share of the base model"})
    block_size: int = 64
    batch_size: int = 2
    tokens: int = 256
    dtype: str = "float32"
    checkpointing: str = field(default="none", metadata={"help": "none, non-reentrant or reentrant"})
    steps: int = field(default=4, metadata={"help": "timed steps per method and round"})
    rounds: int = 5
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


PEFT_SETTING = {"shape": "llama-3.2-3b", "rank": 32, "block_size": 256, "batch_size": 4, "tokens": 768}
SETTINGS = {
    "cpu-small": {},
    "peft": {**PEFT_SETTING, "dtype": "bfloat16", "steps": 5, "rounds": 3},
    "7b": {"shape": "llama-7b", "block_size": 256, "tokens": 1024, "dtype": "bfloat16", "trainable_ratio": 0.0086,
           "target_modules": ["q_proj", "k_proj", "v_proj"], "steps": 3, "rounds": 3,
           "methods": ["floor", "smt", "smt-additive", "smt-warmup", "lora", "dora"]},
}  # fmt: skip
SETTINGS["7b-checkpointing"] = {**SETTINGS["7b"], "checkpointing": "non-reentrant", "batch_size": 4}
SETTINGS["7b-paper"] = {**SETTINGS["7b"], "methods": ["smt", "full"], "checkpointing": "non-reentrant", "rounds": 2}


def main() -> None:
    parser = HfArgumentParser(Options)
    setting = parser.parse_args_into_dataclasses()[0].setting
    if setting not in SETTINGS:
        raise SystemExit(f"--setting {setting} is not one of {', '.join(SETTINGS)}.")
    parser.set_defaults(**SETTINGS[setting])
    (options,) = parser.parse_args_into_dataclasses()
    result = run(options)
    print(table(result))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=1))


def run(options: Options) -> dict:
    base = random_llama(options)
    budget = trainable_budget(base, options)
    batch = torch.randint(0, base.config.vocab_size, (options.batch_size, options.tokens), device=options.device)
    figures: dict[str, dict] = {method: {"step_s": []} for method in options.methods}
    bar = tqdm(total=options.rounds * len(options.methods), desc="rounds x methods")
    for turn in range(options.rounds):
        for method in options.methods:
            with adapted(base, method, budget, options) as model:
                if turn == 0:
                    figures[method] |= count(model, method, batch, options)
                seconds, peak = steps(model, method, batch, options)
                figures[method]["step_s"] += seconds
                figures[method]["peak_bytes"] = peak
            bar.update()
    bar.close()
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "options": asdict(options),
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "methods": figures,
    }


def random_llama(options: Options) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=max(options.tokens, 2048),
        tie_word_embeddings=vocabulary > 100_000, use_cache=False,
    )  # fmt: skip
    dtype = getattr(torch, options.dtype)
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def trainable_budget(base: nn.Module, options: Options) -> int:
    """Trainable parameters that every adapter gets, as near as its granularity allows."""
    if options.trainable_ratio is not None:
        return round(options.trainable_ratio * sum(p.numel() for p in base.parameters()))
    return sum(options.rank * sum(weight.shape) for weight in target_weights(base, options))


def target_weights(base: nn.Module, options: Options) -> list[torch.Tensor]:
    return [m.weight for name, m in base.named_modules() if name.rpartition(".")[2] in options.target_modules]


@contextlib.contextmanager
def adapted(base: LlamaForCausalLM, method: str, budget: int, options: Options):
    """The base model with one method's adapter, trainable; afterwards the base model as it was."""
    base.requires_grad_(method == "full")
    sides = sum(sum(weight.shape) for weight in target_weights(base, options))
    outs = sum(len(weight) for weight in target_weights(base, options))
    common = {"target_modules": options.target_modules}
    lora = LoraConfig(r=max(1, round(budget / sides)), **common)
    smt = SMTConfig(
        block_size=options.block_size, num_blocks=max(1, round(budget / options.block_size**2)), selection="random",
        warmup_steps=options.steps + 1, **common,
    )  # fmt: skip
    configs = {
        "smt": smt,
        "smt-additive": smt,
        "smt-warmup": replace(smt, selection="gradient"),
        "lora": lora,
        "rslora": replace(lora, use_rslora=True),
        "dora": replace(lora, use_dora=True),
        "miss": MissConfig(r=max(1, round(budget / outs)), **common),
        "shira": ShiraConfig(r=max(1, round(budget / sides)), **common),
    }
    hooks = []
    model = get_peft_model(base, configs[method]) if method in configs else base
    if method == "smt-additive":
        for layer in model.base_model.model.smt_bank.layers:
            layer._shared_weight = True  # what a weight that two modules share is treated as
    if method == "floor":
        lowest = next(m for name, m in base.named_modules() if name.rpartition(".")[2] in options.target_modules)
        hooks.append(lowest.register_forward_pre_hook(require_input_gradient))
    if options.checkpointing != "none":
        kwargs = {"use_reentrant": options.checkpointing == "reentrant"}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        base.enable_input_require_grads()
    model.train()
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        if isinstance(model, PeftModel):
            model.unload()
        for parameter in base.parameters():
            parameter.grad = None
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def require_input_gradient(module: nn.Module, args: tuple):
    return args if args[0].requires_grad else (args[0].detach().requires_grad_(),)


def steps(model, method: str, batch: torch.Tensor, options: Options) -> tuple[list[float], int | None]:
    """Seconds of each timed step after one untimed, and the peak of allocated GPU memory over all of them."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    if method == "smt-warmup":
        data = [{"input_ids": batch, "labels": batch}] * (options.steps + 1)
        marks = []
        select_blocks(model, data, loss_function=lambda m, b: marks.append(clock(options)) or m(**b).loss,
                      progress_bar=False)  # fmt: skip
        seconds = [after - before for before, after in zip(marks[1:], marks[2:] + [clock(options)], strict=True)]
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=True) if trained else None
        for step in range(options.steps + 1):
            start = clock(options)
            model(input_ids=batch, labels=batch).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if step:
                seconds.append(clock(options) - start)
    return seconds, torch.cuda.max_memory_allocated() if options.device == "cuda" else None


def clock(options: Options) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class CountOps(TorchDispatchMode):
    """Counts dispatched operators: on a GPU, roughly the kernels launched."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count(model, method: str, batch: torch.Tensor, options: Options) -> dict:
    """What does not depend on the machine: parameters, bytes, FLOPs, operators; and the adapter's life on disk."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures = {"trainable_parameters": trained, "optimizer_bytes": 8 * trained}
    if method == "smt-warmup":
        return {**figures, "trainable_parameters": 0, "optimizer_bytes": 0}
    model(input_ids=batch, labels=batch).loss.backward()  # once, so that lazy set-up is not counted
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = (tensor.coalesce().values() if tensor.is_sparse else tensor).untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=batch, labels=batch).loss
    figures["saved_bytes"] = sum(saved.values())
    loss.backward()
    with FlopCounterMode(display=False) as flops:
        model(input_ids=batch, labels=batch).loss.backward()
    with CountOps() as ops:
        model(input_ids=batch, labels=batch).loss.backward()
    figures |= {"flops": flops.get_total_flops(), "operators": ops.count}
    model.zero_grad()
    return {**figures, **on_disk(model)} if isinstance(model, PeftModel) else figures


def on_disk(model: PeftModel) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model.save_pretrained(folder)
        save = time.perf_counter() - start
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        start = time.perf_counter()
        model.load_adapter(folder, adapter_name="default")
        load = time.perf_counter() - start
    start = time.perf_counter()
    model.merge_adapter()
    merge = time.perf_counter() - start
    model.unmerge_adapter()
    return {"adapter_bytes": size, "save_s": save, "load_s": load, "merge_s": merge}


def table(result: dict) -> str:
    """The figures as Markdown; time and memory also as a ratio to LoRA's."""
    lines = [
        "| method | trainable | step, ms (p20 - p80) | x floor | x LoRA | tokens/s | peak, GiB | saved, MiB | GFLOP "
        "| operators | adapter, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    medians = {name: statistics.median(figures["step_s"]) for name, figures in result["methods"].items()}
    tokens = result["options"]["batch_size"] * result["options"]["tokens"]

    def ratio(name: str, to: str) -> str:
        return f"{medians[name] / medians[to]:.3f}" if to in medians else "-"

    def scaled(value: float | None, unit: float, digits: int = 2) -> str:
        return "-" if value is None else f"{value / unit:.{digits}f}"

    for name, f in result["methods"].items():
        low, *_, high = statistics.quantiles(f["step_s"], n=5)
        lines.append(
            f"| {name} | {f['trainable_parameters']:,} | {1e3 * medians[name]:.1f} ({1e3 * low:.1f} - {1e3 * high:.1f}) "
            f"| {ratio(name, 'floor')} | {ratio(name, 'lora')} | {tokens / medians[name]:,.0f} "
            f"| {scaled(f.get('peak_bytes'), 2**30)} | {scaled(f.get('saved_bytes'), 2**20)} "
            f"| {scaled(f.get('flops'), 1e9)} | {f.get('operators', '-')} | {scaled(f.get('adapter_bytes'), 2**20)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
