"""The code of README.md and of docs/usage.md runs."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 9, "num_hidden_layers": 4}


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(make_llama, batches, tmp_path, monkeypatch) -> dict:
    """What the code takes for granted. The folder has two adapters; the model has 972 blocks of 16 in q, k and v."""
    monkeypatch.chdir(tmp_path)
    base = make_llama(**SIZES)
    for seed, folder in enumerate(["adapter", "other"]):
        random = SMTConfig(num_blocks=890, selection="random", seed=seed, init_weights=False)
        get_peft_model(make_llama(**SIZES), random).save_pretrained(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: base)
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    names = {"PeftModel": PeftModel, "Trainer": Trainer, "get_peft_model": get_peft_model, "SMTConfig": SMTConfig}
    names |= {"SMTWarmupCallback": SMTWarmupCallback, "args": TrainingArguments("out", **options)}
    rows = [{"input_ids": ids, "labels": ids} for batch in batches for ids in batch["input_ids"]]
    return names | {"base": base, "data": rows, "dataloader": batches, "batch": batches[0]}


@pytest.fixture
def model(make_llama):
    """A model whose adapter awaits its warm-up."""
    return get_peft_model(make_llama(**SIZES), SMTConfig(num_blocks=890, warmup_steps=4))


def is_whole(code: str) -> bool:
    return "scripts/tiny_llama" in code


CODE = [(page, n) for page in ("README.md", "docs/usage.md") for n, _ in enumerate(code_of(page))]


@pytest.mark.filterwarnings("ignore:The data has .* batches, fewer than warmup_steps")
@pytest.mark.parametrize("page, number", [(page, n) for page, n in CODE if not is_whole(code_of(page)[n])])
def test_the_code_runs(names, model, page, number):
    names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 1e-2)}
    if "Selection.load" in code_of(page)[number]:  # of a warm-up, which random blocks have not had
        exec(code_of(page)[0], names)
        names["base"] = names["model"].unload()
    exec(code_of(page)[number], names)


def test_the_whole_script_runs_in_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("scripts", "smt_peft"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    [code] = filter(is_whole, code_of("docs/usage.md"))
    exec(code, {})
    said = capsys.readouterr().out
    continued = said.rpartition("def parts(self")[2]
    assert "SMT selected 225 blocks" in said and len(continued) > 10
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
