"""Tests of the command line: what it prints and writes, and what it says where it refuses."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from dense_truth import deltas_of, wrap
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from smt_peft import SMTConfig, checkpoints, merging
from smt_peft.__main__ import main, table
from smt_peft.files import read_adapter
from smt_peft.patches import apply_patch
from smt_peft.writing import UNFINISHED

CONV1D = {"target_modules": ["c_attn", "c_proj"], "budget": 30}


@pytest.fixture
def run(capsys):
    """Run a command, and give its report."""

    def command(*words) -> dict:
        capsys.readouterr()
        main([*map(str, words), "--json"])
        return json.loads(capsys.readouterr().out)

    return command


@pytest.fixture
def refused(capsys):
    """Run a command that must end with exit status 2 and one line in words, and give that."""

    def command(*words) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            main(list(map(str, words)))
        printed = capsys.readouterr()
        [line] = [line for line in printed.err.splitlines() if line.startswith("smt-peft: error: ")]
        assert error.value.code == 2 and not printed.out and "Traceback" not in printed.err
        return line

    return command


def save(folder: Path, base, method: str = "smt", load: type | None = None, **options) -> PeftModel:
    """Save a base model in shards, and an adapter of it whose parameters are random."""
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    model = wrap((load or type(base)).from_pretrained(folder / "base"), method, **options)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    for name, parameter in model.named_parameters():
        if "smt_bank" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape)  # float32, as in training a bfloat16 model
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    return model


def merged(folder: Path, kind: type, **options) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(kind.from_pretrained(folder / "base", **options), folder / "adapter")
    return model.merge_and_unload().state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), f"{name} is not the merged one"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def mixtral() -> MixtralForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    )


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda llama: llama, lambda _: mixtral()], ids=["q_proj.weight", "a router"])
def test_a_target_parameter_called_weight_is_merged(llama, tmp_path, run, make):
    base = make(llama)
    kind, name = type(base), "q_proj.weight" if base is llama else "mlp.gate.weight"
    base.save_pretrained(tmp_path / "base")
    config = SMTConfig(target_modules=[], target_parameters=[name], num_blocks=2, block_size=2, selection="random",
                       init_weights=False)  # fmt: skip
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "out")
    found = kind.from_pretrained(tmp_path / "out").state_dict()
    assert_same(found, merged(tmp_path, kind))
    assert any(not torch.equal(found[key], value) for key, value in base.state_dict().items())


def test_of_one_file_and_an_index_the_file_is_taken_as_transformers_does(llama, tmp_path, run):
    save(tmp_path, llama)
    LlamaForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")  # leaves the index
    assert (tmp_path / "base/model.safetensors.index.json").exists()
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path, LlamaForCausalLM))
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_an_empty_folder_that_is_a_link_or_where_one_stands_stays(llama, tmp_path, run, monkeypatch, command):
    save(tmp_path, llama)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    run(command, tmp_path / "adapter", "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk").is_dir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(command, tmp_path / "adapter", "--out", ".")
    written = {path.name for path in Path().iterdir()}
    assert written == {path.name for path in (tmp_path / "disk").iterdir()} and written >= {
        "config.json" if command == "merge" else "adapter_config.json"
    }


def test_a_link_to_nothing_is_refused_at_once(llama, tmp_path, refused):
    save(tmp_path, llama)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link to nothing" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "link")


def test_a_merge_that_fails_leaves_an_empty_folder_empty(llama, tmp_path, monkeypatch):
    save(tmp_path, llama)
    (tmp_path / "out").mkdir()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(merging, "save_file", full)
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


def test_the_folder_above_an_adapter_and_a_base_model_that_is_gone_get_the_way_out(
    llama, tmp_path, refused, monkeypatch
):
    save(tmp_path, llama)
    assert f"There is one in {tmp_path / 'adapter'}." in refused("info", tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(checkpoints, "snapshot_download", full)
    assert "No space left on device" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    monkeypatch.setattr(checkpoints, "snapshot_download", Mock(side_effect=OSError))
    words = ["merge", tmp_path / "adapter", "--out", tmp_path / "out"]
    assert f"{tmp_path / 'adapter'} names it as its base model; --base names another" in refused(*words)
    assert "names it" not in refused(*words, "--base", tmp_path / "base")


def test_code_of_a_base_model_is_not_run(llama, tmp_path, refused):
    save(tmp_path, llama)
    code = f"from transformers import LlamaConfig as C\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (tmp_path / "base/strange.py").write_text(code)
    file = tmp_path / "base/config.json"
    strange = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.C"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | strange))
    assert "trust_remote_code" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_base_in_the_hubs_cache_is_merged(llama, tmp_path, run):
    save(tmp_path, llama)
    expected, repo = merged(tmp_path, LlamaForCausalLM), tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots/abc").mkdir(parents=True)
    for file in list((tmp_path / "base").iterdir()):
        file.rename(repo / "blobs" / file.name)
        (repo / "snapshots/abc" / file.name).symlink_to(Path("../../blobs") / file.name)
    run("merge", tmp_path / "adapter", "--base", repo / "snapshots/abc", "--out", tmp_path / "out")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), expected)


def test_a_file_that_the_hubs_repositories_share_is_copied(llama, tmp_path, run, refused):
    """huggingface_hub 2.4 keeps large files once for all of them."""
    save(tmp_path, llama)
    (tmp_path / "base/tokenizer.model").write_text("words")
    store, repo = tmp_path / "hub/blobs", tmp_path / "hub/models--a--b"
    (store / "ab").mkdir(parents=True)
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    (tmp_path / "base").rename(repo / "snapshots/abc")
    (repo / "snapshots/abc/tokenizer.model").rename(store / "ab/abcdef")
    (repo / "blobs/1").symlink_to("../../blobs/ab/abcdef")
    (repo / "snapshots/abc/tokenizer.model").symlink_to("../../blobs/1")
    merge = ["merge", tmp_path / "adapter", "--base", repo / "snapshots/abc", "--out", tmp_path / "out"]
    assert "outside of its folder" in refused(*merge), "any folder may be called blobs"
    (store / ".huggingface-shared-blobs").touch()
    run(*merge)
    assert (tmp_path / "out/tokenizer.model").read_text() == "words"


def test_what_cannot_be_copied_is_refused_before_any_shard_is_written(llama, tmp_path, refused, monkeypatch):
    save(tmp_path, llama)
    (tmp_path / "base/config.json").rename(tmp_path / "config.json")
    (tmp_path / "base/config.json").symlink_to(tmp_path / "config.json")
    monkeypatch.setattr(merging, "_write_shard", None)
    assert f"cp -rL {tmp_path / 'base'} COPY" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")


def test_a_model_of_the_hub_is_no_adapter_before_its_weights_come(llama, tmp_path, refused, monkeypatch):
    llama.save_pretrained(tmp_path)
    asked = []

    def download(name, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    for words in (["info", "a/b"], ["plot", "a/b", tmp_path / "p.png"], ["merge", "a/b", "--out", tmp_path / "out"]):
        assert "is no adapter" in refused(*words)
    assert "*.safetensors" not in asked


def test_a_config_that_names_another_models_class_is_refused(llama, tmp_path, refused):
    save(tmp_path, llama)
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    message = refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "names GPT2LMHeadModel, and is of another model (llama)" in message


def test_a_merge_copies_neither_an_adapters_code_nor_what_it_links_to(llama, tmp_path, refused, run):
    save(tmp_path, llama)
    for name in ("tokenizer_config.json", "tokenizer_of_a_stranger.py"):
        (tmp_path / "adapter" / name).write_text('{"auto_map": {"AutoTokenizer": "a/strangers--code.T"}, "pad": 1}')
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").is_file() and not list((tmp_path / "out").glob("*.py"))
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"pad": 1}
    (tmp_path / "base/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "own.T"}}')
    run("merge", tmp_path / "adapter", "--out", tmp_path / "trusted")
    mixed = json.loads((tmp_path / "trusted/tokenizer_config.json").read_text())
    assert mixed == {"pad": 1, "auto_map": {"AutoTokenizer": "own.T"}}
    (tmp_path / "secret").write_text("key")
    (tmp_path / "adapter/tokenizer.model").symlink_to(tmp_path / "secret")
    message = refused("merge", tmp_path / "adapter", "--out", tmp_path / "again")
    assert "tokenizer.model is a link to" in message and not (tmp_path / "again").exists()


def untouched_shard(folder: Path) -> Path:
    """A shard of the base model that has neither blocks nor what tells base models apart: merging copies it."""
    adapter = read_adapter(folder / "adapter")
    places = json.loads((folder / "base/model.safetensors.index.json").read_text())["weight_map"]
    read = {places[f"{name}.weight"] for name in adapter.blocks} | {places[name] for name in adapter.base}
    return folder / "base" / min(set(places.values()) - read)


def test_a_shard_that_is_cut_off_is_named_also_where_it_would_be_copied(llama, tmp_path, refused):
    save(tmp_path, llama)
    shard = untouched_shard(tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    words = "merge", tmp_path / "adapter", "--out", tmp_path / "out"
    assert f"{shard} is broken or cut off" in refused(*words)
    save_file({"other": torch.zeros(1)}, shard)
    assert f"{shard} lacks " in refused(*words)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_merge_left_is_no_reason_to_refuse(llama, tmp_path, run):
    save(tmp_path, llama)
    (tmp_path / f"out/{UNFINISHED}killed").mkdir(parents=True)
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path, LlamaForCausalLM))


def test_a_dtype_that_transformers_does_not_give_all_of_a_model_is_refused(tmp_path, refused, run):
    """It keeps T5's `wo` in float32 beside float16."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    save(tmp_path, base, target_modules=["q", "v"], budget=4)
    words = "merge", tmp_path / "adapter", "--dtype", "float16", "--out"
    assert "DenseReluDense.wo.weight of this model in float32" in refused(*words, tmp_path / "out")
    run(*words, tmp_path / "loaded", "--load")
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "loaded", dtype=torch.float16)
    assert_same(loaded.state_dict(), merged(tmp_path, T5ForConditionalGeneration, dtype=torch.float16))


