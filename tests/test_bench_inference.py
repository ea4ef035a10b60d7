"""Tests of scripts/benchmarks/bench_inference.py, at toy size on the CPU."""

import json
import sys

import bench_inference


def test_inference_is_measured_merged_and_unmerged(tmp_path, monkeypatch, capsys):
    output = tmp_path / "inference.json"
    monkeypatch.setattr(sys, "argv", ["bench_inference.py", "--rehearse", "--output", str(output)])
    assert bench_inference.main() == 0
    result = json.loads(output.read_text())
    assert [(row["method"], row["batch"]) for row in result["speeds"]] == [
        (method, batch) for batch in (1, 2) for method in bench_inference.METHODS
    ]
    assert all(result["adapters"][name]["load_s"] > 0 for name in ("smt", "lora"))
    assert "| smt-merged |" in capsys.readouterr().out
    assert bench_inference.main() == 0 and json.loads(output.read_text()) == result, "what is complete is kept"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rounds", "2"])
    monkeypatch.setattr(bench_inference, "measure", lambda result, *_: result.update(complete=True, anew=True))
    monkeypatch.setattr(bench_inference, "inference_table", lambda result: str(result["anew"]))
    assert bench_inference.main() == 0 and "True" in capsys.readouterr().out, "other options are other figures"
