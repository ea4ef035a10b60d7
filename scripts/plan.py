"""Will it fit? Bytes per GPU, by kind, of training a language model, before anything is loaded or downloaded.

    python scripts/plan.py --model llama-3-70b --checkpointing non-reentrant --strategy fsdp2 --gpus 4

    70,553,706,496 parameters, 606,732,288 trained (9258 blocks of 256)

    GiB per GPU                    loss    top layer bottom layer         step      warm-up
    weights                       32.85        32.85        32.85        32.85        32.85
    gathered weights               3.91         8.70         5.51         3.91         8.70
    trained parameters             2.83         2.83         2.83         2.83         2.83
    optimizer state                1.13         1.13         1.13         1.13         0.00
    gradients                      0.00         0.00         2.83         5.09         0.00
    index, plans, cuBLAS           0.06         0.06         0.06         0.06         0.06
    kept inputs                    0.00         0.03         0.03         0.00         0.03
    activations                    2.56         3.54         0.98         0.00         3.54
    logits and loss                2.94         0.00         0.00         0.00         0.00
    total                         46.28        49.14        46.21        45.87        48.01

    49.14 GiB fits into 80, of which 2 are reserved
    each GPU sends per step, GiB: 1.70 of gradients, 1.70 of what is trained, 194.19 of weights (twice)

    strategy   fewest GPUs  peak, GiB  sent, GiB
    one               none     143.76       0.00
    ddp               none     146.02       4.52
    zero2             none     138.15       2.26
    fsdp2                4      49.14     197.58
    zero3                4      43.51     198.82

    python scripts/plan.py --model llama-3.1-405b --checkpointing non-reentrant | tail -6

    strategy   fewest GPUs  peak, GiB  sent, GiB
    one               none     821.04       0.00
    ddp               none     834.04      25.98
    zero2             none     775.58      12.99
    fsdp2               32      73.47    1482.28
    zero3               16      71.58    1429.62

So with SMT's default budget a 70B takes FSDP2 or ZeRO-3 on 4 GPUs of 80 GiB (in 4 bits, one GPU), a 405B 32 or 16.
A column is what is held at a moment: as the loss's gradient is made; as backward enters the top layer and leaves the
bottom one; in the optimizer's step; at the worst of the warm-up. The largest total decides. --json gives bytes.

Assumed: dense LLaMA-like layers of transformers, eager, flash attention; AdamW; batch_size is per GPU; `dtype` is that
of all weights, without autocast; 4 bits are NF4 without double quantisation; FSDP2 wraps decoder layers and reshards
after forward; DeepSpeed has its default buckets. tests/test_plan.py compares with autograd and with peaks of a GPU.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from command_line import read_options
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.hf_argparser import HfArg

from smt_peft import SMTConfig
from smt_peft.checks import Target
from smt_peft.targets import choose_block_size, default_modules, share_budget

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size", "tie_word_embeddings")  # fmt: skip
SHAPES = {  # in the order of SIZES
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True),
    **dict.fromkeys(["llama-7b", "llama-2-7b"], (4096, 11008, 32, 32, 32, 32000, False)),
    **dict.fromkeys(["llama-13b", "llama-2-13b"], (5120, 13824, 40, 40, 40, 32000, False)),
    **dict.fromkeys(["llama-3-8b", "llama-3.1-8b"], (4096, 14336, 32, 32, 8, 128256, False)),
    **dict.fromkeys(["llama-3-70b", "llama-3.1-70b", "llama-3.3-70b"], (8192, 28672, 80, 64, 8, 128256, False)),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, 128256, False),
}
GIB = 2**30
RESERVE = 2 * GIB  # CUDA's context is about 0.5 GiB, NCCL's buffers up to 1, the rest for the allocator's gaps
WORKSPACE = 2 * 32 * 2**20  # cuBLAS on Hopper: 32 MiB for the thread of the forward and for that of the backward
DEEPSPEED = {"live": 10**9, "bucket": 5 * 10**8}  # elements: stage3_max_live_parameters, reduce_bucket_size
GPUS = {name: [2**i for i in range(1, 11)] for name in ("ddp", "zero2", "fsdp2", "zero3")}  # the numbers to try


@dataclass
class Options:
    """What is to be trained, how, and on what."""

    model: str = HfArg(help=f"a folder with config.json, a model in the hub's cache, or a shape: {', '.join(SHAPES)}")
    method: Literal["smt", "lora", "full"] = HfArg(help="lora gets the rank that trains as much as smt", default="smt")
    num_blocks: int | None = HfArg(help="SMT's budget", default=None)
    trainable_ratio: float | None = HfArg(help="or as a share of the model's parameters", default=None)
    block_size: int | None = HfArg(help="side of a block; else the largest that fits, at most 256", default=None)
    target_modules: list[str] = HfArg(default_factory=list, help="else q, k and v of the architecture")
    batch_size: int = HfArg(help="sequences per GPU", default=1)
    tokens: int = HfArg(help="tokens per sequence", default=2048)
    checkpointing: Literal["none", "non-reentrant"] = HfArg(help="of gradients, layer by layer", default="none")
    dtype: Literal["bfloat16", "float32", "float16", "4bit", "8bit"] = HfArg(help="of weights", default="bfloat16")
    strategy: Literal["one", "ddp", "zero2", "fsdp2", "zero3"] = HfArg(help="how GPUs work together", default="one")
    gpus: int = HfArg(help="how many", default=1)
    gpu_gib: float = HfArg(help="memory of each", default=80.0)
    json: bool = HfArg(help="print JSON", default=False)

    def __post_init__(self) -> None:
        for name in ("batch_size", "tokens", "gpus", "gpu_gib"):
            if getattr(self, name) <= 0:
                raise SystemExit(f"{name} is {getattr(self, name)}; it must be above 0")
        if (self.strategy == "one") != (self.gpus == 1):
            way = "take ddp, zero2, fsdp2 or zero3" if self.strategy == "one" else "take more, or --strategy one"
            raise SystemExit(f"gpus is {self.gpus}, which --strategy {self.strategy} cannot use; {way}")
        if self.quantised and (self.method == "full" or self.strategy in ("fsdp2", "zero3")):
            what = "train" if self.method == "full" else f"shard ({self.strategy})"
            raise SystemExit(f"dtype is {self.dtype!r}, weights that this package does not {what}; take bfloat16, or "
                             "--method smt with --strategy one, ddp or zero2")  # fmt: skip

    @property
    def quantised(self) -> bool:
        return self.dtype.endswith("bit")

    @property
    def itemsize(self) -> int:
        """Bytes of an element of activations, and of a weight that is not quantised."""
        return 4 if self.dtype == "float32" else 2


class Model(NamedTuple):
    """Numbers of elements of a model, the sizes of its targets, and the budget."""

    config: PretrainedConfig
    parameters: int
    in_layers: int
    linear: int  # of those in layers, what bitsandbytes quantises
    widths: list[int]  # input features of each target
    inputs: list[int]  # the same, once for the targets that may read one input
    sides: int  # input and output features of all targets
    blocks: int  # that the targets have
    num_blocks: int
    block_size: int

    @property
    def rank(self) -> int:
        """Of the LoRA that trains as much."""
        return max(1, round(self.num_blocks * self.block_size**2 / self.sides))


def config_of(name: str) -> PretrainedConfig:
    base = name.rstrip("/").rpartition("/")[2].lower()
    shape = next((SHAPES[shape] for shape in SHAPES if f"{base.removeprefix('meta-')}-".startswith(f"{shape}-")), None)
    if shape and not Path(name).exists():
        return LlamaConfig(**dict(zip(SIZES, shape, strict=True)))
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True).get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SystemExit(f"model is {name!r}: no folder with a config.json that transformers knows, not in the hub's "
                         f"cache, and no shape ({', '.join(SHAPES)}); name one of these, or download the config with "
                         f"`hf download {name} config.json`") from error  # fmt: skip


def read_model(o: Options) -> Model:
    """Build the model without memory, and count. The budget and its errors are smt_peft's own."""
    config = config_of(o.model)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    layers = next((m for m in shell.modules() if isinstance(m, nn.ModuleList) and len(m)), [])
    missing = [name for name in SIZES[:4] if not isinstance(getattr(config, name, None), int)]
    experts = any("expert" in name for name, _ in shell.named_modules())
    if missing or experts or len(layers) != config.num_hidden_layers:
        why = "has experts" if experts else f"lacks {missing or 'one list of all layers'}"
        raise SystemExit(f"model is {o.model!r}, whose config ({config.model_type}) {why}, but what is known here are "
                         "dense, LLaMA-like layers; measure a step, or name the nearest shape")  # fmt: skip
    linear = {name: m for name, m in shell.named_modules() if isinstance(m, nn.Linear)}
    names = o.target_modules or sorted(default_modules(shell, config.model_type) or ())
    if names == ["all-linear"]:
        names = {name.rpartition(".")[2] for name, m in linear.items() if m is not shell.get_output_embeddings()}
    sides = {n: (m.out_features, m.in_features) for n, m in linear.items() if n.rpartition(".")[2] in names}
    if not sides:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise SystemExit(f"target_modules is {names}, but no linear layer is named so; take from {', '.join(there)}")
    size = "auto" if o.block_size is None else o.block_size
    smt = SMTConfig(num_blocks=o.num_blocks, trainable_ratio=o.trainable_ratio, block_size=size)
    smt.block_size = b = choose_block_size(smt, sides)
    targets = [Target(name, rows // b, cols // b) for name, (rows, cols) in sides.items()]
    share_budget(smt, targets, shell.num_parameters())
    inputs = {(name.rpartition(".")[0], cols) for name, (_, cols) in sides.items()}  # as the bank's plans take them
    return Model(
        config, shell.num_parameters(), sum(p.numel() for p in layers.parameters()),
        sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear)),
        [cols for _, cols in sides.values()], [cols for _, cols in inputs], sum(map(sum, sides.values())),
        sum(target.rows * target.cols for target in targets), smt.num_blocks, b,
    )  # fmt: skip


