"""Sorted blocks: rows and columns in the order of their importance, against dense gradients."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from dense_truth import SCORES, assert_right, bank_of, dense_gradients, dense_of, in_place, outputs, wrap
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from smt_peft import SMTConfig, scoring, select_blocks
from smt_peft.config import Accumulation, Score
from smt_peft.scoring import FeatureCollector
from smt_peft.selection import arrange, select, sort_lines

SIZE = 16


def warmed_up(base, batches, **options):
    """A model with sorted blocks from a warm-up over all batches, and its selection."""
    options = {"block_size": SIZE, "num_blocks": 12, "warmup_steps": len(batches), **options}
    model = get_peft_model(deepcopy(base), SMTConfig(arrangement="sorted", **options))
    return model, select_blocks(model, batches, progress_bar=False)


def feature_norms(base, names, batches) -> dict[str, list[torch.Tensor]]:
    """The norms of each target's dY and x over the tokens of a batch that have a gradient, summed over the batches; of
    x over all modules that read it, too."""
    dense, found = deepcopy(base).train().requires_grad_(), {name: [0, 0] for name in names}

    def watch(name, x, y):
        def look(dy):
            length = dy.flatten(0, 1).norm(dim=1)
            seen = length > 1e-5 * length.max()
            for side, matrix in enumerate((dy, x)):
                found[name][side] = found[name][side] + matrix.detach().flatten(0, 1)[seen].square().sum(0).sqrt()

        y.register_hook(look)

    for name in names:
        dense.get_submodule(name).register_forward_hook(lambda module, x, y, name=name: watch(name, x[0], y))
    for batch in batches:
        dense(**batch).loss.backward()
    inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    readers: dict[str, list[str]] = {}
    for name in names:
        path, _, module = name.rpartition(".")
        readers.setdefault(f"{path}.{inputs.get(module, module)}", []).append(name)
    for together in readers.values():
        total = sum(found[name][1] for name in together)
        for name in together:
            found[name][1] = total
    return found


def lines_of(*norms: torch.Tensor) -> list[torch.Tensor]:
    """Features in the order of their norms, b a line, ascending in each."""
    return [norm.argsort(descending=True, stable=True).view(-1, SIZE).sort(1).values for norm in norms]


def scored(grids: list[torch.Tensor], score: str, accumulation: str) -> torch.Tensor:
    blocks = torch.stack(grids).unflatten(2, (-1, SIZE)).unflatten(1, (-1, SIZE))
    if accumulation == "signed":
        return SCORES[score](blocks.mean(0))
    return torch.stack([SCORES[score](of) for of in blocks]).mean(0)


@pytest.mark.parametrize("accumulation", Accumulation.__args__)
@pytest.mark.parametrize("score", Score.__args__)
def test_lines_and_scores_are_those_of_dense_gradients(llama, batches, score, accumulation):
    """Rows and columns in the order of their norms in the first half of the batches, blocks scored by the second."""
    _, selection = warmed_up(llama, batches, score=score, accumulation=accumulation)
    gradients, norms = (
        dense_gradients(llama, selection.names, batches[2:]),
        feature_norms(llama, selection.names, batches[:2]),
    )
    assert len(selection.names) == 6
    for name, scores, lines in zip(selection.names, selection.scores, selection.lines, strict=True):
        rows, cols = lines_of(*norms[name])
        assert torch.equal(lines.rows, rows) and torch.equal(lines.cols, cols)
        grids = [g[name][rows.flatten()][:, cols.flatten()] for g in gradients]
        torch.testing.assert_close(scores, scored(grids, score, accumulation), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scope", ["model", "input", "module"])
def test_the_best_of_the_blocks_in_order_are_selected(llama, batches, scope):
    model, selection = warmed_up(llama, batches, scope=scope, num_blocks=16)
    chosen = bank_of(model).selected_blocks()
    for target, row, col in selection.index.tolist():
        lines = selection.lines[target]
        assert [lines.rows[row].tolist(), lines.cols[col].tolist()] in chosen[selection.names[target]]
    assert sum(map(len, chosen.values())) == len(selection.index) == 16
    inputs = [0, 0, 0, 3, 3, 3]  # of q, k and v in two layers
    assert torch.equal(selection.index, select(selection.scores, [(list(range(6)), 16)], scope, inputs))
    assert bank_of(model).is_selected and model.peft_config["default"].selected_blocks == chosen == selection.blocks()


def test_a_budget_of_important_features_holds_more_of_the_gradient_than_tiles_do(llama, batches):
    """What sorting is for: the blocks hold more of the absolute gradient than as many tiles."""
    held = {}
    for arrangement in ("tiles", "sorted"):
        model = get_peft_model(
            deepcopy(llama), SMTConfig(block_size=SIZE, num_blocks=12, warmup_steps=4, arrangement=arrangement)
        )
        select_blocks(model, batches, progress_bar=False)
        masks = in_place(model, torch.ones_like(bank_of(model).weight))
        gradients = dense_gradients(llama, masks, batches)
        held[arrangement] = sum((g[name].abs() * mask).sum() for g in gradients for name, mask in masks.items())
    assert held["sorted"] > held["tiles"]


@pytest.mark.parametrize("selection", ["gradient", "activation", "magnitude", "random"])
def test_every_rule_trains_saves_and_merges(llama, batches, selection, tmp_path):
    base = llama.double()
    model = wrap(base, "sorted", selection=selection, warmup_steps=4, init_weights=True)
    if selection in ("gradient", "activation"):
        select_blocks(model, batches, progress_bar=False)
    nn.init.normal_(bank_of(model).weight, std=0.1)
    assert_right(model, base, batches[0])
    logits = model.eval()(**batches[0]).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deepcopy(base), tmp_path).double().eval()
    bank_of(loaded).weight.data.copy_(bank_of(model).weight)  # files are float32
    assert torch.equal(loaded(**batches[0]).logits, logits)
    assert bank_of(loaded).selected_blocks() == model.peft_config["default"].selected_blocks is not None
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batches[0]).logits, logits, rtol=1e-9, atol=1e-9)


def test_the_same_seed_gives_the_same_blocks_and_another_others(llama):
    chosen = [bank_of(wrap(llama, "sorted", seed=seed)).selected_blocks() for seed in (3, 3, 4)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_magnitude_takes_large_rows_by_large_columns(llama):
    layer = llama.model.layers[1].self_attn.k_proj
    rows, cols = torch.arange(1, 32, 2)[:SIZE], torch.arange(3, 64, 4)[:SIZE]
    layer.weight.data[rows[:, None], cols] *= 10
    model = wrap(llama, "sorted", selection="magnitude", budget=1)
    assert bank_of(model).selected_blocks() == {"model.layers.1.self_attn.k_proj": [[rows.tolist(), cols.tolist()]]}


def test_activation_takes_the_columns_with_the_largest_inputs(llama, batches):
    large = torch.arange(0, 64, 4)
    llama.model.layers[0].input_layernorm.weight.data[large] *= 100
    model, _ = warmed_up(llama, batches, selection="activation", target_modules=["q_proj"], num_blocks=4)
    (blocks,) = bank_of(model).selected_blocks().values()
    assert blocks == [[list(range(row, row + SIZE)), large.tolist()] for row in range(0, 64, SIZE)]


def test_ties_go_to_the_earlier_feature():
    lines = sort_lines(torch.tensor([1.0, 3, 1, 3]), torch.zeros(4), 2)
    assert lines.rows.tolist() == [[1, 3], [0, 2]] and lines.cols.tolist() == [[0, 1], [2, 3]]
    index = torch.tensor([[0, 1, 0], [0, 0, 1]])
    assert arrange(index, [lines]).tolist() == [[0, 0, 2, 0, 1], [0, 1, 3, 2, 3]]


def test_conv1d_has_rows_of_its_outputs(batches):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)).double()
    model = wrap(base, "sorted", target_modules=["c_attn"], budget=5)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    delta, base_weight = layer.get_delta_weight("default"), layer.weight.clone()
    assert delta.shape == (32, 96) and delta.any()
    logits = model.eval()(**batches[0]).logits
    model.merge_adapter()
    assert torch.equal(layer.weight, base_weight + delta)
    torch.testing.assert_close(model(**batches[0]).logits, logits, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, base_weight)


EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_parameters_have_sorted_blocks(batches, dtype):
    base = mixtral().to(dtype)
    base.set_experts_implementation("eager")  # the quicker ones know no float64
    model, selection = warmed_up(base, batches, **EXPERTS, num_blocks=6)
    norms = {name: [0, 0] for name in selection.names}
    for batch in batches[:2]:
        dense = deepcopy(base).train().requires_grad_()
        dense(**batch).loss.backward()
        for name in norms:
            gradient = dense.get_parameter(name).grad.flatten(0, 1)
            norms[name] = [norm + gradient.norm(dim=side) for norm, side in zip(norms[name], (1, 0), strict=True)]
    for name, lines in zip(selection.names, selection.lines, strict=True):
        rows, cols = lines_of(*norms[name])
        assert torch.equal(lines.rows, rows) and torch.equal(lines.cols, cols)
    nn.init.normal_(bank_of(model).weight, std=0.1)
    logits = model.eval()(**batches[0]).logits
    assert not torch.allclose(logits, base(**batches[0]).logits)
    torch.testing.assert_close(model.merge_and_unload()(**batches[0]).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", Accumulation.__args__)
@pytest.mark.parametrize("score", Score.__args__)
def test_sorted_blocks_of_experts_are_scored_in_their_order(batches, score, accumulation, monkeypatch):
    """And a part of a gradient at a time."""
    monkeypatch.setattr(scoring, "MOST_WIDENED", 3 * SIZE * 32)
    base = mixtral()
    _, selection = warmed_up(base, batches, **EXPERTS, num_blocks=6, score=score, accumulation=accumulation)
    gradients = []
    for batch in batches[2:]:
        dense = deepcopy(base).train().requires_grad_()
        dense(**batch).loss.backward()
        gradients.append({name: dense.get_parameter(name).grad.flatten(0, 1) for name in selection.names})
    for name, scores, lines in zip(selection.names, selection.scores, selection.lines, strict=True):
        grids = [g[name][lines.rows.flatten()][:, lines.cols.flatten()] for g in gradients]
        torch.testing.assert_close(scores, scored(grids, score, accumulation), rtol=1e-4, atol=1e-8)


# --- files and configs ---------------------------------------------------------------------------------------------


def test_the_weights_hold_rows_and_columns_and_the_config_stays_short(llama, batches, tmp_path):
    model, selection = warmed_up(llama, batches)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    index = next(tensor for key, tensor in tensors.items() if key.endswith("index"))
    assert index.dtype == torch.int16 and index.shape == (12, 1 + 2 * SIZE)
    assert torch.equal(index.int(), arrange(selection.index, selection.lines))
    assert len((tmp_path / "adapter_config.json").read_text()) < 2000
    assert SMTConfig.from_pretrained(tmp_path).selected_blocks is None


def test_blocks_can_be_given_by_hand(llama, batches):
    name, rows, cols = "model.layers.0.self_attn.q_proj", list(range(3, 35, 2)), list(range(0, 64, 4))
    other = [row + 1 for row in rows]
    base = llama.double()
    model = wrap(base, "sorted", num_blocks=None, selected_blocks={name: [[rows, cols], [other, cols]]})
    assert bank_of(model).selected_blocks() == {name: [[rows, cols], [other, cols]]}
    assert_right(model, base, batches[0])


def test_a_copy_of_a_loaded_adapters_config_has_its_blocks(llama, batches, tmp_path):
    """As TRL makes the reference of a DPO run; the file of a sorted adapter's config has none."""
    wrap(llama, "sorted", seed=3).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(deepcopy(llama), tmp_path, is_trainable=True)
    config = loaded.peft_config["default"]
    config.seed = 4  # by which it would have others
    loaded.add_adapter("ref", config)
    assert torch.equal(bank_of(loaded, "ref").index, bank_of(loaded).index)


