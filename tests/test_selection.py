"""Which blocks win: the rules, the budgets, the ties."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from smt_peft import Selection, SMTConfig, select_blocks
from smt_peft.banks import find_bank
from smt_peft.locations import locations_of
from smt_peft.selection import Lines, apportion, select
from smt_peft.warmup import apply_selection


def selected(base, batches=None, **options) -> dict[str, list[list[int]]]:
    options = {"block_size": 16, "num_blocks": 12, "warmup_steps": 4, **options}
    model = get_peft_model(deepcopy(base), SMTConfig(**options))
    if batches is not None:
        select_blocks(model, batches, progress_bar=False)
    return model.peft_config["default"].selected_blocks


@pytest.mark.parametrize("rule", ["gradient", "activation", "magnitude", "random", "diagonal"])
def test_the_same_seed_gives_the_same_selection(llama, batches, rule):
    data = batches if rule in ("gradient", "activation") else None
    first, again = (selected(llama, data, selection=rule, seed=3) for _ in range(2))
    assert first == again and sum(map(len, first.values())) == 12


def test_another_seed_gives_other_random_blocks(llama):
    assert selected(llama, selection="random", seed=0) != selected(llama, selection="random", seed=1)


def test_magnitude_selects_the_largest_weights(llama):
    layer = llama.model.layers[1].self_attn.k_proj
    layer.weight.data[16:, 32:48] *= 10
    assert selected(llama, selection="magnitude", num_blocks=1) == {"model.layers.1.self_attn.k_proj": [[1, 2]]}


def test_weights_of_zero_have_no_largest(llama):
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    with pytest.raises(ValueError, match="by their weights, and all of them are zero"):
        selected(llama, selection="magnitude", target_modules=["q_proj"])


def test_diagonal_selects_the_block_diagonals(llama):
    blocks = selected(llama, selection="diagonal", target_modules=["q_proj"], num_blocks=8)
    assert list(blocks.values()) == [[[i, i] for i in range(4)]] * 2


def test_activation_selects_the_columns_with_the_largest_inputs(llama, batches):
    llama.model.layers[0].input_layernorm.weight.data[16:32] *= 100
    blocks = selected(llama, batches, selection="activation", target_modules=["q_proj"], num_blocks=4)
    assert blocks == {"model.layers.0.self_attn.q_proj": [[row, 1] for row in range(4)]}


def test_activation_counts_every_use_of_a_module(batches):
    """One that runs twice in a batch, as in models that share layers: the order of the calls does not matter."""
    chosen = []
    for order in ([0, 1], [1, 0]):
        base = nn.ModuleDict({"a": nn.Linear(32, 32)})
        inputs = torch.zeros(2, 1, 32)
        inputs[0, :, :16], inputs[1, :, 16:] = 3, 2
        base.forward = lambda order=order, base=base, inputs=inputs: [base["a"](inputs[i]) for i in order]
        model = get_peft_model(base, SMTConfig(**{"target_modules": ["a"], "block_size": 16, "num_blocks": 2,
                                                  "selection": "activation", "warmup_steps": 1}))  # fmt: skip
        selection = select_blocks(model, [None], loss_function=lambda model, _: model(), progress_bar=False)
        assert selection.scores[0].tolist() == [[3, 2], [3, 2]]
        chosen.append(selection.blocks())
    assert chosen[0] == chosen[1] == {"a": [[0, 0], [1, 0]]}


@pytest.mark.parametrize("selection", ["gradient", "activation"])
@pytest.mark.parametrize("scope", ["model", "input", "module"])
def test_a_module_that_no_token_reaches_has_no_score_and_costs_no_batch_and_no_budget(selection, scope):
    """As experts in a ModuleList do."""
    base = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    base.forward = lambda x: base["a"](x).square().sum() + base["b"](x[:0]).sum()
    options = {"target_modules": ["a", "b"], "block_size": 16, "num_blocks": 4, "warmup_steps": 2}
    model = get_peft_model(base, SMTConfig(**options, selection=selection, scope=scope))
    found = select_blocks(model, [torch.randn(3, 32)] * 2, loss_function=lambda model, x: model(x), progress_bar=False)
    assert found.skipped == 0 and found.blocks().keys() == {"a"} and found.scores[1].count_nonzero() == 0
    if scope != "model":
        with pytest.raises(ValueError, match=r"above the 4 that may be selected \(1 targets have none"):
            found.rebudget(5)


def test_batches_without_labels_are_named(llama, batches):
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=12, warmup_steps=1))
    with pytest.raises(ValueError, match="no loss for a warm-up batch of input_ids: add labels"):
        select_blocks(model, [{"input_ids": batches[0]["input_ids"]}], progress_bar=False)


def test_scope_module_gives_each_matrix_its_share(llama, batches):
    blocks = selected(llama, batches, scope="module", num_blocks=16)
    assert [len(b) for b in blocks.values()] == [4, 2, 2, 4, 2, 2]


def test_a_pattern_gives_its_group_a_budget_of_its_own(llama, batches):
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "num_blocks": 5}
    blocks = selected(llama, batches, num_blocks_pattern={"mlp": 3, r"layers\.0.*v_proj": 2}, **options)
    counts = {"mlp": 0, "first v": 0, "rest": 0}
    for name, of_module in blocks.items():
        group = "mlp" if "mlp" in name else "first v" if "layers.0.self_attn.v" in name else "rest"
        counts[group] += len(of_module)
    assert counts == {"mlp": 3, "first v": 2, "rest": 5}


@pytest.mark.parametrize("rule", ["gradient", "activation"])
def test_modules_that_read_the_same_input_compete(llama, batches, rule):
    options = {"target_modules": "all-linear", "selection": rule, "num_blocks": 20}
    model = get_peft_model(deepcopy(llama), SMTConfig(block_size=16, warmup_steps=4, scope="input", **options))
    selection = select_blocks(model, batches, progress_bar=False)
    readers = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate and up", "up_proj": "gate and up"}
    sets: dict[str, list[tuple[float, str, int, int]]] = {}
    for name, scores in zip(selection.names, selection.scores, strict=True):
        parent, _, kind = name.rpartition(".")
        of = sets.setdefault(f"{parent}.{readers.get(kind, kind)}", [])
        of += [(score.item(), name, *divmod(i, scores.shape[1])) for i, score in enumerate(scores.flatten())]
    assert len(sets) == 8  # of two layers: q, k, v; o; gate, up; down
    kinds = ["qkv", "o_proj", "gate and up", "down_proj"] * 2
    shares = apportion(20, [len(of) for of in sets.values()], kinds)
    expected = {block[1:] for of, share in zip(sets.values(), shares, strict=True)
                for block in sorted(of, key=lambda block: -block[0])[:share]}  # fmt: skip
    assert {(name, *block) for name, blocks in selection.blocks().items() for block in blocks} == expected


def test_without_known_inputs_nobody_competes_by_input():
    scores = [torch.rand(4, 4) for _ in range(3)]
    groups = [([0, 1], 6), ([2], 3)]
    assert select(scores, groups, "input").equal(select(scores, groups, "module"))


def test_ties_go_to_the_earlier_block():
    index = select([torch.ones(2, 2), torch.ones(2, 2)], [([0, 1], 5)], "model")
    assert index.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_selecting_among_a_million_blocks_finds_the_best():
    scores = [torch.randperm(250_000).view(500, 500).float() + 1 for _ in range(4)]
    index = select(scores, [(range(4), 1000)], "model").long()
    chosen = torch.stack(scores)[tuple(index.T)]
    best = torch.stack(scores).flatten().topk(1000).values
    assert torch.equal(chosen.sort(descending=True).values, best)  # sums of so many would be rounded
    assert len(index.unique(dim=0)) == 1000


def test_scores_that_are_not_finite_cannot_be_ranked():
    with pytest.raises(ValueError, match=r"1 of 4 block scores are not finite"):
        select([torch.tensor([[1.0, float("inf")], [2.0, 3.0]])], [([0], 1)], "model")


@pytest.mark.parametrize(
    "total, sizes, shares",
    [(10, [5, 5], [5, 5]), (3, [1, 1], [2, 1]), (7, [16, 8, 8], [4, 1, 2]), (2, [1, 1, 1, 1], [1, 0, 1, 0])],
)
def test_apportion_gives_whole_shares_in_proportion(total, sizes, shares):
    assert apportion(total, sizes) == shares


@pytest.mark.parametrize("total", [1, 7, 38, 162, 1000, 14848])
def test_no_kind_and_no_part_of_a_model_is_passed_over(total):
    """Llama-3.2-1B in blocks of 256: whatever the budget, kinds and halves of the model have what is theirs."""
    grids = {"q": 64, "k": 16, "v": 16, "o": 64, "gate": 256, "up": 256, "down": 256}
    kinds, sizes = [*grids] * 16, [*grids.values()] * 16
    shares = apportion(total, sizes, kinds)
    exact = [total * size / sum(sizes) for size in sizes]
    assert sum(shares) == total and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert all(abs(share - wanted) < 1 for share, wanted in zip(shares, exact, strict=True))
    for kind in grids:
        for half in (slice(0, 56), slice(56, None)):
            of_kind = [position for position in range(112)[half] if kinds[position] == kind]
            assert abs(sum(shares[i] - exact[i] for i in of_kind)) < 1


@pytest.mark.parametrize("rule", ["random", "magnitude", "diagonal"])
def test_fewer_blocks_than_modules_are_spread_over_kinds_and_layers(make_llama, rule):
    blocks = selected(make_llama(num_hidden_layers=8), selection=rule, scope="module", num_blocks=12)
    locations = locations_of([*blocks])
    assert {kind: sum(location.kind == kind for location in locations) for kind in ("q_proj", "k_proj", "v_proj")} == {
        "q_proj": 6, "k_proj": 3, "v_proj": 3
    }  # fmt: skip
    assert {location.layer for location in locations if location.kind == "k_proj"} & {0, 1, 2, 3}
    assert {location.layer for location in locations if location.kind == "k_proj"} & {4, 5, 6, 7}


def test_overlap_is_the_share_of_common_blocks_by_name():
    one = Selection(["a", "b"], 16, torch.tensor([[0, 0, 0], [0, 1, 2], [1, 0, 0], [1, 2, 1]]))
    other = Selection(
        ["b", "c", "a"], 16, torch.tensor([[0, 2, 1], [1, 0, 0], [2, 1, 2]])
    )  # a 1,2 and b 2,1 are there
    assert one.overlap(other) == other.overlap(one) == 2 / 4
    assert one.overlap(one) == 1


def test_blocks_of_other_sizes_overlap_in_the_weights_that_both_have():
    one, other = (Selection(["a"], size, torch.tensor([[0, 0, 0]])) for size in (16, 32))
    lines = [Lines(torch.arange(64).view(4, 16), torch.arange(0, 64).view(16, 4).T)]  # every fourth column
    in_order = Selection(["a"], 16, torch.tensor([[0, 0, 0]]), lines=lines)
    assert one.overlap(other) == 1 / 4
    assert one.overlap(in_order) == 4 / 16 and other.overlap(in_order) == 16 * 8 / 32**2


# --- selections that outlive their warm-up -------------------------------------------------------------------------


@pytest.fixture(params=["tiles", "sorted"])
def arrangement(request):
    return request.param


def selection_of(base, batches, **options) -> Selection:
    options = {"block_size": 16, "num_blocks": 12, "warmup_steps": 4, **options}
    return select_blocks(get_peft_model(deepcopy(base), SMTConfig(**options)), batches, progress_bar=False)


@pytest.mark.parametrize(
    "budget",
    [
        {"num_blocks": 5},
        {"num_blocks": 30, "scope": "module"},
        {"num_blocks": 30, "scope": "input"},
        {"trainable_ratio": 0.1},
        {"num_blocks": 9, "num_blocks_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
def test_another_budget_is_that_of_a_warm_up_of_its_own(llama, batches, arrangement, budget):
    pattern = {"num_blocks_pattern": budget.pop("num_blocks_pattern", {})}
    again = selection_of(llama, batches, arrangement=arrangement, **pattern).rebudget(**budget)
    own = selection_of(llama, batches, arrangement=arrangement, **{"num_blocks": None, **pattern, **budget})
    assert again.blocks() == own.blocks() and torch.equal(again.index, own.index)
    assert again.scope == own.scope and [*again.groups] == [*own.groups]


def test_a_budget_above_all_blocks_is_refused(llama, batches):
    with pytest.raises(ValueError, match="65 blocks is above the 64"):
        selection_of(llama, batches).rebudget(65)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"num_blocks": 0}, "num_blocks=0 is not a positive integer"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 is not a positive integer"),
        ({"trainable_ratio": -1}, r"trainable_ratio=-1 is not in \(0, 1\]"),
        ({"trainable_ratio": 0}, r"trainable_ratio=0 is not in \(0, 1\]"),
        ({"num_blocks": 3, "trainable_ratio": 0.1}, "both set the budget"),
        ({"scope": "layer"}, "scope='layer' is not one of model, input, module"),
    ],
    ids=str,
)
def test_an_impossible_budget_is_refused(llama, batches, budget, words):
    with pytest.raises(ValueError, match=words):
        selection_of(llama, batches).rebudget(**budget)


def test_the_budgets_of_patterns_are_no_main_budget(llama, batches):
    selection = selection_of(llama, batches, num_blocks=None, num_blocks_pattern={"v_proj": 3, "": 9})
    with pytest.raises(ValueError, match="covers every target"):
        selection.rebudget(7)
    assert selection.rebudget(scope="module").scope == "module"


def test_a_selection_without_scores_has_one_budget():
    with pytest.raises(ValueError, match="no scores to select by"):
        Selection(["a"], 16, torch.tensor([[0, 0, 0]])).rebudget(1)


def test_a_selection_is_read_as_it_was_written(llama, batches, arrangement, tmp_path):
    selection = selection_of(llama, batches, arrangement=arrangement, scope="input")
    selection.save(tmp_path)
    read = Selection.load(tmp_path)
    assert read.blocks() == selection.blocks() and read.summary() == selection.summary()
    assert read.rebudget(7).blocks() == selection.rebudget(7).blocks()
    assert all(torch.equal(one, other) for one, other in zip(read.scores, selection.scores, strict=True))
    assert [*read.batch_scores] == [*selection.batch_scores] and len(read.batch_scores) == selection.batches


def test_a_broken_selection_is_refused_in_words(llama, batches, tmp_path):
    selection_of(llama, batches).save(tmp_path)
    file = tmp_path / "selection.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is not a selection, or it is broken"):
        Selection.load(tmp_path)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"names": [1, 2]}, "names are no list of texts"),
        ({"block_size": -16}, "counts are no numbers"),
        ({"groups": [[[0, 99], 12]]}, "groups or inputs name targets"),
        ({"inputs": [-1]}, "groups or inputs name targets"),
        ({"index": torch.tensor([[99, 0, 0]])}, "does not exist"),
        ({"index": torch.tensor([[0, 99, 0]])}, "does not exist"),
        ({"index": torch.tensor([[0, 0, -1]])}, "does not exist"),
        ({"index": torch.full((2, 3), -1)}, "nothing is selected"),
        ({"index": torch.tensor([[0, 0, 0], [0, 0, 0]])}, "a block twice"),
        ({"index": torch.zeros(2, 3)}, "index is float32"),
        ({"index": torch.zeros(2, 2, dtype=torch.int)}, "an index 2 wide"),
        ({"scores": [torch.zeros(4) for _ in range(6)]}, "is not a selection"),
    ],
    ids=str,
)
def test_a_selection_whose_parts_do_not_fit_is_refused(llama, batches, arrangement, tmp_path, change, fault):
    replace(selection_of(llama, batches, arrangement=arrangement), **change).save(tmp_path)
    with pytest.raises(ValueError, match=fault):
        Selection.load(tmp_path)


def test_lines_that_are_not_every_feature_once_are_refused(llama, batches, tmp_path):
    selection = selection_of(llama, batches, arrangement="sorted")
    selection.lines[0].rows[0] = selection.lines[0].rows[1]
    selection.save(tmp_path)
    with pytest.raises(ValueError, match="every feature once"):
        Selection.load(tmp_path)
    sound = selection_of(llama, batches, arrangement="sorted")
    replace(sound, lines=sound.lines[1:]).save(tmp_path)
    with pytest.raises(ValueError, match="is not a selection"):
        Selection.load(tmp_path)
    replace(sound, scores=[score[:1] for score in sound.scores]).save(tmp_path)
    with pytest.raises(ValueError, match="scores and its lines are of other matrices"):
        Selection.load(tmp_path)


def test_a_record_without_targets_is_broken(tmp_path):
    settings = {"names": [], "block_size": 16, "batch_scores": [], "skipped": 0, "groups": [], "patterns": 0}
    settings |= {"inputs": None, "scope": "model", "base_parameters": None}
    index = torch.zeros(1, 3, dtype=torch.int32)
    save_file({"index": index}, tmp_path / "selection.safetensors", {"selection": json.dumps(settings)})
    with pytest.raises(ValueError, match="is not a selection, or it is broken"):
        Selection.load(tmp_path)


def test_every_rank_takes_the_blocks_of_rank_0(llama, batches, monkeypatch):
    """Each may have been given a selection of its own, and under FSDP2 and ZeRO nothing else makes them alike."""
    config = SMTConfig(block_size=16, num_blocks=12, warmup_steps=4)
    mine = select_blocks(get_peft_model(deepcopy(llama), config), batches, progress_bar=False)
    of_rank_0 = get_peft_model(deepcopy(llama), SMTConfig(block_size=16, num_blocks=12, selection="random"))
    theirs = find_bank(of_rank_0, "default").index
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda index, src: index.copy_(theirs) if src == 0 else None)
    model = get_peft_model(llama, config)
    apply_selection(model, "default", mine)
    assert torch.equal(find_bank(model, "default").index, theirs)


def test_the_selection_is_kept_where_a_loaded_adapter_is_saved_again(llama, batches, arrangement, tmp_path):
    selection = selection_of(llama, batches, arrangement=arrangement)
    model = get_peft_model(deepcopy(llama), SMTConfig(selected_blocks=selection))
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(deepcopy(llama), tmp_path / "first", is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    assert Selection.load(tmp_path / "again").rebudget(7).blocks() == selection.rebudget(7).blocks()
    other = get_peft_model(deepcopy(llama), SMTConfig(block_size=16, num_blocks=12, selection="random"))
    other.save_pretrained(tmp_path / "other")
    selection.save(tmp_path / "other")  # which is not its own
    PeftModel.from_pretrained(llama, tmp_path / "other").save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third/selection.safetensors").exists()


def test_the_selection_of_another_adapter_is_not_left_beside_one(llama, batches, tmp_path):
    options = {"block_size": 16, "num_blocks": 12}
    model = get_peft_model(deepcopy(llama), SMTConfig(**options, warmup_steps=4))
    select_blocks(model, batches, progress_bar=False)
    model.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(deepcopy(llama), tmp_path / "first")
    again.save_pretrained(tmp_path / "first")
    assert Selection.load(tmp_path / "first").blocks() == again.peft_config["default"].selected_blocks
    get_peft_model(llama, SMTConfig(**options, selection="random")).save_pretrained(tmp_path / "second")
    model.load_adapter(tmp_path / "second", "default")
    model.save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first/selection.safetensors").exists()


def test_an_adapter_can_be_made_from_a_selection(llama, batches, arrangement):
    selection = selection_of(llama, batches, arrangement=arrangement).rebudget(7)
    model = get_peft_model(llama, SMTConfig(selected_blocks=selection))
    config = model.peft_config["default"]
    assert config.selected_blocks == selection.blocks()
    assert (config.block_size, config.num_blocks, config.arrangement) == (16, 7, arrangement)


def test_a_selection_of_other_blocks_is_refused(llama, batches):
    selection = selection_of(llama, batches)
    with pytest.raises(ValueError, match="block_size=32 is not the selection's 16"):
        SMTConfig(selected_blocks=selection, block_size=32)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"num_blocks": 13}, "number of blocks, 12, are not .* 13"),
        ({"arrangement": "sorted"}, "arrangement, tiles, are not .* sorted"),
        ({"block_size": 8}, "block_size, 16, are not .* 8"),
        ({"target_modules": ["q_proj"]}, r"targets, 6 \(.*\), are not .* 2"),
        ({"num_blocks": 8, "num_blocks_pattern": {"q_proj": 4}}, r"budgets, \d+, are not .* \d"),
    ],
    ids=["budget", "arrangement", "block size", "targets", "groups"],
)
def test_a_selection_that_does_not_fit_the_adapter_is_refused(llama, batches, options, what):
    selection = selection_of(llama, batches)
    model = get_peft_model(llama, SMTConfig(**{"block_size": 16, "num_blocks": 12, **options}))
    with pytest.raises(ValueError, match=what):
        apply_selection(model, "default", selection)
    assert model.peft_config["default"].selected_blocks is None


def test_a_selection_from_matrices_of_other_shapes_is_refused(make_llama, batches, arrangement):
    """Names, block size and budget are the same."""
    selection = selection_of(make_llama(hidden_size=32), batches, arrangement=arrangement)
    options = {"block_size": 16, "num_blocks": 12, "arrangement": arrangement}
    model = get_peft_model(make_llama(), SMTConfig(**options))
    with pytest.raises(ValueError, match=r"q_proj has 2 x 2 blocks of 16; here it has 4 x 4"):
        apply_selection(model, "default", selection)
    with pytest.raises(ValueError, match=r"q_proj has 2 x 2 blocks of 16; here it has 4 x 4"):
        get_peft_model(make_llama(), SMTConfig(selected_blocks=selection))


@pytest.mark.parametrize("selection", ["gradient", "activation"])
def test_the_warm_up_of_an_adapter_that_is_not_active_is_refused(llama, batches, selection):
    """It would score the model with the other adapter's deltas, and train without."""
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=12, selection="random"))
    torch.nn.init.normal_(model.base_model.model.smt_bank["default"].weight)
    model.add_adapter("second", SMTConfig(block_size=16, num_blocks=12, warmup_steps=4, selection=selection))
    with pytest.raises(ValueError, match=r"'second' is not active \(default is\).*model.set_adapter\('second'\)"):
        select_blocks(model, batches, "second", progress_bar=False)
    model.set_adapter("second")
    assert select_blocks(model, batches, "second", progress_bar=False).batches == 4


