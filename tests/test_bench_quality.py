"""Tests of scripts/bench_quality.py, of the studies in configs/study and of the paper's settings in configs/paper."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_quality  # noqa: E402
import finetune  # noqa: E402

STUDIES = sorted((ROOT / "configs/study").glob("*.yaml"))
PAPER = sorted((ROOT / "configs/paper").glob("*.yaml"))
TINY = {
    "testbeds": ["stories260K-lowercase"],
    "targets": {"qkv": ["q_proj", "k_proj", "v_proj"]},
    "budgets": {"qkv": [3200]},
    "seeds": [0],
    "steps": 2,
    "batch_size": 2,
    "tokens": 32,
    "methods": {
        "LoRA": {"type": "lora", "learning_rates": [1e-3]},
        "SMT": {"type": "smt", "block_size": 4, "warmup_steps": 2, "learning_rates": [1e-3, 1e-2]},
        "random": {"type": "smt", "block_size": 4, "selection": "random", "learning_rates": [1e-3]},
        "MiSS": {"type": "miss", "learning_rates": [1e-3]},
        "SHiRA": {"type": "shira", "learning_rates": [1e-3]},
        "full": {"type": "full", "learning_rates": [1e-3]},
    },
}


def line(method: str, rate: float, seed: int, validation: float, test: float) -> dict:
    """What a run leaves in the output."""
    place = {"testbed": "bed", "target": "qkv", "budget": 100, "trained_parameters": 96, "blocks_by_type": None}
    losses = {"validation_loss": validation, "test_loss": test, "old_loss": 1.0}
    more = {"base": {"test_loss": 3.0, "old_loss": 1.0}, "cpu_seconds": 60}
    return {**place, "method": method, "learning_rate": rate, "seed": seed, **losses, **more}


@pytest.fixture
def files(tmp_path, shared) -> Path:
    """A folder with a study, and models and data cut short."""
    for name in ("tinystories/train_v1_lowercase", "tinystories/train_v2_gpt4", "tinystories/valid"):
        short = tmp_path / "shared/data" / f"{name}.jsonl"
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_text("".join((shared / "data" / f"{name}.jsonl").open().readlines()[:40]))
    shutil.copytree(shared / "models/stories260K", tmp_path / "shared/models/stories260K")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    return tmp_path


def sweep(files: Path, *more: str) -> list[dict]:
    """Run the study and give what stands in the output."""
    output = files / "out.jsonl"
    places = ["--shared", str(files / "shared"), "--output", str(output)]
    bench_quality.main([str(files / "study.yaml"), *places, *more])
    return [json.loads(text) for text in output.read_text().splitlines()]


# --- running ---------------------------------------------------------------------------------------------------------


def test_every_method_of_a_study_runs_and_is_reported_once(files):
    lines = sweep(files)
    assert [one["method"] for one in lines] == ["LoRA", "SMT", "SMT", "random", "MiSS", "SHiRA", "full"]


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(files):
    first = sweep(files)
    (files / "out.jsonl").write_text("".join(json.dumps(one) + "\n" for one in first[:3]))
    again = sweep(files)
    assert again[:3] == first[:3] and [one["key"] for one in again] == [one["key"] for one in first]


def test_the_same_run_gives_the_same_losses(files):
    [run] = [run for run in bench_quality.planned(TINY) if (run.method, run.learning_rate) == ("SMT", 1e-2)]
    first, second = (bench_quality.train(run, files / "shared") for _ in range(2))
    assert first["test_loss"] == second["test_loss"]


def test_methods_of_a_budget_train_about_as_many_parameters(files):
    trained = {one["method"]: one["trained_parameters"] for one in sweep(files) if one["method"] != "full"}
    assert all(abs(count - 3200) <= 0.02 * 3200 for count in trained.values()), trained


def test_the_model_of_a_testbed_is_the_same_after_a_run(files):
    run = bench_quality.planned(TINY)[-1]  # full fine-tuning, which changes every weight of its copy
    bench_quality.train(run, files / "shared")
    on_disk = load_file(files / "shared/models/stories260K/model.safetensors")
    kept = bench_quality.load_testbed(run.testbed, files / "shared", run.tokens).model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in on_disk.items())


def test_training_validation_and_test_have_no_row_in_common(files):
    testbed = bench_quality.Testbed("stories260K-lowercase", files / "shared", 32)
    parts = [{tuple(row) for row in part.tolist()} for part in (testbed.train, testbed.validation, testbed.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_methods_see_the_same_batches_and_seeds_see_others(files):
    testbed = bench_quality.Testbed("stories260K-lowercase", files / "shared", 32)
    runs = bench_quality.planned(TINY)
    first, other_method, other_seed = (
        torch.cat(list(bench_quality.batches(run, testbed, 3))) for run in (runs[0], runs[1], replace(runs[0], seed=1))
    )
    assert torch.equal(first, other_method) and not torch.equal(first, other_seed)


def test_a_borrowed_selection_is_the_other_domains(files):
    [own] = [run for run in bench_quality.planned(TINY) if (run.method, run.learning_rate) == ("SMT", 1e-2)]
    settings = json.loads(own.settings) | {"warmup_testbed": "stories260K-gpt4"}
    borrowed = replace(own, settings=json.dumps(settings))
    losses = [bench_quality.train(run, files / "shared")["test_loss"] for run in (own, borrowed)]
    assert losses[0] != losses[1]


def test_full_fine_tuning_runs_once_for_all_budgets():
    study = TINY | {"budgets": {"qkv": [3200, 6400]}}
    assert sum(run.method == "full" for run in bench_quality.planned(study)) == 1


def test_a_folder_without_models_is_named(files):
    shutil.rmtree(files / "shared/models")
    with pytest.raises(SystemExit, match="models/stories260K; give the folder"):
        sweep(files)


# --- reporting -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_chosen_on_validation_even_if_another_tests_better():
    lines = [line("SMT", 0.1, 0, validation=2.0, test=1.9), line("SMT", 0.2, 0, validation=1.8, test=2.1)]
    [runs] = bench_quality.best_runs(lines)["bed", "qkv", 100].values()
    assert [run["learning_rate"] for run in runs] == [0.2]


def test_a_table_gives_the_mean_over_seeds_with_its_spread():
    lines = [line("SMT", 0.1, seed, validation=2.0, test=test) for seed, test in enumerate([1.0, 2.0, 3.0])]
    assert "| 2.000 ± 1.000 |" in bench_quality.tables(lines)


def test_the_best_method_stands_first():
    table = bench_quality.tables([line("SMT", 0.1, 0, 2.0, test=1.5), line("LoRA", 0.1, 0, 2.0, test=1.4)])
    assert table.index("| LoRA |") < table.index("| SMT |")


def test_the_report_runs_nothing_and_draws_a_picture(files):
    (files / "out.jsonl").write_text("")
    first = bench_quality.planned(TINY)[0]
    one = line("LoRA", 1e-3, 0, 2.0, 1.5) | {"key": first.key}
    (files / "out.jsonl").write_text(json.dumps(one) + "\n")
    assert len(sweep(files, "--report")) == 1
    assert (files / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_gets_the_tables_between_its_markers(files):
    one = line("LoRA", 1e-3, 0, 2.0, 1.5) | {"key": bench_quality.planned(TINY)[0].key}
    (files / "out.jsonl").write_text(json.dumps(one) + "\n")
    (files / "page.md").write_text("before\n<!-- out -->\n<!-- /out -->\nafter\n")
    sweep(files, "--report", "--page", str(files / "page.md"))  # fills the place
    sweep(files, "--report", "--page", str(files / "page.md"))
    page = (files / "page.md").read_text()
    assert page.startswith("before\n<!-- out -->\n1 of 7 runs") and page.endswith("<!-- /out -->\nafter\n")
    assert page.count("| LoRA |") == 1


# --- files of options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_planned_and_its_methods_can_be_made(path):
    for run in bench_quality.planned(yaml.safe_load(path.read_text())):
        settings = json.loads(run.settings)
        assert run.testbed in bench_quality.TESTBEDS
        assert settings.get("warmup_testbed", run.testbed) in bench_quality.TESTBEDS
        options = {key: value for key, value in settings.items() if key not in bench_quality.OWN}
        kinds = {"smt": bench_quality.SMTConfig, **bench_quality.RANKED}
        if settings["type"] in kinds:
            kinds[settings["type"]](target_modules=json.loads(run.modules), **options)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_setting_of_the_paper_is_one_that_finetune_takes(path):
    options, args = finetune.parse(["--config", str(path), "--use_cpu", "true"])
    finetune.SMTConfig(**options.smt)
    finetune.LoraConfig(**options.lora)
    assert args.learning_rate < 1e-3  # a number, not the text that YAML makes of 9.65e-6


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.endswith("_smt")], ids=lambda path: path.stem)
def test_methods_of_a_model_differ_in_a_few_lines(path):
    smt = yaml.safe_load(path.read_text())
    others = [other for other in PAPER if other.stem.startswith(path.stem.removesuffix("smt")) and other != path]
    for other in others:
        values = yaml.safe_load(other.read_text())
        different = {key for key in smt | values if smt.get(key) != values.get(key)}
        assert different <= {"methods", "smt", "lora", "learning_rate", "output_dir"}, other.name
    assert len(others) == 3


def test_the_experiment_for_pefts_comparison_trains_what_lora_of_rank_32_does():
    [folder] = (ROOT / "configs/paper/peft-method-comparison/smt").iterdir()
    config = PeftConfig.from_pretrained(str(folder))
    lora = 28 * 32 * ((3072 + 3072) + (3072 + 1024))  # q and v of 28 layers of Llama-3.2-3B
    assert isinstance(config, bench_quality.SMTConfig) and config.num_blocks * config.block_size**2 == lora