def test_blocks_by_hand_may_name_what_they_share_in_different_orders(llama, batches):
    """As two lines these rows would be written twice in bfloat16, and the last one to write would win."""
    name, rows, halves = "model.layers.0.self_attn.q_proj", list(range(16)), (list(range(16)), list(range(16, 32)))
    turned = [[rows, halves[0]], [rows[::-1], halves[1][::-1]]]
    model = wrap(llama, "sorted", num_blocks=None, selected_blocks={name: turned})
    assert bank_of(model).selected_blocks() == {name: [[rows, half] for half in halves]}
    with torch.no_grad():
        bank_of(model).weight.normal_(std=0.1)
    expected = outputs(dense_of(llama, model), batches[0])
    actual = outputs(model.bfloat16(), batches[0])
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_a_file_that_names_what_blocks_share_in_different_orders_is_refused(llama):
    name, rows, halves = "model.layers.0.self_attn.q_proj", list(range(16)), (list(range(16)), list(range(16, 32)))
    model = wrap(llama, "sorted", num_blocks=None, selected_blocks={name: [[rows, half] for half in halves]})
    index = bank_of(model).index.clone()
    index[1, 1:17] = index[1, 1:17].flip(0)
    with pytest.raises(ValueError, match="in another order"):
        bank_of(model).set_index(index)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([[0, 1]], "is not a list of"),
        ([[list(range(16)), list(range(15))]], "16 rows by 16 columns"),
        ([[list(range(16)), list(range(56, 72))]], "does not exist"),
        ([[list(range(16)), [0] * 16]], "name one twice"),
        ([[list(range(16)), list(range(16))], [list(range(8, 24)), list(range(16))]], "share some of their rows"),
        ([[list(range(16)), list(range(16))]] * 2, "twice"),
    ],
    ids=["places", "a short side", "outside", "a column twice", "half the rows", "a block twice"],
)
def test_blocks_that_cannot_be_are_refused(llama, blocks, words):
    with pytest.raises(ValueError, match=words):
        wrap(llama, "sorted", num_blocks=None, selected_blocks={"model.layers.0.self_attn.q_proj": blocks})


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="sorted blocks have no diagonal"):
        SMTConfig(arrangement="sorted", selection="diagonal")


