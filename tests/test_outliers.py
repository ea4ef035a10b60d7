"""Tests of scripts/studies/outliers.py."""

import json
import re
from copy import deepcopy
from pathlib import Path

import outliers
import pytest
import testbeds
import torch
from peft import get_peft_model

from smt_peft import SMTConfig

ROOT = Path(__file__).parents[1]


def test_an_input_far_above_the_median_is_found(short):
    testbed = testbeds.TextTestbed(testbeds.TESTBEDS["stories260K-lowercase"], short, 32)
    norm = testbed.model.model.layers[1].input_layernorm
    norm.weight.data[7] *= 100.0
    found = outliers.outliers_of(testbed)
    assert all(found[f"model.layers.1.self_attn.{part}_proj"]["above 6"] == 1 for part in "qkv")
    assert not any(layer["above 6"] for name, layer in found.items() if "layers.0." in name)
    seen = {}

    def look(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["x"] = output.flatten(0, 1)

    with norm.register_forward_hook(look), torch.no_grad():
        testbed.model(**testbed.batch(testbed.train[: outliers.ROWS]))
    rms = seen["x"].square().mean(0).sqrt()
    layer = found["model.layers.1.self_attn.q_proj"]
    assert layer["inputs"] == 64 and layer["above 6"] == 1 <= layer["above 3"]
    assert layer["largest"] == pytest.approx((rms[7] / rms.median()).item(), abs=0.06)
    assert layer["its std / rms"] == pytest.approx((seen["x"][:, 7].std() / rms[7]).item(), abs=0.006)


def test_chosen_blocks_read_the_input_far_above_the_median_and_random_ones_any(short, monkeypatch):
    testbed = testbeds.TextTestbed(testbeds.TESTBEDS["stories260K-lowercase"], short, 32)
    testbed.model.model.layers[1].input_layernorm.weight.data[7] *= 100.0
    monkeypatch.setattr(outliers, "BATCHES", 2)
    chosen, drawn = (outliers.inputs_read(testbed, rule) for rule in outliers.RULES)
    name = "model.layers.1.self_attn.q_proj"
    assert chosen[name] == 4 < drawn[name]  # its neighbours in one column of blocks
    model = get_peft_model(
        deepcopy(testbed.model),
        SMTConfig(
            target_modules=list(drawn),
            selection="random",
            scope="module",
            block_size=4,
            trainable_ratio=outliers.SHARE,
            init_weights=False,
        ),
    )
    for layer, count in drawn.items():
        delta = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
        assert count == delta.any(0).sum()


def test_a_table_is_printed_and_the_layers_are_written(short, tmp_path, capsys):
    outliers.main(["stories260K-lowercase", "--tokens", "32", "--shared", str(short), "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "outliers.jsonl").read_text().splitlines()]
    assert len({line["layer"] for line in lines}) == len(lines) == 35
    assert {line["testbed"] for line in lines} == {"stories260K-lowercase"}
    shares = [
        sum(line[f"read, {rule}"] for line in lines) / sum(line["inputs"] for line in lines) for rule in outliers.RULES
    ]
    assert printed.splitlines()[-1].split() == ["stories260K-lowercase", "35", "0", "0", *printed.split()[-3:]]
    assert printed.split()[-2:] == [f"{share:.1%}" for share in shares]
    outliers.main(["stories260K-gpt4", "--tokens", "8", "--shared", str(short), "--results", str(tmp_path)])
    both = [json.loads(line) for line in (tmp_path / "outliers.jsonl").read_text().splitlines()]
    assert both[:35] == lines and {line["testbed"] for line in both[35:]} == {"stories260K-gpt4"}
    with pytest.raises(SystemExit):
        outliers.main(["stories260K-lowercase", "babylama", "--results", str(tmp_path)])
    assert re.search("invalid choice: 'babylama' .*stories260K-lowercase", capsys.readouterr().err)


def test_padding_is_no_token(short):
    testbed = testbeds.TextTestbed(testbeds.TESTBEDS["stories260K-lowercase"], short, 32)
    expected, batch = outliers.outliers_of(testbed), testbed.batch

    def padded(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.nn.functional.pad(torch.ones_like(rows), (0, 50))
        return {"input_ids": torch.nn.functional.pad(batch(rows)["input_ids"], (0, 50)), "attention_mask": mask}

    testbed.batch = padded
    found = outliers.outliers_of(testbed)
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert found[name] == pytest.approx(layer, abs=0.11), "rounded to one digit"
