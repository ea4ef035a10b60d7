"""Tests of scripts/tasks.py and scripts/evaluate.py."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import evaluate
from tasks import GROUPS, TASKS, choose, load_test_rows, prompt, read_rows, training_text

NUMERIC = [name for name, task in TASKS.items() if not task.words]


@pytest.fixture
def data(shared):
    return shared / "data"


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 1,234,567.", 1234567),
        ("It fell by 5 to -17 degrees.", -17),
        ("That is 3.50 dollars", 3.5),
        ("3 + 4 = 7. The answer is 7.", 7),
        ("so $12.", 12),
        ("7 apples and 3 pears", 3),
        ("5\n\n### Response:\n6", 5),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_numbers(text, number):
    task = TASKS["gsm8k"]
    assert task.extract(text) == "" if number is None else task.is_right(task.extract(text), str(number))
    assert not task.is_right(task.extract(text), "99")


def test_numbers_are_right_within_a_tolerance():
    assert TASKS["mawps"].is_right("1.833", "1.8333333333333335")
    assert not TASKS["mawps"].is_right("1.83", "1.8333333333333335")
    assert not TASKS["gsm8k"].is_right("9" * 400, "9.0")  # more than a float holds


@pytest.mark.parametrize(
    "name, text, word",
    [
        ("boolq", "the correct answer is false", "false"),
        ("boolq", "false, it is not true", "false"),
        ("boolq", "untrue", "true"),  # as in LLM-Adapters
        ("boolq", "True", ""),
        ("piqa", "solution2 or solution1", "solution2"),
        ("social_i_qa", "answer4", "answer4"),
        ("hellaswag", "ending5, I mean ending3", "ending3"),
        ("winogrande", "neither", ""),
        ("AQuA", "the answer is (C).", "C"),
        ("AQuA", "Rationale: By hand.The answer is (C).", "B"),  # as in LLM-Adapters
        ("AQuA", "c", ""),
    ],
)
def test_words(name, text, word):
    assert TASKS[name].extract(text) == word
    assert TASKS[name].is_right(word, "false") == (word == "false")


@pytest.mark.parametrize("name", TASKS)
def test_each_gold_answer_is_right_and_others_are_wrong(name, data):
    task = TASKS[name]
    rows, _ = load_test_rows(task, data)
    for row in rows:
        says = (task.lead + task.option).format
        assert task.is_right(task.extract(says(row["answer"]).removeprefix("The answer is ")), row["answer"])
        if task.words:
            assert row["answer"] in task.options(row)
            others = task.options(row).keys() - {row["answer"]}
        else:
            others = [str(float(row["answer"]) + 1)]
        assert not any(task.is_right(other, row["answer"]) for other in others)


@pytest.mark.parametrize("name", GROUPS["commonsense"])
def test_each_commonsense_output_is_right_and_is_an_option(name, data):
    task = TASKS[name]
    rows, _ = load_test_rows(task, data)
    assert all(task.is_right(task.extract(row["output"]), row["answer"]) for row in rows)
    assert all(row["output"] == task.lead + task.options(row)[row["answer"]] for row in rows)


@pytest.mark.parametrize(
    "file, count, right", [("gsm8k_train", 7473, 7473), ("mawps_train", 1898, 1898), ("math_data_train", 3057, 2399)]
)
def test_rationales_end_in_the_right_number_as_often_as_known(file, count, right, data):
    rows = [row for row in read_rows(data / "math" / f"{file}.jsonl") if row["answer"] not in tuple("ABCDE")]
    task = TASKS["gsm8k"]
    assert len(rows) == count
    assert sum(task.is_right(task.extract(row["output"]), row["answer"]) for row in rows) == right


def test_options_are_those_of_the_row(data):
    assert TASKS["boolq"].options({"instruction": "x\n\nAnswer format: true/false"}) == {
        "true": " true",
        "false": " false",
    }
    assert {len(TASKS["ARC-Easy"].options(row)) for row in load_test_rows(TASKS["ARC-Easy"], data)[0]} == {3, 4, 5}
    assert list(TASKS["AQuA"].options({"instruction": "x"}).values()) == [" (A)", " (B)", " (C)", " (D)", " (E)"]
    with pytest.raises(ValueError, match="gsm8k: its answers are numbers"):
        TASKS["gsm8k"].options({"instruction": "x"})


def test_prompt_and_training_text():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert prompt(" Add 1 and 2. ") == expected
    assert training_text({"instruction": "Add 1 and 2.", "output": "\nA: 3.\n"}) == expected + "A: 3."


def test_choose():
    assert [task.name for task in choose("AQuA, boolq,AQuA")] == ["AQuA", "boolq"]
    assert len(choose("commonsense")) == 8 and len(choose("math")) == 6 and len(choose("math,mawps")) == 7
    with pytest.raises(ValueError, match="no task is called 'bool'; there are commonsense, math, boolq"):
        choose("bool")
    with pytest.raises(ValueError, match="no task is named"):
        choose(" ,")


def test_rows_the_model_was_trained_on_are_left_out(data):
    count = 0
    for task in choose("math"):
        rows, notes = load_test_rows(task, data, ["math_data_train"])
        assert rows == read_rows(data / "math" / f"{task.name}_test_not_in_math_data.jsonl")
        assert len(notes) == 1 and notes[0].endswith("rows left out, they are in math_data_train")
        count += len(rows)
    assert count == 765
    assert load_test_rows(TASKS["gsm8k"], data, ["gsm8k_train"])[1] == []
    both, notes = load_test_rows(TASKS["AddSub"], data, ["math_data_train", str(data / "math" / "mawps_train.jsonl")])
    assert len(both) == 11 and len(notes) == 2
    with pytest.raises(ValueError, match="AddSub: none of its test rows is left"):
        load_test_rows(TASKS["AddSub"], data, ["AddSub_test"])


def test_a_sample_says_that_it_is_one(data):
    assert load_test_rows(TASKS["hellaswag"], data)[1] == ["a sample of 1,000 rows, not the official test set"]


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file with the test rows of boolq"):
        load_test_rows(TASKS["boolq"], tmp_path)
    (tmp_path / "boolq").mkdir()
    row = {"instruction": "x", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row]))
    assert load_test_rows(TASKS["boolq"], tmp_path) == ([row], [])
    with pytest.raises(FileNotFoundError, match="no file with the training rows 'nothing'"):
        load_test_rows(TASKS["boolq"], tmp_path, ["nothing"])
    del row["answer"]
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="row 1 has no answer"):
        load_test_rows(TASKS["boolq"], tmp_path)


@pytest.fixture(scope="module")
def tiny():
    """A random model in double precision, and a tokenizer with a token per character and one for "bc"."""
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *map(chr, range(32, 127)), "\n", "bc"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**sizes, **tokens, initializer_range=0.4)
    return LlamaForCausalLM(config).double().eval(), tokenizer


def log_probs_one_by_one(model, tokens):
    """The log-probability of each token but the first."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return [logits[position, token].item() for position, token in enumerate(tokens[1:])]