def test_a_pointer_of_git_lfs_is_no_traceback(llama, tmp_path, refused):
    save(tmp_path, llama, "lora")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    for text in ("version https://git-lfs.github.com/spec/v1\n", ""):
        (tmp_path / "adapter/adapter_model.bin").write_text(text)
        assert refused("merge", tmp_path / "adapter", "--load", "--out", tmp_path / "out")


def test_what_a_console_cannot_show_does_not_fail_what_is_done(llama, tmp_path):
    save(tmp_path, llama)
    out = tmp_path / "Summe-ü"
    command = [sys.executable, "-m", "smt_peft", "combine", tmp_path / "adapter", "--out", out]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and r"Summe-\xfc" in done.stdout and (out / "adapter_config.json").is_file()


def test_a_name_that_moves_the_cursor_is_shown_in_characters(llama, tmp_path, capsys):
    save(tmp_path, llama)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base\x1b[2J"}))
    main(["info", str(tmp_path / "adapter")])
    assert r"base\x1b[2J" in capsys.readouterr().out


def test_nor_does_one_in_an_error_or_a_table(llama, tmp_path, refused, capsys):
    save(tmp_path, llama)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base\x1b[2J"}))
    assert r"base\x1b[2J" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert table("what", {"row\x1b": {"blocks": 1}})[1].startswith(r"row\x1b")


def test_what_has_come_into_the_folder_meanwhile_stays(llama, tmp_path, refused, monkeypatch):
    save(tmp_path, llama)
    write = merging._write_shard

    def write_shard(source, target, *rest):
        (tmp_path / "out/config.json").write_text("mine")
        return write(source, target, *rest)

    monkeypatch.setattr(merging, "_write_shard", write_shard)
    assert "out is not empty" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"config.json": "mine"}


def test_a_tensor_in_two_shards_is_named(llama, tmp_path, refused):
    """transformers takes the last of them, whatever the index says."""
    save(tmp_path, llama)
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.0.self_attn.v_proj.weight"
    other = next(tmp_path / "base" / name for name in index.values() if name != index[key])
    save_file(load_file(other) | {key: torch.zeros(1)}, other, {"format": "pt"})
    assert f"has {key} in two files" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["BatchEncoding", "AutoTokenizer"])