@pytest.mark.parametrize("block_size", [16, 8])
def test_blocks_of_an_earlier_adapter_can_be_avoided(llama, batches, arrangement, block_size):
    """Also those of another block size or order: not one weight is in both."""
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=12, warmup_steps=4))
    first = select_blocks(model, batches, progress_bar=False)
    options = {"block_size": block_size, "num_blocks": 9, "warmup_steps": 4, "arrangement": arrangement}
    model.add_adapter("second", SMTConfig(**options))
    model.set_adapter("second")
    second = select_blocks(model, batches, "second", progress_bar=False, avoid=["default"])
    assert second.overlap(first) == 0 == second.rebudget(12).overlap(first)


@pytest.mark.parametrize("avoid", ["default", "third"], ids=["no blocks yet", "no such adapter"])
def test_what_cannot_be_avoided_is_refused_before_the_warm_up(llama, avoid):
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=5))
    model.add_adapter("second", SMTConfig(block_size=16, num_blocks=5))
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"nothing to avoid|no SMT adapter 'third'"):
        select_blocks(model, [], "second", progress_bar=False, avoid=[avoid])  # no batch: that would be another error


def test_more_blocks_than_are_left_are_refused(llama, batches):
    model = get_peft_model(llama, SMTConfig(block_size=16, num_blocks=60, selection="random"))
    model.add_adapter("second", SMTConfig(block_size=16, num_blocks=5, warmup_steps=4))
    model.set_adapter("second")
    with pytest.raises(ValueError, match="A budget of 5 blocks is above the 4 that may be selected"):
        select_blocks(model, batches, "second", progress_bar=False, avoid=["default"])


