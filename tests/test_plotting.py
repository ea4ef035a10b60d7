"""Tests of smt_peft/plotting.py."""

import sys
from itertools import pairwise

import pytest
import torch
from dense_truth import bank_of, deltas_of, wrap

from smt_peft import Selection, plotting
from smt_peft.files import read_adapter
from smt_peft.plotting import plot_adapter, plot_losses, plot_overlap, plot_selection, plot_shares
from smt_peft.selection import select

matplotlib = pytest.importorskip("matplotlib")


def selection_of(names: list[str], shapes: list[tuple[int, int]], budget: int) -> Selection:
    """A selection from scores that rise from block to block, so that the last blocks win."""
    scores = [torch.arange(r * c).view(r, c) + 100.0 * i for i, (r, c) in enumerate(shapes)]  # one score is zero
    index = select(scores, [(range(len(names)), budget)], "model")
    return Selection(names, 4, index, scores)


def images(figure) -> list[torch.Tensor]:
    """The picture of each module, [rows, columns, red green blue], in the order of reading."""
    return [torch.as_tensor(image.get_array()[..., :3]) for image in figure.axes[0].images]


def coloured(image: torch.Tensor) -> torch.Tensor:
    return image[..., 0] != image[..., 2]


def texts(figure) -> dict[str, tuple[float, float]]:
    """What is written on the sheet -> inches from the left and the top."""
    return {text.get_text(): text.get_position() for text in figure.axes[0].texts}


def counts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if "/" in text.get_text()]


@pytest.fixture
def selection() -> Selection:
    names = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")]
    return selection_of(names, [(3, 3), (2, 3)] * 2, budget=8)


def test_each_module_is_drawn_with_its_scores(selection):
    for image, target in zip(images(plot_selection(selection)), (0, 2, 1, 3), strict=True):  # layers for each type
        grey = image.mean(-1)[~coloured(image)]
        assert image.shape[:2] == selection.scores[target].shape and (grey.diff() <= 0).all()


def test_the_selected_blocks_are_coloured_and_no_others(selection):
    drawn = []
    for image, target in zip(images(plot_selection(selection)), (0, 2, 1, 3), strict=True):
        drawn += [[target, *block] for block in coloured(image).nonzero().tolist()]
    assert sorted(drawn) == selection.index.tolist()


def test_selected_blocks_are_darker_than_all_others_whatever_their_scores():
    scores = [torch.tensor([[1.0, 2.0, 4.0, 0.0]]), torch.tensor([[100.0, 200.0, 0.0, 50.0]])]
    chosen = torch.tensor([[0, 0, 0], [0, 0, 3]])
    everything = torch.cat(images(plot_selection(Selection(["layers.0.q", "layers.0.v"], 4, chosen, scores))))
    darkness = (everything @ torch.tensor([0.3, 0.59, 0.11], dtype=everything.dtype)).flatten()
    assert darkness[[0, 3]].max() < darkness[[1, 2, 4, 5, 6, 7]].min()


def test_a_few_extreme_scores_leave_the_others_their_shades():
    scores = torch.linspace(1, 2, 400).view(20, 20)
    scores[0, :4], scores[0, 4:8] = 1e-6, 1e6
    [image] = images(plot_selection(Selection(["layers.0.q"], 4, torch.tensor([[0, 0, 4]]), [scores])))
    assert image[1].mean() - image[-1].mean() > 0.25  # of the 0.42 between white and the darkest grey


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_an_adapter_is_drawn_where_its_deltas_are_and_how_large(llama, tmp_path, method):
    model = wrap(llama, method, budget=8)
    with torch.no_grad():
        bank_of(model).weight *= torch.arange(1, 9)[:, None, None]
    model.save_pretrained(tmp_path)
    figure, truth, seen = plot_adapter(read_adapter(tmp_path)), deltas_of(model), []
    kinds = ["q_proj", "k_proj", "v_proj"]
    names = [f"model.layers.{layer}.self_attn.{kind}" for kind in kinds for layer in range(2)]
    for image, name in zip(images(figure), names, strict=True):
        tiles = truth[name].unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).square().mean((1, 3))
        assert torch.equal(coloured(image), tiles > 0), name
        seen += zip(tiles[tiles > 0].tolist(), image.mean(-1)[tiles > 0].tolist(), strict=True)
    assert min(seen)[1] > max(seen)[1], "the larger, the darker"
    assert ("8 sorted blocks" if method == "sorted" else "8 of 64 blocks") in figure.get_suptitle() + str(
        texts(figure)
    )


def test_counts_are_the_selected_blocks_and_all_blocks(selection):
    assert counts(plot_selection(selection)) == ["0/9", "2/9", "0/6", "6/6"]


@pytest.mark.parametrize("names", [
    [f"{part}.block.{layer}.layer.{module}" for part in ("encoder", "decoder") for layer in range(3)
     for module in ("0.SelfAttention.q", "1.EncDecAttention.q", "2.DenseReluDense.wi")],
    [f"model.{part}.layers.{layer}.{module}" for part in ("encoder", "decoder") for layer in range(2)
     for module in ("self_attn.q_proj", "encoder_attn.q_proj", "fc1")[:: 2 if part == "encoder" else 1]],
    [f"layers.{layer}.mlp.{module}" for layer in range(2)
     for module in ("gate", *(f"experts.{expert}.w{n}" for expert in range(4) for n in (1, 2)))],
    [f"layer.{layer}.{module}" for layer in range(2)
     for module in ("attention.output.dense", "intermediate.dense", "output.dense")],
], ids=["t5", "bart", "experts", "bert"])  # fmt: skip
def test_no_module_is_drawn_over_another(names):
    figure = plot_selection(selection_of(names, [(2, 2)] * len(names), budget=9))
    boxes = {tuple(image.get_extent()) for image in figure.axes[0].images}
    assert len(boxes) == len(names) and len(counts(figure)) == len(names)