@pytest.mark.parametrize("load", [[], ["--load"]])
def test_what_is_named_as_a_model_and_is_none_is_refused(llama, tmp_path, refused, name, load):
    save(tmp_path, llama)
    files = [tmp_path / "base/config.json", tmp_path / "adapter/adapter_config.json"]
    for file, said in zip(
        files, ({"architectures": [name]}, {"auto_mapping": {"base_model_class": name}}), strict=True
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | said))
    assert name in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out", *load)


def test_a_classifier_without_a_shape_is_refused(llama, tmp_path, refused):
    save(tmp_path, llama, load=LlamaForSequenceClassification, task_type="SEQ_CLS")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({k: v.sum() if k.endswith("score.weight") else v for k, v in load_file(file).items()}, file)
    assert "score.modules_to_save" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--load")


def test_a_method_without_weights_to_merge_is_refused(llama, tmp_path, refused):
    llama.save_pretrained(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(llama, config).save_pretrained(tmp_path / "prompt")
    words = "merge", tmp_path / "prompt", "--base", tmp_path / "base", "--load", "--out", tmp_path / "out"
    assert "of a method that cannot be merged into weights" in refused(*words)
    assert "is of the method PROMPT_TUNING; patches are of SMT adapters" in refused(
        "patch", tmp_path / "prompt", "--base", tmp_path / "base", "--out", tmp_path / "patch.safetensors"
    )


def test_a_patch_takes_nobodys_place_and_needs_a_folder(llama, tmp_path, refused):
    save(tmp_path, llama)
    (tmp_path / "there").write_text("mine")
    assert "is there already" in refused("patch", tmp_path / "adapter", "--out", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    assert "There is no folder" in refused("patch", tmp_path / "adapter", "--out", tmp_path / "no/patch")


def test_options_of_the_other_conversion_are_refused(llama, tmp_path, refused):
    save(tmp_path, llama)
    out = "--out", tmp_path / "out"
    assert "--num_blocks would do nothing" in refused(
        "convert", tmp_path / "adapter", "--rank", 8, "--num_blocks", 9, *out
    )
    idle = "--block_size", 32, "--arrangement", "sorted"
    said = refused("convert", tmp_path / "adapter", "--rank", 8, *idle, *out)
    assert "--block_size, --arrangement would do nothing" in said
    base = tmp_path / "base"
    assert "is a model, for which --rank would do nothing" in refused(
        "convert", base, "--base", base, "--rank", 8, *out
    )


def test_options_of_other_combinations_are_refused(llama, tmp_path, refused):
    save(tmp_path, llama)
    both = "combine", tmp_path / "adapter", tmp_path / "adapter", "--out", tmp_path / "out"
    assert "density=0.2 does nothing for 'linear'" in refused(*both, "--density", 0.2)
    sign = "--majority_sign_method", "frequency"
    assert "does nothing for --type linear" in refused(*both, *sign)


def test_what_an_ended_run_left_is_named(llama, tmp_path, capsys):
    save(tmp_path, llama)
    left = tmp_path / "out" / f"{UNFINISHED}x"
    left.mkdir(parents=True)
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--json"])
    assert f"{left} was left by a run that was ended" in capsys.readouterr().err


def test_an_adapter_that_has_diverged_is_drawn_and_told_of(llama, tmp_path, run):
    model = save(tmp_path, llama)
    weight = model.get_base_model().smt_bank["default"].weight
    weight.data[-1] = float("nan")
    model.save_pretrained(tmp_path / "adapter")
    assert run("info", tmp_path / "adapter")["largest"] is None  # JSON has no NaN
    run("plot", tmp_path / "adapter", tmp_path / "picture.png")
    weight.data[:] = float("nan")
    model.save_pretrained(tmp_path / "adapter")
    run("plot", tmp_path / "adapter", tmp_path / "other.png")
    assert (tmp_path / "other.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("file", "text", "words", "load"),
    [
        ("base/model.safetensors.index.json", "{}", "has no weight_map", []),
        ("base/model.safetensors.index.json", '{"weight_map": ["model.safetensors"]}', "has no weight_map", []),
        ("base/model.safetensors.index.json", "{", "model.safetensors.index.json cannot be read", []),
        ("adapter/adapter_config.json", "{", "adapter_config.json cannot be read", []),
        ("adapter/adapter_config.json", "[]", "holds no JSON object", []),
        (
            "adapter/adapter_config.json",
            '{"peft_type": "NEWEST"}',
            "NEWEST, which this PEFT does not know",
            ["--load"],
        ),
    ],
    ids=["index", "list", "broken index", "broken config", "config", "method"],
)
def test_json_that_says_something_else_is_named(llama, tmp_path, refused, file, text, words, load):
    save(tmp_path, llama)
    (tmp_path / file).write_text(text)
    out = ["--base", tmp_path / "base", "--out", tmp_path / "out", *load]
    assert words in refused("merge", tmp_path / "adapter", *out)


def test_what_the_adapter_was_not_saved_with_is_taken_by_no_command(tmp_path, make_llama, run):
    """A foreign bias beside bias='smt_only', and a foreign weight: as in loading, they are left out."""
    save(tmp_path, make_llama(attention_bias=True), bias="smt_only")
    file = tmp_path / "adapter/adapter_model.safetensors"
    foreign = {"model.layers.0.self_attn.o_proj.bias": torch.ones(64), "model.norm.weight": torch.ones(64)}
    save_file({**load_file(file), **{f"base_model.model.{k}": 7 * v for k, v in foreign.items()}}, file)
    expected = merged(tmp_path, LlamaForCausalLM)
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), expected)
    assert not foreign.keys() & set(run("info", tmp_path / "adapter")["also_trained"])


