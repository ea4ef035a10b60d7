"""Expert weights stored as 3-D parameters, reached through target_parameters, against dense autograd."""

import copy

import pytest
import torch
import transformers as tf
from dense_truth import bank_of
from peft import LoraConfig, PeftModel, get_peft_model

from smt_peft import SMTConfig, select_blocks

SIZE, NUM_BLOCKS = 8, 12
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4)),
    "qwen3 moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.fixture(params=[(name, how) for name in MODELS for how in ("eager", "grouped_mm", "batched_mm")], ids=" ".join)
def base(request):
    name, how = request.param
    model, config = MODELS[name]
    torch.manual_seed(0)
    model = model(copy.deepcopy(config))
    model.set_experts_implementation(how)
    return model


@pytest.fixture(params=[[], ["q_proj", "v_proj"]], ids=["experts only", "with attention"])
def config(request):
    return lambda: SMTConfig(
        target_modules=request.param,
        target_parameters=EXPERTS,
        num_blocks=NUM_BLOCKS,
        block_size=SIZE,
        warmup_steps=1,
        task_type="CAUSAL_LM",
    )


OTHERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ONCE = {"mixtral": ["w1", "w2", "w3"], "qwen3 moe": ["gate_proj", "up_proj", "down_proj"]}
BY_REGEX = {name: rf".*\.({'|'.join([*OTHERS, *once])})" for name, once in ONCE.items()}


@pytest.mark.parametrize("how", ["names", "experts alone", "a regex", "all-linear"])
@pytest.mark.parametrize("name", MODELS)
def test_names_that_experts_once_had_are_the_parameters_they_are_in_now(name, how):
    """As with LoRA; which with "all-linear" trains the router, too."""
    named = {"names": [*OTHERS, *ONCE[name]], "experts alone": ONCE[name], "a regex": BY_REGEX[name]}.get(how, how)
    model, config = MODELS[name]
    lora = get_peft_model(model(copy.deepcopy(config)), LoraConfig(target_modules=named, r=1)).base_model
    given = SMTConfig(target_modules=named, num_blocks=4, block_size=SIZE, selection="random")
    smt = get_peft_model(model(copy.deepcopy(config)), given)
    expected = {*lora.targeted_module_names, *lora.targeted_parameter_names}
    found = {target.name.replace(".base_layer", "") for target in bank_of(smt).targets}
    assert found == {name for name in expected if not name.endswith("gate.weight")} and given.target_parameters is None
    if how != "experts alone":
        assert any("q_proj" in name for name in found)
    assert any("experts" in name for name in found)


def test_half_of_what_is_fused_is_refused_as_with_lora():
    model, config = MODELS["qwen3 moe"]
    for make in (LoraConfig, SMTConfig):
        with pytest.raises(ValueError, match=r"gate_proj (of .*experts )?without (also targeting )?up_proj"):
            get_peft_model(model(copy.deepcopy(config)), make(target_modules=["q_proj", "gate_proj"]))


@pytest.mark.filterwarnings("error:target_modules=")
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target_modules": ["shared_expert.gate_proj"]}, ["shared_expert.gate_proj"]),
        ({"target_modules": r".*shared_expert\.down_proj"}, ["shared_expert.down_proj"]),
        ({"target_modules": r".*experts\.\d+\.down_proj"}, ["experts.down_proj"]),
        ({"target_modules": ["down_proj"]}, ["experts.down_proj", "shared_expert.down_proj"]),
        (
            {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*experts.*"},
            ["q_proj", "shared_expert.down_proj"],
        ),
        (
            {"target_modules": ["down_proj"], "layers_to_transform": [0]},
            ["0.mlp.experts.down_proj", "0.mlp.shared_expert.down_proj"],
        ),
        (
            {"target_modules": ["q_proj", "down_proj"], "selection": "activation"},
            ["q_proj", "shared_expert.down_proj"],
        ),
    ],
    ids=str,
)
def test_experts_beside_a_shared_one_are_those_that_are_named(options, expected):
    config = tf.Qwen2MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                               shared_expert_intermediate_size=16)  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(
        tf.Qwen2MoeForCausalLM(config), SMTConfig(**{"selection": "random", **options}, num_blocks=4, block_size=SIZE)
    )
    found = {target.name.replace(".base_layer", "") for target in bank_of(model).targets}
    assert all(any(f".{name}".endswith(f".{end}") for end in expected) for name in found)
    assert all(any(f".{name}".endswith(f".{end}") for name in found) for end in expected)
    assert len(found) == len(expected) * (1 if "layers_to_transform" in options else 2)


def parameter(model, target: str) -> torch.nn.Parameter:
    return dict(model.named_parameters()).get(target, dict(model.named_parameters()).get(f"{target}.weight"))


