"""Tests of scripts/finetune.py and scripts/merge.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import finetune  # noqa: E402
import merge  # noqa: E402

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
        prompt: Say
        output_dir: {files}/out
        learning_rate: 1e-2
        max_steps: 3
        save_strategy: "no"
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
    return json.loads((files / "out/results.json").read_text()) | {"printed": done.stdout}


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


def test_reloaded_and_merged_smt_adapters_give_the_very_same_logits(run):
    assert run["smt"]["logits_off_by"] == {"reloaded": 0, "merged": 0}


def test_the_summary_has_a_line_for_each_method(run):
    *_, smt, lora = run["printed"].splitlines()
    assert smt.split()[:2] == ["smt", "1,024"] and lora.split()[0] == "lora"


def test_a_picture_of_the_selection_is_written(adapter):
    assert (adapter / "selection.png").read_bytes().startswith(b"\x89PNG")


def test_plain_transformers_loads_what_merge_writes(files, adapter):
    merge.merge(merge.Options(adapter=str(adapter), output=str(files / "merged")))
    command = [sys.executable, "-c", PLAIN_LOGITS, files / "merged", files / "logits.pt"]
    subprocess.run(command, check=True, capture_output=True, cwd=files)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), adapter)
    with torch.no_grad():
        expected = with_adapter(torch.arange(8)[None]).logits
    torch.testing.assert_close(torch.load(files / "logits.pt"), expected, rtol=0, atol=0)


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_quickstart_is_a_valid_configuration():
    options, _ = finetune.parse(["--config", str(ROOT / "configs/quickstart.yaml")])
    finetune.SMTConfig(**options.smt)
    finetune.LoraConfig(**options.lora)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--methods", "smt,dora"], "smt,dora"),
        (["--max_length", "long"], "invalid int value: 'long'"),
    ],
)
def test_a_wrong_option_is_named(wrong, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        finetune.parse(["--model", "m", "--data", "d", *wrong])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_a_missing_file_of_options_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        finetune.parse(["--config", "nowhere.yaml"])


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_missing_data_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        finetune.load_rows("nowhere.jsonl", 4)


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


@pytest.mark.parametrize(
    "columns, message",
    [({"story": ["a"]}, r"\['story'\]; it needs text, or instruction and output"), ({"text": ["a"]}, "max_length=99")],
)
def test_data_that_cannot_be_used_is_refused_in_words(tokenizer, columns, message):
    with pytest.raises(SystemExit, match=message):
        finetune.encode(Dataset.from_dict(columns), tokenizer, 99)


# --- what merge.py refuses ------------------------------------------------------------------------------------------


def test_merge_says_that_there_is_no_such_adapter(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder nowhere"):
        merge.merge(merge.Options(adapter="nowhere", output=str(tmp_path / "out")))


def test_merge_says_that_a_folder_is_no_adapter(tmp_path):
    with pytest.raises(SystemExit, match=r"no adapter_config\.json"):
        merge.merge(merge.Options(adapter=str(tmp_path), output=str(tmp_path / "out")))


def test_merge_does_not_overwrite_anything(files):
    with pytest.raises(SystemExit, match="is not empty"):
        merge.merge(merge.Options(adapter=str(files), output=str(files)))


def test_merge_asks_for_a_base_that_the_adapter_does_not_name(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "SMT"}')
    with pytest.raises(SystemExit, match="--base"):
        merge.merge(merge.Options(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