def test_the_revision_of_the_base_model_is_the_adapters(llama, tmp_path, monkeypatch, run):
    save(tmp_path, llama)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "some/base", "revision": "v1"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    asked = []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(tmp_path / "base")

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    run("merge", tmp_path / "adapter", "--base", "some/base", "--out", tmp_path / "again")
    assert asked == [("some/base", "v1"), ("some/base", None)]


def test_of_weights_in_two_forms_one_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, **_):
        asked.append(allow_patterns[0])
        (tmp_path / "pytorch_model.bin").touch() if asked[-1] == "*.bin" else None
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    checkpoints.local_folder("some/base", patterns=("*.safetensors", "*.bin"))
    assert asked == ["*.safetensors", "*.bin"], "there are no others"
    (tmp_path / "model.safetensors").touch()
    checkpoints.local_folder("some/base", patterns=("*.safetensors", "*.bin"))
    assert asked[2:] == ["*.safetensors"]


def test_a_base_that_is_read_only_merges_into_files_that_are_not(llama, tmp_path, run):
    save(tmp_path, llama)
    for file in (tmp_path / "base").iterdir():
        file.chmod(0o444)
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    run("combine", tmp_path / "adapter", "--out", tmp_path / "sum")
    run("patch", tmp_path / "adapter", "--out", tmp_path / "patch.safetensors")
    (mine := tmp_path / "mine").touch()
    files = [tmp_path / "patch.safetensors", *(tmp_path / "out").iterdir(), *(tmp_path / "sum").iterdir()]
    assert {file.stat().st_mode for file in files} == {mine.stat().st_mode}


@pytest.mark.parametrize("load", [[], ["--load"]], ids=["files", "load"])
def test_what_lies_beside_the_weights_comes_along(llama, tmp_path, run, load):
    save(tmp_path, llama)
    (tmp_path / "base/preprocessor_config.json").write_text("{}")
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out", *load)
    assert (tmp_path / "out/preprocessor_config.json").exists()


@pytest.mark.parametrize("method", ["smt", "sorted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_files_are_merge_and_unloads_bit_for_bit(llama, tmp_path, run, method, dtype):
    save(tmp_path, llama.to(dtype), method)
    before = tensors_in(tmp_path / "base")
    report = run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path, LlamaForCausalLM))
    assert_same(tensors_in(tmp_path / "base"), before)
    changed = sum(not torch.equal(value, before[key]) for key, value in tensors_in(tmp_path / "out").items())
    assert report["tensors_changed"] == changed > 0
    assert report["shards_copied"] > 0 and report["shards_rewritten"] > 0


