"""Cost of a training step: SMT beside the floor, LoRA and other PEFT methods at equal trainable parameters.

    python scripts/benchmarks/bench_training.py --setting cpu-small --results docs/results
    python scripts/benchmarks/bench_training.py --setting host          what each adapted layer costs the host
    bash scripts/benchmarks/bench_gpu.sh                                all settings for one GPU

Weights are random in real shapes: cost does not depend on values. The floor is the same model, frozen, with gradients
flowing down to the outputs of the lowest adapted layers: no method that trains inside the layers can be cheaper.
All methods stand on the same base weights within one process and take turns (rounds), so that a slow moment of the
machine hits all of them; compare ratios. In every forward transformers waits for the device once, to see if sequences
are packed, for all methods alike; not in compiled steps, and those captured in a CUDA graph. Each setting writes
`training_SETTING.json` as it goes, keeps what this machine and commit have written there before, and stops at a limit
in seconds; exit status 3 says that something is missing or has failed.
`scripts/benchmarks/report_benchmarks.py` turns these files into tables and pictures.
"""

from __future__ import annotations

import contextlib
import cProfile
import gc
import math
import pstats
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

import results
import torch
from peft import LoraConfig, MissConfig, ShiraConfig, get_peft_model
from report_benchmarks import host_table, training_table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from smt_peft import SMTConfig, select_blocks

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size")  # fmt: skip
SHAPES = {  # in the order of SIZES
    "tiny": (64, 128, 2, 4, 2, 64),
    "tiny-deep": (64, 128, 28, 4, 2, 64),
    "cpu-small": (512, 1408, 6, 8, 4, 4096),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
}
METHODS = ["floor", "smt", "lora", "dora", "miss", "shira", "full", "smt-warmup"]
VARIANTS = ["lora-bf16", "smt-sorted"]  # not in every setting
QV, QKV = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]
UNMASKED = "unmasked_sdpa"  # transformers makes no mask for an attention that it does not know, and waits for nothing
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
NO_TIME, NO_MEMORY, NOT_COMPARABLE = "no time was left", "out of memory", "not comparable"
CAPTURE_S = 3  # for each method
ENOUGH_ROUNDS = 3  # fewer, where more are asked for, are no figure yet
LINEAR = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Command:
    setting: list[str] = field(default_factory=lambda: ["cpu-small"])
    results: str | None = HfArg(default=None, help="folder to write to; default: print only")
    seconds: float = HfArg(default=math.inf, help="limit of each setting")
    rehearse: bool = HfArg(default=False, help="run the settings at toy size on CPU")


@dataclass
class Options:
    """What is measured. A setting gives a starting point; every option named on the command line overrides it."""

    shape: str = "cpu-small"
    layers: int | None = HfArg(default=None, help="only so many decoder layers")
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    target_modules: list[str] = field(default_factory=lambda: list(QV))
    rank: int = HfArg(default=8, help="LoRA's rank; its parameters are the budget of every method")
    trainable_ratio: float | None = HfArg(default=None, help="sets the rank: share of the base model")
    block_size: int = 64
    batch_size: int = 2
    tokens: int = 256
    dtype: str = "float32"
    checkpointing: Literal["none", "non-reentrant"] = "none"
    compile: bool = HfArg(default=False, help="torch.compile each decoder layer")
    steps: int = HfArg(default=4, help="timed steps per method and round")
    rounds: int = 8
    sweep: str | None = HfArg(default=None, help="option to vary: one run for each of `values`")
    values: list[str] = field(default_factory=list)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


PEFT = {"shape": "llama-3.2-3b", "rank": 32, "block_size": 256, "batch_size": 4, "tokens": 768, "dtype": "bfloat16"}
PAPER = {"shape": "llama-7b", "trainable_ratio": 0.0086, "target_modules": QKV, "block_size": 256, "batch_size": 2,
         "tokens": 1024, "dtype": "bfloat16"}  # fmt: skip
