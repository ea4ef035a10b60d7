"""A file that is broken and a name that is odd: refused in words, and all other adapters stay whole."""

import json
from copy import deepcopy

import pytest
import torch
from dense_truth import (
    add_adapter,
    assert_right,
    assert_same_state,
    bank_of,
    make_config,
    outputs,
    state_of,
    train,
    wrap,
)
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


@pytest.fixture
def base(llama):
    """Never wrapped, in float64."""
    return llama.double()


# --- broken files ------------------------------------------------------------------------------------------


def truncated(file):
    file.write_bytes(file.read_bytes()[:-1000])


def edited(part, change):
    """A function that changes a part of an adapter's file."""

    def edit(file):
        state = load_file(file)
        key = next(key for key in state if key.endswith(part))
        changed = change(state[key])
        del state[key]
        save_file({**state, **({} if changed is None else {key: changed.contiguous()})}, file)

    return edit


def with_first_row(row):
    return lambda index: torch.cat([torch.tensor([row], dtype=index.dtype), index[1:]])


BROKEN = {
    "truncated": truncated,
    "a target out of range": edited("index", with_first_row([99, 0, 0])),
    "a column out of range": edited("index", with_first_row([0, 0, 99])),
    "a negative row": edited("index", with_first_row([0, -1, 0])),
    "a block twice": edited("index", lambda index: torch.cat([index[1:2], index[1:]])),
    "fewer indices": edited("index", lambda index: index[:-1]),
    "no index": edited("index", lambda index: None),
    "fewer blocks": edited("weight", lambda weight: weight[:-1]),
    "smaller blocks": edited("weight", lambda weight: weight[:, :8, :8]),
    "a flat weight": edited("weight", lambda weight: weight.flatten()),
}


WORDS = {  # what is said of them; of all others, that a block does not exist
    "truncated": "incomplete metadata",
    "a block twice": "names a block twice",
    "fewer indices": "do not belong together",
    "no index": "without their index",
    "fewer blocks": "do not belong together",
    "smaller blocks": "20 blocks of 8 x 8, .* 20 blocks of 16 x 16",
    "a flat weight": "do not belong together",
}
NO_SUCH_BLOCK = "in slot 0 of the index does not exist"


def broken(folder, how):
    BROKEN[how](folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def two(base, batches, tmp_path):
    """A model with two adapters, and a folder with a third of the same shape."""
    model = wrap(base)
    add_adapter(model, "other", seed=4)
    train(model, batches)
    wrap(base, seed=9).save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_over_an_adapter_of_the_same_name_leaves_it_as_it_was(base, batches, two, how):
    model, folder = two
    expected, before = outputs(model, batches[0]), state_of(model)
    config = deepcopy(model.peft_config["default"].to_dict())
    with pytest.raises((ValueError, SafetensorError), match=WORDS.get(how, NO_SUCH_BLOCK)):
        model.load_adapter(broken(folder, how), "default", is_trainable=True)
    assert torch.equal(outputs(model, batches[0]), expected)
    assert_same_state(state_of(model), before)
    assert model.peft_config["default"].to_dict() == config
    assert_right(model, base, batches[0])


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_under_a_new_name_leaves_no_trace_and_the_others_right(base, batches, two, how):
    model, folder = two
    expected, before = outputs(model, batches[0]), state_of(model)
    with pytest.raises(ValueError, match=WORDS.get(how, NO_SUCH_BLOCK)):
        model.load_adapter(broken(folder, how), "third")
    assert list(model.peft_config) == ["default", "other"]
    assert_same_state(state_of(model), before)
    assert torch.equal(outputs(model, batches[0]), expected)
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        assert_right(model, base, batches[0], adapter)


def test_a_file_of_another_budget_over_an_adapter_is_refused(base, batches, two):
    model, folder = two
    expected = outputs(model, batches[0])
    wrap(base, budget=12, seed=6).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"12 blocks of 16 x 16, .* 20 blocks of 16 x 16"):
        model.load_adapter(folder, "default")
    assert torch.equal(outputs(model, batches[0]), expected)
    assert_right(model, base, batches[0])


def test_a_config_beside_the_file_that_belongs_to_another_is_refused(base, batches, two):
    model, folder = two
    before = state_of(model)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"num_blocks": 12, "selected_blocks": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"20 blocks.* 12 blocks"):
        model.load_adapter(folder, "third")
    assert_same_state(state_of(model), before)
    assert_right(model, base, batches[0])


# --- odd names ------------------------------------------------------------------------------------------


NAMES = ["index", "fingerprint", "layers", "q_proj", "model"]
IMPOSSIBLE = ["keys", "", "default.weight", "weight", "smt_bank"]  # with the last two, PEFT saves no other adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_works(base, batches, tmp_path, name):
    model = wrap(base)
    before, expected = state_of(model), outputs(model, batches[0])
    model.add_adapter(name, make_config(seed=5))
    model.double().set_adapter(name)
    train(model, batches)
    assert_right(model, base, batches[0], name)
    model.save_pretrained(tmp_path)
    assert torch.equal(bank_of(PeftModel.from_pretrained(deepcopy(base), tmp_path)).index, bank_of(model).index)
    again = PeftModel.from_pretrained(deepcopy(base), tmp_path / name).double()
    torch.testing.assert_close(outputs(again, batches[0]), outputs(model, batches[0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(bank_of(again).index, bank_of(model, name).index)
    model.delete_adapter(name)
    model.set_adapter("default")
    assert_same_state(state_of(model), before)
    assert torch.equal(outputs(model, batches[0]), expected)
    assert_right(model, base, batches[0])


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_name_is_refused_before_anything_changes(base, batches, name):
    model, plain = wrap(base), deepcopy(base)
    before = [state_of(one) for one in (model, plain)]
    with pytest.raises(ValueError, match=f"An SMT adapter cannot be called '{name}'"):
        model.add_adapter(name, make_config(seed=5))
    with pytest.raises(ValueError, match=f"An SMT adapter cannot be called '{name}'"):
        get_peft_model(plain, make_config(), adapter_name=name)
    for one, state in zip((model, plain), before, strict=True):
        assert_same_state(state_of(one), state)
    assert list(model.peft_config) == ["default"]
    assert_right(model, base, batches[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_of_the_first_adapter_works(base, batches, tmp_path, name):
    wrapped = get_peft_model(deepcopy(base), make_config(), adapter_name=name).double().train()
    train(wrapped, batches)
    assert_right(wrapped, base, batches[0], name)
    wrapped.save_pretrained(tmp_path)
    folder = tmp_path / name if (tmp_path / name / "adapter_config.json").is_file() else tmp_path
    again = PeftModel.from_pretrained(deepcopy(base), folder, adapter_name=name).double()
    torch.testing.assert_close(outputs(again, batches[0]), outputs(wrapped, batches[0]), rtol=1e-4, atol=1e-5)