@pytest.mark.parametrize(
    "make, load, options",
    [
        ("gpt2", None, CONV1D),
        ("gpt2", None, {"target_modules": r".*attn\.c_proj", "budget": 12}),  # square: its shape tells nothing
        ("gpt2", None, {**CONV1D, "method": "sorted"}),
        ("without prefix", None, CONV1D),  # as GPT-2 lies on the hub
        ("llama", LlamaModel, {}),  # the adapter's names have no prefix
        ("biases", None, {"bias": "all"}),
        ("biases", None, {"bias": "smt_only"}),
        ("llama", None, {"modules_to_save": ["lm_head", "norm"]}),
        ("llama", None, {"target_modules": ["lm_head", "q_proj"]}),
        ("tied", None, {}),  # but no target is
        ("mixtral", None, {}),
    ],
)
def test_models_whose_files_are_not_what_they_seem(make_llama, tmp_path, run, make, load, options):
    bases = {"llama": make_llama, "gpt2": gpt2, "without prefix": gpt2, "mixtral": mixtral}
    bases["biases"] = lambda: make_llama(attention_bias=True)
    bases["tied"] = lambda: make_llama(tie_word_embeddings=True)
    model = save(tmp_path, bases[make](), load=load, **options)
    kind = load or type(model.get_base_model())
    if make == "without prefix":
        for path in (tmp_path / "base").glob("*.safetensors"):
            named = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
            save_file(named, path, {"format": "pt"})
        index = tmp_path / "base/model.safetensors.index.json"
        index.write_text(index.read_text().replace("transformer.", ""))
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert_same(kind.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path, kind))
    assert tensors_in(tmp_path / "out").keys() == tensors_in(tmp_path / "base").keys()


def test_a_new_classifier_has_the_labels_that_its_adapter_has(llama, tmp_path, run):
    llama.save_pretrained(tmp_path / "base")
    options = {"num_labels": 5, "pad_token_id": 0}
    model = wrap(LlamaForSequenceClassification.from_pretrained(tmp_path / "base", **options), task_type="SEQ_CLS")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", "--load", "--out", tmp_path / "out")
    found = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.num_labels == 5
    assert_same(found.state_dict(), model.merge_and_unload().state_dict())


def test_a_classifier_whose_adapter_is_pickled_is_merged_by_loading(llama, tmp_path, run):
    llama.save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    model = wrap(model, "lora", task_type="SEQ_CLS")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    run("merge", tmp_path / "adapter", "--load", "--out", tmp_path / "out")
    found = LlamaForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert_same(found, model.merge_and_unload().state_dict())