THREE = {"methods": ["floor", "smt", "lora"]}
SWEEP = {**PAPER, **THREE, "layers": 8, "steps": 2, "rounds": 2}
BUDGETS = {"sweep": "trainable_ratio", "values": ["0.001", "0.0025", "0.0086", "0.025", "0.05"], "target_modules": QKV}
SETTINGS = {
    "cpu-small": {},
    "cpu-budgets": {**THREE, **BUDGETS, "block_size": 32, "steps": 3, "rounds": 4},
    "cpu-smollm2": {**THREE, **BUDGETS, "shape": "smollm2-135m", "values": ["0.009", "0.03", "0.05", "0.1"],
                    "target_modules": LINEAR, "batch_size": 8, "tokens": 48, "steps": 1, "rounds": 5},
    "host": {**THREE, "shape": "tiny-deep", "rank": 4, "block_size": 16, "batch_size": 1, "tokens": 16, "steps": 1,
             "rounds": 60, "sweep": "target_modules", "values": ["q,v", "all linear"], "device": "cpu"},
    "host-gpu": {**THREE, "shape": "tiny-deep", "rank": 4, "block_size": 16, "batch_size": 1, "tokens": 16, "steps": 1,
                 "rounds": 40, "dtype": "bfloat16", "sweep": "target_modules", "values": ["q,v", "all linear"]},
    "peft": {**PEFT, "methods": ["floor", "smt", "lora", *VARIANTS, "dora", "miss", "full", "smt-warmup", "shira"]},
    "linear": {**PEFT, "target_modules": LINEAR, "methods": ["floor", "smt", "lora", *VARIANTS], "rounds": 6},
    "7b-paper": {**PAPER, "checkpointing": "non-reentrant", "methods": [*THREE["methods"], "full"], "rounds": 5},
    "compile": {**PAPER, **THREE, "layers": 4, "compile": True, "rounds": 6},
    "context": {**SWEEP, "sweep": "tokens", "values": ["512", "1024", "2048", "8192"], "batch_size": 1},
    "budgets": {**SWEEP, **BUDGETS, "values": ["0.001", "0.0086", "0.05"], "block_size": 128},
    "blocks": {**SWEEP, "sweep": "block_size", "values": ["32", "64", "256"]},
    "checkpointing": {**PEFT, **THREE, "sweep": "checkpointing", "steps": 2,
                      "rounds": 2, "values": ["none", "non-reentrant"]},
    "sizes": {**SWEEP, "layers": None, "sweep": "shape", "batch_size": 1,
              "values": ["llama-3.2-1b", "llama-7b", "llama-13b"]},
}  # fmt: skip
TOY = {"shape": "tiny", "layers": None, "trainable_ratio": None, "rank": 16, "block_size": 16, "batch_size": 1,
       "tokens": 32, "steps": 2, "rounds": 2, "device": "cpu"}  # fmt: skip
TOY_VALUES = {"trainable_ratio": ["0.05"], "block_size": ["8", "16"], "tokens": ["16", "32"], "shape": ["tiny"]}
KINDS = {"trainable_ratio": float, "layers": int,  # of options whose default does not say it
         "target_modules": {"q,v": QV, "all linear": LINEAR}.__getitem__}  # fmt: skip


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = HfArgumentParser((Command, Options))
    command = parser.parse_args_into_dataclasses()[0]
    unknown = [name for name in command.setting if name not in SETTINGS]
    if unknown:
        raise SystemExit(f"--setting {unknown[0]} is not one of {', '.join(SETTINGS)}.")
    found = []
    for name in command.setting:
        parser = HfArgumentParser((Command, Options))
        defaults = SETTINGS[name]
        if command.rehearse:
            values = TOY_VALUES.get(defaults.get("sweep"), defaults.get("values", []))
            defaults = {**defaults, **TOY, "values": values}
        parser.set_defaults(**defaults)
        options = parser.parse_args_into_dataclasses()[1]
        if unknown := set(options.methods) - {*METHODS, *VARIANTS}:
            raise SystemExit(f"--methods {unknown.pop()} is not one of {', '.join([*METHODS, *VARIANTS])}.")
        if options.values and not options.sweep:
            raise SystemExit(f"--values {' '.join(options.values)} are values of --sweep: which option?")
        path = Path(command.results, f"training_{name}.json") if command.results else None
        result = opened(path, name, options)
        found.append(result)
        if result["complete"]:
            continue
        try:
            measure(result, options, path, time.monotonic() + command.seconds)
        except KeyboardInterrupt:
            print("Stopped.")
            break
    for result in found:
        if result["runs"]:
            print(f"\n{result['setting']}: {result['machine']}\n\n{training_table(result)}", flush=True)
            if result["sweep"] == "target_modules":
                print(f"\n{host_table(result)}")
    return 0 if len(found) == len(command.setting) and all(result["complete"] for result in found) else 3


