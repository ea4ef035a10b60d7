"""The warm-up scores what dense gradients say, selects the best, and leaves everything else as it was."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from dense_truth import SCORES, dense_gradients
from peft import get_peft_model
from torch import nn

from smt_peft import SMTConfig, scoring, select_blocks
from smt_peft.config import Accumulation, Score
from smt_peft.layer import Linear
from smt_peft.scoring import FeatureCollector

SIZE = 16


def wrap(base, **options):
    return get_peft_model(base, SMTConfig(**{"block_size": SIZE, "num_blocks": 12, "warmup_steps": 4, **options}))


def warm_up(model, batches, **options):
    return select_blocks(model, batches, progress_bar=False, **options)


def target_names(model) -> list[str]:
    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, Linear)]


def expected_scores(gradients, name, score, accumulation) -> torch.Tensor:
    grids = [g[name].unflatten(1, (-1, SIZE)).unflatten(0, (-1, SIZE)) for g in gradients]
    if accumulation == "signed":
        return SCORES[score](torch.stack(grids).mean(0))
    return torch.stack([SCORES[score](grid) for grid in grids]).mean(0)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpointing", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("accumulation", Accumulation.__args__)
@pytest.mark.parametrize("score", Score.__args__)
def test_scores_equal_those_of_dense_gradients(llama, batches, score, accumulation, checkpointing):
    base = deepcopy(llama)
    model = wrap(llama, score=score, accumulation=accumulation)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    selection = warm_up(model, batches)
    gradients = dense_gradients(base, target_names(model), batches)
    assert len(selection.names) == 6
    for name, scores in zip(selection.names, selection.scores, strict=True):
        torch.testing.assert_close(scores, expected_scores(gradients, name, score, accumulation), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpointing", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_what_is_trained_beside_the_model_keeps_its_gradient(llama, batches, checkpointing, has_gradient):
    """A head of the loss's own, which the optimizer of the first step would find full of the warm-up's gradients."""
    head = nn.Linear(64, 2)
    if has_gradient:
        head(torch.ones(1, 64)).sum().backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in head.parameters()]
    model = wrap(llama)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()

    def loss(model, batch):
        return head(model(**batch).logits.mean(1)).square().mean() / (float("nan") if batch is batches[1] else 1)

    warm_up(model, batches, loss_function=loss)
    for parameter, (grad, values) in zip(head.parameters(), before, strict=True):
        assert parameter.grad is grad and (grad is None or torch.equal(grad, values))


def test_a_copy_that_gets_deltas_without_their_blocks_says_so(llama, batches, tmp_path):
    """A teacher that was made before the selection, and is updated by its parameters: it would compute the base."""
    student = wrap(llama)
    teacher = deepcopy(student).eval().requires_grad_(False)
    teacher(**batches[0])  # the base, as it is
    warm_up(student, batches)
    with torch.no_grad():
        student.get_base_model().smt_bank["default"].weight.normal_()
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)
    for use in (
        lambda: teacher(**batches[0]),
        lambda: teacher.save_pretrained(tmp_path),
        deepcopy(teacher).merge_adapter,
    ):
        with pytest.raises(ValueError, match="deltas of adapter 'default' are not zero, and it has no blocks"):
            use()
    teacher.load_state_dict(student.state_dict())
    torch.testing.assert_close(teacher(**batches[0]).logits, student.eval()(**batches[0]).logits)


def test_the_selection_is_the_best_blocks_of_the_whole_model(llama, batches):
    base = deepcopy(llama)
    model = wrap(llama, num_blocks=7)
    warm_up(model, batches)
    gradients = dense_gradients(base, target_names(model), batches)
    ranked = []
    for name in target_names(model):
        scores = expected_scores(gradients, name, "abs_mean", "absolute")
        ranked += [(float(s), name, i // scores.shape[1], i % scores.shape[1]) for i, s in enumerate(scores.flatten())]
    best = {(name, row, col) for _, name, row, col in sorted(ranked, reverse=True)[:7]}
    selected = model.peft_config["default"].selected_blocks
    assert {(name, row, col) for name, blocks in selected.items() for row, col in blocks} == best


def test_random_deltas_find_no_blocks(llama, batches):
    with pytest.raises(ValueError, match="not zero: it was made with init_weights=False"):
        warm_up(wrap(llama, init_weights=False), batches)


@pytest.mark.parametrize("rule", ["gradient", "activation"])
def test_the_loss_scale_leaves_the_scores_alone(llama, batches, rule):
    plain = warm_up(wrap(deepcopy(llama), selection=rule), batches)
    scaled = warm_up(wrap(llama, selection=rule), batches, loss_scale=1024.0)
    for one, other in zip(plain.scores, scaled.scores, strict=True):
        torch.testing.assert_close(one, other)


def test_a_warm_up_beside_a_trained_adapter_scores_the_function_that_runs(llama, batches):
    """Blocks for a second adapter, while the first one, active too, changes what the model computes."""
    model = wrap(llama, selection="random", init_weights=False)
    dense = deepcopy(model).merge_and_unload()
    model.add_adapter("second", SMTConfig(block_size=SIZE, num_blocks=5, warmup_steps=4))
    model.base_model.set_adapter(["default", "second"])
    selection = warm_up(model, batches, adapter_name="second")
    gradients = dense_gradients(dense, target_names(model), batches)
    for name, scores in zip(selection.names, selection.scores, strict=True):
        expected = expected_scores(gradients, name, "abs_mean", "absolute")
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)


def test_the_signed_score_of_a_module_used_twice_is_that_of_its_whole_gradient():
    torch.manual_seed(0)
    module, x = nn.ModuleDict({"twice": nn.Linear(32, 32)}), torch.randn(5, 32)
    twice = deepcopy(module.twice)
    twice(twice(x).tanh()).square().sum().backward()
    model = wrap(module, target_modules=["twice"], num_blocks=2, accumulation="signed", warmup_steps=1)
    layer = model.base_model.model.twice
    selection = warm_up(model, [x], loss_function=lambda model, x: layer(layer(x).tanh()).square().sum())
    expected = expected_scores([{"twice": twice.weight.grad}], "twice", "abs_mean", "signed")
    torch.testing.assert_close(selection.scores[0], expected)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_score_of_a_batch_is_the_sum_of_its_blocks_scores(llama, batches, scale):
    base, model = deepcopy(llama), wrap(llama)
    selection = warm_up(
        model, [{**batches[0], "broken": True}, *batches[1:]], loss_function=with_broken, loss_scale=scale
    )
    gradients = dense_gradients(base, selection.names, batches)
    sums = [
        sum(expected_scores([g], n, "abs_mean", "absolute").sum().item() for n in selection.names) for g in gradients
    ]
    assert selection.batch_scores == pytest.approx([0.0, *sums[1:]], rel=1e-4)


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs"])
def test_the_score_of_a_batch_whose_signed_gradients_are_summed_is_their_size(llama, batches, score):
    base, model = deepcopy(llama), wrap(llama, accumulation="signed", score=score)
    selection = warm_up(model, batches)
    size = SCORES["l1"] if score == "abs_mean" else lambda g: g.sum((1, 3)).abs()
    for found, gradients in zip(selection.batch_scores, dense_gradients(base, selection.names, batches), strict=True):
        grids = [g.unflatten(1, (-1, SIZE)).unflatten(0, (-1, SIZE)) for g in gradients.values()]
        assert found == pytest.approx(sum(size(grid).sum().item() for grid in grids), rel=1e-4)


# --- data that is too little or broken --------------------------------------------------------------------------


def with_broken(model, batch):
    loss = model(**{k: v for k, v in batch.items() if k != "broken"}).loss
    return loss * float("nan") if "broken" in batch else loss


def test_batches_that_are_not_finite_are_skipped_and_counted(llama, batches):
    clean = warm_up(wrap(deepcopy(llama), warmup_steps=3), batches[1:])
    selection = warm_up(wrap(llama), [{**batches[0], "broken": True}, *batches[1:]], loss_function=with_broken)
    assert (selection.batches, selection.skipped) == (4, 1) and "1 of them skipped" in selection.summary()
    assert all(torch.equal(a, b) for a, b in zip(clean.scores, selection.scores, strict=True))


def test_a_loss_scale_that_overflows_is_halved_until_it_does_not(llama, batches):
    clean = warm_up(wrap(deepcopy(llama), warmup_steps=3), batches[2:] + batches[:1])

    def overflowing(model, batch):
        loss = model(**batch).loss
        loss.register_hook(lambda scale: scale if scale <= 256 else scale * float("inf"))
        return loss

    data = batches[2:] + batches[:1]
    selection = warm_up(wrap(llama, warmup_steps=3), data, loss_function=overflowing, loss_scale=1024.0)
    assert selection.skipped == 0 and selection.batches == 3  # the first of them was run three times
    for one, other in zip(clean.scores, selection.scores, strict=True):
        torch.testing.assert_close(one, other)


def test_a_broken_batch_leaves_the_loss_scale_where_it_was(llama, batches):
    scales = []

    def noting(model, batch):
        loss = with_broken(model, batch)
        loss.register_hook(lambda scale: scales.append(scale.item()))
        return loss

    data = [batches[0], {**batches[1], "broken": True}, *batches[2:]]
    selection = warm_up(wrap(llama), data, loss_function=noting, loss_scale=4.0)
    assert scales == [4, 4, 4, 4] and selection.skipped == 1  # no scale helps a loss that is not finite itself


def test_a_loss_that_takes_a_batch_apart_gets_it_whole_again(llama, batches):
    def overflowing(model, batch):
        loss = model(input_ids=batch["input_ids"], labels=batch.pop("labels")).loss
        loss.register_hook(lambda scale: scale if scale <= 1 else scale * float("inf"))
        return loss

    selection = warm_up(wrap(llama, warmup_steps=2), batches[:2], loss_function=overflowing, loss_scale=4.0)
    assert selection.skipped == 0 and "labels" in batches[0]


def test_ranks_run_a_batch_again_together(monkeypatch):
    """One whose own batch is fine waits for the one whose overflows, or they would not meet in the next collective."""
    # Of another rank: its gradient overflows twice, then its data are broken, which no scale helps, then all is well.
    others = iter([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(scoring, "reduce_over_ranks", lambda values, kind: values * torch.tensor(next(others)))
    collector = FeatureCollector([SimpleNamespace(device="cpu")], 8.0)
    found = []
    for _ in range(4):
        collector._take(0, torch.full((2,), 3.0 * collector.scale))
        found.append((collector.scale, collector.end_batch()))
    assert found == [(8, False), (4, False), (2, True), (8, True)] and not list(others)
    assert collector.skipped == 0 and collector._sums[0].tolist() == [6, 6]


def test_only_the_gradient_of_the_loss_itself_is_scored(llama, batches):
    """Adversarial and smoothing losses differentiate others for their own sake."""
    clean = warm_up(wrap(deepcopy(llama)), batches)

    def loss(model, batch):
        embedded = model.get_input_embeddings()(batch["input_ids"])
        noise = torch.zeros_like(embedded, requires_grad=True)
        torch.autograd.grad(model(inputs_embeds=embedded + noise, labels=batch["labels"]).loss, noise)
        return model(**batch).loss

    found = warm_up(wrap(llama), batches, loss_function=loss)
    assert found.batch_scores == clean.batch_scores
    assert all(torch.equal(a, b) for a, b in zip(clean.scores, found.scores, strict=True))


def test_too_many_batches_that_are_not_finite_are_an_error(llama, batches):
    broken = [{**batch, "broken": True} for batch in batches[:2]]
    with pytest.raises(ValueError, match=r"2 of 4 warm-up batches.*lower the loss scale or use bfloat16"):
        warm_up(wrap(llama), broken + batches[2:], loss_function=with_broken)


def test_scores_that_are_all_zero_are_an_error(llama, batches):
    with pytest.raises(ValueError, match=r"Every block scores zero.*Check that the labels"):
        warm_up(wrap(llama), batches, loss_function=lambda model, batch: model(**batch).loss * 0)


@pytest.mark.parametrize("empty", [[], iter(())], ids=["no batches", "an iterator at its end"])
def test_an_empty_dataloader_is_an_error(llama, empty):
    with pytest.raises(ValueError, match=r"got 0 of \d+ batches, and then none.*Give it data"):
        warm_up(wrap(llama), empty)


def test_few_batches_are_gone_through_again_with_a_warning(llama, batches):
    with pytest.warns(UserWarning, match=r"2 batches, fewer than warmup_steps=4"):
        selection = warm_up(wrap(llama), batches[:2])
    assert selection.batches == 4


def test_a_model_without_the_adapter_is_an_error(llama, batches):
    with pytest.raises(ValueError, match=r"no SMT adapter; wrap it first"):
        warm_up(llama, batches)
    with pytest.raises(ValueError, match=r"no SMT adapter 'other'; the model has \['default'\]"):
        warm_up(wrap(llama), batches, adapter_name="other")


def test_a_rule_without_data_needs_no_warm_up(llama, batches):
    with pytest.raises(ValueError, match=r"selection='random' needs no data"):
        warm_up(wrap(llama, selection="random"), batches)


def test_training_before_a_selection_names_the_way_out(llama, batches):
    model = wrap(llama)
    with pytest.raises(RuntimeError, match=r"'default' has no blocks yet.*SMTWarmupCallback.*select_blocks"):
        model.train()(**batches[0])
    with torch.no_grad():
        assert torch.isfinite(model(**batches[0]).loss), "evaluation needs no selection"


def test_the_summary_says_where_the_blocks_are(llama, batches):
    selection = warm_up(wrap(llama), batches)
    assert sum(selection.counts_by_type().values()) == sum(selection.counts_by_layer().values()) == 12
    assert "12 blocks of 16 x 16 (3,072 parameters)" in selection.summary()
    assert "from 4 batches" in selection.summary()


def test_the_selection_fills_bank_and_config(llama, batches):
    model = wrap(llama)
    selection = warm_up(model, batches)
    assert model.peft_config["default"].selected_blocks == selection.blocks()
    assert torch.equal(model.base_model.model.smt_bank["default"].index, selection.index)


@pytest.mark.parametrize("selection", ["gradient", "activation"])
def test_modules_that_get_views_of_one_input_read_one_input(llama, batches, selection):
    """As under DeepSpeed ZeRO-3, whose hooks hand each module a view of its own."""
    config = SMTConfig(block_size=16, num_blocks=20, target_modules="all-linear", scope="input", warmup_steps=2,
                       selection=selection)  # fmt: skip
    found = []
    for views in (False, True):
        model = get_peft_model(deepcopy(llama), config)
        for module in model.modules():
            if views and isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (args[0].view_as(args[0]),))
            if views and hasattr(module, "smt_blocks"):
                module.register_forward_pre_hook(lambda _, args: (args[0].view_as(args[0]),))
        found.append(select_blocks(model, batches, progress_bar=False))
    assert found[0].inputs == found[1].inputs and len({*found[0].inputs}) == 8
    assert torch.equal(found[0].index, found[1].index)


# --- what a model remembers ---------------------------------------------------------------------------------------


def test_what_a_reference_pass_thaws_is_frozen_again(llama, batches):
    """As TRL's, which switch the adapter off; PEFT then makes whole modules trainable."""
    model, seen = wrap(llama, modules_to_save=["lm_head"]), []
    head = model.get_output_embeddings().modules_to_save["default"].weight

    def loss(model, batch):
        seen.append(head.requires_grad)
        with model.disable_adapter():
            model(**batch)
        return model(**batch).loss

    warm_up(model, batches, loss_function=loss)
    assert len(seen) > 1 and not any(seen) and head.requires_grad


