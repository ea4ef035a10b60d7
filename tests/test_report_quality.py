"""Tests of scripts/studies/report_quality.py: its numbers against ones computed by hand."""

import json
import re

import pytest
import report_quality
import yaml
from made_up_study import RESULTS, SMT, STUDY, lines_of

PAGE = "Links [tables](results/quality_tiny.md).\n"


@pytest.fixture
def report(tmp_path):
    """Report a study from lines; gives the page that is made of it."""

    def of(study: dict, lines: list[dict], *options: str) -> str:
        (tmp_path / "docs/results").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        (tmp_path / "docs/results/quality_tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report_quality.main([str(tmp_path / "tiny.yaml"), "--results", str(tmp_path / "docs/results"), *options])
        return (tmp_path / "docs/results/quality_tiny.md").read_text()

    return of


@pytest.fixture
def overview(report, tmp_path):
    """Report a study from lines beside a page that links it; gives the overview, if there is one."""

    def of(study: dict, lines: list[dict], page: str = PAGE) -> str:
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs/page.md").write_text(page)
        report(study, lines, "--page", str(tmp_path / "docs/page.md"))
        page = tmp_path / "docs/results/quality_overview.md"
        return page.read_text() if page.exists() else ""

    return of


def rows_of(page: str) -> list[dict[str, str]]:
    """Every row of every table, by column."""
    rows, head = [], None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
        elif cells[0] != "---":
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def test_a_table_has_the_numbers_that_a_hand_computes(report):
    lora, smt, full = rows_of(report(STUDY, lines_of(STUDY)))
    assert lora == {
        "method": "LoRA",
        "trained": "3,200",
        "learning rate": "0.01 of 0.001 0.01 0.1",
        "validation": "1.600",  # mean of 1.5, 1.6, 1.7
        "test": "1.700 ± 0.100",
        "- LoRA": "",
        "old domain": "1.400 ± 0.000",
        "seeds": "3",
        "CPU min": "1.2",  # 30, 90 and 90 seconds
        "blocks, first seed": "",
    }
    # -0.1, -0.2 and 0: their standard deviation is 0.1, that of unpaired seeds would be greater
    assert smt["- LoRA"] == "-0.100 ± 0.100" and smt["test"] == "1.600 ± 0.100"
    assert smt["learning rate"] == "0.01*" and smt["blocks, first seed"] == "v_proj 200"
    assert full["learning rate"] == "0.001* of 0.001 0.01" and full["- LoRA"] == "-0.600 ± 0.100"


def test_what_a_model_forgets_of_its_own_answers_has_a_column(report):
    lines = [
        line | {"answers_loss": 2.0 + line["seed"], "base": line["base"] | {"answers_loss": 0.5}}
        for line in lines_of(STUDY)
    ]
    page = report(STUDY, lines)
    assert rows_of(page)[0]["own answers"] == "3.000 ± 1.000" and "own answers 0.500)" in page


def test_a_classifier_is_judged_by_its_accuracy(report):
    page = report(STUDY, lines_of(STUDY, "classification"))
    lora, smt, _ = rows_of(page)
    assert "(before: test 2.000, accuracy 12.5 %)" in page and "old domain" not in lora
    assert lora["accuracy"] == "15.0 ± 5.0 %" and smt["- LoRA"] == "+5.0 ± 5.0 points"


def test_what_is_not_complete_is_reported_as_far_as_it_is(report):
    lines = lines_of(STUDY)
    some = [line for line in lines if (line["method"], line["seed"]) in {("LoRA", 0), ("LoRA", 1), ("SMT", 0)}]
    page = report(STUDY, some)
    lora, smt = rows_of(page)
    assert (lora["seeds"], smt["seeds"]) == ("2", "1") and smt["- LoRA"] == "-0.100"  # of the seed that both have
    assert f"{len(some)} of 12 runs, torch 2.13.0:" in page and "**Not complete" in page
    assert "0 of 12 runs:" in report(STUDY, [])


def test_without_lora_the_first_method_is_what_others_are_compared_with(report):
    study = STUDY | {"methods": {name: STUDY["methods"][name] for name in ("SMT", "full")}}
    assert rows_of(report(study, lines_of(study)))[1]["- SMT"] == "-0.500 ± 0.100"


def test_lines_that_the_study_does_not_ask_for_are_left_out_and_counted(report, capsys):
    lines = lines_of(STUDY)
    lora = [line for line in lines if line["method"] == "LoRA"]
    page = report(STUDY | {"methods": {"LoRA": STUDY["methods"]["LoRA"]}}, lines)
    assert len(rows_of(page)) == 1 and f"{len(lines) - len(lora)} more that the study" in capsys.readouterr().out


def test_full_fine_tuning_and_whole_weights_stand_in_every_table_that_they_belong_to(report, monkeypatch):
    monkeypatch.setitem(RESULTS, "dense", RESULTS["SMT"])
    methods = STUDY["methods"] | {"dense": {"type": "dense", "learning_rates": [0.01]}}
    budgets = {"qkv": [1600, 3200], "v": [1600]}
    study = STUDY | {"targets": STUDY["targets"] | {"v": ["v_proj"]}, "budgets": budgets, "methods": methods}
    page = report(study, lines_of(study))
    assert [row["method"] for row in rows_of(page)] == 3 * ["LoRA", "SMT", "full", "dense"]
    assert page.count("about 1,600 parameters") == 2 and page.count("about 3,200 parameters") == 1
    only = [line for line in lines_of(study) if line["target"] != "v" and line["budget"] != 3200]
    assert report(study, only).count("before:") == 1  # they do not begin a table of their own


def test_more_targets_than_methods_stand_in_one_table(report):
    study = STUDY | {"targets": {"v": ["v_proj"], "o": ["o_proj"]}, "methods": {"SMT": SMT}}
    study |= {"budgets": {"v": [3200], "o": [3200]}}
    assert [row["method"] for row in rows_of(report(study, lines_of(study)))] == ["v: SMT", "o: SMT"]


def test_the_page_of_a_study_says_where_it_comes_from_and_what_was_read_in_it(report, tmp_path):
    (tmp_path / "docs/results/notes").mkdir(parents=True)
    (tmp_path / "docs/results/notes/tiny.md").write_text("SMT wins here.\n")
    page = report(STUDY, lines_of(STUDY))
    assert page.startswith("# tiny\n\n[tiny.yaml](../../tiny.yaml), 12 of 12 runs, torch 2.13.0:")
    assert f"    python scripts/studies/bench_quality.py {tmp_path}/tiny.yaml" in page and "Not complete" not in page
    assert page.index("SMT wins here.") < page.index("![tiny](quality_tiny.png)") < page.index("| LoRA |")
    assert (tmp_path / "docs/results/quality_tiny.png").read_bytes().startswith(b"\x89PNG")
    assert report(STUDY, lines_of(STUDY)) == page, "the same the second time"


# --- the overview ----------------------------------------------------------------------------------------------------

BLOCKS = dict.fromkeys(("SMT, whole model", "SMT, per input"), SMT)
TUNED = STUDY | {"methods": {"LoRA": STUDY["methods"]["LoRA"], **BLOCKS}}
KNOWN = {
    "LoRA": ({0.001: 1.9, 0.01: 1.5, 0.1: 1.6}, [1.6, 1.8, 1.7]),
    "SMT, whole model": ({0.01: 1.7}, [2.0, 2.0, 2.0]),
    "SMT, per input": ({0.01: 1.6}, [1.5, 1.6, 1.7]),
}


def test_the_overview_has_the_differences_that_a_hand_computes(overview, tmp_path):
    page = overview(TUNED, lines_of(TUNED, results=KNOWN))
    [row] = rows_of(page)
    assert row["testbed, parameters"] == "stories260K-lowercase, qkv, 3,200" and row["LoRA"] == "1.700 ± 0.100"
    assert row["paper's SMT - LoRA"] == "+0.300 ± 0.100" and row["seeds"] == "3"
    assert row["best SMT"] == "per input" and row["best SMT - LoRA"] == "-0.100 ± 0.100"
    assert (tmp_path / "docs/results/quality_overview.png").read_bytes().startswith(b"\x89PNG")
    assert "![overview](quality_overview.png)" in page


def test_the_overview_has_places_where_the_papers_recipe_was_not_tried(overview):
    methods = {name: options for name, options in TUNED["methods"].items() if name != "SMT, whole model"}
    study = TUNED | {"methods": methods}
    results = {name: result for name, result in KNOWN.items() if name in methods}
    [row] = rows_of(overview(study, lines_of(study, results=results)))
    assert row["paper's SMT - LoRA"] == "" and row["best SMT - LoRA"] == "-0.100 ± 0.100"


def test_a_part_of_the_pages_studies_leaves_the_overview_alone(overview, capsys):
    page = f"[tables](results/quality_other.md) quality_STUDY.md\n{PAGE}"
    assert not overview(TUNED, lines_of(TUNED, results=KNOWN), page)
    assert re.search(r"The overview stays as it is, because .* links other, too\.", capsys.readouterr().out)
