"""Tests of scripts/report_quality.py: its numbers against ones computed by hand."""

import json
import math
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import quality_pictures
import report_quality
from bench_quality import planned

SMT = {"type": "smt", "block_size": 4, "learning_rates": [0.01]}
STUDY = {
    "testbeds": ["stories260K-lowercase"],
    "targets": {"qkv": ["q_proj", "k_proj", "v_proj"]},
    "budgets": {"qkv": [3200]},
    "seeds": [0, 1, 2],
    "steps": 2,
    "batch_size": 2,
    "tokens": 32,
    "methods": {
        "LoRA": {"type": "lora", "learning_rates": [0.001, 0.01, 0.1]},
        "SMT": SMT,
        "full": {"type": "full", "learning_rates": [0.001, 0.01]},
    },
}
# By method: learning rate -> validation loss with the first seed, and test losses with all seeds at the best one.
# LoRA's best validation is at 0.01, where its test is worst.
RESULTS = {
    "LoRA": ({0.001: 1.9, 0.01: 1.5, 0.1: float("nan")}, [1.6, 1.8, 1.7]),
    "SMT": ({0.01: 1.6}, [1.5, 1.6, 1.7]),
    "full": ({0.001: 1.2, 0.01: 1.3}, [1.1, 1.1, 1.1]),
}


def lines_of(study: dict, kind: str = "text", results: dict = RESULTS) -> list[dict]:
    """What a study leaves in its file, all of it."""
    lines = []
    for run in planned(study):
        validation, test = results[run.method]
        _, best_rate = min((loss, rate) for rate, loss in validation.items() if not math.isnan(loss))
        best = run.learning_rate == best_rate
        for place, seed in enumerate(study["seeds"] if best else study["seeds"][:1]):
            of_seed = replace(run, seed=seed)
            loss = test[place] if best else 1.0
            line = {"key": of_seed.key, **asdict(of_seed), "trained_parameters": run.budget or 260_032}
            line |= {"validation_loss": validation[run.learning_rate] + place / 10, "test_loss": loss}
            line |= {"blocks_by_type": {"v_proj": 200, "q_proj": 0} if "smt" in run.settings else None}
            line |= {"cpu_seconds": 90 if place else 30, "torch": "2.13.0"}
            if kind == "text":
                line |= {"old_loss": 1.4, "base": {"test_loss": 2.0, "old_loss": 1.25}}
            else:
                line |= {"test_accuracy": 1 - loss / 2, "base": {"test_loss": 2.0, "test_accuracy": 0.125}}
            lines.append(line)
    return lines