def test_rows_and_columns_say_as_much_as_tells_modules_apart():
    names = ["model.layers.3.self_attn.q_proj", "model.layers.4.self_attn.q_proj"]
    assert {"q_proj", "layer 3", "4"} <= texts(plot_selection(selection_of(names, [(2, 2)] * 2, 2))).keys()
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    names += [
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.experts.3.w1",
        "decoder.block.0.experts.2.w1",
    ]
    shown = texts(plot_selection(selection_of(names, [(2, 2)] * 5, 2)))
    assert {"encoder 0", "decoder 0", "EncDecAttention.q", "experts.3.w1"} <= shown.keys()


LLAMA_3_8B = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (4, 16), "self_attn.v_proj": (4, 16),
              "self_attn.o_proj": (16, 16), "mlp.gate_proj": (56, 16), "mlp.up_proj": (56, 16),
              "mlp.down_proj": (16, 56)}  # fmt: skip


@pytest.mark.parametrize("modules", [
    {"v_proj": (16, 16)},
    dict.fromkeys(("q_proj", "k_proj", "v_proj"), (16, 16)),
    LLAMA_3_8B,
], ids=["v", "qkv", "all"])  # fmt: skip
def test_a_real_model_fits_a_page_with_room_for_every_label(modules):
    names = [f"layers.{layer}.{module}" for layer in range(32) for module in modules]
    figure = plot_selection(selection_of(names, [*modules.values()] * 32, budget=900))
    width, height = figure.get_size_inches()
    assert 8 < width < 12 and height < 13
    assert all(image.get_extent()[1] - image.get_extent()[0] > 0.4 for image in figure.axes[0].images)
    rows = sorted(text.get_position()[1] for text in figure.axes[0].texts if text.get_text().endswith("proj"))
    assert all(below - above > 0.2 for above, below in pairwise(rows))


def test_a_selected_block_is_seen_where_blocks_are_finer_than_pixels():
    scores = torch.ones(500, 500)
    [image] = images(plot_selection(Selection(["layers.0.q"], 4, torch.tensor([[0, 249, 251]]), [scores])))
    assert coloured(image).sum() == 1 and max(image.shape) <= 75


def test_modules_outside_of_layers_and_equal_scores_can_be_drawn():
    selection = Selection(["head"], 4, torch.tensor([[0, 0, 1]]), [torch.ones(2, 2)])
    assert counts(plot_selection(selection)) == ["1/4"]


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
    ],
    ids=["shares", "overlap", "losses"],
)
def test_every_picture_is_saved_where_it_is_given_a_path(selection, tmp_path, draw):
    draw(selection, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_without_scores_it_says_what_is_missing(selection):
    selection.scores = None
    with pytest.raises(ValueError, match="no scores"):
        plot_selection(selection)


def test_without_matplotlib_it_names_the_way_out(selection, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
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


def test_layers_of_an_encoder_and_a_decoder_have_bars_of_their_own():
    names = [f"{part}.block.{layer}.{kind}" for part in ("encoder", "decoder") for layer in range(2) for kind in "qv"]
    ax = plot_shares(selection_of(names, [(2, 2)] * 8, budget=6)).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [
        [0, 0, 0, pytest.approx(400 / 6)],
        [0, 0, 0, pytest.approx(200 / 6)],
    ]


def test_types_beyond_the_palette_are_told_apart():
    names = [f"layers.0.kind{number}" for number in range(20)]
    bars = [bars[0] for bars in plot_shares(selection_of(names, [(1, 1)] * 20, budget=20)).axes[0].containers]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 20


def test_the_matrix_shows_every_pairs_overlap(selection):
    other = Selection(selection.names, 4, torch.cat([selection.index[:2], torch.tensor([[0, 0, 0]])]))
    ax = plot_overlap({"one": selection, "other": other}).axes[0]
    shown = {text.get_position(): text.get_text() for text in ax.texts}
    assert shown == {(0, 0): "100", (1, 0): "25", (0, 1): "25", (1, 1): "100"}  # 2 of max(8, 3) blocks
    assert ax.images[0].get_array().tolist() == [[100, 25], [25, 100]]


# --- curves ------------------------------------------------------------------------------------------------------


LOG = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.5}, {"step": 2, "loss": 2.0}, {"train_runtime": 1.0}]


def curves(figure) -> dict[str, list[tuple[float, float]]]:
    lines = figure.axes[0].get_lines()
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in lines}


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


def test_runs_beyond_the_palette_are_told_apart():
    lines = plot_losses({str(run): [(0, run), (1, run)] for run in range(20)}).axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_more_tiles_than_a_picture_can_show_are_refused(llama, tmp_path, monkeypatch):
    wrap(llama).save_pretrained(tmp_path)
    monkeypatch.setattr(plotting, "MOST_TILES", 10)
    with pytest.raises(ValueError, match=r"have \d+ tiles of 16 x 16, too many for a picture"):
        plot_adapter(read_adapter(tmp_path))
