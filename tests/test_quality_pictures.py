"""Tests of scripts/studies/quality_pictures.py: what is drawn, and whether it can be read."""

from dataclasses import replace
from itertools import pairwise

import pytest
import quality_pictures
from bench_quality import planned
from made_up_study import SMT, STUDY, lines_of
from quality_results import frames, results_of, runs_of

BUDGETS, RATES = {"budgets": {"qkv": [1600, 3200]}}, {"x_axis": "learning_rate"}


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """Draw a study; gives the caption and the figure."""
    figures = []
    monkeypatch.setattr(quality_pictures.Figure, "savefig", lambda figure, *args, **options: figures.append(figure))

    def of(study: dict, lines: list[dict]):
        results = results_of(study, runs_of(study, lines))
        caption = quality_pictures.draw(study, results, frames(study, results), tmp_path / "tiny.png")
        figures[-1].draw_without_rendering()
        return caption, figures[-1]

    return of


@pytest.mark.parametrize("kind", ["text", "classification"])
def test_the_picture_shows_what_varies(picture, kind):
    for change, axis in ((BUDGETS, "trained parameters"), (RATES, "learning rate"), ({}, "test")):
        _, figure = picture(STUDY | change, lines_of(STUDY | change, kind))
        assert figure.axes[-1].get_xlabel().startswith(axis)


@pytest.mark.parametrize("change", [BUDGETS, RATES, {}], ids=["budgets", "rates", "seeds"])
def test_a_picture_of_one_seed_promises_neither_bars_nor_circles(picture, change):
    circles = {}
    for seeds in ([0], [0, 1, 2]):
        study = STUDY | change | {"seeds": seeds}
        caption, figure = picture(study, lines_of(study))
        assert ("bars:" in caption) == ("ean over the seeds" in caption) == (len(seeds) > 1)
        circles[len(seeds)] = [line for line in figure.axes[0].get_lines() if line.get_markersize() == 3.5]
        assert ("Small circles" in caption) == bool(circles[len(seeds)])
    assert not circles[1] and bool(circles[3]) == (change == {})


def test_another_x_axis_is_named(picture):
    study = STUDY | {"x_axis": "budget"}
    with pytest.raises(SystemExit, match="x_axis budget is not learning_rate"):
        picture(study, lines_of(study))


def test_testbeds_with_losses_far_apart_have_axes_of_their_own(picture):
    study = STUDY | RATES | {"testbeds": ["stories260K-lowercase", "babyllama-lowercase"]}
    lines = [
        line | {"test_loss": line["test_loss"] - (line["testbed"] == "babyllama-lowercase")}
        for line in lines_of(study)
    ]
    _, figure = picture(study, lines)
    (low, high), (other_low, other_high) = (axes.get_ylim() for axes in figure.axes[-2:])
    assert other_high < low < high and other_low < other_high


def test_a_legend_of_long_names_leaves_the_panels_their_width(picture):
    widths = []
    for name in ("SMT", "SMT, per kind of input, blocks of 128, Muon"):
        study = STUDY | RATES | {"methods": {name: SMT}}
        lines = [line | {"method": name} for line in lines_of(STUDY) if line["method"] == "SMT"]
        keys = [replace(run, seed=seed).key for run in planned(study) for seed in (0, 1, 2)]
        _, figure = picture(study, [line | {"key": key} for line, key in zip(lines, keys, strict=True)])
        widths.append(figure.axes[0].get_window_extent().width)
    assert widths[1] > 0.8 * widths[0]


def test_kinds_share_neither_colour_nor_dash_nor_marker():
    looks = [(kind, dash, *look) for kind, (dash, looks) in quality_pictures.STYLES.items() for look in looks]
    kinds, dashes, colours, markers = zip(*looks, strict=True)
    assert len(set(kinds)) == len(set(dashes)) and len(looks) == len(set(colours)) == len(set(markers))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_methods_of_a_kind_share_their_dash_but_neither_colour_nor_marker(count):
    methods = {f"SMT {number}": {"type": "smt"} for number in range(count)}
    smt = quality_pictures.styles({"methods": methods}).values()
    assert len({look["linestyle"] for look in smt}) == 1
    assert len({look["color"] for look in smt}) == len({look["marker"] for look in smt}) == count


def test_sorted_blocks_are_not_drawn_like_tiles():
    kinds = [SMT | {"arrangement": arrangement} for arrangement in ("tiles", "sorted") for _ in range(5)]
    looks = quality_pictures.styles({"methods": dict(enumerate(kinds))}).values()
    assert len({look["linestyle"] for look in looks}) == 2 and len({look["color"] for look in looks}) == 10


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