@torch.no_grad()
def test_mean_log_probs_are_those_of_each_text_alone(tiny):
    model, tokenizer = tiny
    pairs = [("A question?", " yes"), ("A question?", " not at all"), ("Another, longer question?", " d"), ("x", "y")]
    for (context, text), value in zip(pairs, evaluate.mean_log_probs(model, tokenizer, pairs), strict=True):
        alone = log_probs_one_by_one(model, tokenizer(context + text)["input_ids"])[-len(text) :]
        assert value == pytest.approx(sum(alone) / len(text), rel=1e-5)


@torch.no_grad()
def test_a_token_across_the_end_of_the_context_is_scored(tiny):
    model, tokenizer = tiny
    ids = tokenizer("abc")["input_ids"]
    assert len(ids) == 2
    assert evaluate.mean_log_probs(model, tokenizer, [("ab", "c")]) == pytest.approx(log_probs_one_by_one(model, ids))


def test_overflow_is_an_error(tiny):
    model, tokenizer = tiny
    broken = LlamaForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, math.inf)
    with pytest.raises(ValueError, match="try --dtype float32"):
        evaluate.mean_log_probs(broken, tokenizer, [("a", "b")])


@torch.no_grad()
def test_most_likely_option_of_each_row(tiny):
    model, tokenizer = tiny
    task = TASKS["winogrande"]
    rows = [{"instruction": f"{name} ran.\n\nAnswer format: option1/option2"} for name in ("Ann", "Bartholomew")]
    given = evaluate.most_likely(model, tokenizer, task, rows)
    for row, one in zip(rows, given, strict=True):
        assert list(one["scores"]) == ["option1", "option2"]
        assert one["prediction"] == max(one["scores"], key=one["scores"].get)
        pair = (prompt(row["instruction"]) + "the correct answer is", " " + one["prediction"])
        assert one["scores"][one["prediction"]] == pytest.approx(
            evaluate.mean_log_probs(model, tokenizer, [pair])[0], rel=1e-5
        )


def options(**changes):
    return evaluate.Options(**({"model": "m", "data": "d", "output": "o"} | changes))


ROWS = [{"instruction": "x" * length, "answer": "true"} for length in (3, 30, 1, 12, 7)]


