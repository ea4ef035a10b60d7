"""Tests of scripts/evaluate.py and scripts/scores.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import evaluate
import pytest
import scores
import tasks
import torch
from answering import most_likely
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import TASKS, load_test_rows, read_rows, training_data
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from smt_peft.__main__ import main as smt_peft

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_scores():
    given = [{"right": right} for right in (True, True, True, False)]
    assert scores.score(given, 1.23, ["note"]) == {
        "accuracy": 75.0,
        "standard_error": pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5),
        "rows": 4,
        "seconds": 1.2,
        "notes": ["note"],
    }
    tasks = {"a": {"accuracy": 50, "standard_error": 3}, "b": {"accuracy": 100, "standard_error": 4}}
    assert scores.average(tasks) == {"accuracy": 75, "standard_error": 2.5, "tasks": 2}


def test_two_runs_into_one_file_keep_each_others_scores(tmp_path):
    output, given = tmp_path / "r.json", [{"right": True}, {"right": False}]
    both = {name: scores.open_results(output, {"model": "m"}) for name in ("a", "b")}
    for name, results in both.items():
        results["tasks"][name], results["runs"] = scores.score(given, 1.0, []), [name]
        unfinished = scores.Unfinished(scores.answers_file(output, name, ".unfinished"), [], {"model": "m"}, {})
        saved = scores.save(results, name, unfinished, output)
    assert [*saved["tasks"]] == ["a", "b"] and saved["average"]["tasks"] == 2 and set(saved["runs"]) == {"a", "b"}
    assert json.loads(output.read_text()) == saved and saved["seconds"] == 2.0


# --- from the command line to the files --------------------------------------------------------------------------


@pytest.fixture
def command(shared, tmp_path):
    """Give the options of a run on four rows, to which others can be added."""

    def options(*more, model=shared / "models/stories260K") -> list[str]:
        names = ["--model", str(model)] if model else []
        return [*names, "--data", f"{shared}/data", "--output", f"{tmp_path}/out/results.json", "--limit", "4", *more]

    return options


@pytest.fixture
def adapter(shared, tmp_path) -> Path:
    """A LoRA adapter of stories260K whose folder says that it was trained on BoolQ."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(shared / "models/stories260K")
    get_peft_model(base, LoraConfig(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/training_data.json").write_text('{"train": ["boolq_train"]}')
    return tmp_path / "adapter"


@pytest.fixture
def copy(shared, tmp_path) -> Path:
    """A copy of stories260K."""
    (tmp_path / "copy").mkdir()
    for file in (shared / "models/stories260K").iterdir():
        shutil.copyfile(file, tmp_path / "copy" / file.name)
    return tmp_path / "copy"


def test_generate_end_to_end_and_resume(command, tmp_path, monkeypatch, capsys):
    results = evaluate.main(command("--tasks", "winogrande"))
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert results["tasks"]["winogrande"]["rows"] == 4
    assert results["tasks"]["winogrande"]["notes"] == ["only the first 4 of 1,267 rows"]
    assert results["settings"]["limit"] == 4 and results["runs"][0]["versions"]["torch"] == torch.__version__
    [file] = (tmp_path / "out/results.rows").iterdir()
    rows = [json.loads(line) for line in file.open()]
    assert file.name == "winogrande.jsonl"
    assert len(rows) == 4 and rows[0].keys() == {"prediction", "text", "right"}
    assert "winogrande" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", None)  # what is done needs no model
        assert evaluate.main(command("--tasks", "winogrande")) == results
    more = evaluate.main(command("--tasks", "winogrande,boolq", "--batch_size", "2"))
    assert list(more["tasks"]) == ["winogrande", "boolq"] and len(more["runs"]) == 2
    assert more["tasks"]["winogrande"] == results["tasks"]["winogrande"]
    with pytest.raises(SystemExit, match=r"results\.json was made with num_beams 4 \(now 1\); name another file"):
        evaluate.main(command("--tasks", "boolq", "--num_beams", "1"))


def test_the_protocol_reaches_the_answers_and_stands_beside_the_scores(command, tmp_path, monkeypatch):
    few = ("--tasks", "boolq", "--limit", "1", "--num_beams", "1")
    monkeypatch.setattr(evaluate, "generate", lambda *given: [{"prediction": "", "text": str(given[4].new_tokens)}])
    results = evaluate.main(command(*few, "--protocol", "official"))
    assert results["settings"]["protocol"] == "official"
    assert json.loads((tmp_path / "out/results.rows/boolq.jsonl").read_text())["text"] == "256"
    with pytest.raises(SystemExit, match=r"was made with protocol 'official' \(now 'llm-adapters'\)"):
        evaluate.main(command(*few))


@pytest.mark.parametrize("mode", ["text_likelihood", "label_likelihood"])
def test_likelihood_end_to_end_from_yaml(command, tmp_path, mode):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"mode: {mode}\ntasks: boolq\nlimit: 2\ntrained_on: boolq_train\nadapter:\n")
    results = evaluate.main(["--config", str(settings), *command()])
    assert results["tasks"]["boolq"]["rows"] == 4
    assert results["tasks"]["boolq"]["notes"][0] == "6 of 3,270 rows left out, they are in boolq_train"
    rows = [json.loads(line) for line in (tmp_path / "out/results.rows/boolq.jsonl").open()]
    assert all(row["scores"].keys() == {"true", "false"} for row in rows)
    assert results["average"]["accuracy"] == 25 * sum(row["right"] for row in rows)
    results = evaluate.main(["--config", str(settings), *command("--tasks", "hellaswag")])
    assert results["tasks"]["hellaswag"]["notes"] == [
        "a sample of 1,000 rows, not the official test set",
        "only the first 4 of 1,000 rows",
        "3 of its prompts are longer than the model's context of 512 tokens",
    ]


def test_refusals(command, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)  # all of this shows before the model is loaded
    with pytest.raises(SystemExit, match="There is no folder ada"):
        evaluate.main(command("--adapter", "ada"))
    with pytest.raises(SystemExit, match="nothing to evaluate: name a --model, or an --adapter"):
        evaluate.main(command(model=None))
    with pytest.raises(SystemExit, match="gsm8k: its answers are numbers"):
        evaluate.main(command("--mode", "text_likelihood", "--tasks", "boolq,math"))
    with pytest.raises(SystemExit, match="protocol official is a way to generate, but mode is text_likelihood"):
        evaluate.main(command("--mode", "text_likelihood", "--protocol", "official"))
    with pytest.raises(SystemExit, match="mode text_likelihood generates nothing: leave out num_beams"):
        evaluate.main(command("--mode", "text_likelihood", "--num_beams", "1"))
    with pytest.raises(SystemExit, match="quantization has 'load_in_4bits', no option of BitsAndBytesConfig"):
        evaluate.main(command("--quantization", "{load_in_4bits: true}"))
    for name in ("batch_size", "num_beams"):
        with pytest.raises(SystemExit, match=f"{name} is 0; it is at least 1"):
            evaluate.main(command(f"--{name}", "0"))
    with pytest.raises(SystemExit, match="no file with the test rows of boolq"):
        evaluate.main(command("--data", str(tmp_path)))
    (tmp_path / "results.json").write_text('{"smt": {}}')
    with pytest.raises(SystemExit, match=r"results\.json holds no scores of this script; name another"):
        evaluate.main(command("--output", f"{tmp_path}/results.json"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="nowhere"):
        evaluate.main(command("--tasks", "boolq", "--limit", "1", model=str(tmp_path / "nowhere")))


# --- what the weights were trained on, and the base model they belong to -----------------------------------------

BOOLQ = ("--tasks", "boolq", "--mode", "label_likelihood")
LEFT_OUT = "6 of 3,270 rows left out, they are in boolq_train"


def test_an_adapter_says_its_base_model_and_its_training_data(command, adapter, shared):
    results = evaluate.main(command("--adapter", str(adapter), *BOOLQ, model=None))
    assert results["settings"]["model"] == str(shared / "models/stories260K") and results["notes"] == []
    assert results["settings"]["trained_on"] == "boolq_train"
    assert results["tasks"]["boolq"]["notes"][0] == LEFT_OUT


def test_the_training_data_of_an_adapter_must_be_known(command, adapter):
    (adapter / "training_data.json").unlink()
    with pytest.raises(SystemExit, match=rf"nothing says what {adapter} was trained on.*--trained_on none"):
        evaluate.main(command("--adapter", str(adapter), *BOOLQ))
    results = evaluate.main(command("--adapter", str(adapter), "--trained_on", "none", *BOOLQ))
    assert LEFT_OUT not in results["tasks"]["boolq"]["notes"]


def test_a_model_of_unknown_training_is_scored_with_a_note(command, capsys):
    note = "training data unknown: contamination was not removed"
    results = evaluate.main(command(*BOOLQ))
    assert [said.startswith(note) for said in results["notes"]] == [True]
    assert note in capsys.readouterr().out
    assert results["settings"]["trained_on"] is None


def test_a_model_says_its_training_data_and_an_option_wins(command, shared, copy, tmp_path):
    (copy / "training_data.json").write_text('{"train": ["stdlib-source", "math_data_train"]}')
    svamp = command("--tasks", "SVAMP", "--limit", "1", "--num_beams", "1", model=copy)
    results = evaluate.main(svamp)
    count = len(read_rows(shared / "data/math/SVAMP_test_not_in_math_data.jsonl"))
    assert results["tasks"]["SVAMP"]["notes"][1] == f"only the first 1 of {count} rows" and results["notes"] == []
    results = evaluate.main([*svamp, "--trained_on", "none", "--output", f"{tmp_path}/other.json"])
    assert results["tasks"]["SVAMP"]["notes"] == ["only the first 1 of 1,000 rows"]


def test_what_the_base_model_of_an_adapter_learnt_counts_too(adapter, copy):
    (copy / "training_data.json").write_text('{"train": ["math_data_train"]}')
    options = evaluate.Options(model=str(copy), adapter=str(adapter), data="d", output="o")
    evaluate.complete(options)
    assert options.training_files == ["boolq_train", "math_data_train"]


def test_a_base_model_on_the_hub_says_what_it_learnt_and_has_the_adapters_revision(adapter, copy, monkeypatch):
    (copy / "training_data.json").write_text('{"train": ["math_data_train"]}')
    monkeypatch.setattr(tasks, "hf_hub_download", lambda name, file, revision: asked.append(revision) or copy / file)
    asked = []
    options = evaluate.Options(model="a/b", adapter=str(adapter), data="d", output="o")
    evaluate.complete(options)
    assert options.training_files == ["boolq_train", "math_data_train"]
    named = {"base_model_name_or_path": "a/b", "revision": "v1"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | named))
    options = evaluate.Options(adapter=str(adapter), data="d", output="o")
    assert evaluate.complete(options) == [] and asked == [None, "v1"]
    assert options.model == "a/b" and options.revision == "v1"
    monkeypatch.setattr(evaluate, "AutoTokenizer", Mock())
    monkeypatch.setattr(evaluate, "load_model", Mock(side_effect=StopIteration))
    with pytest.raises(StopIteration):
        evaluate.load(options, torch.device("cpu"))
    evaluate.AutoTokenizer.from_pretrained.assert_called_with("a/b", revision="v1")
    evaluate.load_model.assert_called_with(options, "v1")


@pytest.mark.parametrize("error, said", [(RepositoryNotFoundError, None), (HfHubHTTPError, "the hub is out")])
def test_what_the_hub_does_not_say_is_no_answer(adapter, monkeypatch, error, said):
    monkeypatch.setattr(tasks, "hf_hub_download", Mock(side_effect=error("the hub is out", response=Mock())))
    if said is None:
        assert tasks.training_data_of("a/b") is None
    else:
        with pytest.raises(OSError, match=said):
            tasks.training_data_of("a/b")


@pytest.mark.parametrize("learnt", [None, ["math_data_train", "boolq_train"]])
def test_a_merged_model_says_what_its_base_model_and_the_adapter_learnt(command, adapter, copy, tmp_path, learnt):
    if learnt:
        (copy / "training_data.json").write_text(json.dumps({"train": learnt}))
    smt_peft(["merge", str(adapter), "--base", str(copy), "--out", f"{tmp_path}/merged", "--load"])  # it is LoRA
    results = evaluate.main(command(*BOOLQ, model=tmp_path / "merged"))
    assert results["settings"]["trained_on"] == ",".join(learnt or ["boolq_train"])
    assert results["tasks"]["boolq"]["notes"][0] == LEFT_OUT


def test_a_merged_model_says_nothing_where_the_adapter_does_not(adapter, copy, tmp_path):
    (copy / "training_data.json").write_text('{"train": ["math_data_train"]}')
    (adapter / "training_data.json").unlink()
    smt_peft(["merge", str(adapter), "--base", str(copy), "--out", f"{tmp_path}/merged", "--load"])  # it is LoRA
    assert training_data(f"{tmp_path}/merged") is None  # half of it would pass for all of it


def test_another_base_model_than_the_adapter_names_is_noted(command, adapter, shared, copy):
    results = evaluate.main(command("--adapter", str(adapter), *BOOLQ, model=copy))
    [note] = results["notes"]
    assert note == f"{adapter} was made for {shared}/models/stories260K, and stands on {copy} here"


NOT_MLP = ["gate_proj", "up_proj", "down_proj", "lm_head"]  # bitsandbytes' CPU kernel for 4 bits wants other shapes


@pytest.mark.parametrize(
    "quantization", [{"load_in_4bit": True, "llm_int8_skip_modules": NOT_MLP}, {"load_in_8bit": True}]
)
def test_an_adapter_on_a_quantised_base(command, adapter, shared, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    options = ("--adapter", str(adapter), "--quantization", json.dumps(quantization))
    evaluate.main(command(*options, *BOOLQ, "--batch_size", "1"))
    given = [json.loads(line) for line in (tmp_path / "out/results.rows/boolq.jsonl").open()]
    base = AutoModelForCausalLM.from_pretrained(
        shared / "models/stories260K", quantization_config=BitsAndBytesConfig(**quantization)
    )
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    tokenizer.pad_token = tokenizer.eos_token
    model = PeftModel.from_pretrained(base, adapter).eval()
    rows, _ = load_test_rows(TASKS["boolq"], shared / "data", ["boolq_train"])
    with torch.no_grad():
        for row, one in zip(rows[:4], given, strict=True):
            [expected] = most_likely(model, tokenizer, TASKS["boolq"], [row], by_label=True)
            assert one["scores"] == pytest.approx(expected["scores"], rel=1e-5)


# --- going on after an interruption -------------------------------------------------------------------------------


def without_times(output: Path) -> tuple[dict, str]:
    """The results, without what differs from one run to the next, and the answers to the rows."""
    results = json.loads(output.read_text())
    for part in (results, *results["tasks"].values()):
        del part["seconds"]
    for run in results["runs"]:
        del run["command"]
    return results, (output.with_suffix(".rows") / "boolq.jsonl").read_text()


@pytest.fixture
def boolq(command):
    """Give the options of a run on four rows of BoolQ, one at a time."""
    return lambda mode, *more: command("--tasks", "boolq", "--batch_size", "1", "--mode", mode, *more)


@pytest.fixture
def interrupted(boolq, tmp_path, monkeypatch):
    """Run to the third of four batches, and there lose the end of what was written last."""

    def run(mode: str) -> Path:
        name = "generate" if mode == "generate" else "most_likely"
        original, calls = getattr(evaluate, name), []

        def until_the_third(*arguments, **named):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluate, name, until_the_third)
            evaluate.main(boolq(mode))
        file = tmp_path / "out/results.rows/boolq.unfinished.jsonl"
        file.write_text(file.read_text()[:-5])
        return file

    return run


@pytest.mark.parametrize("mode, name", [("generate", "generate"), ("label_likelihood", "most_likely")])
def test_an_interrupted_task_goes_on_where_it_was(boolq, tmp_path, interrupted, monkeypatch, mode, name):
    file, original, asked = interrupted(mode), getattr(evaluate, name), []
    monkeypatch.setattr(evaluate, name, lambda *parts, **named: asked.append(1) or original(*parts, **named))
    evaluate.main(boolq(mode))
    assert len(asked) == 3 and not file.exists()  # one batch was kept, one was cut off, two were never begun
    evaluate.main(boolq(mode, "--output", f"{tmp_path}/whole.json"))
    assert without_times(tmp_path / "out/results.json") == without_times(tmp_path / "whole.json")


def test_answers_of_other_settings_or_rows_are_not_used(boolq, interrupted):
    file = interrupted("label_likelihood")
    written = file.read_text()
    for options, message in (
        (boolq("text_likelihood"), r"mode 'label_likelihood' \(now 'text_likelihood'\)"),
        (boolq("label_likelihood", "--limit", "5"), r"limit 4 \(now 5\), rows' sha256"),
    ):
        with pytest.raises(SystemExit, match=rf"boolq\.unfinished\.jsonl was made with {message}"):
            evaluate.main(options)
    assert file.read_text() == written


ON_A_DISK_WITHOUT_THE_RESULTS = """
import os, pathlib, sys
if os.environ["RANK"] == "1":
    exists = pathlib.Path.exists
    pathlib.Path.exists = lambda path, **how: "/out/results" not in str(path) and exists(path, **how)
sys.path.insert(0, {scripts!r})
import evaluate
evaluate.main(sys.argv[1:])
"""


def test_two_processes_on_two_disks_go_on_with_what_one_began(boolq, interrupted, tmp_path):
    """Three rows are left for two processes with a row at a time: the last step has none for one of them."""
    interrupted("label_likelihood")
    script = tmp_path / "two_disks.py"
    script.write_text(ON_A_DISK_WITHOUT_THE_RESULTS.format(scripts=str(SCRIPTS)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, script, *boolq("label_likelihood")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["machine"]["processes"] for run in together["runs"]] == [1, 2]
    alone = evaluate.main(boolq("label_likelihood", "--output", f"{tmp_path}/alone.json"))
    assert together["average"] == alone["average"]
    [file], [other] = (list((tmp_path / name).iterdir()) for name in ("out/results.rows", "alone.rows"))
    for one, expected in zip(file.open(), other.open(), strict=True):
        assert json.loads(one)["scores"] == pytest.approx(json.loads(expected)["scores"], rel=1e-5)