def activations(model: Model, o: Options) -> dict[str, float]:
    """Bytes by purpose; `layer`: what one layer keeps for backward; `held`: what is kept of all layers."""
    c, tokens, w = model.config, o.batch_size * o.tokens, o.itemsize
    full, plain, eight = o.method == "full", o.checkpointing == "none", o.dtype == "8bit"
    depth, hidden, mlp = c.num_hidden_layers, tokens * c.hidden_size, tokens * c.intermediate_size
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attended = tokens * c.num_attention_heads * head
    key = tokens * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head
    # A norm keeps its input in float32, and 1 / rms; a trained one also what its weight scales. Flash attention keeps
    # q, k, v, its result, and the log of each softmax's sum in float32 (cos and sin are small). The MLP keeps gate(x),
    # silu(gate(x)) and up(x). A frozen linear layer keeps nothing: its input's gradient needs the weight alone.
    norm = 4 * hidden + 4 * tokens + w * hidden * full
    layer = 2 * norm + w * 2 * (attended + key) + 4 * tokens * c.num_attention_heads + 3 * w * mlp
    # A trained one keeps its input: of q, k and v; of gate and up; of down (that of o is attention's). So does
    # bitsandbytes' frozen 8-bit layer, in an attribute, which checkpointing does not take away.
    layer_inputs = w * (2 * hidden + mlp) * (full or eight)
    last = norm + w * hidden * full
    held = depth * w * (hidden + (2 * hidden + mlp + attended) * eight) + last  # with checkpointing
    if plain:
        held = depth * (layer + layer_inputs) + last - norm * (not full)  # the first norm's input needs no gradient
    # Kept besides. SMT: the columns that some block reads, at worst each block others; siblings that would keep as
    # much as their input has keep it, once for all. LoRA: the input and A x, in float32, and so for 16-bit models a
    # copy of the input per adapter. With checkpointing this is kept for one layer; at worst all blocks are in one.
    reach, rank = model.num_blocks * model.block_size, model.rank * len(model.widths)
    lora = 4 * (sum(model.widths if w == 2 else model.inputs) + rank)
    inputs = sum(model.inputs)
    kept = {"smt": w * min(reach, inputs), "lora": lora}.get(o.method, 0)
    in_one = {"smt": w * min(reach, inputs / depth), "lora": lora / depth}.get(o.method, 0)
    return {
        "layer": layer + layer_inputs, "held": held,
        "kept": tokens * kept * plain, "kept in one": tokens * in_one,
        "watched": tokens * w * inputs / (1 if plain else depth),
        # Backward of an MLP: the gradients of its three products; of a norm: the hidden state in float32, twice.
        "working": 3 * w * mlp + 8 * hidden + 2 * c.hidden_size * c.intermediate_size * o.quantised,
        # float32: the result of log_softmax, its gradient, that of the logits. The forward's w + 4 + 4 are no more.
        "loss": 12 * tokens * c.vocab_size,
    }  # fmt: skip