def test_generation_does_not_depend_on_the_batch(tiny):
    answers = [evaluate.answers(*tiny, TASKS["boolq"], ROWS, options(batch_size=size)) for size in (1, 5)]
    assert answers[0] == answers[1]
    assert all(answer["text"] for answer in answers[0])


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_processes_share_the_rows(mode, tiny, monkeypatch):
    run = options(batch_size=2, mode=mode)
    alone = evaluate.answers(*tiny, TASKS["boolq"], ROWS, run)
    gathered = []
    monkeypatch.setattr(evaluate, "gather_object", lambda found: gathered.extend(found) or gathered)

    def answers_of_process(index):
        state = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0)
        monkeypatch.setattr(evaluate, "PartialState", lambda: state)
        return evaluate.answers(*tiny, TASKS["boolq"], ROWS, run)

    with pytest.raises(ValueError, match="argument 2 is longer"):  # one process has only its part of the rows
        answers_of_process(0)
    together = answers_of_process(1)
    assert len(gathered) == len(ROWS)
    for one, other in zip(together, alone, strict=True):
        assert one["prediction"] == other["prediction"] and one.get("text") == other.get("text")
        assert one.get("scores", {}) == pytest.approx(other.get("scores", {}), rel=1e-5)


def test_scores():
    given = [{"right": right} for right in (True, True, True, False)]
    assert evaluate.score(given, 1.23, ["note"]) == {
        "accuracy": 75.0,
        "standard_error": pytest.approx(100 * (0.75 * 0.25 / 4) ** 0.5),
        "rows": 4,
        "seconds": 1.2,
        "notes": ["note"],
    }
    scores = {"a": {"accuracy": 50, "standard_error": 3}, "b": {"accuracy": 100, "standard_error": 4}}
    assert evaluate.average(scores) == {"accuracy": 75, "standard_error": 2.5, "tasks": 2}


def command(shared, path, *more):
    folders = ["--model", str(shared / "models" / "stories260K"), "--data", str(shared / "data")]
    return [*folders, "--output", str(path), "--limit", "4", *more]


def test_generate_end_to_end_and_resume(shared, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "results.json"
    results = evaluate.main(command(shared, path, "--tasks", "winogrande"))
    assert results == json.loads(path.read_text())
    assert results["tasks"]["winogrande"]["rows"] == 4
    assert results["tasks"]["winogrande"]["notes"] == ["only the first 4 of 1,267 rows"]
    assert results["settings"]["limit"] == 4 and results["runs"][0]["versions"]["torch"] == torch.__version__
    rows = [json.loads(line) for line in (tmp_path / "new" / "results.rows" / "winogrande.jsonl").open()]
    assert len(rows) == 4 and rows[0].keys() == {"prediction", "text", "right"}
    assert "winogrande" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", None)  # what is done needs no model
        assert evaluate.main(command(shared, path, "--tasks", "winogrande")) == results
    more = evaluate.main(command(shared, path, "--tasks", "winogrande,boolq", "--batch_size", "2"))
    assert list(more["tasks"]) == ["winogrande", "boolq"] and len(more["runs"]) == 2
    assert more["tasks"]["winogrande"] == results["tasks"]["winogrande"]
    with pytest.raises(ValueError, match=r"has scores made with num_beams 4 \(now 1\); name another file"):
        evaluate.main(command(shared, path, "--tasks", "boolq", "--num_beams", "1"))


def test_likelihood_end_to_end_from_yaml(shared, tmp_path, capsys):
    path, settings = tmp_path / "results.json", tmp_path / "settings.yaml"
    settings.write_text("mode: likelihood\ntasks: boolq\nlimit: 2\ntrained_on: boolq_train\nadapter:\n")
    results = evaluate.main([str(settings), *command(shared, path)])
    assert results["tasks"]["boolq"]["rows"] == 4
    assert results["tasks"]["boolq"]["notes"][0] == "6 of 3,270 rows left out, they are in boolq_train"
    rows = [json.loads(line) for line in (tmp_path / "results.rows" / "boolq.jsonl").open()]
    assert all(row["scores"].keys() == {"true", "false"} for row in rows)
    assert results["average"]["accuracy"] == 25 * sum(row["right"] for row in rows)
    results = evaluate.main([str(settings), *command(shared, path, "--tasks", "hellaswag")])
    assert results["tasks"]["hellaswag"]["notes"] == [
        "a sample of 1,000 rows, not the official test set",
        "only the first 4 of 1,000 rows",
        "3 of its prompts are longer than the model's context of 512 tokens",
    ]


def test_refusals(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", None)  # all of this shows before the model is loaded
    run = command(shared, tmp_path / "results.json")
    with pytest.raises(ValueError, match="nothing says what ada was trained on"):
        evaluate.main([*run, "--adapter", "ada"])
    with pytest.raises(ValueError, match="gsm8k: its answers are numbers"):
        evaluate.main([*run, "--mode", "likelihood", "--tasks", "boolq,math"])
    with pytest.raises(ValueError, match="batch_size 0"):
        evaluate.main([*run, "--batch_size", "0"])
    with pytest.raises(FileNotFoundError, match="no file with the test rows of boolq"):
        evaluate.main([*run, "--data", str(tmp_path)])
