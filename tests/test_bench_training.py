"""Tests of scripts/benchmarks/bench_training.py, at toy size on the CPU."""

import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_training
import pytest
import report_benchmarks
import torch

ROOT = Path(__file__).parents[1]

ON_A_GPU = (ROOT / "scripts/benchmarks/bench_gpu.sh").read_text()
GPU_SETTINGS = " ".join(re.findall(r"^ +training \d+ (.*)$", ON_A_GPU, re.M)).split()
THREE = ["--methods", "floor", "smt", "lora"]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run the script with a setting and options; give its exit status and what stands in its file."""

    def run(setting: str, *options: str) -> tuple[int, dict]:
        command = ["bench_training.py", "--setting", setting, *options, "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", command)
        status = bench_training.main()
        return status, json.loads((tmp_path / f"results/training_{setting}.json").read_text())

    return run


@pytest.mark.parametrize("setting", [name for name in GPU_SETTINGS if name != "compile"])
def test_every_setting_for_a_gpu_runs_at_toy_size(setting, measure):
    status, result = measure(setting, "--rehearse")
    assert status == 0 and result["complete"]
    for run in result["runs"]:
        assert list(run["methods"]) == bench_training.SETTINGS[setting]["methods"]
        assert all(figure["step_s"] and "note" not in figure for figure in run["methods"].values())


def test_whatever_is_swept_has_values_of_its_kind(measure):
    _, result = measure(
        "cpu-small", "--rehearse", "--methods", "floor", "lora", "--sweep", "rank", "--values", "2", "4"
    )
    assert [run["options"]["rank"] for run in result["runs"]] == [2, 4]
    with pytest.raises(SystemExit, match="--values 2 are values of --sweep: which option"):
        measure("cpu-small", "--values", "2")


def test_a_setting_for_a_gpu_is_in_the_script_that_runs_them_all():
    on_a_cpu = {name for name in bench_training.SETTINGS if "cpu" in name or name == "host"}
    assert set(GPU_SETTINGS) == set(bench_training.SETTINGS) - on_a_cpu


def test_the_methods_train_equally_many_parameters(measure):
    figures = measure("cpu-small", "--rehearse")[1]["runs"][0]["methods"]
    trained = {name: figure["trainable_parameters"] for name, figure in figures.items()}
    assert trained["smt"] == trained["lora"] == trained["shira"] and trained["floor"] == 0
    assert trained["full"] == figures["full"]["optimizer_bytes"] / 8


def test_a_method_that_cannot_be_compared_is_left_out_with_a_note(measure):
    small = ["--shape", "tiny", "--rank", "1", "--block_size", "16", "--rounds", "1"]  # 4 blocks are no rank of LoRA's
    _, result = measure("cpu-small", *small, *THREE)
    figures = result["runs"][0]["methods"]
    assert "not comparable" in figures["smt"]["note"] and not figures["smt"]["step_s"]
    assert figures["lora"]["step_s"]


def test_flops_that_cannot_be_counted_cost_nothing_else(measure, monkeypatch):
    class Refuses(bench_training.FlopCounterMode):
        def __enter__(self):
            raise AssertionError("sdpa_flop_count: query/key/value shapes are incompatible")

    monkeypatch.setattr(bench_training, "FlopCounterMode", Refuses)
    status, result = measure("cpu-small", "--rehearse", *THREE)
    assert status == 0 and all(figure["flops"] is None for figure in result["runs"][0]["methods"].values())
    assert "GFLOP" not in report_benchmarks.training_table(result)


def test_a_method_that_failed_is_tried_again(measure, monkeypatch):
    attach, failing = bench_training.attach, ["smt"]

    def fails(base, method, options):
        if method in failing:
            raise RuntimeError("a passing fault")
        return attach(base, method, options)

    monkeypatch.setattr(bench_training, "attach", fails)
    status, result = measure("cpu-small", "--rehearse", *THREE)
    assert status == 3 and result["runs"][0]["methods"]["smt"]["note"] == "a passing fault"
    failing.clear()
    status, result = measure("cpu-small", "--rehearse", *THREE)
    assert status == 0 and "note" not in result["runs"][0]["methods"]["smt"]


def test_a_method_that_there_is_not_is_refused_and_a_host_run_that_was_stopped_has_no_table(measure, monkeypatch):
    with pytest.raises(SystemExit, match="loar is not one of floor, smt, lora"):
        measure("cpu-small", "--rehearse", "--methods", "floor", "smt", "loar")
    status, result = measure("host", "--rehearse", "--methods", "floor", "smt")
    assert status == 0 and report_benchmarks.host_table(result) == report_benchmarks.markdown([])


def test_code_that_differs_from_its_commit_has_another_name_for_each_change(monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    said = {"describe": b"abc\n", "diff": b""}
    monkeypatch.setattr(
        bench_training.results.subprocess, "run", lambda words, **_: SimpleNamespace(stdout=said[words[3]])
    )
    names = [bench_training.results.commit()]
    for said["diff"] in (b"one change", b"another"):
        names.append(bench_training.results.commit())
    assert names[0] == "abc" and len(set(names)) == 3 and all(name.startswith("abc") for name in names)


@pytest.mark.parametrize("other", ["machine", "commit", "options"])
def test_what_another_machine_commit_or_command_made_is_not_kept(measure, monkeypatch, other):
    measure("cpu-small", "--rehearse", *THREE)
    if other == "machine":
        monkeypatch.setattr(bench_training.results.platform, "machine", lambda: "another")
    elif other == "commit":
        monkeypatch.setenv("COMMIT", "another")
    monkeypatch.setattr(bench_training, "measure_run", lambda run, *_: run.update(complete=True, anew=True))
    monkeypatch.setattr(bench_training, "training_table", lambda _: "")
    more = ["--rank", "8"] if other == "options" else []
    assert measure("cpu-small", *(["--rehearse"] if not more else []), *THREE, *more)[1]["runs"][0]["anew"]


def test_a_base_model_that_is_too_large_costs_its_own_point(measure, monkeypatch):
    def too_large(shape, *_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_training, "random_llama", too_large)
    status, result = measure("sizes", "--rehearse")
    assert status == 0
    assert all(figure == {"note": "out of memory"} for figure in result["runs"][0]["methods"].values())


def test_a_method_that_runs_out_of_memory_is_left_out_with_a_note(measure, monkeypatch):
    def attach(base, method, options, attach=bench_training.attach):
        if method == "smt":
            raise torch.OutOfMemoryError
        return attach(base, method, options)

    monkeypatch.setattr(bench_training, "attach", attach)
    _, result = measure("cpu-small", "--rehearse", *THREE)
    assert result["runs"][0]["methods"]["smt"]["note"] == "out of memory"
    assert "| out of memory |" in report_benchmarks.training_table(result)


def test_a_stopped_sweep_keeps_its_points_and_goes_on_from_there(measure, monkeypatch):
    """As Ctrl-C and SIGTERM stop it, in the second round of the second point."""
    take_turn, turns = bench_training.Trial.take_turn, []

    def stopped(trial, figure):
        turns.append(trial)
        if len(turns) == 6 + 5:
            raise KeyboardInterrupt
        take_turn(trial, figure)

    monkeypatch.setattr(bench_training.Trial, "take_turn", stopped)
    status, result = measure("blocks", "--rehearse")
    assert status == 3 and [run["complete"] for run in result["runs"]] == [True, False]
    assert all(figure["step_s"] for figure in result["runs"][1]["methods"].values()), "its first round stands there"
    status, again = measure("blocks", "--rehearse")
    assert status == 0 and again["complete"] and again["runs"][0] == result["runs"][0] and len(again["runs"]) == 2
    assert len(turns) == 6 + 5 + 6
    assert measure("blocks", "--rehearse") == (0, again), "what is complete is kept"


def test_what_is_no_longer_in_time_is_missing(measure):
    status, result = measure("peft", "--rehearse", "--seconds", "0.1")
    assert status == 3 and not result["complete"]
    notes = [figure.get("note") for figure in result["runs"][0]["methods"].values()]
    assert notes[0] is None and notes[-1] == "no time was left"


def test_an_unknown_setting_is_named(measure):
    with pytest.raises(SystemExit, match="--setting h200 is not one of cpu-small"):
        measure("h200")


def test_times_of_the_host_and_the_device_are_taken_apart(monkeypatch):
    """A device that needs 10 s after each step of 1 s is told: in what is waited for, not in the host's own time."""
    options = bench_training.Options(**{**bench_training.TOY, "device": "cpu", "methods": ["smt"]})
    base = bench_training.random_llama("tiny", None, "float32", "cpu")
    trial = bench_training.Trial(base, "smt", options, torch.randint(0, 64, (1, 32)))
    trial.step()
    now, queue = [0.0], []

    def step(*_) -> None:
        queue.append(1)
        now[0] += 1

    def wait() -> None:
        now[0] += 10 * len(queue)
        queue.clear()

    monkeypatch.setattr(bench_training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trial, "step", step)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    trial.on_gpu, figure = True, {"step_s": [], "synced_s": [], "host_s": []}
    trial.take_turn(figure)
    assert (figure["step_s"][0], figure["synced_s"][0], figure["host_s"][0]) == (11, 11, 1)


