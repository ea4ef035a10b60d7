"""Tests of scripts/benchmarks/bench_ops.py: toy sizes on the CPU."""

import json
import sys

import bench_ops
import pytest
import report_benchmarks
import torch


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run the script at toy size; gives its exit status and its file."""
    sizes = [(64, 32, 8, 16, 3, arrangement) for arrangement in ("tiles", "sorted")]
    monkeypatch.setattr(bench_ops, "SIZES", {"cpu": sizes})
    for rate in ("copy_rate", "matmul_rate", "selection_seconds"):
        monkeypatch.setattr(bench_ops, rate, lambda *_: 1e9)

    def run(*options: str) -> tuple[int, dict]:
        output = ["--output", str(tmp_path / "ops.json"), "--device", "cpu", "--seconds", "0"]
        monkeypatch.setattr(sys, "argv", ["bench_ops.py", *output, *options])
        return bench_ops.main(), json.loads((tmp_path / "ops.json").read_text())

    return run


def test_every_op_is_right_and_timed_on_tiles_and_sorted_blocks(measure):
    status, result = measure()
    assert status == 0 and len(result["ops"]) == 4 + 5, "no gather of tiles in all columns"
    assert all(row["error"] < 1e-6 and row["seconds"] > 0 for row in result["ops"])
    assert {row["size"] for row in result["ops"]} == {
        f"[64, 32], 8 tokens, 3 {kind} of 16" for kind in ("blocks", "sorted blocks")
    }
    gradient = next(row for row in result["ops"] if row["op"] == "block_grad")
    assert gradient["flops_s"] == pytest.approx(2 * 8 * 3 * 16**2 / 1e9)


def test_an_op_that_is_wrong_is_not_timed_and_tried_again(measure, monkeypatch, capsys):
    wrong = pytest.MonkeyPatch()
    wrong.setattr(bench_ops.ops, "block_grad", lambda *_: torch.ones(3, 16, 16))
    status, result = measure()
    wrong.undo()
    assert status == 3 and [row["op"] for row in result["ops"] if "seconds" not in row] == ["block_grad"] * 2
    assert "block_grad" in capsys.readouterr().out and "wrong, not timed" in report_benchmarks.ops_table(result)
    right = [row for row in result["ops"] if "seconds" in row]
    status, result = measure()
    assert status == 0 and result["ops"][: len(right)] == right, "what is there is not measured again"
    assert len(result["ops"]) == 9


def test_no_row_starts_after_the_limit(measure, tmp_path):
    (tmp_path / "ops.json").write_text("{}")
    assert measure("--limit_s", "0") == (3, {})
