"""Tests of smt_peft/plotting.py."""

import sys

import pytest
import torch

from smt_peft import Selection
from smt_peft.plotting import plot_selection
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


def test_without_scores_it_says_what_is_missing(selection):
    selection.scores = None
    with pytest.raises(ValueError, match="no scores"):
        plot_selection(selection)


def test_without_matplotlib_it_names_the_extra(selection, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'smt-peft\[plot\]'"):
        plot_selection(selection)
