"""Tests of scripts/studies/bench_selection.py: figures against those computed by hand, and against `select_blocks`."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bench_selection
import pytest
import report_selection
import torch
from bench_selection import Half, Setting, Subject
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from smt_peft import SMTConfig, select_blocks

ROOT = Path(__file__).parents[1]

BEDS = ("stories260K-lowercase", "stories260K-gpt4")
COUNTS = [1, 3]


@pytest.fixture
def files(tmp_path, shared, monkeypatch) -> Path:
    """A folder with models/ and data/ cut short, and settings to match."""
    for name in ("train_v1_lowercase", "train_v2_gpt4", "valid"):
        short = tmp_path / "data/tinystories" / f"{name}.jsonl"
        short.parent.mkdir(parents=True, exist_ok=True)
        with (shared / "data/tinystories" / short.name).open() as file:
            short.write_text("".join(line for line, _ in zip(file, range(40), strict=False)))
    shutil.copytree(shared / "models/stories260K", tmp_path / "models/stories260K")
    monkeypatch.setattr(bench_selection, "SETTINGS", dict.fromkeys(BEDS, Setting(4, 2, 32)))
    return tmp_path


def silent() -> tqdm:
    return tqdm(disable=True)


def made_up(scores: list[torch.Tensor], others: list[torch.Tensor], budget: int) -> Subject:
    """A subject with the scores of two halves after one batch, in blocks of 1 x 1."""
    subject = object.__new__(Subject)
    subject.setting, subject.budget = Setting(1, 1, 1), budget
    subject.modules = {f"layers.{i}.q_proj": nn.Linear(*score.T.shape) for i, score in enumerate(scores)}
    subject.grids, subject.sizes = [tuple(s.shape) for s in scores], [s.numel() for s in scores]
    subject.halves = [SimpleNamespace(after={1: of}, scores={"abs_mean": of}) for of in (scores, others)]
    return subject


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_agreement_is_the_share_of_blocks_in_common_and_chance_is_what_random_blocks_would_share():
    first = [torch.tensor([[9.0, 8.0], [1.0, 1.0]]), torch.tensor([[7.0, 6.0, 1.0, 1.0]])]
    second = [torch.tensor([[9.0, 1.0], [8.0, 7.0]]), torch.tensor([[6.0, 1.0, 1.0, 1.0]])]
    found = made_up(first, second, budget=4).agreement("model")
    assert found["overlap"] == {1: [2 / 4, 2 / 4]}, "both have the first block of each module"
    assert found["random"] == 4 / 8
    assert found["random_in_modules"] == (2 * 3 / 4 + 2 * 1 / 4) / 4


def test_places_are_shares_of_the_selection_by_type_and_layer():
    scores = [torch.tensor([[9.0, 8.0], [7.0, 1.0]]), torch.tensor([[6.0, 1.0, 1.0, 1.0]])]
    assert made_up(scores, scores, budget=4).places() == {"q_proj": [3 / 4, 1 / 4]}


class Aligned(nn.Module):
    """Two projections of a constant input; what comes back is a constant, too, so that all tokens pull one way."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})])

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        projections = self.layers[0]
        return SimpleNamespace(loss=0.5 * projections["q_proj"](x).sum() + 2 * projections["v_proj"](x).sum())


@pytest.fixture
def aligned():
    """A subject with one batch of nine tokens of 3.0 in each half; the budget is all blocks of one module."""
    model = Aligned()
    names = [f"layers.0.{kind}" for kind in ("q_proj", "v_proj")]
    subject = made_up([torch.ones(2, 2)] * 2, [torch.ones(2, 2)] * 2, budget=4)
    subject.setting, subject.modules = Setting(2, 1, 9), {name: model.get_submodule(name) for name in names}
    testbed = SimpleNamespace(model=model)
    batches = [{"x": torch.full((1, 9, 4), 3.0)}]
    subject.halves = [Half(subject.modules, 2).run(testbed, batches, [1], silent()) for _ in range(2)]
    return subject


def test_factors_are_those_of_tokens_that_all_pull_one_way(aligned):
    factors = aligned.factors()
    for kind, dy in (("q_proj", 0.5), ("v_proj", 2.0)):
        own = factors[kind]
        assert own["x"] == pytest.approx(3.0) and own["dy"] == pytest.approx(dy)
        assert own["mean |g|"] == own["best |g|"] == pytest.approx(9 * 3 * dy)
        assert own["coherence"] == pytest.approx(9**0.5), "independent tokens would have about 1"
        assert own["peak"] == pytest.approx(1) and own["share of score in best"] == pytest.approx(1 / 4)
        assert own["candidates"] == 0.5
    assert (factors["q_proj"]["selected"], factors["v_proj"]["selected"]) == (0, 1)


