"""Tests of smt_peft/plotting.py."""

import sys

import pytest
import torch

from smt_peft import Selection
from smt_peft.plotting import plot_losses, plot_overlap, plot_quality, plot_selection, plot_shares
from smt_peft.selection import select

matplotlib = pytest.importorskip("matplotlib")


def selection_of(names: list[str], shapes: list[tuple[int, int]], budget: int) -> Selection:
    """A selection from scores that rise from block to block, so that the last blocks win."""
    scores = [torch.arange(r * c).view(r, c) + 100.0 * i for i, (r, c) in enumerate(shapes)]  # one score is zero
    index = select(scores, [(range(len(names)), budget)], "model")
    return Selection(names, 4, index, scores)


def titles(figure) -> dict[str, str]:
    """What stands above the modules, by what is drawn in them."""
    return [ax.get_title().split("\n")[-1] for ax in figure.axes if ax.images]


@pytest.fixture
def selection() -> Selection:
    names = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")]
    return selection_of(names, [(3, 3), (2, 3)] * 2, budget=8)


def test_each_module_is_drawn_with_its_scores(selection):
    drawn = [ax.images[0].get_array().data for ax in plot_selection(selection).axes if ax.images]
    expected = [selection.scores[target] for target in (0, 2, 1, 3)]  # a row of layers for each type
    assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(drawn, expected, strict=True))


def test_the_selected_blocks_are_framed_and_no_others(selection):
    figure = plot_selection(selection)
    framed = []
    for ax, target in zip([ax for ax in figure.axes if ax.images], (0, 2, 1, 3), strict=True):
        for frame in ax.collections[0].get_paths():
            column, row = frame.vertices[:4].mean(0).round().astype(int).tolist()
            framed.append([target, row, column])
    assert sorted(framed) == selection.index.tolist()


def test_titles_count_the_selected_blocks(selection):
    assert titles(plot_selection(selection)) == ["0/9", "2/9", "0/6", "6/6"]


def test_many_layers_are_wrapped_so_that_the_picture_fits_a_page():
    names = [f"layers.{layer}.v_proj" for layer in range(32)]
    width, height = plot_selection(selection_of(names, [(4, 4)] * 32, 10)).get_size_inches()
    assert width < 14 and height < 14


def test_modules_outside_of_layers_and_equal_scores_can_be_drawn():
    selection = Selection(["head"], 4, torch.tensor([[0, 0, 1]]), [torch.ones(2, 2)])
    assert titles(plot_selection(selection)) == ["1/4"]


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_ending_of_the_path_chooses_the_format(selection, tmp_path, ending, start):
    path = tmp_path / f"picture.{ending}"
    plot_selection(selection, path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    "draw",
    [
        lambda selection, path: plot_shares(selection, path),
        lambda selection, path: plot_overlap({"one": selection}, path),
        lambda selection, path: plot_losses({"run": [(1, 2.0)]}, path=path),
        lambda selection, path: plot_quality({"method": [(1, 2.0)]}, path=path),
    ],
    ids=["shares", "overlap", "losses", "quality"],
)
def test_every_picture_is_saved_where_it_is_given_a_path(selection, tmp_path, draw):
    draw(selection, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_without_scores_it_says_what_is_missing(selection):
    selection.scores = None
    with pytest.raises(ValueError, match="no scores"):
        plot_selection(selection)


def test_without_matplotlib_it_names_the_extra(selection, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'smt-peft\[plot\]'"):
        plot_selection(selection)


# --- shares and overlap ------------------------------------------------------------------------------------------


def test_bars_are_the_share_of_blocks_per_type_and_layer(selection):
    drawn = {}
    for bars in plot_shares(selection).axes[0].containers:
        kind = bars.get_label().split(":")[0]
        drawn |= {(layer, kind): bar.get_height() for layer, bar in enumerate(bars)}
    counts = {(layer, kind): 0 for layer in (0, 1) for kind in ("q_proj", "v_proj")}
    for target in selection.index[:, 0].tolist():
        counts[target // 2, selection.names[target].split(".")[-1]] += 1
    assert drawn == {place: pytest.approx(100 * count / 8) for place, count in counts.items()}


def test_the_bars_of_a_layer_stand_on_each_other(selection):
    first, second = plot_shares(selection).axes[0].containers
    for below, above in zip(first, second, strict=True):
        assert above.get_y() == pytest.approx(below.get_height())


def test_shares_need_no_scores_and_no_layers():
    ax = plot_shares(Selection(["head", "layers.3.mlp"], 4, torch.tensor([[0, 0, 1], [1, 0, 0]]))).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-", "3"]


def test_the_matrix_shows_every_pairs_overlap(selection):
    other = Selection(selection.names, 4, torch.cat([selection.index[:2], torch.tensor([[0, 0, 0]])]))
    ax = plot_overlap({"one": selection, "other": other}).axes[0]
    shown = {text.get_position(): text.get_text() for text in ax.texts}
    assert shown == {(0, 0): "100", (1, 0): "25", (0, 1): "25", (1, 1): "100"}  # 2 of max(8, 3) blocks
    assert ax.images[0].get_array().tolist() == [[100, 25], [25, 100]]


# --- curves ------------------------------------------------------------------------------------------------------


LOG = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.5}, {"step": 2, "loss": 2.0}, {"train_runtime": 1.0}]


def curves(figure) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in figure.axes[0].get_lines()}


def test_losses_are_those_of_the_log_or_of_the_list():
    assert curves(plot_losses({"trainer": LOG, "by hand": [(5, 1.0), (6, 0.5)]})) == {
        "trainer": [(1, 3.0), (2, 2.0)],
        "by hand": [(5, 1.0), (6, 0.5)],
    }


def test_another_entry_of_the_log_can_be_drawn():
    figure = plot_losses({"trainer": LOG}, key="eval_loss")
    assert curves(figure) == {"trainer": [(1, 2.5)]} and figure.axes[0].get_ylabel() == "eval loss"


def test_a_log_without_the_entry_says_what_it_has():
    with pytest.raises(ValueError, match=r"'trainer' has no 'grad_norm'.*eval_loss, loss"):
        plot_losses({"trainer": LOG}, key="grad_norm")
    with pytest.raises(ValueError, match=r"'empty' has no 'loss'.*nothing"):
        plot_losses({"empty": []})


def test_runs_differ_by_more_than_colour():
    lines = plot_losses({str(run): [(0, run), (1, run)] for run in range(8)}).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 8


def test_quality_stands_at_its_budget_with_its_spread():
    figure = plot_quality({"SMT": [(200, 1.5, 0.25), (100, 2.0, 0.5)], "full": [(900, 1.0)]})
    smt, full = figure.axes[0].containers
    assert smt.lines[0].get_xydata().tolist() == [[100, 2.0], [200, 1.5]]
    assert [bar.tolist() for bar in smt.lines[2][0].get_segments()] == [
        [[100, 1.5], [100, 2.5]],
        [[200, 1.25], [200, 1.75]],
    ]
    assert full.lines[0].get_xydata().tolist() == [[900, 1.0]] and figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize("budgets", [[3200, 25600], [1e5, 1e7], [0.0086, 0.05]], ids=str)
def test_budgets_are_written_out_in_full(budgets, tmp_path):
    figure = plot_quality({"SMT": [(budget, 1.0) for budget in budgets]}, path=tmp_path / "picture.png")
    low, high = figure.axes[0].get_xlim()
    labels = [
        label.get_text()
        for tick, label in zip(figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(labels) >= 2 and all(
        budgets[0] / 10 < float(text.replace(",", "")) < 10 * budgets[1] for text in labels
    )
