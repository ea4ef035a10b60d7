"""Merge an adapter into its base model, and write a model that plain transformers loads, without smt_peft.

python scripts/merge.py --adapter runs/quickstart/smt --output runs/quickstart/merged
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from tasks import TRAINING_DATA, training_data
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import smt_peft  # noqa: F401  registers SMT with PEFT


@dataclass
class Options:
    adapter: str = field(metadata={"help": "adapter: a folder or a name on the Hugging Face hub"})
    output: str = field(metadata={"help": "folder to write; must not exist or be empty"})
    base: str | None = field(default=None, metadata={"help": "base model, if not the one that the adapter names"})
    dtype: str = field(default="auto", metadata={"help": 'data type of the weights; "auto" for the base model\'s'})


def base_model(adapter: str) -> str | None:
    """Give the model that an adapter, a folder or a name on the hub, says it was made for."""
    is_folder = Path(adapter).is_dir()
    if is_folder and not Path(adapter, "adapter_config.json").is_file():
        raise SystemExit(f"{adapter} is no adapter: it has no adapter_config.json")
    if not is_folder and adapter.count("/") != 1:
        raise SystemExit(f"there is no folder {adapter}, and a name on the hub looks like user/name")
    return PeftConfig.from_pretrained(adapter).base_model_name_or_path


@torch.no_grad()
def merge(options: Options) -> float:
    """Write the merged model, and give the largest difference of its logits from the adapter's."""
    output = Path(options.output)
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output} is not empty; name another folder, or empty it")
    named = base_model(options.adapter)
    base = options.base or named
    if not base:
        raise SystemExit(f"{options.adapter} does not say what its base model is; give it with --base")

    model = AutoModelForCausalLM.from_pretrained(base, dtype=options.dtype)
    model = PeftModel.from_pretrained(model, options.adapter).eval()
    tokens = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=tokens).logits
    model.merge_and_unload(safe_merge=True).save_pretrained(output)
    own_tokenizer = Path(options.adapter, "tokenizer_config.json").is_file()
    AutoTokenizer.from_pretrained(options.adapter if own_tokenizer else base).save_pretrained(output)
    learnt = training_data(options.adapter)
    if learnt is not None:  # and what the base model has learnt, if that was itself trained by these scripts
        names = list(dict.fromkeys([*(training_data(base) or []), *learnt]))
        (output / TRAINING_DATA).write_text(json.dumps({"train": names}) + "\n", encoding="utf-8")

    del model  # so that there is one model in memory at a time
    written = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    difference = (written(input_ids=tokens).logits - expected).abs().max().item()
    if not difference <= torch.finfo(written.dtype).eps ** 0.5 * expected.abs().max():
        raise RuntimeError(f"the logits of {output} are off those of the adapter by {difference:.2g}; do not use it")
    return difference


if __name__ == "__main__":
    [options] = HfArgumentParser(Options).parse_args_into_dataclasses(sys.argv[1:])
    difference = merge(options)
    print(f"{options.output}: merged; its logits are off those of the adapter by {difference:.2g} at most")
