"""Online RL in two processes: one trains an SMT adapter, one generates with the plain model and takes patches.

    python scripts/live_sync.py              the tiny LLaMA of this repository learns to answer in 40 characters
    python scripts/live_sync.py --shapes_7b  what a patch of 890 blocks of 256 costs on a 7B model's q, k and v

GRPO in its simplest form: several completions of each prompt, the advantage of each among them, and one update a
round, so that the ratio of the policies is 1 and nothing is clipped. Afterwards all merged weights are sent as often,
from the same trainer and from one with LoRA; its values are random, on which the cost does not depend. What is sent
goes through files in a temporary folder. A minute on a CPU; docs/sync.md explains it.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from command_line import read_options
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

from smt_peft import SMTConfig, select_blocks
from smt_peft.patches import apply_patch, sparse_patch

MODEL = Path(__file__).parent / "tiny_llama"
PROMPTS = ["Return the", "The following", "If the", "This module"]
LENGTH = 40  # of the best answer, in characters


@dataclass
class Options:
    steps: int = 20
    group: int = HfArg(default=8, help="completions of each prompt")
    new_tokens: int = HfArg(default=24, help="of a completion, at most")
    learning_rate: float = 5e-3
    trainable_ratio: float = 0.0086
    seed: int = 0
    shapes_7b: bool = HfArg(default=False, help="measure a 7B model's shapes; needs 5 GB")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.group < 2:
            raise SystemExit(
                f"steps is {self.steps} and group {self.group}; take a step at least, and two completions to compare"
            )


# --- the generating process ------------------------------------------------------------------------------------------


class Generator:
    """A plain model in a process of its own. Its methods are what the trainer may ask for."""

    def __init__(self, options: Options):
        torch.set_num_threads(1)
        torch.manual_seed(options.seed)
        disable_progress_bar()
        self.options, self.original = options, None
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL).eval()

    def sample(self) -> list[dict]:
        """Of each prompt: its length, its completions' tokens with the prompt's, and their texts."""
        groups = []
        for prompt in PROMPTS:
            tokens = self.tokenizer(prompt, return_tensors="pt")
            sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": self.options.group}
            found = self.model.generate(**tokens, **sampling, max_new_tokens=self.options.new_tokens)
            length = tokens["input_ids"].shape[1]
            texts = self.tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)
            groups.append({"length": length, "tokens": found.tolist(), "texts": texts})
        return groups

    def take_patch(self, path: str) -> tuple[float, float]:
        """Seconds to read a patch, and to write it into the model."""
        start = time.perf_counter()
        patch = load_file(path)
        read = time.perf_counter()
        original = apply_patch(self.model, patch, keep_original=self.original is None)
        self.original = self.original or original  # all patches have the same blocks: the first undoes all
        return read - start, time.perf_counter() - read

    def take_weights(self, path: str) -> tuple[float, float]:
        """The same for all weights."""
        start = time.perf_counter()
        weights = load_file(path)
        read = time.perf_counter()
        self.model.load_state_dict(weights, strict=False)  # a tied weight comes once
        return read - start, time.perf_counter() - read

    def undo(self) -> None:
        apply_patch(self.model, self.original, keep_original=False)

    def write_logits(self, path: str) -> None:
        save_file({"logits": logits(self.model)}, path)


def serve(connection: Connection, options: Options) -> None:
    """Do what the trainer asks for, until it asks for nothing."""
    generator = Generator(options)
    while (request := connection.recv()) is not None:
        name, *arguments = request
        connection.send(getattr(generator, name)(*arguments))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(3, 1536, (2, 64), generator=torch.Generator().manual_seed(0))
    return model(tokens).logits


# --- the training process --------------------------------------------------------------------------------------------


class Syncs:
    """Sends a model's weights to the generating process, and notes what each way costs."""

    def __init__(self, connection: Connection, folder: str):
        self.connection, self.folder = connection, Path(folder)
        self.costs: dict[str, list[tuple]] = {}

    def ask(self, name: str, *arguments: str):
        self.connection.send((name, *arguments))
        return self.connection.recv()

    def logits(self) -> Tensor:
        """Those of the generating process's model."""
        path = self.folder / "logits.safetensors"
        self.ask("write_logits", str(path))
        return load(path.read_bytes())["logits"]

    def send(self, way: str, request: str, make: Callable[[], dict[str, Tensor]]) -> None:
        costs = self.costs.setdefault(way, [])
        path = self.folder / f"{request}{len(costs)}.safetensors"  # a new one: the last may still be mapped
        start = time.perf_counter()
        tensors = make()
        made = time.perf_counter()
        save_file(tensors, path)
        saved = time.perf_counter() - made
        read, applied = self.ask(request, str(path))
        costs.append((path.stat().st_size, made - start, saved + read, applied, time.perf_counter() - start))
        path.unlink()

    def table(self) -> str:
        """Bytes of each way, and its median times: to make the tensors, write and read the file, apply it; in all."""
        lines = [f"{'':28}{'bytes':>12}{'make':>9}{'file':>9}{'apply':>9}{'all':>9}  milliseconds"]
        for way, costs in self.costs.items():
            size, *seconds = (median(column) for column in zip(*costs, strict=True))
            lines.append(f"{way:28}{size:12,.0f}" + "".join(f"{1000 * part:9.1f}" for part in seconds))
        return "\n".join(lines)


def merged_weights(model: PeftModel) -> dict[str, Tensor]:
    """All weights of the plain model, with the adapter merged for the moment, as TRL sends them."""
    model.merge_adapter()
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if model.base_model.prefix not in name
    }
    model.unmerge_adapter()
    return weights