def grids(model, base, gradients: bool = False) -> list[torch.Tensor]:
    """[block rows, block columns, SIZE, SIZE] of each target's weight (or gradient) in a plain model."""
    tensors = [parameter(base, target.name) for target in bank_of(model).targets]
    tensors = [tensor.grad if gradients else tensor.detach() for tensor in tensors]
    return [t.reshape(-1, t.shape[-1]).unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE) for t in tensors]


def selected(base, config):
    model = get_peft_model(copy.deepcopy(base), config())
    select_blocks(model, [BATCH], progress_bar=False)
    return model


def trained(base, config, steps=3):
    model = selected(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def dense(base):
    model = copy.deepcopy(base).train()
    model(**BATCH).loss.backward()
    return model


def test_the_warm_up_selects_the_blocks_with_the_largest_dense_gradient(base, config):
    model = selected(base, config)
    scores = torch.cat([grid.abs().mean((2, 3)).flatten() for grid in grids(model, dense(base), gradients=True)])
    chosen = torch.stack([grids(model, dense(base), True)[t][r, c].abs().mean() for t, r, c in bank_of(model).index])
    torch.testing.assert_close(
        chosen.sort().values, scores.topk(NUM_BLOCKS).values.sort().values, rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_block_gradients_equal_the_dense_gradient(base, config, checkpointing):
    model = selected(base, config).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model(**BATCH).loss.backward()
    blocks = grids(model, dense(base), gradients=True)
    expected = torch.stack([blocks[t][r, c] for t, r, c in bank_of(model).index])
    torch.testing.assert_close(bank_of(model).weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_loaded_adapter_gives_the_trained_logits(base, config, tmp_path):
    model = trained(base, config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert (logits(model) - logits(base)).abs().max() > 1e-3


def test_merging_keeps_the_logits_and_touches_only_selected_blocks(base, config):
    model = trained(base, config)
    expected, index, before = logits(model), bank_of(model).index, grids(model, base)
    targets = [target.name for target in bank_of(model).targets]
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-6)
    changed = set()
    for t, name in enumerate(targets):
        tensor = parameter(merged, name).detach()
        after = tensor.reshape(-1, tensor.shape[-1]).unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE)
        changed |= {(t, *rc) for rc in (after != before[t]).any(3).any(2).nonzero().tolist()}
    assert changed <= {tuple(block) for block in index.tolist()} and changed


def test_unmerging_disabling_and_unloading_give_back_the_base_bit_for_bit(base, config):
    model = trained(base, config)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    after = model.unload().state_dict()
    assert [name for name, value in base.state_dict().items() if not torch.equal(after[name], value)] == []


def test_experts_that_are_trained_in_eval_mode_need_a_selection(base, config):
    loss = get_peft_model(base, config()).eval()(**BATCH).loss
    with pytest.raises(RuntimeError, match="has no blocks yet"):
        loss.backward()


def test_experts_show_their_own_weight_after_a_forward(base, config):
    model = get_peft_model(base, config())
    select_blocks(model, [BATCH])
    model.train()(**BATCH).loss.backward()
    assert not any(name in vars(module) for module in model.modules() for name in module._parameters)
    copy.deepcopy(model)


def test_a_second_adapter_shares_the_wrappers(base, config):
    model = trained(base, config)
    expected = logits(model)
    model.add_adapter("other", config())
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(base))
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("arrangement", ["tiles", "sorted"])
def test_two_adapters_on_one_parameter_add_up(base, arrangement):
    options = {"target_modules": [], "target_parameters": EXPERTS, "block_size": SIZE, "num_blocks": 40}
    options |= {"selection": "random", "init_weights": False}
    torch.manual_seed(1)
    model, dense = get_peft_model(copy.deepcopy(base), SMTConfig(**options)), copy.deepcopy(base)
    model.add_adapter("other", SMTConfig(**options, seed=1, arrangement=arrangement))
    model.base_model.set_adapter(["default", "other"])
    blocks = [  # of which weight, where in it as a matrix, and the deltas with their gradients
        (bank.targets[target].name, [torch.tensor(lines) for lines in features(place)], bank.weight, number)
        for bank in (bank_of(model), bank_of(model, "other"))
        for number, (target, *place) in enumerate(bank.index.tolist())
    ]
    for name, (rows, cols), weight, number in blocks:
        parameter(dense, name).data.flatten(0, -2)[rows[:, None], cols] += weight[number].detach()
    for each in (model, dense):
        each.eval()(**BATCH).loss.backward()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    assert any(weight.grad.any() for *_, weight, _ in blocks)
    for name, (rows, cols), weight, number in blocks:
        expected = parameter(dense, name).grad.flatten(0, -2)[rows[:, None], cols]
        torch.testing.assert_close(weight.grad[number], expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="cannot mix adapters of a parameter"):
        model(TOKENS, adapter_names=["default", "other"])


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_an_adapter_without_blocks_beside_another_takes_nothing_away(base, config, order):
    model = trained(base, config)
    expected = logits(model)
    model.add_adapter("other", config())
    model.base_model.set_adapter(order)
    torch.testing.assert_close(model.eval()(**BATCH).logits.detach(), expected)


def features(place: list[int]) -> tuple[list[int], list[int]]:
    """The rows and columns of a tile at (row, column), or of a sorted block that lists them."""
    if len(place) == 2:
        return tuple([*range(at * SIZE, (at + 1) * SIZE)] for at in place)
    return place[:SIZE], place[SIZE:]


@pytest.mark.parametrize("how", ["beside another adapter", "disabled"])
def test_the_warm_up_scores_the_model_that_it_runs_in(base, config, how):
    """Scores beside an active adapter are those of the base model with its deltas merged; without any, of the base."""
    first, second = config(), config()
    first.selection = "random"
    model = get_peft_model(copy.deepcopy(base), first)
    torch.nn.init.normal_(bank_of(model).weight, std=0.1)
    truth = copy.deepcopy(base if how == "disabled" else model)
    truth = truth if how == "disabled" else truth.merge_and_unload()
    expected = select_blocks(get_peft_model(truth, config()), [BATCH], progress_bar=False).scores
    model.add_adapter("second", second)
    if how == "disabled":
        model.set_adapter("second")
        with model.disable_adapter():
            scores = select_blocks(model, [BATCH], "second", progress_bar=False).scores
    else:
        model.base_model.set_adapter(["default", "second"])
        scores = select_blocks(model, [BATCH], "second", progress_bar=False).scores
    for found, truth in zip(scores, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-7)


def test_experts_that_share_a_weight_are_merged_and_come_back(base):
    """As LoRA's, one layer's merge leaves the other's weight alone."""
    first, second = (layer.mlp.experts for layer in base.model.layers)
    second.gate_up_proj = first.gate_up_proj
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "num_blocks": NUM_BLOCKS}
    model = get_peft_model(copy.deepcopy(base), SMTConfig(**options, block_size=SIZE, selection="random")).eval()
    torch.nn.init.normal_(bank_of(model).weight, std=0.1)
    before, expected = copy.deepcopy(base).state_dict(), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    unloaded = model.unload()
    assert unloaded.model.layers[0].mlp.experts.gate_up_proj is unloaded.model.layers[1].mlp.experts.gate_up_proj
    assert all(torch.equal(value, before[name]) for name, value in unloaded.state_dict().items())


