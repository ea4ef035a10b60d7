"""Merges an adapter into a checkpoint that is larger than the memory that this process may take; Linux only.

python tests/merge_in_little_memory.py FOLDER

Prints a JSON object: bytes of the limit and of the checkpoint, and the names of the shards that have blocks.
"""

import json
import resource
import sys
from pathlib import Path

sys.modules["datasets"] = None  # not needed here, and pyarrow reserves a gigabyte

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from smt_peft import SMTConfig  # noqa: E402
from smt_peft.__main__ import main  # noqa: E402
from smt_peft.files import Blocks, StoredAdapter, write_adapter  # noqa: E402

LAYERS, HIDDEN, BLOCK = 8, 256, 64
TARGETS = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in (2, 5) for kind in ("up", "down")]


def private_bytes() -> int:
    """What counts against the limit: private writable memory, used or not."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return 1024 * int(line.split()[1])


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros, which takes no room on the disk."""
    header, at = {}, 0
    for key, shape in shapes.items():
        end = at + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("rb+") as file:
        file.truncate(8 + len(text) + at)


def write_files(folder: Path, inner: int) -> None:
    """A LLaMA whose layers have a shard each, and an adapter of some of them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": LAYERS, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=4, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards = {key: f"{key.split('.')[2]}.safetensors" if "layers" in key else "0.safetensors" for key in shapes}
    config.save_pretrained(folder / "base")
    (folder / "base/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    for name in set(shards.values()):
        write_zeros(folder / "base" / name, {key: shapes[key] for key, shard in shards.items() if shard == name})
    of_block = torch.arange(BLOCK)[None]
    blocks = Blocks(of_block + HIDDEN - BLOCK, of_block + BLOCK, torch.randn(1, BLOCK, BLOCK))
    of_targets = {name: shapes[f"{name}.weight"] for name in TARGETS}
    about = SMTConfig(block_size=BLOCK, target_modules=["up_proj", "down_proj"], num_blocks=len(TARGETS))
    about.base_model_name_or_path = str(folder / "base")
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter", StoredAdapter(about, of_targets, dict.fromkeys(TARGETS, blocks), {}, {}))


folder = Path(sys.argv[1])
before = private_bytes()
shard = before // 6  # so that eight are more than the limit
write_files(folder, inner=shard // (3 * 4 * HIDDEN) // BLOCK * BLOCK)
limit = private_bytes() + 3 * shard // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:  # the limit is one
    torch.ones(2 * shard, dtype=torch.uint8)
    raise SystemExit("there is no limit")
except RuntimeError:
    main(["merge", str(folder / "adapter"), "--out", str(folder / "out"), "--json"])
checkpoint = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
print(json.dumps({"limit": limit, "checkpoint": checkpoint}), file=sys.stderr)
