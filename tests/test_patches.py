"""Patches: what merging would write, sent to a plain model and undone there, bit for bit."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from dense_truth import QKV, add_adapter, bank_of, deltas_of, dense_of, wrap
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file, save, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from smt_peft import SMTConfig, patches
from smt_peft.patches import apply_patch, fused_rows, sparse_patch

LAYER = "model.layers.0.self_attn"


def gpt2(_) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2, eos_token_id=0))


def mixtral(_) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


MODELS = {
    "llama": (lambda make: make(), {}),
    "bfloat16": (lambda make: make().bfloat16(), {"target_modules": "all-linear"}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "experts only": (mixtral, {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "down_proj"]}),
    "tied": (lambda make: make(tie_word_embeddings=True), {"target_modules": ["lm_head", "q_proj"]}),
    "tied bfloat16": (lambda make: make(tie_word_embeddings=True).bfloat16(), {"target_modules": ["lm_head"]}),
}


@pytest.fixture(params=MODELS)
def base(request, make_llama):
    """A plain model, and an option per adapter that goes with it."""
    make, options = MODELS[request.param]
    base = make(make_llama).eval()
    base.options = options
    return base


@pytest.fixture(params=["smt", "sorted"])
def model(request, base) -> PeftModel:
    model = wrap(base, request.param, budget=8, **base.options)
    bank_of(model).weight.data = bank_of(model).weight.data.float() * 1.01  # deltas that no other dtype can hold
    return model


def merged(model: PeftModel, *adapters: str) -> nn.Module:
    return deepcopy(model).merge_and_unload(adapter_names=list(adapters) or None).eval()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert not different


def assert_differ(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert any(not torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def through_a_file(patch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return load(save(patch))


def test_a_patched_model_is_the_merged_one_and_undone_the_base(base, model, logits):
    expected, plain, before = merged(model), deepcopy(base), deepcopy(base)
    undo = apply_patch(plain, through_a_file(sparse_patch(model)))
    assert_same(plain, expected)
    assert torch.equal(logits(plain), logits(expected)) and not torch.equal(logits(plain), logits(base))
    assert apply_patch(plain, through_a_file(undo), keep_original=False) is None
    assert_same(plain, before)
    assert torch.equal(logits(plain), logits(base))


def test_a_state_dict_is_patched_in_place(base, model):
    state = {name: value.clone() for name, value in base.state_dict().items()}
    undo = apply_patch(state, sparse_patch(model))
    expected = merged(model).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    apply_patch(state, undo)
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())


def test_making_a_patch_changes_nothing(base, model):
    before = deepcopy(model.state_dict())
    sparse_patch(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_a_patch_agrees_with_the_dense_sum(llama, method):
    model, plain = wrap(llama, method), deepcopy(llama)
    apply_patch(plain, sparse_patch(model))
    assert_same(plain, dense_of(llama, model))


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_a_patch_holds_blocks_and_little_more(llama, method):
    model = wrap(llama, method, budget=20)
    patch = sparse_patch(model)
    changed = {name: delta for name, delta in deltas_of(model).items() if delta.any()}
    assert {key.split("/")[0] for key in patch} == {f"{name}.weight" for name in changed}
    values = [tensor for key, tensor in patch.items() if key.endswith("/values")]
    assert sum(tensor.numel() for tensor in values) == 20 * 16 * 16
    places = [tensor for key, tensor in patch.items() if key.endswith(("/rows", "/cols"))]
    assert {tensor.dtype for tensor in places} == {torch.int16}
    assert sum(tensor.numel() for tensor in places) == 20 * 2 * (1 if method == "smt" else 16)


def test_coordinates_that_need_more_than_16_bits_have_them():
    plain = nn.Sequential(nn.Linear(16, 2**15 + 16, bias=False))
    chosen = {"0": [[2**11, 0]]}
    config = SMTConfig(target_modules=["0"], block_size=16, num_blocks=1, selected_blocks=chosen, init_weights=False)
    model = get_peft_model(deepcopy(plain), config)
    patch = sparse_patch(model)
    assert patch["0.weight/0/rows"].tolist() == [2**15]
    apply_patch(plain, patch)
    assert_same(plain, merged(model))


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(make_llama) -> PeftModel:
    """Two adapters in bfloat16 of different block sizes that overlap, the second in any rows and columns."""
    model = wrap(make_llama().bfloat16(), "smt", budget=30, seed=0)
    model.add_adapter("other", SMTConfig(target_modules=QKV, block_size=8, num_blocks=100, selection="random",
                                         arrangement="sorted", init_weights=False, seed=1))  # fmt: skip
    for name in ("default", "other"):
        bank_of(model, name).weight.data *= 3
    return model


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_the_patch_of_several_adapters_is_what_merging_them_in_turn_writes(two, make_llama, names):
    base = make_llama().bfloat16()
    plain, expected = deepcopy(base), merged(two, *names)
    undo = apply_patch(plain, through_a_file(sparse_patch(two, names)))
    assert_same(plain, expected)
    assert_differ(expected, merged(two, *names[::-1]))  # the order matters in bfloat16
    apply_patch(plain, undo)
    assert_same(plain, base)


def test_without_a_name_the_active_adapters_are_taken(two, make_llama):
    two.base_model.set_adapter(["other", "default"])
    plain = make_llama().bfloat16()
    apply_patch(plain, sparse_patch(two))
    assert_same(plain, merged(two, "other", "default"))
    two.set_adapter("other")
    plain = make_llama().bfloat16()
    apply_patch(plain, sparse_patch(two))
    assert_same(plain, merged(two, "other"))


# --- one after the other ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_a_later_patch_goes_on_top_and_the_first_undo_is_enough(llama, method):
    model, plain = wrap(llama, method), deepcopy(llama)
    undo = apply_patch(plain, sparse_patch(model))
    for _ in range(2):
        bank_of(model).weight.data *= -1.5
        apply_patch(plain, sparse_patch(model), keep_original=False)
        apply_patch(plain, sparse_patch(model), keep_original=False)  # twice is harmless
    assert_same(plain, merged(model))
    apply_patch(plain, undo)
    assert_same(plain, llama)


def test_patches_of_other_blocks_are_undone_the_last_first(llama):
    model, plain = wrap(llama, seed=0), deepcopy(llama)
    add_adapter(model, "other", seed=1)
    undo = [apply_patch(plain, sparse_patch(model, name)) for name in ("default", "other")]
    for patch in reversed(undo):
        apply_patch(plain, patch)
    assert_same(plain, llama)


# --- where models live -----------------------------------------------------------------------------------------------


def test_an_offloaded_model_makes_the_same_patch_and_stays_offloaded(llama):
    model = wrap(llama)
    expected = sparse_patch(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    found = sparse_patch(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    weights = [parameter for name, parameter in model.named_parameters() if "base_layer" in name]
    assert weights and all(weight.device.type == "meta" for weight in weights)


def test_an_offloaded_receiver_is_refused_untouched(llama):
    plain = deepcopy(llama)
    cpu_offload(plain, execution_device=torch.device("cpu"))
    with pytest.raises(TypeError, match="is offloaded"):
        apply_patch(plain, sparse_patch(wrap(llama)))


def test_weights_that_are_stored_transposed(llama):
    model, plain = wrap(llama), deepcopy(llama)
    for layer in (layer for layer in model.modules() if hasattr(layer, "smt_blocks")):
        layer.weight.data = layer.weight.data.T.contiguous().T
    apply_patch(plain, sparse_patch(model))
    assert_same(plain, merged(model))
    weight = plain.get_parameter(f"{LAYER}.q_proj.weight")
    weight.data = weight.data.T.contiguous().T
    with pytest.raises(TypeError, match="is not contiguous"):
        apply_patch(plain, sparse_patch(wrap(llama, budget=30)))


def test_a_model_made_in_inference_mode_is_patched(llama, make_llama):
    model = wrap(llama)
    with torch.inference_mode():
        plain = make_llama()
    undo = apply_patch(plain, sparse_patch(model))
    assert_same(plain, merged(model))
    apply_patch(plain, undo)
    assert_same(plain, llama)


def test_the_file_works_without_the_package_and_what_it_needs(llama, tmp_path):
    model = wrap(llama, "sorted")
    save_file(sparse_patch(model), tmp_path / "patch.safetensors")
    state = {name: value.clone() for name, value in llama.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from patches import apply_patch
from safetensors.torch import load_file, save_file
state = load_file("state.safetensors")
apply_patch(state, load_file("patch.safetensors"))
save_file(state, "patched.safetensors")
assert not {{"peft", "transformers", "accelerate", "smt_peft"}} & set(sys.modules)
"""
    (tmp_path / "patches.py").write_text(Path(patches.__file__).read_text())
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = load_file(tmp_path / "patched.safetensors")
    assert all(torch.equal(found[name], value) for name, value in merged(model).state_dict().items())


