"""Tests of scripts/train_tiny_llama.py: the model that it writes, from short texts."""

import pytest
import torch
import train_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENTATION = [f"Return the {number}th item of a list, or raise an error." for number in range(40)]
SOURCE_CODE = [f"def item_{number}(values):\n    return values[{number}]" for number in range(40)]


def documentation(split: str) -> list[str]:
    return DOCUMENTATION if split == "train" else DOCUMENTATION[:4]


def source_code(split: str) -> list[str]:
    return SOURCE_CODE if split == "train" else SOURCE_CODE[:4]


@pytest.mark.parametrize("larger", [False, True], ids=["as shipped", "source code, bfloat16"])
def test_the_written_model_has_learnt_its_texts_and_says_how_it_was_made(tmp_path, monkeypatch, larger):
    monkeypatch.setattr(train_tiny_llama, "documentation", documentation)
    monkeypatch.setattr(train_tiny_llama, "source_code", source_code)
    short = {"steps": 20, "warmup_steps": 2, "batch_size": 2, "length": 16, "layers": 1}
    more = {"source_code": larger, "bfloat16": larger}
    seen = set()  # whether training's forward passes are under autocast

    def look(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, torch.nn.Linear) and module.training:
            seen.add(torch.is_autocast_enabled("cpu"))

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        train_tiny_llama.main(train_tiny_llama.Settings(output=tmp_path, **short, **more))
    assert seen == {larger}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    losses = {}
    for name, texts in {"documentation": DOCUMENTATION, "source code": SOURCE_CODE}.items():
        ids = train_tiny_llama.pack(texts, tokenizer)[:256].view(-1, 16)
        losses[name] = train_tiny_llama.evaluate(model, ids)
    untrained = train_tiny_llama.evaluate(train_tiny_llama.new_model(tokenizer, 192, 1), ids)
    assert losses["documentation"] < untrained - 1
    assert (losses["source code"] < untrained - 1) == larger
    page = (tmp_path / "README.md").read_text()
    assert ("documentation and the source code of Python" in page) == larger
    assert f"--source_code {larger}" in page and f"--bfloat16 {larger}" in page


def test_a_folder_that_cannot_be_made_is_noticed_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        train_tiny_llama.main(train_tiny_llama.Settings(output=tmp_path / "file", steps=10**9))