def plan(model: Model, o: Options) -> dict:
    """Bytes per GPU by moment and kind, their totals, the largest, and what a GPU sends in a step."""
    n, c, w, a = o.gpus, model.config, o.itemsize, activations(model, o)
    smt, full, deepspeed = o.method == "smt", o.method == "full", o.strategy in ("zero2", "zero3")
    sharded = o.strategy in ("fsdp2", "zero3")
    # NF4: 4 bits, and a float32 scale for 64 weights. LLM.int8: a byte (a scale for a row is next to nothing).
    packed = {"4bit": 4 / 8 + 4 / 64, "8bit": 1}.get(o.dtype, w)
    in_layers = model.linear * packed + (model.in_layers - model.linear) * w
    outside = (model.parameters - model.in_layers) * w
    weights, layer = in_layers + outside, in_layers / c.num_hidden_layers
    # Deltas, and PEFT's LoRA, are float32; full fine-tuning trains weights as they are. AdamW's moments have the dtype
    # of the parameter. DeepSpeed trains in the model's dtype; a float32 copy for 16 bits belongs to its optimizer.
    trained = model.parameters if full else model.num_blocks * model.block_size**2 if smt else model.rank * model.sides
    size = w if full or deepspeed else 4
    own = trained * size  # also of the gradients
    state = trained * (12 if deepspeed and w == 2 else 2 * size)
    # Gathered by FSDP2: what is outside the layers, until backward ends, and three layers: the one at work, and the
    # next, as it arrives and as it is put in place. ZeRO-3 keeps up to so many elements, or its largest weight.
    live = min(weights, w * max(DEEPSPEED["live"], c.hidden_size * max(c.vocab_size, c.intermediate_size)))
    gathered = {"fsdp2": [outside, outside + 3 * layer, outside + layer, outside],
                "zero3": [live, live, live, 0]}.get(o.strategy, [0] * 4)  # fmt: skip
    # SMT's bank is one parameter of the root: gathered whole for a step, and its gradient is whole before it is
    # scattered. Those of LoRA and of full fine-tuning come and go with their layers.
    passing = own if smt else 3 * own / c.num_hidden_layers
    gradients = {"one": own, "ddp": 2 * own}.get(o.strategy, own / n + passing)
    bucket = own * (o.strategy == "ddp")  # DDP's, there from the start, besides the gradients
    reduced = DEEPSPEED["bucket"] * size * deepspeed
    parts = 1 if o.strategy in ("one", "ddp") else n
    top = a["held"] + a["working"] + a["layer"] * (o.checkpointing != "none")
    rows = {  # at the loss, the top layer, the bottom layer, the step
        "weights": [weights / (n if sharded else 1)] * 4,
        "gathered weights": gathered,
        "trained parameters": [0 if full else own / n + passing if sharded else own] * 4,
        "optimizer state": [state / parts] * 4,
        # In the step SMT's are there twice: the parts of the layers, and joined.
        "gradients": [bucket, bucket + outside / parts * full, gradients + reduced, gradients + own * smt],
        "index, plans, cuBLAS": [84 * model.num_blocks * smt + WORKSPACE] * 4,  # int32 [3], int64: at most 9 a block
        "kept inputs": [a["kept"], max(a["kept"], a["kept in one"]), a["kept in one"], 0],
        "activations": [a["held"], top, a["layer"] + a["working"], 0],
        "logits and loss": [a["loss"], 0, 0, 0],
    }
    names = ["loss", "top layer", "bottom layer", "step"]
    moments = {name: {kind: row[i] for kind, row in rows.items()} for i, name in enumerate(names)}
    # The warm-up, at its worst: no optimizer state yet, except DeepSpeed's; each input that targets read, once; the
    # scores of a batch and their sum, one float32 a block.
    if smt:
        worst = max(names[:2], key=lambda name: sum(moments[name].values()))
        other = {"kept inputs": a["watched"], "optimizer state": state / parts * deepspeed, "scores": 8 * model.blocks}
        moments["warm-up"] = moments[worst] | other
    # A ring: to gather, or to scatter, x bytes each GPU sends (n - 1) / n of them; an all-reduce is both.
    again = {"smt": own, "lora": 2 * own, "full": 0}[o.method]  # the bank is gathered once, in forward
    twice = {"fsdp2": outside + 2 * in_layers, "zero3": 2 * weights}.get(o.strategy, 0)
    sent = {"ddp": {"gradients": 2 * own}, "zero2": {"gradients": own, "what is trained": own}}
    sent = sent.get(o.strategy, {"gradients": own, "what is trained": again, "weights (twice)": twice})
    total = {name: sum(kinds.values()) for name, kinds in moments.items()}
    peak = max(total.values())
    fits, sent = peak + RESERVE <= o.gpu_gib * GIB, {kind: x * (n - 1) / n for kind, x in sent.items() if n > 1}
    return {"trained": trained, "bytes": moments, "total": total, "peak": peak, "fits": fits, "sent": sent}