def test_experts_that_no_matrix_is_a_view_of_are_not_merged_into_a_copy():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(4, 64, 64).transpose(1, 2))

        def forward(self, x):
            return torch.einsum("td,eod->to", x, self.w)

    base = torch.nn.ModuleDict({"experts": Experts()})
    config = SMTConfig(target_modules=[], target_parameters=["experts.w"], num_blocks=2, selection="random")
    model = get_peft_model(base, config)
    with pytest.raises(TypeError, match="w is not contiguous"):
        model.merge_adapter()


def test_sorted_blocks_train_after_a_first_forward_in_inference_mode():
    """As Lightning's sanity check does, on a copy that has made no plans yet."""
    model, config = MODELS["mixtral"]
    torch.manual_seed(0)
    options = {"target_modules": [], "target_parameters": EXPERTS[:1], "selection": "random", "arrangement": "sorted"}
    base = model(copy.deepcopy(config))
    wrapped = copy.deepcopy(get_peft_model(base, SMTConfig(**options, num_blocks=NUM_BLOCKS, block_size=SIZE)))
    with torch.inference_mode():
        wrapped.eval()(TOKENS)
    wrapped.train()(**BATCH).loss.backward()
    assert bank_of(wrapped).weight.grad.any()


def test_experts_that_zero3_divides_after_wrapping_are_refused():
    model, config = MODELS["mixtral"]
    options = {"target_modules": [], "target_parameters": EXPERTS, "selection": "random"}
    model = get_peft_model(model(copy.deepcopy(config)), SMTConfig(**options, num_blocks=2, block_size=SIZE))
    for name, weight in model.named_parameters():
        if name.endswith("_proj"):
            weight.ds_id, weight.ds_shape, weight.data = 0, weight.shape, torch.empty(0)
    with pytest.raises(TypeError, match="down_proj is divided among processes"):
        model.base_model.model.model.layers[0].mlp.experts(
            torch.zeros(3, 32), torch.zeros(3, 2).long(), torch.ones(3, 2)
        )


class Packed(torch.nn.Module):
    """Experts in a type that deltas cannot be added to."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2, 16, 16).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
def test_parameters_of_a_packed_type_are_refused(dtype):
    options = {"target_modules": [], "target_parameters": ["0.weights"], "selection": "random"}
    with pytest.raises(TypeError, match=rf"0\.weights is of {str(dtype)[6:]}, .*load the model in bfloat16"):
        get_peft_model(torch.nn.Sequential(Packed(dtype)), SMTConfig(**options, num_blocks=2, block_size=SIZE))
