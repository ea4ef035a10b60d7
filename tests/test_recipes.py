"""Tests of scripts/studies/recipes.py: what the quality study's methods do, against direct computations."""

import json
from dataclasses import replace

import bench_quality
import pytest
import recipes
import testbeds
import torch
from recipes import Recipe

from smt_peft.banks import find_bank

QKV = json.dumps(["q_proj", "k_proj", "v_proj"])
BUDGET = 3200  # 200 blocks of 4, or LoRA of rank 2
SMT = {"type": "smt", "block_size": 4, "warmup_steps": 2}
RUN = bench_quality.Run("stories260K-lowercase", "qkv", QKV, BUDGET, "", 1e-2, 0, 4, 2, 32, "{}")


@pytest.fixture
def testbed(short) -> testbeds.TextTestbed:
    return testbeds.TextTestbed(testbeds.TESTBEDS[RUN.testbed], short, RUN.tokens)


@pytest.fixture
def select(short):
    """Warm up with a recipe, always on a new model; gives the model, its adapter's bank and the selection."""

    def of(settings: dict):
        testbed = testbeds.TextTestbed(testbeds.TESTBEDS[RUN.testbed], short, RUN.tokens)
        recipe = Recipe.parse(settings)
        model = recipes.adapted(recipe, testbed.model, QKV, BUDGET, 0, None)
        selection = recipes.warm_up(recipe, model, lambda count: bench_quality.batches(RUN, testbed, count))
        return model, find_bank(model, "default"), selection

    return of


def chosen(bank) -> set[tuple[int, int, int]]:
    return {tuple(block) for block in bank.index.tolist()}


def best(scores: list[torch.Tensor], count: int) -> set[tuple[int, int, int]]:
    """The blocks with the greatest scores, of all modules."""
    ranked = sorted(
        ((value, (module, row, col)) for module, grid in enumerate(scores)
         for row, values in enumerate(grid.tolist()) for col, value in enumerate(values)),
        reverse=True,
    )  # fmt: skip
    return {block for _, block in ranked[:count]}


def test_the_ranking_over_the_rms_is_scale_free(select):
    scores = select(SMT)[2].scores
    expected = best([grid.double() / grid.double().pow(2).mean() ** 0.5 for grid in scores], 200)
    assert chosen(select(SMT | {"ranking": "module_rms"})[1]) == expected != best(scores, 200)


def test_the_ranking_by_weight_takes_the_mean_of_abs_w(select):
    model, bank, selection = select(SMT)
    scores = []
    for grid, target in zip(selection.scores, bank.targets, strict=True):
        weight = model.get_submodule(f"base_model.model.{target.name}").get_base_layer().weight.abs().double()
        rows, cols = grid.shape
        scores.append(grid * weight.view(rows, 4, cols, 4).mean((1, 3)))
    assert chosen(select(SMT | {"ranking": "weight"})[1]) == best(scores, 200) != best(selection.scores, 200)


def test_the_first_step_of_adam_moves_every_block_by_the_learning_rate(select, testbed):
    model, bank, selection = select(SMT)
    data = bench_quality.batches(RUN, testbed, 1)
    for grid in recipes.movements(model, selection.names, bank.block_size, data):
        torch.testing.assert_close(grid, torch.full_like(grid, 1e-3), rtol=0.05, atol=0)
    assert chosen(select(SMT | {"ranking": "movement"})[1]) != best(selection.scores, 200)