def points_of(options: Options) -> list[Options]:
    """One for each value of what is swept."""
    if not options.sweep:
        return [options]
    kind = KINDS.get(options.sweep) or type(getattr(options, options.sweep))
    return [replace(options, **{options.sweep: kind(value)}) for value in options.values]


def opened(path: Path | None, setting: str, options: Options) -> dict:
    """What is to be filled, with the finished runs of its file."""
    result = results.kept(path, options.device, setting=setting, sweep=options.sweep, complete=False, runs=[])
    wanted = [asdict(point) for point in points_of(options)]
    result["runs"] = [run for run in result["runs"] if run["complete"] and run["options"] in wanted]
    result["complete"] = len(result["runs"]) == len(wanted)
    return result


def measure(result: dict, options: Options, path: Path | None, deadline: float) -> None:
    """Fill a setting's result, run by run, until the deadline; written whenever there is something new."""
    done, longest = [run["options"] for run in result["runs"]], 0.0
    for point in points_of(options):
        begin = time.monotonic()
        if asdict(point) in done:
            continue
        if begin + longest > deadline:
            print(f"{result['setting']}: no time is left for the rest.", flush=True)
            return
        run = {"options": asdict(point), "complete": False, "methods": {}}
        result["runs"].append(run)
        try:
            measure_run(run, point, deadline, partial(results.write, result, path))
        except torch.OutOfMemoryError:  # of the base model alone
            run |= {"complete": True, "methods": {method: {"note": NO_MEMORY} for method in point.methods}}
        finally:
            results.write(result, path)
        longest = max(longest, time.monotonic() - begin)
        if options.sweep:
            print(training_table({**result, "runs": [run]}), flush=True)
    result["complete"] = all(run["complete"] for run in result["runs"])
    results.write(result, path)


def measure_run(run: dict, options: Options, deadline: float, write: Callable[[], None]) -> None:
    """All methods for one combination of options: what can be counted, one by one, then times, in turns."""
    begin = time.monotonic()
    base = random_llama(options.shape, options.layers, options.dtype, options.device)
    batch = torch.randint(0, base.config.vocab_size, (options.batch_size, options.tokens), device=options.device)
    run["base_parameters"], run["adapted_layers"] = base.num_parameters(), len(targets(base, options))
    figures, trials = run["methods"], []
    for method in options.methods:
        left = deadline - time.monotonic()
        if trials and left < 0.4 * (deadline - begin):
            figures[method] = {"note": NO_TIME}
            continue
        figures[method] = {"step_s": [], "synced_s": [], "host_s": []}
        count = partial(counted, base, method, options, batch, figures[method])
        guarded(figures[method], lambda count=count: trials.append(count()), max(20, 0.6 * left))
        write()
    # Checkpointing asks for the state of random numbers, which a CUDA graph cannot; sweeps have no time for one.
    captures = options.checkpointing == "none" and options.sweep is None and any(trial.on_gpu for trial in trials)
    gc.freeze()  # a process with one method has a tenth of these objects to go through
    for turn in range(options.rounds):
        left = deadline - time.monotonic()
        for trial in trials[:: -1 if turn % 2 else 1]:
            if "note" not in figures[trial.method]:
                guarded(figures[trial.method], partial(trial.take_turn, figures[trial.method]), max(20, 0.6 * left))
        write()
        is_enough = turn + 1 >= min(ENOUGH_ROUNDS, options.rounds)
        if time.monotonic() > deadline - (CAPTURE_S * len(trials) if captures and is_enough else 0):
            break
    if options.sweep == "target_modules":
        run["host_profile"] = {trial.method: profile_host(trial) for trial in trials}
    run["complete"] = is_enough and all(map(is_final, figures.values()))
    if captures:  # last, and none after one that failed, in which PyTorch may still be capturing
        capture([trial for trial in trials if "note" not in figures[trial.method]], figures)
    trials.clear()
    gc.unfreeze()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    write()


def capture(trials: list[Trial], figures: dict[str, dict]) -> None:
    failed: dict = {}
    for trial in sorted(trials, key=lambda trial: trial.method.startswith("smt")):  # which no GPU has captured yet
        if trial.method not in ("smt-warmup", "shira") and not failed:  # SHiRA's sparse tensors wait for the device
            with contextlib.suppress(Exception):  # it costs these figures alone
                guarded(failed, lambda trial=trial: figures[trial.method].update(captured_s=trial.captured()), 60)


