"""Tests of scripts/benchmarks/report_benchmarks.py: tables, pictures and goals from made-up and toy figures."""

import json
import sys

import bench_training
import report_benchmarks


def test_the_report_puts_a_table_and_a_picture_beside_the_figures(tmp_path, monkeypatch):
    results = ["--results", str(tmp_path / "results"), "--rehearse", "--methods", "floor", "smt", "lora"]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "--setting", "cpu-small", "blocks", *results])
    assert bench_training.main() == 0
    page = tmp_path / "benchmarks.md"
    table = "<!-- training_cpu-small -->\nold\n<!-- /training_cpu-small -->"
    page.write_text(f"before\n{table}\n![](results/training_blocks.png)\n")
    report_benchmarks.main(tmp_path)
    text, more = page.read_text(), (tmp_path / "results/benchmarks.md").read_text()
    assert "| smt |" in text and "old" not in text and text.startswith("before") and text.endswith(".png)\n")
    assert "## training_blocks" in more and "## training_cpu-small" in more
    assert "| launches |" in more and "| launches |" not in text, "the page has what one decides by"
    assert (tmp_path / "results/training_blocks.png").stat().st_size > 0, "the page shows it"


def test_ratios_are_taken_within_a_round():
    """The second round is twice as slow for all methods: the ratios do not move."""
    seconds = {"floor": [1.0, 2.0], "smt": [1.5, 3.0], "lora": [3.0, 6.0]}
    figures = {name: {"trainable_parameters": 1, "step_s": steps} for name, steps in seconds.items()}
    run = {"options": {"batch_size": 1, "tokens": 8}, "methods": figures}
    table = report_benchmarks.training_table({"sweep": None, "runs": [run]})
    (row,) = [line for line in table.splitlines() if "| smt |" in line]
    assert [cell.strip() for cell in row.split("|")][4:6] == ["1.500", "0.500"]


def test_the_summary_says_which_goals_are_reached(tmp_path):
    figures = {
        "floor": {"step_s": [1.0], "device_s": 0.9, "host_s": [0.5], "peak_bytes": 2**30},
        "smt": {"step_s": [1.02], "device_s": 0.99, "host_s": [0.6], "peak_bytes": 2**30 + 1},
        "lora": {"step_s": [1.2], "device_s": 1.0, "host_s": [0.6], "peak_bytes": 2**31},
    }
    run = {"options": {"batch_size": 1, "tokens": 8}, "methods": figures}
    (tmp_path / "training_peft.json").write_text(json.dumps({"sweep": None, "runs": [run]}))
    text = report_benchmarks.summary(tmp_path)
    assert "reached peft: step 1.020 x floor's, at most 1.05" in text and "reached peft: step 0.850 x lora's" in text
    assert "MISSED  peft: device 1.100 x floor's, at most 1.03" in text and "reached peft: host 1.000 x lora's" in text