def test_a_folder_without_a_selection_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no selection.safetensors in .*: a warm-up leaves one"):
        Selection.load(tmp_path)


def test_tiles_are_not_given_to_a_sorted_arrangement(llama, batches):
    with pytest.raises(ValueError, match="arrangement='sorted' is not the selection's"):
        SMTConfig(selected_blocks=selection_of(llama, batches), arrangement="sorted")


# --- where blocks are ----------------------------------------------------------------------------------------------


def test_layers_are_counted_in_their_order_and_what_is_outside_of_them_first():
    names = ["layers.10.mlp", "head", "layers.2.mlp"]
    selection = Selection(names, 16, torch.tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 1]]))
    assert list(selection.counts_by_layer().items()) == [("-", 1), ("2", 2), ("10", 1)]


def test_layers_that_are_counted_more_than_once_are_not_added_up():
    names = [f"model.{part}.layers.{layer}.q_proj" for part in ("encoder", "decoder") for layer in (0, 1)]
    selection = Selection([*names, "head"], 16, torch.tensor([[0, 0, 0], [2, 0, 0], [2, 0, 1], [3, 0, 0], [4, 0, 0]]))
    counts = {"-": 1, "encoder.0": 1, "decoder.0": 2, "decoder.1": 1}
    assert list(selection.counts_by_layer().items()) == list(counts.items())
    assert "encoder.0: 1, decoder.0: 2" in selection.summary()


@pytest.mark.parametrize(
    "modules, kinds",
    [
        (["self_attn.q_proj", "mlp.up_proj"], ["q_proj", "up_proj"]),
        (["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"], ["SelfAttention.q", "EncDecAttention.q"]),
        (["attention.output.dense", "output.dense"], ["attention.output.dense", "output.dense"]),
        (["experts.0.w1", "experts.1.w1", "experts.1.w2"], ["w1", "w1", "w2"]),
        (["mlp.experts.0.w", "mlp.shared.w"], ["experts.*.w", "shared.w"]),
    ],
)
def test_a_type_says_as_much_as_tells_it_from_others_of_its_layer(modules, kinds):
    names = [f"model.layers.{layer}.{module}" for layer in (3, 4) for module in modules]
    assert locations_of(names) == [("", layer, kind) for layer in (3, 4) for kind in kinds]
    assert len({*locations_of(names, numbered=True)}) == len(names)