def is_final(figure: dict) -> bool:
    """Whether another run could not say more: only what is too large, or cannot be compared, fails for good."""
    return figure.get("note", NO_MEMORY).startswith((NO_MEMORY, NOT_COMPARABLE))


def guarded(figure: dict, action: Callable[[], object], seconds: float) -> None:
    """One method that fails, or takes more than so many seconds, costs the run nothing but its own row."""

    def stop(*_) -> None:
        raise TimeoutError("it took too long")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0 if seconds == math.inf else seconds)
    try:
        action()
    except torch.OutOfMemoryError:
        figure["note"] = NO_MEMORY
    except Exception as error:
        figure["note"] = str(error).strip().partition("\n")[0] or type(error).__name__
        if "CUDA error" in str(error):  # nothing works afterwards in this process
            raise
        traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def counted(base: LlamaForCausalLM, method: str, options: Options, batch: torch.Tensor, figure: dict) -> Trial:
    start = time.perf_counter()
    trial = Trial(base, method, options, batch)
    figure |= trial.count()
    device = f", device {1e3 * figure['device_s']:.2f} ms" if "device_s" in figure else ""
    first = f"first step {figure.get('first_step_s', 0):.2f} s{device}"
    seconds = time.perf_counter() - start
    print(f"{method}: {figure['trainable_parameters']:,} trained, {first} ({seconds:.1f} s in all)", flush=True)
    return trial


# --- one method on the base ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def random_llama(shape: str, layers: int | None, dtype: str, device: str) -> LlamaForCausalLM:
    """A frozen LLaMA with random weights, made on the device."""
    sizes = dict(zip(SIZES, SHAPES[shape], strict=True))
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    tied = shape.startswith(("smollm2", "llama-3.2"))  # as these have their embeddings
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        config = LlamaConfig(**sizes, tie_word_embeddings=tied, max_position_embeddings=8192, use_cache=False)
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def targets(base: nn.Module, options: Options) -> list[nn.Module]:
    return [module for name, module in base.named_modules() if name.rpartition(".")[2] in options.target_modules]


def rank_of(base: LlamaForCausalLM, options: Options) -> tuple[int, int]:
    """LoRA's rank, and its parameters: the budget that the other methods get, as near as they can."""
    sides = sum(sum(module.weight.shape) for module in targets(base, options))
    if options.trainable_ratio is None:
        return options.rank, options.rank * sides
    rank = max(1, round(options.trainable_ratio * base.num_parameters() / sides))
    return rank, rank * sides


def attach(base: LlamaForCausalLM, method: str, options: Options) -> tuple[nn.Module, LlamaForCausalLM]:
    """A model of its own on the base's weights with one method's adapter, and the LLaMA in it."""
    train = method == "full"
    llama = deepcopy(base, {id(p): nn.Parameter(p.data, requires_grad=train) for p in base.parameters()})
    if options.checkpointing != "none":
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    if options.checkpointing != "none" or options.compile:  # no hook inside a compiled layer; as PEFT does, for all
        llama.enable_input_require_grads()
    rank, budget = rank_of(base, options)
    common = {"target_modules": options.target_modules}
    lora = LoraConfig(r=rank, **common)
    smt = SMTConfig(block_size=options.block_size, num_blocks=max(1, round(budget / options.block_size**2)),
                    selection="random", scope="module", warmup_steps=options.steps + 2, **common)  # fmt: skip
    shira = ShiraConfig(r=rank, **common)
    shira.mask_fn = random_mask
    configs = {
        "smt": smt,
        "smt-sorted": replace(smt, arrangement="sorted"),
        "smt-warmup": replace(smt, selection="gradient"),
        "lora": lora,
        "lora-bf16": lora,
        "dora": replace(lora, use_dora=True),
        "miss": MissConfig(r=max(1, round(budget / sum(len(m.weight) for m in targets(base, options)))), **common),
        "shira": shira,
    }
    model = llama
    if method in configs:  # PEFT's default holds the adapters of 16-bit models in float32
        model = get_peft_model(llama, configs[method], autocast_adapter_dtype=method != "lora-bf16")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if abs(trained / budget - 1) > 0.06:  # DoRA's magnitudes are some 5 %
            raise ValueError(f"{NOT_COMPARABLE}: {trained:,} parameters, the budget is {budget:,}")
    elif not train and not options.compile:
        for module in targets(llama.model.layers[0], options):
            module.register_forward_hook(require_gradient)
    return model, llama