def batch_of(group: dict) -> dict:
    """A prompt's completions as tensors, with the advantage of each among them."""
    rewards = torch.tensor([1 - abs(len(text) / LENGTH - 1) for text in group["texts"]])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    tokens = torch.tensor(group["tokens"])
    return {"tokens": tokens, "length": group["length"], "advantages": advantages, "reward": rewards.mean().item()}


def grpo_loss(model: nn.Module, batch: dict) -> Tensor:
    """Minus the mean over tokens of the completion's advantage times the ratio of the policies, whose value is 1."""
    tokens, start = batch["tokens"], batch["length"]
    log_probabilities = model(tokens).logits[:, start - 1 : -1].log_softmax(-1)
    chosen = log_probabilities.gather(2, tokens[:, start:, None]).squeeze(2)
    ratio = (chosen - chosen.detach()).exp()
    counted = tokens[:, start:] != model.config.pad_token_id
    return -(ratio * batch["advantages"][:, None] * counted).sum() / counted.sum()


def train(options: Options, syncs: Syncs) -> PeftModel:
    """Train, with a patch to the generating process after each step."""
    groups = syncs.ask("sample")
    batches = [batch_of(group) for group in groups]
    config = SMTConfig(trainable_ratio=options.trainable_ratio, block_size=16, warmup_steps=len(batches))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)
    print(select_blocks(model, batches, loss_function=grpo_loss, progress_bar=False).summary())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    for step in range(options.steps + 1):
        if step % 5 == 0 or step == options.steps:
            reward = sum(batch["reward"] for batch in batches) / len(batches)
            print(f"step {step:3}  mean reward {reward:5.2f}  {PROMPTS[0] + groups[0]['texts'][0]!r}", flush=True)
        if step == options.steps:
            return model
        for batch in batches:
            (grpo_loss(model, batch) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        syncs.send("SMT, a patch", "take_patch", lambda: sparse_patch(model))
        groups = syncs.ask("sample")
        batches = [batch_of(group) for group in groups]


def run(options: Options) -> bool:
    """Train, compare the ways to sync, and tell whether the generating process had the right logits."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    disable_progress_bar()
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    generating = context.Process(target=serve, args=(theirs, options), daemon=True)
    generating.start()
    theirs.close()  # so that its end is noticed here
    with tempfile.TemporaryDirectory() as folder:
        syncs = Syncs(connection, folder)
        model = train(options, syncs)
        base = AutoModelForCausalLM.from_pretrained(MODEL)
        is_merged = torch.equal(syncs.logits(), logits(deepcopy(model).merge_and_unload()))
        syncs.ask("undo")
        is_base = torch.equal(syncs.logits(), logits(base))
        for _ in range(options.steps):
            syncs.send("SMT, all weights, merged", "take_weights", lambda: merged_weights(model))
        targets = ["q_proj", "k_proj", "v_proj"]
        lora = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        for _ in range(options.steps):
            syncs.send("LoRA, all weights, merged", "take_weights", lambda: merged_weights(lora))
        connection.send(None)
        generating.join()
    print(syncs.table())
    print(
        f"The generator's logits equal the merged model's bit for bit: {is_merged}; once undone, the base's: {is_base}"
    )
    return is_merged and is_base


# --- the shapes of a 7B model ----------------------------------------------------------------------------------------


def measure_7b(layers: int = 32, side: int = 4096, num_blocks: int = 890, block_size: int = 256) -> None:
    """What each part of a sync takes: q, k and v of a 7B model in bfloat16 (3.2 GB), in one process."""
    names = ["q_proj", "k_proj", "v_proj"]
    base = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(side, side, bias=False, dtype=torch.bfloat16, device="meta") for name in names})
        for _ in range(layers)
    ).to_empty(device="cpu")
    for weight in base.parameters():
        nn.init.normal_(weight, std=0.02)
    print(f"milliseconds (and of CPU time) on {torch.get_num_threads()} threads, medians of 5")
    for arrangement in ("tiles", "sorted"):
        blocks = {"num_blocks": num_blocks, "block_size": block_size, "arrangement": arrangement}
        config = SMTConfig(target_modules=names, selection="random", init_weights=False, **blocks)
        model = get_peft_model(base, config)
        plain = {name.replace(".base_layer", ""): weight.data for name, weight in base.named_parameters()}
        costs: dict[str, list[tuple[float, float]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "patch.safetensors")
            for _ in range(5):
                patch = timed(costs, "make", sparse_patch, model)
                timed(costs, "write file", save_file, patch, path)
                size = path.stat().st_size
                patch = timed(costs, "read file", load_file, path)
                undo = timed(costs, "apply", apply_patch, plain, patch)
                timed(costs, "apply the next", apply_patch, plain, patch, False)
                timed(costs, "undo", apply_patch, plain, undo, False)
        print(f"{arrangement}: {size:,} bytes")
        for part, seconds in costs.items():
            wall, cpu = (1000 * median(column) for column in zip(*seconds, strict=True))
            print(f"  {part:16}{wall:6.0f} ({cpu:.0f})", flush=True)
        base = model.unload()


def timed(costs: dict[str, list[tuple[float, float]]], part: str, call: Callable, *arguments):
    """Call, and note the seconds and the seconds of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*arguments)
    costs.setdefault(part, []).append((time.perf_counter() - wall, time.process_time() - cpu))
    return result


if __name__ == "__main__":
    [options] = read_options(sys.argv[1:], Options)
    if options.shapes_7b:
        measure_7b()
    elif not run(options):
        raise SystemExit("The generating process did not have the right weights.")