def test_every_column_of_a_gpu_is_filled(measure, monkeypatch):
    """With a pretended device: the code that only a GPU runs, for every method of the main setting."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    class Profile(contextlib.nullcontext):
        def __init__(self, activities):
            super().__init__(self)

        def events(self):
            took = SimpleNamespace(elapsed_us=lambda: 12.5)
            kinds = [("kernel", cuda, False)] * 3 + [("annotation", cuda, True), ("operator", cpu, False)]
            names = ("name", "device_type", "is_user_annotation")
            return [SimpleNamespace(time_range=took, **dict(zip(names, kind, strict=True))) for kind in kinds]

    def start(trial, base, *rest, start=bench_training.Trial.__init__):
        start(trial, base, *rest)
        trial.on_gpu, trial.others = True, 2**30

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(bench_training.Trial, "__init__", start)
    numbers = {"max_memory_allocated": 2**31, "reset_peak_memory_stats": None, "synchronize": None}
    for name, number in {**numbers, "empty_cache": None, "Stream": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda number=number: number)
    replays = []
    graph = SimpleNamespace(replay=lambda: replays.append(1), reset=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    status, result = measure("peft", "--rehearse")
    assert status == 0
    for method, figure in result["runs"][0]["methods"].items():
        assert "note" not in figure and figure["synced_s"]
        if method != "smt-warmup":
            assert figure["launches"] == 3 and figure["device_s"] == pytest.approx(3 * 12.5e-6)
            assert len(figure.get("captured_s", ())) == (0 if method == "shira" else 4) and replays
            assert figure["peak_bytes"] == 2**30 and len(figure["step_s"]) == len(figure["host_s"]) == 2
    (row,) = [line for line in report_benchmarks.training_table(result).splitlines() if "| smt |" in line]
    assert "| - |" not in row.rpartition(" | - |")[0], "only the note is empty"


@pytest.mark.parametrize("lacks_memory", [True, False])
def test_a_step_that_is_not_captured_costs_that_figure_alone(measure, monkeypatch, lacks_memory):
    """Also where it is memory that lacks, or CUDA that refuses: what the rounds measured stands."""

    def start(trial, base, *rest, start=bench_training.Trial.__init__):
        start(trial, base, *rest)
        trial.on_gpu = True

    def captured(trial):
        if trial.method in ("smt", "shira"):  # which in truth waits for the device, and is not asked
            raise torch.OutOfMemoryError if lacks_memory else RuntimeError("CUDA error: operation not permitted")
        return [1.0]

    monkeypatch.setattr(bench_training.Trial, "__init__", start)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_training.Trial, "count", lambda trial: {"trainable_parameters": 1})
    monkeypatch.setattr(bench_training.Trial, "captured", captured)
    methods = "floor", "shira", "lora", "smt"
    status, result = measure("peft", "--rehearse", "--methods", *methods)
    assert status == 0 and result["complete"]
    assert all(len(figure["step_s"]) == 2 for figure in result["runs"][0]["methods"].values())
    figures = result["runs"][0]["methods"]
    assert not any("note" in figure for figure in figures.values())
    assert {method for method, figure in figures.items() if "captured_s" in figure} == {"floor", "lora"}


def test_the_host_setting_says_where_the_time_goes(measure):
    _, result = measure("host", "--rehearse")
    table = report_benchmarks.host_table(result)
    assert "| q, v | all |" in table and "smt_peft/ops/" in table and "peft/tuners/lora/layer.py" in table