def require_gradient(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_()


def random_mask(base_layer: nn.Linear, r: int, **_) -> torch.Tensor:
    """As SHiRA's own, which draws on the CPU, seconds for each layer of a large model."""
    weight = base_layer.weight
    mask = torch.zeros(weight.numel(), device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = 1
    return mask.view(weight.shape)


class Trial:
    """One method, ready to take steps. All stand on the same weights, which no method but `full` changes."""

    def __init__(self, base: LlamaForCausalLM, method: str, options: Options, batch: torch.Tensor):
        self.method, self.options, self.batch = method, options, batch
        self.on_gpu = options.device == "cuda"
        # What the other trials hold is no part of this one's peak.
        weights = sum(p.nbytes for p in base.parameters())
        self.others = torch.cuda.memory_allocated() - weights if self.on_gpu else 0
        self.model, self.llama = attach(base, method, options)
        self.model.train()
        self.attention = UNMASKED if options.compile else "sdpa"  # with another, compiled layers are compiled anew
        self.llama.set_attn_implementation(self.attention)
        if options.compile:
            torch._dynamo.config.recompile_limit = 64  # shared by all methods: they run the same decoder layer
            for layer in self.llama.model.layers:
                layer.compile()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # As the Trainer's, but for what a CUDA graph needs.
        self.optimizer = (
            torch.optim.AdamW(self.trained, lr=1e-5, fused=True, capturable=self.on_gpu) if self.trained else None
        )

    def backward(self, batch: torch.Tensor | None = None) -> None:
        batch = self.batch if batch is None else batch
        self.model(input_ids=batch, labels=batch).loss.backward()

    def step(self, batch: torch.Tensor | None = None) -> None:
        self.backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()  # takes the gradients away, so that each step makes them anew

    def clock(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def count(self) -> dict:
        """What needs no rounds: parameters, bytes, FLOPs, kernels and the time that they take together."""
        figure = {"trainable_parameters": sum(p.numel() for p in self.trained)}
        if self.method == "smt-warmup":
            return {"trainable_parameters": 0}
        graphs, breaks = compiler_counts() if self.options.compile else (0, 0)
        start = self.clock()
        self.step()
        figure["first_step_s"] = self.clock() - start  # compiles and tunes kernels: no part of the other times
        self.step()
        state = [t for s in self.optimizer.state.values() for t in s.values()] if self.optimizer else []
        figure["optimizer_bytes"] = sum(t.nbytes for t in state if t.dim())
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.step()
            figure["peak_bytes"] = torch.cuda.max_memory_allocated() - self.others
            figure |= self.profile()
        elif not self.options.compile:
            with CountLaunches() as counter:
                self.step()
            figure["launches"] = counter.count
        if self.options.compile:
            now = compiler_counts()
            return {**figure, "graphs": now[0] - graphs, "graph_breaks": now[1] - breaks}
        return {**figure, "saved_bytes": self.saved_bytes(), "flops": self.flops()}

    def profile(self) -> dict:
        """Kernels of one step: how many, how long together, and which."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.step()
            self.clock()
        kernels: dict[str, list] = defaultdict(lambda: [0, 0.0])
        for event in profiler.events():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device and not getattr(event, "is_user_annotation", False):
                kernels[event.name][0] += 1
                kernels[event.name][1] += event.time_range.elapsed_us() / 1e6
        longest = sorted(kernels.items(), key=lambda item: -item[1][1])
        return {
            "launches": sum(count for count, _ in kernels.values()),
            "device_s": sum(seconds for _, seconds in kernels.values()),
            "kernels": {name[:160]: values for name, values in longest[:40]},
        }

    def captured(self) -> list[float]:
        """Seconds of a step that is captured in a CUDA graph and replayed, in which the host takes no part."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.llama.set_attn_implementation(UNMASKED)
        self.clock()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        self.clock()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        graph.replay()
        seconds = [self.timed(lambda: [graph.replay() for _ in range(3)]) / 3 for _ in range(4)]
        graph.reset()
        torch.cuda.empty_cache()
        return seconds

    def saved_bytes(self) -> int:
        """Bytes of the distinct storages, other than weights, that a forward saves for its backward."""
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = (tensor.coalesce().values() if tensor.is_sparse else tensor).untyped_storage()
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor.detach()  # the tensor itself could be a node's own output, and never be freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.model(input_ids=self.batch, labels=self.batch)
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)

    def flops(self) -> int | None:
        """As PyTorch counts them, attention spelt out, since its formula refuses grouped queries in some versions.

        None where that fails or would take much memory.
        """
        if self.options.tokens > 2048:
            return None
        try:
            self.llama.set_attn_implementation("eager")
            with FlopCounterMode(display=False) as counter:
                self.backward()
            return counter.get_total_flops()
        except TimeoutError:
            raise
        except Exception as error:
            print(f"{self.method}: FLOPs not counted: {error!r}")
            return None
        finally:
            self.llama.set_attn_implementation(self.attention)
            self.model.zero_grad()

    def take_turn(self, figure: dict) -> None:
        """Some steps: back to back, each waited for, and (few tokens, not waited for) the time of the host alone."""
        steps = self.options.steps
        if self.method == "smt-warmup":
            figure["synced_s" if self.on_gpu else "step_s"].append(self.warm_up())
            return
        if not self.on_gpu:
            figure["step_s"].append(median(self.timed(self.step) for _ in range(steps)))
            return
        figure["step_s"].append(self.timed(lambda: [self.step() for _ in range(steps)]) / steps)
        figure["synced_s"].append(median(self.timed(self.step) for _ in range(2)))
        if not self.options.compile:  # another shape would compile anew
            figure["host_s"].append(self.host_seconds())

    def timed(self, action: Callable[[], object]) -> float:
        start = self.clock()
        action()
        return self.clock() - start

    def host_seconds(self) -> float:
        """Time until Python has enqueued a step that the device has nearly no work with, so that nothing blocks."""
        small, seconds = self.batch[:1, :16].contiguous(), []
        for _ in range(3):
            start = self.clock()
            self.step(small)
            seconds.append(time.perf_counter() - start)
        return median(seconds[1:])

    def warm_up(self) -> float:
        """A step of the warm-up, which has no optimizer."""
        marks = []

        def loss_of(model, batch):
            marks.append(self.clock())
            return model(**batch).loss

        batches = [{"input_ids": self.batch, "labels": self.batch}] * (self.options.steps + 2)
        select_blocks(self.model, batches, progress_bar=False, loss_function=loss_of)
        return median(after - before for before, after in pairwise(marks[1:]))


def compiler_counts() -> tuple[int, int]:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


class CountLaunches(TorchDispatchMode):
    """Counts operators that do more than make a view: what would be a kernel launch."""

    count = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # it keeps nothing, so that what is changed in place may be

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


# --- the host ------------------------------------------------------------------------------------------------------


SAVING = "Function.apply and what it saves"


def profile_host(trial: Trial, steps: int = 20) -> dict[str, float]:
    """Seconds of a step by place in the code, as a profiler that slows Python calls sees them; the least of the steps.

    The least, here and for whole steps, because what disturbs a host only ever adds to its time.
    """
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0] * steps)
    for step in range(steps):
        trial.clock()  # nothing of the step before is waited for in this one
        with cProfile.Profile() as profile:
            trial.step()
        for (file, _, name), (_, _, own, *_) in pstats.Stats(profile).stats.items():
            seconds[place(file, name)][step] += own
    return {name: min(values) for name, values in seconds.items()}


def place(file: str, function: str) -> str:
    if file == "~":  # written in C
        names = {"run_backward": "autograd's engine and C++ nodes", "apply": SAVING, "save_for": SAVING}
        return next((place for part, place in names.items() if part in function), "operators, views, other C calls")
    for package in ("smt_peft", "peft"):
        if f"/{package}/" in file:
            return package + file.rpartition(f"/{package}")[2]
    places = {
        "nn/modules/module.py": "torch.nn.Module's calls",
        "autograd/function.py": SAVING,
        "transformers/": "transformers",
    }
    inside = file.rpartition("site-packages/")[2]
    return next((place for part, place in places.items() if part in file), inside.rpartition("/benchmarks/")[2])


if __name__ == "__main__":
    sys.exit(main())