def test_the_ranking_by_adam_is_the_square_of_the_mean_gradient_over_its_mean_size(select, testbed):
    bank = select(SMT | {"ranking": "adam", "score": "l2"})[1]
    weights = [testbed.model.get_submodule(target.name).weight for target in bank.targets]
    per_batch = []
    for batch in bench_quality.batches(RUN, testbed, 2):
        gradients = torch.autograd.grad(testbed.model(**batch).loss, weights)
        per_batch.append([g.double().view(len(g) // 4, 4, g.shape[1] // 4, 4).transpose(1, 2) for g in gradients])
    means = [torch.stack(gradients).mean(0).norm(dim=(2, 3)) for gradients in zip(*per_batch, strict=True)]
    sizes = [torch.stack(gradients).norm(dim=(3, 4)).mean(0) for gradients in zip(*per_batch, strict=True)]
    expected = best([mean**2 / size for mean, size in zip(means, sizes, strict=True)], 200)
    assert len(chosen(bank) & expected) >= 199  # a tie in float32 may fall either way


def test_a_quantile_holds_the_best_blocks_below_its_upper_end(select):
    scores = select(SMT)[2].scores
    ranked = torch.cat([grid.flatten() for grid in scores]).sort(descending=True).values
    limit = ranked[len(ranked) // 4]
    below = [torch.where(grid <= limit, grid, 0) for grid in scores]
    assert chosen(select(SMT | {"quantile": [0.5, 0.75]})[1]) == best(below, 200)


@pytest.mark.parametrize("tile", [[8, 4], [1, 0], [0, 1]], ids=str)
def test_tiles_are_selected_whole_the_best_of_each_module(select, tile):
    settings = SMT | {"block_size": 1, "scope": "module"}
    scores = select(settings)[2].scores
    bank = select(settings | {"tile": tile})[1]
    for module, grid in enumerate(scores):
        rows, cols = (side or whole for side, whole in zip(tile, grid.shape, strict=True))
        blocks = {(row // rows, col // cols) for target, row, col in chosen(bank) if target == module}
        count = int((bank.index[:, 0] == module).sum())
        means = grid.double().view(len(grid) // rows, rows, grid.shape[1] // cols, cols).mean((1, 3))
        assert blocks == {block[1:] for block in best([means], -(-count // (rows * cols)))}  # the last one in part


def test_the_head_of_a_sorted_arrangement_is_left_out(select):
    settings = SMT | {"arrangement": "sorted", "scope": "module"}
    _, _, whole = select(settings)
    _, bank, rest = select(settings | {"leave_out": [2, 1]})
    assert (whole.index[:, 1] < 2).any() and (whole.index[:, 2] < 1).any()
    assert (rest.index[:, 1] >= 2).all() and (rest.index[:, 2] >= 1).all() and len(rest.index) == len(whole.index)
    for target, lines in enumerate(rest.lines):
        mine = bank.index[bank.index[:, 0] == target, 1:]
        assert not set(mine[:, :4].flatten().tolist()) & set(lines.rows[:2].flatten().tolist())
        assert not set(mine[:, 4:].flatten().tolist()) & set(lines.cols[0].tolist())
    with pytest.raises(SystemExit, match="needs arrangement: sorted"):
        Recipe.parse(SMT | {"leave_out": [1, 1]})


@pytest.mark.parametrize("own", [{"ranking": "weight"}, {"tile": [4, 1]}, {"quantile": [0.0, 0.5]}])
def test_a_ranking_of_this_script_does_not_know_who_reads_one_input(own):
    with pytest.raises(SystemExit, match="take model or module"):
        Recipe.parse(SMT | own | {"scope": "input"})


def test_single_entries_are_those_of_the_largest_gradients_and_are_trained(short, testbed):
    recipe = Recipe.parse({"type": "shira", "best_entries": 2})
    dense, batches = testbed.model, bench_quality.batches(RUN, testbed, 2)
    sums = {}
    for batch in batches:
        dense.requires_grad_().zero_grad()
        dense(**batch).loss.backward()
        for name, p in dense.named_parameters():
            sums[name] = sums.get(name, 0) + p.grad.abs()
    dense.requires_grad_(False)
    model = recipes.adapted(recipe, testbed.model, QKV, BUDGET, 0, None)
    assert recipes.warm_up(recipe, model, lambda count: batches[:count]) is None
    model(**batches[0]).loss.backward()
    for name, layer in model.named_modules():
        if isinstance(layer, recipes.ShiraLayer):
            entries, trained = layer.shira_indices["default"].long(), layer.shira_weight["default"]
            found = sums[f"{name.removeprefix('base_model.model.')}.weight"]
            assert set(found[tuple(entries)].tolist()) == set(found.flatten().topk(len(trained)).values.tolist())
            assert trained.grad.abs().max() > 0 and not layer.get_base_layer().weight.requires_grad


def test_half_a_budget_in_low_rank_factors_trains_both(select, testbed):
    model, _, selection = select(SMT | {"lora_share": 0.5})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = [sum(p.numel() for name, p in trained.items() if ("lora" in name) == lora) for lora in (True, False)]
    assert sizes == [BUDGET // 2, BUDGET // 2] and len(selection.index) == 100
    model(**bench_quality.batches(RUN, testbed, 1)[0]).loss.backward()
    assert all(p.grad.any() for name, p in trained.items() if "lora_A" not in name)  # whose B is 0 at first


def test_a_second_selection_keeps_the_first_delta_or_drops_it(short, testbed):
    plain, kept, dropped = (
        bench_quality.train(replace(RUN, settings=json.dumps(SMT | more)), testbeds.TESTBEDS, short)["train_loss"]
        for more in ({}, {"restart": {"steps": [2], "keep": True}}, {"restart": {"steps": [2], "keep": False}})
    )
    base = testbed.model(**bench_quality.batches(RUN, testbed, 3)[2]).loss.item()
    assert kept[:3] == pytest.approx(plain[:3], abs=2e-4) and abs(base - plain[2]) > 1e-3
    assert dropped[:2] == plain[:2] and dropped[2] == pytest.approx(base, abs=1e-4)


@pytest.mark.parametrize("warm", [False, True])
def test_the_learning_rate_goes_on_falling_or_rises_again_after_a_selection(short, monkeypatch, warm):
    rates, make = [], recipes.make_optimizer

    def watched(*args) -> torch.optim.Optimizer:
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(recipes, "make_optimizer", watched)
    settings = json.dumps(SMT | {"restart": {"steps": [2], "keep": True, "warm": warm}})
    bench_quality.train(replace(RUN, settings=settings), testbeds.TESTBEDS, short)
    assert rates == pytest.approx([1e-2, 5e-3, 1e-2, 5e-3] if warm else [1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_the_delta_is_scaled_by_the_weight_of_its_module(select):
    model, bank, _ = select(SMT)
    rms = {t.name: model.get_submodule(f"base_model.model.{t.name}").get_base_layer().weight.square().mean().sqrt()
           for t in bank.targets}  # fmt: skip
    changes = []
    for settings in (SMT, SMT | {"delta_scale": "weight_rms"}):
        bank.weight.data.zero_()
        bank.weight.grad = torch.ones_like(bank.weight)
        recipes.make_optimizer(Recipe.parse(settings), model, 1e-2, None, 0.0).step()
        changes.append(bank.weight.detach().clone())
    mean = sum(rms.values()) / len(rms)
    expected = torch.stack([rms[bank.targets[module].name] / mean for module in bank.index[:, 0].tolist()])
    torch.testing.assert_close(changes[1], changes[0] * expected[:, None, None])


def test_a_scaled_delta_trains_as_autograd_on_base_plus_scale_times_values(select, testbed):
    """The bank holds scale * values: after steps of AdamW on the dense truth's values, with their weight decay."""
    settings = SMT | {"delta_scale": 3.0, "optimizer_options": {"weight_decay": 0.5}}
    model, bank, _ = select(settings)
    for one in (model, testbed.model):
        one.double()
    data = bench_quality.batches(RUN, testbed, 3)
    optimizer = recipes.make_optimizer(Recipe.parse(settings), model, 1e-2, None, 0.0)
    dense, values = testbed.model.requires_grad_(False), torch.zeros_like(bank.weight).requires_grad_()
    truth = torch.optim.AdamW([values], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.5)
    for batch in data:
        model(**batch).loss.backward()
        weights = {f"{target.name}.weight": dense.get_submodule(target.name).weight.clone() for target in bank.targets}
        for value, (module, row, col) in zip(values, bank.index.tolist(), strict=True):
            weight = weights[f"{bank.targets[module].name}.weight"]
            weight[4 * row : 4 * row + 4, 4 * col : 4 * col + 4] += 3.0 * value
        torch.func.functional_call(dense, weights, kwargs=batch).loss.backward()
        torch.testing.assert_close(bank.weight.grad, values.grad, rtol=1e-3, atol=1e-6)
        for one in (optimizer, truth):
            one.step()
            one.zero_grad()
    torch.testing.assert_close(bank.weight, 3.0 * values, rtol=1e-3, atol=1e-4)