def test_criteria_see_what_they_are_named_after(aligned):
    aligned.budget = 1
    with torch.no_grad():
        list(aligned.modules.values())[0].weight[2:, 2:] = 10  # noqa: RUF015
    blocks = {name: one.index.tolist() for name, one in aligned.criteria("model").items()}
    assert blocks["magnitude"] == [[0, 1, 1]] and blocks["abs_mean"] == blocks["l2, signed"] == [[1, 0, 0]]
    assert len(blocks) == 10


# --- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def subject(files) -> Subject:
    seen = Subject(BEDS[0], files)
    seen.look(COUNTS, silent())
    return seen


@pytest.mark.filterwarnings("ignore:.* selected blocks are in")
@pytest.mark.parametrize("scope", bench_selection.SCOPES)
def test_a_half_gives_the_selection_that_the_package_gives(files, monkeypatch, scope):
    seen = Subject(BEDS[0], files)
    model, batch, read = copy.deepcopy(seen.testbed.model), seen.testbed.batch, []
    monkeypatch.setattr(seen.testbed, "batch", lambda rows: read.append(batch(rows)) or read[-1])
    seen.look(COUNTS, silent())
    config = SMTConfig(
        target_modules=list(seen.modules), block_size=4, num_blocks=seen.budget, scope=scope, warmup_steps=COUNTS[-1]
    )
    package = select_blocks(get_peft_model(model, config), read[: COUNTS[-1]], progress_bar=False)
    assert torch.equal(package.index, seen.best(0, scope).index)
    assert package.overlap(seen.best(0, scope)) == 1


def test_the_halves_share_no_row(files, monkeypatch):
    read = []
    seen = Subject(BEDS[0], files)
    batch = seen.testbed.batch
    monkeypatch.setattr(seen.testbed, "batch", lambda rows: read.extend(map(tuple, rows.tolist())) or batch(rows))
    seen.look(COUNTS, silent())
    assert len(read) == len(set(read)) == 2 * 3 * 2


def test_what_was_kept_after_some_batches_is_not_changed_by_later_ones(subject):
    first, last = (subject.halves[0].after[count] for count in COUNTS)
    assert all((a <= b).all() and not torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_a_run_writes_figures_pictures_and_a_page(files):
    results = files / "results"
    (results / "notes").mkdir(parents=True)
    (results / "notes/selection.md").write_text("What we read in it.\n")
    places = ["--shared", str(files), "--results", str(results)]
    bench_selection.main([*places, "--testbeds", *BEDS, "--counts", *map(str, COUNTS)])
    found = json.loads((results / "selection.json").read_text())
    assert set(found["testbeds"]) == set(BEDS)
    assert found["tasks"]["module"]["lowercase, first half"]["lowercase, first half"] == 1
    for testbed in found["testbeds"].values():
        assert sum(own["selected"] for own in testbed["factors"].values()) == pytest.approx(1)
        assert sum(map(sum, testbed["places"].values())) == pytest.approx(1)
        assert testbed["criteria"]["module"]["abs_mean"] == 1 > testbed["criteria"]["module"]["random"]
        assert testbed["selected"] / testbed["blocks"] == pytest.approx(0.022 * 260032 / 226560, rel=0.01)
    names = ("batches", "tasks_model", "tasks_module", "criteria", "factors", "places")
    assert all((results / f"selection_{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    text = (results / "selection.md").read_text()
    assert "What we read in it." in text and all(f"](selection_{name}.png)" in text for name in names)
    assert "| stories260K-gpt4 | per module |" in text and "| v_proj |" in text
    report_selection.main(results)
    assert (results / "selection.md").read_text() == text, "made again from the file alone"


def test_one_testbed_alone_has_no_tasks_to_compare(files):
    places = ["--shared", str(files), "--results", str(files)]
    bench_selection.main([*places, "--testbeds", BEDS[0], "--counts", "1"])
    assert json.loads((files / "selection.json").read_text())["tasks"] == {}
    assert "tasks" not in (files / "selection.md").read_text()


def test_a_testbed_without_settings_is_refused(files):
    with pytest.raises(SystemExit, match="no settings for minilm-boolq; there are some for stories260K-lowercase"):
        Subject("minilm-boolq", files)


def test_too_little_data_is_refused(files):
    with pytest.raises(SystemExit, match="two halves need 400000"):
        Subject(BEDS[0], files).look([100_000], silent())