def ways(model: Model, o: Options) -> dict[str, dict]:
    """Per strategy the fewest GPUs on which it fits, None if it does not, and the figures there."""
    found = {}
    for strategy, numbers in {"one": [1], **GPUS}.items():
        if not (o.quantised and strategy in ("fsdp2", "zero3")):
            plans = [(gpus, plan(model, replace(o, strategy=strategy, gpus=gpus))) for gpus in numbers]
            gpus, one = next((pair for pair in plans if pair[1]["fits"]), (None, plans[-1][1]))
            found[strategy] = {"gpus": gpus, "peak": one["peak"], "sent": sum(one["sent"].values())}
    return found


def table(model: Model, o: Options, result: dict, found: dict[str, dict]) -> str:
    """Lay out the bytes, in GiB."""
    how = {"smt": f"{model.num_blocks} blocks of {model.block_size}", "lora": f"rank {model.rank}", "full": "all"}
    lines = [f"{model.parameters:,} parameters, {result['trained']:,} trained ({how[o.method]})", ""]
    lines.append(f"{'GiB per GPU':22}" + "".join(f"{name:>13}" for name in result["bytes"]))
    for kind in list(result["bytes"].values())[-1]:
        row = [kinds.get(kind, 0) / GIB for kinds in result["bytes"].values()]
        lines += [f"{kind:22}" + "".join(f"{x:13.2f}" for x in row)] if max(row) >= 0.005 else []
    lines.append(f"{'total':22}" + "".join(f"{x / GIB:13.2f}" for x in result["total"].values()))
    fits = "fits" if result["fits"] else "does not fit"
    lines += ["", f"{result['peak'] / GIB:.2f} GiB {fits} into {o.gpu_gib:g}, of which {RESERVE / GIB:g} are reserved"]
    if result["sent"]:
        kinds = ", ".join(f"{x / GIB:.2f} of {kind}" for kind, x in result["sent"].items())
        lines.append(f"each GPU sends per step, GiB: {kinds}")
    lines += ["", f"{'strategy':10}{'fewest GPUs':>12}{'peak, GiB':>11}{'sent, GiB':>11}"]
    for name, way in found.items():
        lines.append(f"{name:10}{way['gpus'] or 'none':>12}{way['peak'] / GIB:11.2f}{way['sent'] / GIB:11.2f}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    (options,) = read_options(argv, Options)
    try:
        model = read_model(options)
    except ValueError as error:  # of smt_peft, about a budget or a block size
        raise SystemExit(str(error)) from error
    result, found = plan(model, options), ways(model, options)
    if options.json:
        head = {"options": asdict(options), "parameters": model.parameters, "reserve": RESERVE}
        print(json.dumps({**head, **result, "ways": found}, indent=2))
    else:
        print(table(model, options, result, found))


if __name__ == "__main__":
    main(sys.argv[1:])