@pytest.mark.parametrize(("saved", "other"), [("tiles", "sorted"), ("sorted", "tiles")])
def test_a_checkpoint_of_the_other_arrangement_is_refused(llama, saved, other):
    states = {kind: wrap(llama, arrangement=kind) for kind in (saved, other)}
    with pytest.raises(ValueError, match="arrangement"):
        states[other].load_state_dict(states[saved].state_dict())


@pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
def test_padding_changes_nothing(llama, batches, arrangement):
    """Neither scores nor, sorted, the order: the inputs of padding may be larger than all others."""
    llama.double().model.embed_tokens.weight.data[0] *= 50  # of the padding token
    padded = []
    for batch in batches:
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 6))
        labels = torch.nn.functional.pad(batch["labels"], (0, 6), value=-100)
        padded.append({"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()})
    config = SMTConfig(
        block_size=8, num_blocks=30, arrangement=arrangement, target_modules="all-linear", warmup_steps=4
    )
    found, expected = (
        select_blocks(get_peft_model(deepcopy(llama), config), data, progress_bar=False) for data in (padded, batches)
    )
    assert torch.equal(found.features(), expected.features())
    for score, wanted in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(score, wanted)


def test_a_gradient_that_is_rounding_is_none():
    """Beside the longest 1e-7 is, 1e-4 is not: the inputs of such a token say nothing, or what they say."""
    dy, x = torch.zeros(3, 2), torch.zeros(3, 4)
    dy[0, 0], dy[1, 1], dy[2, 1] = 1.0, 1e-7, 1e-4
    x[0, 0], x[1, 1], x[2, 2] = 1.0, 1e6, 2.0
    assert FeatureCollector.measure(SimpleNamespace(scale=1.0), 0, dy, x)[2:].tolist() == [1, 0, 2, 0]


def test_a_layer_that_sees_no_token_is_ranked_like_any_other():
    """As an expert to which nothing is routed."""

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(SIZE * 2, SIZE * 2), torch.nn.Linear(SIZE * 2, SIZE * 2)

        def forward(self, x):
            return self.used(x).square().mean() + self.idle(x[:0]).sum()

    config = SMTConfig(
        target_modules=["used", "idle"], block_size=SIZE, num_blocks=3, arrangement="sorted", warmup_steps=2
    )
    data = torch.randn(2, 5, SIZE * 2)
    selection = select_blocks(
        get_peft_model(Routed(), config), data, progress_bar=False, loss_function=lambda model, x: model(x)
    )
    assert selection.index[:, 0].tolist() == [selection.names.index("used")] * 3


def test_features_beyond_16_bits_are_saved_and_loaded(tmp_path):
    blocks = {"0": [[list(range(2**15 - 8, 2**15 + 8)), list(range(16))]]}
    plain = nn.Sequential(nn.Linear(16, 2**15 + 16, bias=False))
    options = {"target_modules": ["0"], "block_size": 16, "arrangement": "sorted", "init_weights": False}
    model = get_peft_model(deepcopy(plain), SMTConfig(**options, selected_blocks=blocks))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert bank_of(loaded).selected_blocks() == blocks
    assert torch.equal(bank_of(loaded).weight, bank_of(model).weight)
