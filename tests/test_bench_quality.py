"""Tests of scripts/studies/bench_quality.py and the files in configs/study."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import bench_quality
import pytest
import recipes
import testbeds
import torch
import yaml
from recipes import Recipe
from safetensors.torch import load_file
from testbeds import TESTBEDS, Source

ROOT = Path(__file__).parents[1]

STUDIES = sorted((ROOT / "configs/study").glob("*.yaml"))
BUDGET = 3200  # on q, k and v 200 blocks of 4, or LoRA of rank 2
SMT = {"type": "smt", "block_size": 4, "warmup_steps": 2}
METHODS = {
    "LoRA": {"type": "lora"},
    "DoRA": {"type": "lora", "use_dora": True},
    "MiSS": {"type": "miss"},
    "SHiRA": {"type": "shira"},
    "full": {"type": "full"},
    "dense": {"type": "dense"},
    "SMT": SMT,
    "random": SMT | {"selection": "random"},
    "borrowed": SMT | {"warmup_testbed": "stories260K-gpt4"},
    "per group": SMT | {"num_blocks_pattern": {"q_proj": 100, "k_proj": 50, "v_proj": 50}},
    "over rms": SMT | {"ranking": "module_rms"},
    "adam": SMT | {"ranking": "adam", "score": "l2"},
    "times weight": SMT | {"ranking": "weight"},
    "quantile": SMT | {"quantile": [0.5, 0.75]},
    "tiles": SMT | {"block_size": 1, "tile": [8, 4], "scope": "module"},
    "rows": SMT | {"block_size": 1, "tile": [1, 0]},
    "without its head": SMT | {"arrangement": "sorted", "leave_out": [2, 1]},
    "half LoRA": SMT | {"lora_share": 0.5},
    "restart, kept": SMT | {"restart": {"steps": [1], "keep": True, "warm": True}},
    "restart, dropped": SMT | {"restart": {"steps": [1], "keep": False}},
    "Muon": SMT | {"optimizer": "muon"},
    "weight decay": SMT | {"optimizer_options": {"weight_decay": 0.1}},
    "scaled": SMT | {"delta_scale": "weight_rms"},
}
STUDY = {
    "testbeds": ["stories260K-lowercase"],
    "targets": {"qkv": ["q_proj", "k_proj", "v_proj"]},
    "budgets": {"qkv": [BUDGET]},
    "seeds": [0],
    "steps": 2,
    "batch_size": 2,
    "tokens": 32,
}


def study_of(**methods: dict) -> dict:
    return STUDY | {"methods": {name: {"learning_rates": [1e-2]} | method for name, method in methods.items()}}


def run_of(settings: dict, **changes) -> bench_quality.Run:
    return replace(bench_quality.planned(study_of(method=settings))[0], **changes)


@pytest.fixture
def train(short):
    """Run a method, with changes to its run."""
    return lambda settings, **changes: bench_quality.train(run_of(settings, **changes), TESTBEDS, short)


@pytest.fixture
def sweep(short, tmp_path):
    """Run a study and give what stands in the output."""

    def of(study: dict, *options: str) -> list[dict]:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        results = tmp_path / "".join(["results", *options])
        bench_quality.main([str(tmp_path / "tiny.yaml"), "--shared", str(short), "--results", str(results), *options])
        return [json.loads(text) for text in (results / "quality_tiny.jsonl").read_text().splitlines()]

    return of


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_and_trains_about_as_much_as_the_budget_says(train, method):
    line = train(METHODS[method])
    assert all(line[f"{part}_loss"] > 0 for part in ("validation", "test", "old")) and len(line["train_loss"]) == 2
    whole = {"full": 260_032, "dense": 5 * 64 * (64 + 32 + 32)}  # five layers, grouped keys and values
    more = 5 * (64 + 32 + 32) if method == "DoRA" else 0  # its magnitudes
    assert abs(line["trained_parameters"] - whole.get(method, BUDGET) - more) <= 0.02 * BUDGET


def test_a_study_that_was_interrupted_goes_on_where_it_was(sweep, tmp_path):
    study = study_of(LoRA={"type": "lora"}, SMT=SMT | {"learning_rates": [1e-3, 1e-2]})
    first = sweep(study)
    (tmp_path / "results/quality_tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first[:2]))
    again = sweep(study)
    assert again[:2] == first[:2] and [line["key"] for line in again] == [line["key"] for line in first]


def test_the_rate_with_the_best_validation_runs_with_the_other_seeds(sweep, monkeypatch):
    validation = {1e-3: 1.5, 1e-2: 1.2, 1e-1: float("nan")}  # and the test loss says the opposite
    monkeypatch.setattr(
        bench_quality,
        "train",
        lambda run, *_: {
            "validation_loss": validation[run.learning_rate],
            "test_loss": 2 - validation[run.learning_rate],
        },
    )
    lines = sweep(study_of(SMT=SMT | {"learning_rates": [1e-1, 1e-3, 1e-2]}) | {"seeds": [7, 8, 9]})
    tried = [(line["seed"], line["learning_rate"]) for line in lines]
    assert tried == [(7, 1e-1), (7, 1e-3), (7, 1e-2), (8, 1e-2), (9, 1e-2)]


def test_the_same_run_gives_the_same_losses(train):
    assert train(SMT)["test_loss"] == train(SMT)["test_loss"]


def test_compiled_layers_train_as_eager_ones(sweep, tmp_path):
    study = study_of(LoRA={"type": "lora"}, random=SMT | {"selection": "random", "scope": "module"})
    eager = sweep(study)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = sweep(study, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6  # of ten layers: alike ones share theirs
    for one, other in zip(eager, compiled, strict=True):
        assert other["compiled"] and one["key"] == other["key"]
        assert other["test_loss"] == pytest.approx(one["test_loss"], abs=1e-4)
    with pytest.raises(SystemExit, match="has runs with --compile"):
        bench_quality.Results(tmp_path / "results--compile/quality_tiny.jsonl", False)


def test_the_model_of_a_testbed_is_the_same_after_a_run(train, short):
    train(METHODS["full"])  # changes every weight of its copy
    kept = testbeds.load_testbed(TESTBEDS["stories260K-lowercase"], short, 32).model.state_dict()
    on_disk = load_file(short / "models/stories260K/model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in on_disk.items())


def test_methods_see_the_same_batches_and_seeds_see_others(short):
    testbed = testbeds.load_testbed(TESTBEDS["stories260K-lowercase"], short, 32)
    runs = run_of(SMT), run_of(METHODS["LoRA"]), run_of(SMT, seed=1)
    first, other_method, other_seed = (
        torch.cat([batch["input_ids"] for batch in bench_quality.batches(run, testbed, 3)]) for run in runs
    )
    assert torch.equal(first, other_method) and not torch.equal(first, other_seed)


def test_full_fine_tuning_runs_once_for_all_budgets_and_targets_and_whole_weights_once_per_target():
    study = study_of(full={"type": "full"}, dense={"type": "dense"}, LoRA={"type": "lora"})
    study |= {"targets": {"v": ["v_proj"], "all": "all-linear"}, "budgets": {"v": [100, 200], "all": [300]}}
    methods = [run.method for run in bench_quality.planned(study)]
    assert [methods.count(method) for method in ("full", "dense", "LoRA")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"testbeds": ["stories"]}, "no testbed stories; there are stories260K-lowercase"),
        ({"methods": {"x": SMT | {"learning_rates": [1], "warmup_testbed": "stories"}}}, "no testbed stories"),
        ({"methods": {"x": {"type": "lorax", "learning_rates": [1]}}}, "type lorax is not one of smt, full"),
        ({"methods": {"x": SMT | {"scop": "input", "learning_rates": [1]}}}, "smt has no option scop"),
        ({"methods": {"x": {"type": "full", "r": 4, "learning_rates": [1]}}}, "full has no option r"),
        ({"methods": {"x": {"type": "smt", "learning_rates": [1]}}}, "smt needs a block_size"),
        ({"methods": {"x": SMT | {"ranking": "best", "learning_rates": [1]}}}, "ranking best is not one of score"),
        ({"methods": {"x": SMT | {"optimizer": "sgd", "learning_rates": [1]}}}, "optimizer sgd is not one of adamw"),
        ({"methods": {"x": SMT | {"delta_scale": "5e-1", "learning_rates": [1]}}}, "delta_scale '5e-1' is neither"),
        ({"methods": {"x": SMT | {"restart": {"step": 9}, "learning_rates": [1]}}}, "restart .* needs steps"),
    ],
)
def test_what_there_is_not_is_refused_before_any_work(sweep, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        sweep(study_of(LoRA={"type": "lora"}) | change)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_folder_without_models_is_named(tmp_path):
    with pytest.raises(SystemExit, match="models/stories260K; give the folder"):
        bench_quality.train(run_of(SMT), TESTBEDS, tmp_path)


def test_a_borrowed_selection_is_the_other_domains(train):
    own, borrowed = (train(METHODS[method], steps=4)["test_loss"] for method in ("SMT", "borrowed"))
    assert own != borrowed


# --- testbeds --------------------------------------------------------------------------------------------------------


def test_a_study_brings_its_own_testbed(sweep, short):
    texts = {name: short / f"data/tinystories/{name}.jsonl" for name in ("train_v2_gpt4", "valid")}
    source = {"model": "models/stories260K", "train": str(texts["train_v2_gpt4"]), "test": str(texts["valid"])}
    [line] = sweep(study_of(LoRA={"type": "lora"}) | {"testbeds": ["mine"], "own_testbeds": {"mine": source}})
    valid = testbeds.load_testbed(TESTBEDS["stories260K-lowercase"], short, 32).base["old_loss"]
    assert line["testbed"] == "mine" and "old_loss" not in line
    assert line["base"]["test_loss"] == pytest.approx(valid, abs=0.05)  # the same text, cut off elsewhere


def test_results_of_a_testbed_of_the_studys_own_are_not_those_of_another_of_that_name():
    study = study_of(LoRA={"type": "lora"}) | {"testbeds": ["mine"]}
    one, other = (study | {"own_testbeds": {"mine": {"model": model, "train": "rows.jsonl"}}} for model in "ab")
    keys = [[run.key for run in bench_quality.planned(each)] for each in (one, other, study_of(LoRA={"type": "lora"}))]
    assert not set(keys[0]) & set(keys[1]) and "source" not in keys[2][0], "known ones keep the keys that they had"


def test_a_testbed_in_bfloat16_trains_and_measures_under_autocast(short, sweep):
    source = asdict(TESTBEDS["stories260K-lowercase"]) | {"bfloat16": True}
    study = study_of(SMT=SMT) | {"testbeds": ["half"], "own_testbeds": {"half": source}}
    sweep(study_of(SMT=SMT))
    seen = set()  # whether forward passes are under autocast: in the warm-up, training and measuring

    def look(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, torch.nn.Linear):
            seen.add(torch.is_autocast_enabled("cpu"))

    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        exact, line = sweep(study)
    assert seen == {True}
    for name in ("test_loss", "old_loss"):
        assert line[name] != exact[name] and line[name] == pytest.approx(exact[name], rel=2e-2)
    assert line["train_loss"][0] != exact["train_loss"][0]
    assert line["base"]["test_loss"] == pytest.approx(exact["base"]["test_loss"], rel=2e-2)
    assert line["trained_parameters"] == exact["trained_parameters"]


@pytest.mark.parametrize("settings", [SMT | {"arrangement": "sorted", "block_size": 16}, {"type": "lora"}], ids=str)
def test_completions_are_learnt(tmp_path, settings):
    rows = [{"text": f"def f{i}(x):", "label": f"number_{i % 3}"} for i in range(600)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(ROOT / "scripts/tiny_llama")
    source = {"model": model, "train": str(tmp_path / "rows.jsonl"), "kind": "completion", "bfloat16": True}
    study = study_of(method=settings) | {"own_testbeds": {"mine": source}, "testbeds": ["mine"], "steps": 20}
    [run] = bench_quality.planned(study | {"budgets": {"qkv": [20_000]}, "tokens": 48, "batch_size": 8})
    line = bench_quality.train(run, bench_quality.sources(study), Path("/"))
    assert (
        line["test_loss"] < 0.5 * line["base"]["test_loss"] and line["test_accuracy"] >= line["base"]["test_accuracy"]
    )
    assert "old_loss" not in line and "answers_loss" not in line


@pytest.mark.parametrize("settings", [SMT | {"block_size": 16, "optimizer": "muon"}, {"type": "full"}], ids=str)
def test_a_classifier_is_trained_beside_every_method(intents, settings):
    study = study_of(method=settings) | {"own_testbeds": {"intents": intents}, "testbeds": ["intents"]}
    study |= {"targets": {"q": ["query"]}, "budgets": {"q": [2560]}, "tokens": 16}
    [run] = bench_quality.planned(study)
    line = bench_quality.train(run, bench_quality.sources(study), Path())
    testbed = testbeds.load_testbed(Source(**intents), Path(), 16)
    head = (384 + 1) * len(testbed.labels)
    whole = sum(parameter.numel() for parameter in testbed.model.parameters())
    assert line["trained_parameters"] == (whole if settings["type"] == "full" else 2560 + head)
    assert 0 <= line["test_accuracy"] <= 1 and "old_loss" not in line


def test_a_classifier_has_a_learning_rate_of_its_own(intents):
    testbed = testbeds.load_testbed(Source(**intents), Path(), 16)
    model = recipes.adapted(Recipe.parse({"type": "full"}), testbed.model, "[]", 0, 0, ["classifier"])
    optimizer = recipes.make_optimizer(Recipe.parse({"type": "full"}), model, 1e-3, ["classifier"], 1e-2)
    rates = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    assert rates == [(1e-3, len(list(model.parameters())) - 2), (1e-2, 2)]


# --- files of options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_planned_and_its_methods_can_be_made(path):
    runs = bench_quality.planned(yaml.safe_load(path.read_text()))
    assert len({run.key for run in runs}) == len(runs) > 0
    configs = {"smt": recipes.SMTConfig, **recipes.RANKED}
    for run in runs:
        recipe = Recipe.parse(json.loads(run.settings))
        if recipe.type in configs:
            configs[recipe.type](target_modules=json.loads(run.modules), **recipe.config)