def test_a_model_that_generates_is_of_its_own_class_whatever_the_task(tmp_path):
    """As models of vision and language are, which are trained with task_type="CAUSAL_LM", too."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    base = T5ForConditionalGeneration(T5Config(**sizes))
    base.save_pretrained(tmp_path / "base")
    wrap(base, task_type="CAUSAL_LM", target_modules=["q", "v"], budget=4).save_pretrained(tmp_path / "adapter")
    loaded = merging.load_model(tmp_path / "adapter", tmp_path / "base")
    assert isinstance(loaded.get_base_model(), T5ForConditionalGeneration)


@pytest.mark.parametrize("stored, dtype", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_dtype_is_that_of_a_model_loaded_in_it(llama, tmp_path, run, stored, dtype):
    save(tmp_path, llama.to(getattr(torch, stored)))
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--dtype", dtype)
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_same(found, merged(tmp_path, LlamaForCausalLM, dtype=dtype))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())


def test_a_checkpoint_of_one_file(llama, tmp_path, run):
    save(tmp_path, llama)
    for path in (tmp_path / "base").glob("*.safetensors*"):
        path.unlink()
    llama.save_pretrained(tmp_path / "base")
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path, LlamaForCausalLM))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_larger_than_the_memory(tmp_path):
    script = Path(__file__).with_name("merge_in_little_memory.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stderr.splitlines()[-1])
    assert numbers["limit"] < numbers["checkpoint"]
    report = json.loads(done.stdout)
    assert (report["shards_rewritten"], report["shards_copied"]) == (2, 6)
    for name, blocks in read_adapter(tmp_path / "adapter").blocks.items():
        weight = load_file(tmp_path / f"out/{name.split('.')[2]}.safetensors")[f"{name}.weight"]
        assert torch.equal(weight[blocks.rows[0][:, None], blocks.cols[0]], blocks.deltas[0])  # on zeros
        assert weight.count_nonzero() == blocks.deltas.count_nonzero()
        del weight
    for path in (tmp_path / "out").iterdir():  # half a gigabyte
        path.unlink()


def test_tokenizer_and_notes_come_along(llama, tmp_path, run):
    save(tmp_path, llama)
    for folder, files in (("base", ["tokenizer.json", "vocab.json"]), ("adapter", ["tokenizer.json", "source.spm"])):
        for name in (*files, "tokenizer_config.json"):
            (tmp_path / folder / name).write_text(json.dumps({"of": folder}))
        (tmp_path / folder / "training_data.json").write_text(json.dumps({"train": [folder, "both"]}))
    (tmp_path / "base/README.md").write_text("of the base model")
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir() if "safetensors" not in path.name}
    notes = {"tokenizer.json", "tokenizer_config.json", "training_data.json", "source.spm"}
    assert names == {"config.json", "generation_config.json", *notes}
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": "adapter"}
    assert json.loads((tmp_path / "out/training_data.json").read_text()) == {"train": ["base", "both", "adapter"]}


@pytest.mark.parametrize(
    "make, load, options, message",
    [
        ("llama", LlamaForSequenceClassification, {"modules_to_save": ["score"]}, "score.weight of the adapter is"),
        ("tied", None, {"target_modules": ["lm_head"], "budget": 9}, "lm_head of the adapter is not among"),
        (
            "mixtral",
            None,
            {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
            "in a form that transformers converts",
        ),
    ],
)
def test_what_does_not_lie_in_the_files_is_refused_and_can_be_loaded(
    make_llama, tmp_path, run, refused, make, load, options, message
):
    tied = {"llama": {}, "tied": {"tie_word_embeddings": True}}
    base = mixtral() if make == "mixtral" else make_llama(**tied[make])
    kind = load or type(base)
    save(tmp_path, base, load=load, **options)
    line = refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert message in line and "--load" in line
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--load")
    assert_same(kind.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path, kind))


def test_a_tied_weight_that_lies_in_the_files_is_refused(make_llama, tmp_path, refused):
    save(tmp_path, make_llama(), target_modules=["lm_head"], budget=9)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "base")
    assert "tied" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")


def test_merge_refuses_in_words_and_leaves_nothing(llama, make_llama, tmp_path, refused, monkeypatch):
    save(tmp_path, llama)
    make_llama(hidden_size=32).save_pretrained(tmp_path / "smaller")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    there, adapter, out = set(tmp_path.iterdir()), tmp_path / "adapter", ("--out", tmp_path / "out")
    assert "taken is not empty" in refused("merge", adapter, "--out", tmp_path / "taken")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)  # root may write anywhere
        assert f"{tmp_path} may not be written to" in refused("merge", adapter, *out)
    assert "taken/file is no folder" in refused("convert", adapter, "--out", tmp_path / "taken/file/new/lora")
    assert "name that with --base" in refused("merge", adapter, *out, "--base", tmp_path / "smaller")
    assert "no adapter: it has no adapter_config" in refused("merge", tmp_path / "base", *out)
    assert "There is no folder nowhere" in refused("merge", "nowhere", *out)
    assert "There is no folder nowhere" in refused("merge", adapter, *out, "--base", "nowhere")
    assert "neither model.safetensors nor" in refused("merge", adapter, *out, "--base", adapter)
    index = next((tmp_path / "base").glob("*.index.json"))
    original = index.read_text()
    index.write_text(original.replace("model-00002", "../model-00002"))
    assert "no file of this folder" in refused("merge", adapter, *out)
    index.write_text(original)
    next((tmp_path / "base").glob("*-00002-*")).rename(tmp_path / "lost")
    assert "which its index names" in refused("merge", adapter, *out)
    next(tmp_path.glob("lost")).rename(next((tmp_path / "base").glob("*-00001-*")).with_name("back"))
    assert set(tmp_path.iterdir()) == there


def test_a_base_must_be_named_by_somebody(llama, tmp_path, refused):
    save(tmp_path, llama)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "name it with --base" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")


def test_a_quantised_base_is_refused(llama, tmp_path, refused):
    save(tmp_path, llama)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "base")
    assert "is quantised" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")


def test_a_base_with_a_nan_is_refused(llama, tmp_path, refused):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.weight.fill_(float("nan"))
    save(tmp_path, llama)
    assert "NaN or infinite entries" in refused("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_interrupted_merge_leaves_nothing(llama, tmp_path, monkeypatch):
    save(tmp_path, llama)
    written = []

    def interrupted(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    monkeypatch.setattr(merging, "save_file", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")])
    assert (
        end.value.code == 130
        and len(written) == 2
        and {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    )


def test_another_base_of_the_same_shape_is_warned_of(llama, tmp_path, capsys):
    save(tmp_path, llama)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(1)
    llama.save_pretrained(tmp_path / "other")
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--base", str(tmp_path / "other")])
    assert "smt-peft: warning: " in capsys.readouterr().err


def test_nothing_but_what_was_trained_is_taken_from_a_file(llama, tmp_path, capsys):
    save(tmp_path, llama)
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    weights["base_model.model.model.norm.weight"] = torch.zeros(64)
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")])
    assert "holds model.norm.weight" in capsys.readouterr().err
    assert torch.equal(tensors_in(tmp_path / "out")["model.norm.weight"], llama.model.norm.weight)


# --- info, plot, diff ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_info(llama, tmp_path, run, method):
    deltas = deltas_of(save(tmp_path, llama, method, modules_to_save=["lm_head"]))
    report = run("info", tmp_path / "adapter")
    expected = {"blocks": 20, "block_size": 16, "parameters": 20 * 256, "modules": 6}
    assert expected.items() <= report.items() and report["base_model"] == str(tmp_path / "base")
    assert report["arrangement"] == {"smt": "tiles", "sorted": "sorted"}[method]
    assert report["selection"] == "random, scope model, seed 0" and report["also_trained"] == ["lm_head.weight"]
    assert report["bytes"] == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    everything = torch.cat([delta.flatten() for delta in deltas.values()])
    assert report["norm"] == pytest.approx(everything.norm().item())
    assert report["largest"] == pytest.approx(everything.abs().max().item())
    for key, part in (("by_type", -1), ("by_layer", 2)):
        for group, found in report[key].items():
            own = [delta for name, delta in deltas.items() if name.split(".")[part] == group]
            assert found["norm"] == pytest.approx(sum(delta.square().sum().item() for delta in own) ** 0.5)
            assert 256 * found["blocks"] == sum(delta.count_nonzero().item() for delta in own)
        assert sum(group["share"] for group in report[key].values()) == pytest.approx(1)


def test_info_for_people(llama, tmp_path, capsys):
    save(tmp_path, llama)
    main(["info", str(tmp_path / "adapter")])
    lines = capsys.readouterr().out.splitlines()
    assert f"base model           {tmp_path}/base" in lines and "parameters           5,120" in lines
    assert [line.split()[0] for line in lines[-8:] if line] == ["by", "q_proj", "k_proj", "v_proj", "by", "0", "1"]


def test_whoever_has_seen_enough_gets_no_traceback(llama, tmp_path, monkeypatch):
    def print_to_nobody(*_, **__):
        raise BrokenPipeError

    save(tmp_path, llama)
    closed = []
    monkeypatch.setattr("builtins.print", print_to_nobody)
    monkeypatch.setattr("os.dup2", lambda *_: closed.append(True))
    main(["info", str(tmp_path / "adapter")])
    assert closed


@pytest.mark.parametrize("method", ["smt", "sorted"])
def test_plot(llama, tmp_path, run, method):
    save(tmp_path, llama, method)
    run("plot", tmp_path / "adapter", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(llama, tmp_path, monkeypatch):
    save(tmp_path, llama)
    (tmp_path / "old.png").write_text("old")
    monkeypatch.setattr("smt_peft.__main__.plot_adapter", lambda adapter, path: path.write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plot", str(tmp_path / "adapter"), str(tmp_path / "old.png")])
    assert (tmp_path / "old.png").read_text() == "old"


def test_plot_refuses_a_format_that_there_is_not(llama, tmp_path, refused):
    save(tmp_path, llama)
    assert "foo" in refused("plot", tmp_path / "adapter", tmp_path / "picture.foo")


@pytest.mark.parametrize("method, other", [("smt", "smt"), ("smt", "sorted"), ("sorted", "sorted")])
def test_diff_is_that_of_the_dense_deltas(llama, tmp_path, run, method, other):
    one = deltas_of(save(tmp_path / "one", llama, method))
    two = deltas_of(save(tmp_path / "two", llama, other, seed=1, budget=15, target_modules=["q_proj", "o_proj"]))
    report = run("diff", tmp_path / "one/adapter", tmp_path / "two/adapter")
    names = sorted({*one, *two})
    zeros = {name: torch.zeros_like(delta) for name, delta in (one | two).items()}
    first, second = (torch.cat([(zeros | of)[name].flatten() for name in names]) for of in (one, two))
    assert report["cosine"] == pytest.approx(torch.cosine_similarity(first, second, 0).item(), abs=1e-6)
    assert report["parameters"] == [20 * 256, 15 * 256]
    assert report["parameters_in_both"] == int((first.bool() & second.bool()).sum()) > 0
    assert report["overlap"] == report["parameters_in_both"] / (20 * 256)
    q_proj = [torch.cat([of[name].flatten() for name in names if "q_proj" in name]) for of in (one, two)]
    expected = torch.cosine_similarity(*q_proj, 0).item()
    assert report["by_type"]["q_proj"]["cosine"] == pytest.approx(expected, abs=1e-6)
    assert report["by_type"]["v_proj"] == {"overlap": 0, "cosine": None}


def test_diff_with_itself(llama, tmp_path, run):
    save(tmp_path, llama)
    report = run("diff", tmp_path / "adapter", tmp_path / "adapter")
    assert report["overlap"] == 1 and report["cosine"] == pytest.approx(1)


def test_diff_refuses_adapters_of_different_models(make_llama, tmp_path, refused):
    save(tmp_path / "one", make_llama())
    save(tmp_path / "two", make_llama(hidden_size=96))
    assert "made for different models" in refused("diff", tmp_path / "one/adapter", tmp_path / "two/adapter")


# --- combine, convert, patch ----------------------------------------------------------------------------------------


def test_combine(llama, tmp_path, run):
    one, two = (deltas_of(save(tmp_path / name, llama, seed=seed)) for seed, name in enumerate(["one", "two"]))
    folders = [tmp_path / name / "adapter" for name in ("one", "two")]
    run("combine", *folders, "--weights", 1, "-5e-1", "--out", tmp_path / "sum")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "one/base"), tmp_path / "sum")
    for name, delta in deltas_of(model).items():
        torch.testing.assert_close(delta, one[name] - two[name] / 2)
    assert run("info", tmp_path / "sum")["selection"] is None  # no rule chose these


def test_a_sum_that_is_not_finite_is_refused(llama, tmp_path, refused):
    save(tmp_path, llama)
    words = "combine", tmp_path / "adapter", "--out", tmp_path / "sum", "--weights"
    assert "has NaN or infinite values" in refused(*words, "1e39") and not (tmp_path / "sum").exists()


def test_combine_by_signs(llama, tmp_path, run):
    """By the same options the command does what Python does."""
    for seed, name in enumerate(["one", "two"]):
        save(tmp_path / name, llama, seed=seed)
    folders = [tmp_path / name / "adapter" for name in ("one", "two")]
    options = "--type", "ties", "--density", 0.5, "--majority_sign_method", "frequency"
    run("combine", *folders, *options, "--out", tmp_path / "sum")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "one/base"), folders[0])
    model.load_adapter(folders[1], "two")
    how = {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"}
    model.add_weighted_adapter(["default", "two"], [1, 1], "mix", **how)
    model.load_adapter(tmp_path / "sum", "sum")
    found, expected = deltas_of(model, "sum"), deltas_of(model, "mix")
    assert found.keys() == expected.keys() and any(delta.any() for delta in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_convert_to_lora(llama, tmp_path, run):
    deltas = deltas_of(save(tmp_path, llama))
    report = run("convert", tmp_path / "adapter", "--rank", 4, "--out", tmp_path / "lora")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    found = deltas_of(model)
    lost = sum((found.get(name, 0) - delta).square().sum() for name, delta in deltas.items())
    total = sum(delta.square().sum() for delta in deltas.values())
    assert report["error"] == pytest.approx((lost / total).sqrt().item(), rel=1e-4) and 0.1 < report["error"] < 1


def test_convert_with_as_many_ranks_as_hold_a_share(llama, tmp_path, run):
    save(tmp_path, llama)
    errors = []
    for energy in (0.5, 0.9, 1):
        report = run("convert", tmp_path / "adapter", "--energy", energy, "--out", tmp_path / f"lora{energy}")
        errors.append(report["error"])
        assert all(one["error"] ** 2 <= 1 - energy + 1e-6 for one in report["by_module"].values())
    assert errors[0] > errors[1] > errors[2]


def test_convert_takes_a_share_and_an_arrangement(llama, tmp_path, run):
    save(tmp_path, llama)
    run("merge", tmp_path / "adapter", "--out", tmp_path / "tuned")
    options = (
        "--trainable_ratio",
        0.05,
        "--block_size",
        8,
        "--arrangement",
        "sorted",
        "--target_modules",
        "q_proj, v_proj",
    )
    report = run("convert", tmp_path / "tuned", "--base", tmp_path / "base", *options, "--out", tmp_path / "found")
    config = SMTConfig.from_pretrained(tmp_path / "found")
    assert config.arrangement == "sorted" and config.target_modules == {"q_proj", "v_proj"}
    assert report["blocks"] == config.num_blocks == round(0.05 * llama.num_parameters() / 64)


def test_convert_a_fully_fine_tuned_model(llama, tmp_path, run, refused, capsys):
    deltas = deltas_of(save(tmp_path, llama))
    run("merge", tmp_path / "adapter", "--out", tmp_path / "tuned")
    assert "--base" in refused("convert", tmp_path / "tuned", "--out", tmp_path / "found")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "tuned"), "--out", "found", "--block_size", "big"])
    assert "'big' is neither a whole number nor auto" in capsys.readouterr().err
    budget = ("--num_blocks", 20, "--block_size", 16, "--target_modules", "q_proj,k_proj,v_proj")
    report = run("convert", tmp_path / "tuned", "--base", tmp_path / "base", *budget, "--out", tmp_path / "found")
    assert report["share_of_the_difference_in_all"] == pytest.approx(1)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "found")
    for name, delta in deltas_of(model).items():
        torch.testing.assert_close(delta, deltas[name], rtol=1e-5, atol=1e-6)


def test_patch(llama, tmp_path, run):
    save(tmp_path, llama)
    run("patch", tmp_path / "adapter", "--out", tmp_path / "patch.safetensors")
    apply_patch(llama, load_file(tmp_path / "patch.safetensors"))
    assert_same(llama.state_dict(), merged(tmp_path, LlamaForCausalLM))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "patch.safetensors"}


def test_patch_of_another_base_in_another_dtype(llama, tmp_path, run):
    save(tmp_path, llama)
    (tmp_path / "base").rename(tmp_path / "moved")
    options = "--base", tmp_path / "moved", "--dtype", "bfloat16"
    run("patch", tmp_path / "adapter", *options, "--out", tmp_path / "patch.safetensors")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(deepcopy(plain), tmp_path / "adapter").merge_and_unload().state_dict()
    apply_patch(plain, load_file(tmp_path / "patch.safetensors"))
    assert_same(plain.state_dict(), expected)


def test_as_a_module_it_runs_too(llama, tmp_path):
    save(tmp_path, llama)
    words = [sys.executable, "-m", "smt_peft", "plot", tmp_path / "adapter", tmp_path / "blocks"]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "blocks.png" in ended.stdout and (tmp_path / "blocks.png").stat().st_size, "a name without a suffix"


@pytest.mark.parametrize("command", ["info", "plot", "diff", "merge", "combine", "convert", "patch"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"usage: smt-peft {command}" in capsys.readouterr().out


def test_a_wrong_command_is_named(refused):
    assert "nonsense" in refused("nonsense")