# --- fused projections -----------------------------------------------------------------------------------------------


def fuse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As serving engines hold a LLaMA."""
    fused = dict(state)
    for layer in range(2):
        for block, one, parts in (
            ("self_attn", "qkv_proj", ["q_proj", "k_proj", "v_proj"]),
            ("mlp", "gate_up_proj", ["gate_proj", "up_proj"]),
        ):
            path = f"model.layers.{layer}.{block}."
            fused[f"{path}{one}.weight"] = torch.cat([fused.pop(f"{path}{part}.weight") for part in parts])
    return fused


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_fused_projections_get_their_parts(llama, method):
    model = wrap(llama, method, target_modules="all-linear", budget=60)
    patch, mapping, engine = sparse_patch(model), fused_rows(llama.state_dict()), fuse(llama.state_dict())
    assert mapping[f"{LAYER}.v_proj.weight"] == (f"{LAYER}.qkv_proj.weight", 64 + 32)
    undo = apply_patch(engine, patch, mapping=mapping)
    expected = fuse(merged(model).state_dict())
    assert any("qkv_proj" in name and not torch.equal(engine[name], fuse(llama.state_dict())[name]) for name in engine)
    assert all(torch.equal(engine[name], value) for name, value in expected.items())
    apply_patch(engine, undo, mapping=mapping)
    assert all(torch.equal(engine[name], value) for name, value in fuse(llama.state_dict()).items())


def test_a_mapping_that_runs_over_the_fused_weight_is_refused(llama):
    name = f"{LAYER}.q_proj.weight"
    patch = {key: tensor for key, tensor in sparse_patch(wrap(llama, budget=30)).items() if key.startswith(name)}
    with pytest.raises(ValueError, match=r"of the shape \(64, 64\), which does not fit .* from row 96 on"):
        apply_patch(fuse(llama.state_dict()), patch, mapping={name: (f"{LAYER}.qkv_proj.weight", 96)})


# --- refused in words ------------------------------------------------------------------------------------------------


def refuse(kind, words, *arguments, **options) -> None:
    with pytest.raises(kind, match=words):
        sparse_patch(*arguments, **options)


def test_what_no_patch_can_be_made_of(llama):
    refuse(ValueError, "has no SMT adapter", llama)
    refuse(ValueError, "no SMT adapter 'absent'", wrap(llama), "absent")
    refuse(ValueError, "'default' has no blocks yet", wrap(llama, selection="gradient"))
    refuse(ValueError, "trains more than blocks .*lm_head", wrap(llama, modules_to_save=["lm_head"]))
    refuse(ValueError, "trains more than blocks .*smt_only", wrap(llama, bias="smt_only"))
    refuse(ValueError, r"trains more than blocks .*\[5, 9\]", wrap(llama, trainable_token_indices=[5, 9]))
    model = wrap(llama)
    model.merge_adapter()
    refuse(ValueError, r"holds the merged adapter\(s\) default", model)


def test_sharded_and_quantised_bases_are_refused(llama):
    sharded, quantised, subclass = wrap(llama), wrap(llama), wrap(llama)
    for layer in (layer for layer in sharded.modules() if hasattr(layer, "smt_blocks")):
        layer.weight.ds_id = 0  # as ZeRO-3 marks its parameters
    refuse(TypeError, "is sharded", sharded)
    with pytest.raises(TypeError, match="A sharded weight cannot be merged into"):
        sharded.merge_adapter()
    assert sharded.get_model_status().merged_adapters == []
    for layer in (layer for layer in quantised.modules() if hasattr(layer, "smt_blocks")):
        layer.quantization_backend = object()
    refuse(TypeError, "is quantised", quantised)
    kind = type("Int8Parameter", (nn.Parameter,), {})
    for layer in (layer for layer in subclass.modules() if hasattr(layer, "smt_blocks")):
        layer.base_layer.weight = kind(layer.weight, requires_grad=False)
    refuse(TypeError, r"is quantised \(Int8Parameter\)", subclass)


def test_values_that_are_not_finite_are_refused_where_asked(llama):
    model = wrap(llama)
    bank_of(model).weight.data[3, 5, 7] = torch.nan
    refuse(ValueError, "would hold NaN or infinite values: .*'default'", model, safe_merge=True)
    assert any(tensor.isnan().any() for tensor in sparse_patch(model).values())


def cut(patch, key):
    del patch[key]


def change(make):
    def one(patch, key):
        patch[key] = make(patch[key].clone())

    return one


BROKEN = {
    "lacks a part": ("rows", cut, "is no patch, or a broken one"),
    "below": ("rows", change(lambda rows: rows - 100), "is broken: its blocks"),
    "outside": ("cols", change(lambda cols: cols * 0 + 49), "is broken: its blocks"),
    "fewer": ("rows", change(lambda rows: rows[1:]), "is broken: its blocks"),
    "flat": ("values", change(lambda values: values.flatten(1)), "is broken: its blocks"),
    "dtype": ("values", change(torch.Tensor.half), "torch.float16, but .* is torch.float32"),
    "shape": ("shape", change(lambda shape: shape * 2), "does not fit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_patch_that_does_not_fit_is_refused_and_nothing_is_written(llama, case):
    part, spoil, words = BROKEN[case]
    patch, plain = sparse_patch(wrap(llama)), deepcopy(llama)
    spoil(patch, [key for key in patch if key.endswith(part)][-1])
    with pytest.raises(ValueError, match=words):
        apply_patch(plain, patch)
    assert_same(plain, llama)


def test_another_model_is_refused(llama, make_llama):
    patch = sparse_patch(wrap(llama))
    with pytest.raises(ValueError, match=r"does not fit .* of the shape \(32, 32\)"):
        apply_patch(make_llama(hidden_size=32, num_key_value_heads=4, head_dim=8), patch)
    with pytest.raises(ValueError, match=r"torch.float32, but .* is torch.bfloat16"):
        apply_patch(make_llama().bfloat16(), patch)
    with pytest.raises(ValueError, match="before PEFT wraps it"):
        apply_patch(wrap(llama), patch)
    with pytest.raises(ValueError, match="fused projections give a mapping"):
        apply_patch(fuse(llama.state_dict()), patch)
    with pytest.raises(ValueError, match="is no patch"):
        apply_patch(llama, llama.state_dict())


@pytest.mark.parametrize("keep_original", [True, False])
def test_rows_that_are_no_integers_are_refused_before_anything_is_written(llama, keep_original):
    before, patch = deepcopy(llama).state_dict(), sparse_patch(wrap(deepcopy(llama)))
    last = [key for key in patch if key.endswith("/rows")][-1]
    with pytest.raises(ValueError, match="patch is broken"):
        apply_patch(llama, {**patch, last: patch[last].float()}, keep_original)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_an_interrupted_patch_leaves_the_model_as_it_was(llama, monkeypatch):
    before, patch = deepcopy(llama).state_dict(), sparse_patch(wrap(deepcopy(llama)))
    write, count = patches._write, []

    def interrupted(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(patches, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_patch(llama, patch)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_a_parameter_of_a_transposed_layer_is_taken_as_it_is_stored():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=32)).eval()
    names = ["attn.c_proj.weight", "attn.c_attn.weight"]
    config = SMTConfig(target_modules=[], target_parameters=names, num_blocks=6, block_size=16, selection="random",
                       init_weights=False)  # fmt: skip
    model, ids = get_peft_model(deepcopy(base), config).eval(), torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
        apply_patch(base, sparse_patch(model))
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(ids).logits, expected)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, base.state_dict()[name]), name


def test_the_mapping_to_fused_projections_knows_a_wrapped_model(llama):
    plain = fused_rows(llama.state_dict())
    assert plain and fused_rows(wrap(llama).base_model.model.state_dict()) == plain


def test_a_compiled_model_takes_a_patch(llama):
    patch = sparse_patch(wrap(deepcopy(llama)))
    plain = deepcopy(llama)
    apply_patch(plain, patch)
    apply_patch(torch.compile(llama, backend="eager"), patch)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("method", ["smt", "sorted"])
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_the_largest_place_that_a_patch_can_name_is_outside(make_llama, method, side):
    """One more than the largest int16 is a negative one."""
    patch, server = sparse_patch(wrap(make_llama(), method)), make_llama()
    before = deepcopy(server)
    key = [key for key in patch if key.endswith(f"/{side}")][-1]
    patch[key] = patch[key].clone()
    patch[key].view(-1)[-1] = torch.iinfo(patch[key].dtype).max
    with pytest.raises(ValueError, match="The patch is broken"):
        apply_patch(server, patch, keep_original=False)
    assert_same(server, before)


def test_an_undo_needs_nothing_of_the_patch_that_it_undoes(llama):
    """Whose tensors may be mapped from a file that the next one is written over."""
    model = wrap(llama)
    served = deepcopy(llama)
    patch = {name: value.clone() for name, value in sparse_patch(model).items()}
    undo = apply_patch(served, patch)
    for value in patch.values():
        value.zero_()
    apply_patch(served, undo)
    assert_same(served, llama)


def test_a_tied_tensor_of_a_state_dict_is_refused(make_llama):
    base = make_llama(tie_word_embeddings=True)
    patch = sparse_patch(wrap(base, target_modules=["lm_head", "q_proj"], budget=8))
    before = deepcopy(base)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to another tensor of the state dict"):
        apply_patch(base.state_dict(), patch)
    assert_same(base, before)
