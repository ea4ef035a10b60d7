"""Tests of scripts/bench_training.py and report_benchmarks.py: every setting at toy size, on the CPU."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_training  # noqa: E402
import report_benchmarks  # noqa: E402

GPU_SETTINGS = re.findall(r"^for setting in (.*); do$", (ROOT / "scripts/bench_gpu.sh").read_text(), re.MULTILINE)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run the script with these options and give what stands in its file."""

    def run(*options: str) -> dict:
        output = tmp_path / "results/training_it.json"
        monkeypatch.setattr(sys, "argv", ["bench_training.py", *options, "--output", str(output)])
        bench_training.main()
        return json.loads(output.read_text())

    return run


@pytest.mark.parametrize("setting", " ".join(GPU_SETTINGS).split())
def test_every_setting_for_a_gpu_runs_at_toy_size(setting, measure):
    result = measure("--setting", setting, "--rehearse")
    methods = bench_training.SETTINGS[setting]["methods"]
    assert all(list(run["methods"]) == methods for run in result["runs"])
    assert all(figure["step_s"] for run in result["runs"] for figure in run["methods"].values())


def test_a_setting_for_a_gpu_is_in_the_script_that_runs_them_all():
    assert set(" ".join(GPU_SETTINGS).split()) == {name for name in bench_training.SETTINGS if "cpu" not in name}


def test_the_methods_train_equally_many_parameters(measure):
    figures = measure("--setting", "cpu-small", "--rehearse")["runs"][0]["methods"]
    trained = {name: figure["trainable_parameters"] for name, figure in figures.items()}
    assert trained["smt"] == trained["lora"] == trained["shira"] and trained["floor"] == 0


def test_methods_that_cannot_be_compared_are_refused(measure):
    with pytest.raises(ValueError, match="not comparable"):  # 4 blocks of 16 are no rank of LoRA's
        measure("--setting", "cpu-small", "--shape", "tiny", "--rank", "1", "--block_size", "16", "--rounds", "1")


def test_an_unknown_setting_is_named(measure):
    with pytest.raises(SystemExit, match="--setting h200 is not one of cpu-small"):
        measure("--setting", "h200")


def test_the_report_puts_a_table_and_a_picture_beside_the_figures(tmp_path, measure):
    measure("--setting", "cpu-small", "--rehearse", "--methods", "floor", "smt", "lora")
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- training_it -->\nold\n<!-- /training_it -->\nafter\n")
    report_benchmarks.main(tmp_path)
    text = page.read_text()
    assert "| smt |" in text and "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert (tmp_path / "results/training_it.png").stat().st_size > 0


def test_the_report_names_a_file_without_a_place(tmp_path, measure):
    measure("--setting", "cpu-small", "--rehearse", "--methods", "floor", "smt", "lora")
    (tmp_path / "benchmarks.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"no place for training_it\.json"):
        report_benchmarks.main(tmp_path)


def test_ratios_are_taken_within_a_round():
    """The second round is twice as slow for all methods: the ratios do not move."""
    counted = {"trainable_parameters": 1, "saved_bytes": 0, "flops": 1, "launches": 1, "optimizer_bytes": 0}
    seconds = {"floor": [1.0, 1.0, 2.0, 2.0], "smt": [1.5, 1.5, 3.0, 3.0], "lora": [3.0, 3.0, 6.0, 6.0]}
    figures = {name: {**counted, "step_s": steps} for name, steps in seconds.items()}
    options = {"rounds": 2, "steps": 2, "batch_size": 1, "tokens": 8, "block_size": 16}
    table = report_benchmarks.training_table(
        {"sweep": "block_size", "runs": [{"options": options, "methods": figures, "base_parameters": 1}]}
    )
    (row,) = [line for line in table.splitlines() if "| smt |" in line]
    assert [cell.strip() for cell in row.split("|")][5:7] == ["1.500", "0.500"]