def test_what_is_computed_once_more_in_the_backward_is_frozen_too(llama, batches):
    """A reference pass between a checkpointed forward and its backward, as in DPO, thaws whole modules."""
    model = wrap(llama, modules_to_save=["input_layernorm"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()

    def loss(model, batch):
        loss = model(**batch).loss
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        return loss

    assert warm_up(model, batches, loss_function=loss).batches == 4


def test_a_forward_after_a_reference_pass_is_frozen(llama, batches):
    """As in GRPO; else the warm-up would hold the gradients of whole modules."""
    model = wrap(llama, modules_to_save=["lm_head"])
    head, held = model.get_output_embeddings().modules_to_save["default"].weight, []

    def loss(model, batch):
        held.append(head.grad)
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        return model(**batch).loss

    warm_up(model, batches, loss_function=loss)
    assert held == [None] * 4


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_what_is_compiled_runs_eagerly_but_for_flex_attention(llama, batches, attention, monkeypatch):
    """Which needs a compiler, or it keeps all scores of all heads."""
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: stances.append(stance) or nullcontext())
    model = wrap(llama)
    model.other = torch.nn.Module()
    model.other.config = SimpleNamespace(_attn_implementation=attention)
    warm_up(model, batches)
    assert stances == ([] if attention == "flex_attention" else ["force_eager"])


def test_positions_that_grow_with_the_longest_input_are_put_back(make_llama, batches):
    """Dynamic NTK keeps the longest length it has seen beside the frequencies that it made for it."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    base = make_llama(max_position_embeddings=8, rope_parameters=rope)
    ids = torch.randint(2, 64, (1, 16), generator=torch.Generator().manual_seed(3))
    expected = deepcopy(base).eval()(ids).logits
    model = wrap(base)
    warm_up(model, [{"input_ids": ids, "labels": ids}] * 4)
    assert torch.equal(model.eval()(ids).logits, expected)


# --- several ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
@pytest.mark.parametrize("selection", ["gradient", "activation"])
def test_two_ranks_that_see_the_same_find_what_one_does(llama, batches, selection, arrangement, monkeypatch):
    options = {"selection": selection, "arrangement": arrangement}
    alone = warm_up(wrap(deepcopy(llama), **options), batches)
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", lambda *_, **__: None)
    least = distributed.ReduceOp.MIN
    monkeypatch.setattr(distributed, "all_reduce", lambda v, op=None: None if op == least else v.mul_(2))
    both = warm_up(wrap(llama, **options), batches)
    assert torch.equal(both.index, alone.index)
    for one, other in zip(both.scores, alone.scores, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def beside(monkeypatch):
    """Another rank, which adds to what is summed, and has what is the least."""

    def rank(sums, least):
        def all_reduce(values, operation):
            other = least if operation == torch.distributed.ReduceOp.MIN else sums
            other = torch.tensor(other) if values.shape == (len(other),) and not values.is_floating_point() else None
            if other is not None:
                values.copy_(torch.minimum(values, other) if other.tolist() == least else values + other)

        for name, value in {"is_initialized": True, "get_world_size": 2, "broadcast": None}.items():
            monkeypatch.setattr(torch.distributed, name, lambda *_, value=value, **__: value)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    return rank


def test_too_many_broken_batches_are_counted_over_all_ranks(llama, batches, beside):
    beside(sums=[0, 4], least=[])
    broken = [{**batch, "broken": True} for batch in batches[:3]]
    selection = warm_up(wrap(llama), broken + batches[3:], loss_function=with_broken)
    assert selection.skipped == 3, "of 4 here, and of 8 in all"


def test_layers_that_read_one_input_on_any_rank_do_so_on_all(llama, batches, beside):
    """As where no token of one rank is routed to an expert."""
    model = wrap(llama, scope="input")
    names = target_names(model)
    beside(sums=[], least=[0] * len(names))
    assert warm_up(model, batches).inputs == [0] * len(names)


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs"])
def test_a_warm_up_inside_of_autocast_sums_as_widely_as_one_whose_backward_is_outside(llama, batches, score):
    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    dense = []
    for inside in (True, False):
        model = deepcopy(llama).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            forward(model, batches[0]).backward()
        dense.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    if not torch.equal(*dense):
        pytest.skip("this PyTorch's own backward rounds more inside of autocast, as 2.7 does")
    found = []
    for inside in (True, False):
        model = wrap(deepcopy(llama), selection="gradient", score=score, accumulation="signed", warmup_steps=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(select_blocks(model, batches, loss_function=forward, progress_bar=False))
    for scores, expected in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_two_experts_without_tokens_do_not_read_one_input():
    collector = FeatureCollector([SimpleNamespace(device="cpu")] * 3, 1.0)
    first, second = torch.empty(0, 4), torch.empty(0, 4)
    for position, x in enumerate([first, second, second]):
        collector._read(position, x)
    assert collector.inputs == [0, 1, 1]