@pytest.fixture
def report(tmp_path):
    """Report a study from lines; gives the page."""

    def of(
        study: dict, lines: list[dict], page: str = "before\n<!-- quality_tiny -->\n<!-- /quality_tiny -->\nafter\n"
    ) -> str:
        (tmp_path / "docs/results").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        (tmp_path / "docs/results/quality_tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "docs/page.md").write_text(page)
        places = ["--results", str(tmp_path / "docs/results"), "--page", str(tmp_path / "docs/page.md")]
        report_quality.main([str(tmp_path / "tiny.yaml"), *places])
        return (tmp_path / "docs/page.md").read_text()

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
    assert smt["learning rate"] == "0.01" and smt["blocks, first seed"] == "v_proj 200"
    assert full["learning rate"] == "0.001* of 0.001 0.01" and full["- LoRA"] == "-0.600 ± 0.100"


def test_a_classifier_is_judged_by_its_accuracy(report):
    page = report(STUDY, lines_of(STUDY, "classification"))
    lora, smt, _ = rows_of(page)
    assert "(before: test 2.000, accuracy 12.5 %)" in page and "old domain" not in lora
    assert lora["accuracy"] == "15.0 ± 5.0 %" and smt["- LoRA"] == "+5.0 ± 5.0 points"


def test_what_is_not_complete_is_reported_as_far_as_it_is(report):
    lines = lines_of(STUDY)
    some = [line for line in lines if (line["method"], line["seed"]) in {("LoRA", 0), ("LoRA", 1), ("SMT", 0)}]
    for line in some:
        line.pop("train_loss", None)
    page = report(STUDY, some)
    lora, smt = rows_of(page)
    assert (lora["seeds"], smt["seeds"]) == ("2", "1") and smt["- LoRA"] == "-0.100"  # of the seed that both have
    assert f"{len(some)} of 12 runs; torch 2.13.0." in page
    assert "0 of 12 runs." in report(STUDY, [])


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


@pytest.mark.parametrize(
    ("change", "drawn"),
    [
        ({"budgets": {"qkv": [1600, 3200]}}, "draw_budgets"),
        ({"x_axis": "learning_rate"}, "draw_rates"),
        ({}, "draw_seeds"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "classification"])
def test_the_picture_shows_what_varies(report, tmp_path, monkeypatch, change, drawn, kind):
    called = []
    for name in ("draw_budgets", "draw_rates", "draw_seeds"):
        draw = getattr(sys.modules["quality_pictures"], name)
        monkeypatch.setattr(
            f"quality_pictures.{name}", lambda *a, name=name, draw=draw: called.append(name) or draw(*a)
        )
    page = report(STUDY | change, lines_of(STUDY | change, kind))
    assert called == [drawn] and "![tiny](results/quality_tiny.png)" in page
    assert (tmp_path / "docs/results/quality_tiny.png").read_bytes().startswith(b"\x89PNG")


BUDGETS, RATES = {"budgets": {"qkv": [1600, 3200]}}, {"x_axis": "learning_rate"}


@pytest.fixture
def picture(report, monkeypatch):
    """Report a study; gives its page and its figure."""
    figures = []
    monkeypatch.setattr(quality_pictures.Figure, "savefig", lambda figure, *args, **options: figures.append(figure))

    def of(study: dict, lines: list[dict]):
        page = report(study, lines)
        figures[-1].draw_without_rendering()
        return page, figures[-1]

    return of


@pytest.mark.parametrize("change", [BUDGETS, RATES, {}], ids=["budgets", "rates", "seeds"])
def test_a_picture_of_one_seed_promises_neither_bars_nor_circles(picture, change):
    circles = {}
    for seeds in ([0], [0, 1, 2]):
        study = STUDY | change | {"seeds": seeds}
        page, figure = picture(study, lines_of(study))
        assert ("bars:" in page) == ("ean over the seeds" in page) == (len(seeds) > 1)
        circles[len(seeds)] = [line for line in figure.axes[0].get_lines() if line.get_markersize() == 3.5]
        assert ("Small circles" in page) == bool(circles[len(seeds)])
    assert not circles[1] and bool(circles[3]) == (change == {})


def test_another_x_axis_is_named(report):
    study = STUDY | {"x_axis": "budget"}
    with pytest.raises(SystemExit, match="x_axis budget is not learning_rate"):
        report(study, lines_of(study))


def test_types_share_neither_colour_nor_dash_nor_marker():
    looks = [(type_, dash, *look) for type_, (dash, looks) in quality_pictures.STYLES.items() for look in looks]
    types, dashes, colours, markers = zip(*looks, strict=True)
    assert len(set(types)) == len(set(dashes)) and len(looks) == len(set(colours)) == len(set(markers))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_methods_of_a_type_share_their_dash_but_neither_colour_nor_marker(count):
    methods = {f"SMT {number}": {"type": "smt"} for number in range(count)}
    smt = quality_pictures.styles({"methods": methods}).values()
    assert len({look["linestyle"] for look in smt}) == 1
    assert len({look["color"] for look in smt}) == len({look["marker"] for look in smt}) == count


@pytest.mark.parametrize("change", [BUDGETS, RATES, {}], ids=["budgets", "rates", "seeds"])
def test_noise_is_not_magnified(picture, change):
    study = STUDY | change
    lines = [line | {"test_loss": 1.5 + line["seed"] / 1e4, "old_loss": 1.4} for line in lines_of(study)]
    _, figure = picture(study, lines)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    limits = [axes.get_ylim() for axes in panels] + [
        axes.get_xlim() for axes in panels if axes.get_xscale() == "linear"
    ]
    assert all(round(high - low, 9) >= 0.02 for low, high in limits)


def test_one_budget_alone_does_not_spread_what_is_drawn_beside_it(picture):
    study = STUDY | {"targets": STUDY["targets"] | {"v": ["v_proj"]}, "budgets": {"qkv": [3200, 6400], "v": [3200]}}
    _, figure = picture(study, lines_of(study))
    low, high = figure.axes[1].get_xlim()
    assert low <= 1600 and high >= 6400


@pytest.mark.parametrize(
    "rates", [[5e-3, 1e-2, 2e-2, 3e-2], [5e-4, 1e-3, 2e-3, 5e-3], [1e-4, 3e-4, 1e-3, 1e-2, 5e-2], [1e-2]]
)
def test_learning_rates_do_not_run_together(picture, rates):
    study = STUDY | RATES | {"methods": {"SMT": SMT | {"learning_rates": rates}}}
    lines = [line | {"learning_rate": rate} for rate in rates for line in lines_of(STUDY) if line["method"] == "SMT"]
    keys = {(run.learning_rate, seed): replace(run, seed=seed).key for run in planned(study) for seed in (0, 1, 2)}
    _, figure = picture(study, [line | {"key": keys[line["learning_rate"], line["seed"]]} for line in lines])
    low, high = figure.axes[-1].get_xlim()
    ticks = [tick for tick in figure.axes[-1].xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    assert 2 <= len(boxes) <= 4 and all(one.x1 + 3 < other.x0 for one, other in pairwise(boxes))


def test_the_overview_has_the_differences_that_a_hand_computes(report, tmp_path):
    smt = dict.fromkeys(("SMT, whole model", "SMT, per input"), SMT)
    study = STUDY | {"methods": {"LoRA": STUDY["methods"]["LoRA"], **smt}}
    known = {"LoRA": ({0.001: 1.9, 0.01: 1.5, 0.1: 1.6}, [1.6, 1.8, 1.7])}
    known |= {"SMT, whole model": ({0.01: 1.7}, [2.0, 2.0, 2.0]), "SMT, per input": ({0.01: 1.6}, [1.5, 1.6, 1.7])}
    page = "<!-- quality_tiny -->\n<!-- /quality_tiny -->\n<!-- quality_overview -->\n<!-- /quality_overview -->\n"
    [row] = [row for row in rows_of(report(study, lines_of(study, results=known), page)) if "best SMT" in row]
    assert row["testbed, parameters"] == "stories260K-lowercase, qkv, 3,200" and row["LoRA"] == "1.700 ± 0.100"
    assert row["paper's SMT - LoRA"] == "+0.300 ± 0.100" and row["seeds"] == "3"
    assert row["best SMT"] == "per input" and row["best SMT - LoRA"] == "-0.100 ± 0.100"
    assert (tmp_path / "docs/results/quality_overview.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_pages_studies_leaves_the_overview_alone(report, capsys):
    study = STUDY | {"methods": {"LoRA": STUDY["methods"]["LoRA"], "SMT, whole model": SMT}}
    other = "<!-- quality_other -->\n<!-- /quality_other -->\n<!-- quality_overview -->\nas before\n"
    lines = lines_of(study, results={"LoRA": RESULTS["LoRA"], "SMT, whole model": RESULTS["LoRA"]})
    page = report(study, lines, f"<!-- quality_tiny -->\n<!-- /quality_tiny -->\n{other}")
    assert page.endswith(other) and "| LoRA |" in page
    assert "the overview stays as it is" in capsys.readouterr().out


def result_of(curve: list[tuple[float, float, float]], best: float) -> report_quality.Result:
    """A method that ran with these (learning rate, test loss, old loss)."""
    runs = [dict(zip(("learning_rate", "test_loss", "old_loss"), values, strict=True)) for values in curve]
    return report_quality.Result([run for run in runs if run["learning_rate"] == best], runs)


def test_forgetting_is_compared_at_equal_loss():
    lora = result_of([(1, 2.0, 1.0), (2, 1.0, 2.0), (3, 1.5, 9.0)], best=2)  # 3 - loss, as far as its best
    smt = result_of([(1, 1.8, 1.0), (2, 1.2, 1.6), (3, 3.0, 9.0)], best=2)  # 2.8 - loss
    assert report_quality.forgets_more(smt, lora) == pytest.approx([-0.2])
    assert report_quality.forgets_more(lora, smt) == pytest.approx([0.2])
    assert report_quality.forgets_more(result_of([(1, 3.0, 1.0)], best=1), lora) == []  # none that both reach


def test_a_page_keeps_what_stands_around_its_markers_and_is_the_same_the_second_time(report):
    first = report(STUDY, lines_of(STUDY))
    assert first.startswith("before\n<!-- quality_tiny -->\n") and first.endswith("<!-- /quality_tiny -->\nafter\n")
    assert report(STUDY, lines_of(STUDY), first) == first


def test_a_page_without_the_markers_is_named_and_left_as_it_is(report, tmp_path):
    with pytest.raises(SystemExit, match="no place for quality_tiny: add <!-- quality_tiny --> and"):
        report(STUDY, lines_of(STUDY), "nothing\n")
    assert (tmp_path / "docs/page.md").read_text() == "nothing\n"
