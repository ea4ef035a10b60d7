"""Tests of scripts/tasks.py."""

import json

import pytest
import tasks
from tasks import GROUPS, TASKS, choose, load_test_rows, prompt, read_rows, training_data

WITH_OPTIONS = [name for name, task in TASKS.items() if task.words]


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


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_never_right(name):
    assert not TASKS[name].is_right("", "")


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


@pytest.mark.parametrize(
    "name, text, word",
    [("boolq", "TRUE, not false", "true"), ("piqa", "Solution2", "solution2"), ("AQuA", "a, (C)", "C")],
)
def test_words_in_lower_case(name, text, word):
    assert TASKS[name].extract(text, lower_case=True) == word
    assert TASKS[name].extract(f"### Response: {text}", lower_case=True) == ""


@pytest.mark.parametrize("name", TASKS)
def test_each_gold_answer_is_right_and_others_are_wrong(name, data):
    task = TASKS[name]
    rows, _ = load_test_rows(task, data)
    for row in rows:
        says = (task.lead + task.label).format
        assert task.is_right(task.extract(says(row["answer"]).removeprefix("The answer is ")), row["answer"])
        if task.words:
            assert row["answer"] in task.labels(row)
            others = task.labels(row).keys() - {row["answer"]}
        else:
            others = [str(float(row["answer"]) + 1)]
        assert not any(task.is_right(other, row["answer"]) for other in others)


@pytest.mark.parametrize("name", GROUPS["commonsense"])
def test_each_commonsense_output_is_right_and_states_a_label(name, data):
    task = TASKS[name]
    rows, _ = load_test_rows(task, data)
    assert all(task.is_right(task.extract(row["output"]), row["answer"]) for row in rows)
    assert all(row["output"] == task.lead + task.labels(row)[row["answer"]] for row in rows)


@pytest.mark.parametrize(
    "file, count, right", [("gsm8k_train", 7473, 7473), ("mawps_train", 1898, 1898), ("math_data_train", 3057, 2399)]
)
def test_rationales_end_in_the_right_number_as_often_as_known(file, count, right, data):
    rows = [row for row in read_rows(data / "math" / f"{file}.jsonl") if row["answer"] not in tuple("ABCDE")]
    task = TASKS["gsm8k"]
    assert len(rows) == count
    assert sum(task.is_right(task.extract(row["output"]), row["answer"]) for row in rows) == right


def test_labels_are_those_of_the_row(data):
    assert TASKS["boolq"].labels({"instruction": "x\n\nAnswer format: true/false"}) == {
        "true": " true",
        "false": " false",
    }
    assert {len(TASKS["ARC-Easy"].labels(row)) for row in load_test_rows(TASKS["ARC-Easy"], data)[0]} == {3, 4, 5}
    assert list(TASKS["AQuA"].labels({"instruction": "x"}).values()) == [" (A)", " (B)", " (C)", " (D)", " (E)"]
    for options in (TASKS["gsm8k"].labels, TASKS["gsm8k"].texts):
        with pytest.raises(ValueError, match="gsm8k: its answers are numbers"):
            options({"instruction": "x"})


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_the_instruction_is_made_of_the_texts_of_its_options(name, data):
    """Put after their headings, the texts give back the end of the instruction, up to white space."""
    task = TASKS[name]
    files = sorted((data / task.folder).glob(f"{name}_*.jsonl"))
    assert files
    for row in (row for file in files for row in read_rows(file)):
        texts = task.texts(row)
        assert texts.keys() == task.labels(row).keys() and row["answer"] in texts
        assert all(text and text == text.strip() for text in texts.values())
        if name == "boolq":
            assert texts == {"true": "true", "false": "false"}
            continue
        listed = [f"({word}) {text}" if name == "AQuA" else f"{word.title()}: {text}" for word, text in texts.items()]
        end = [] if name == "AQuA" else ["Answer format: " + "/".join(texts)]
        assert row["instruction"].split()[-len(" ".join(listed + end).split()) :] == " ".join(listed + end).split()


@pytest.mark.parametrize(
    "name, instruction, texts",
    [
        ("winogrande", "_ ran.\n\nOption1: Ann Option2: Bo B. Answer format: option1/option2", ["Ann", "Bo B."]),
        ("piqa", "Go?\n\nSolution1: a\nb\n\nSolution2: c\n\nAnswer format: solution1/solution2", ["a\nb", "c"]),
        (
            "AQuA",
            "P (A)? Answer Choices: (A) 1 (B) A) 2  (C) (1,0) (D) x (E) None",
            ["1", "A) 2", "(1,0)", "x", "None"],
        ),
    ],
)
def test_texts_of_options(name, instruction, texts):
    assert list(TASKS[name].texts({"instruction": instruction}).values()) == texts


@pytest.mark.parametrize("options", ["Option1: Ann Option2: ", "Option1: Option2: Bo ", "Option2: Bo "])
def test_an_option_without_a_text_is_named(options):
    with pytest.raises(ValueError, match=r"winogrande: no text for each of Option1:, Option2: in '_ ran"):
        TASKS["winogrande"].texts({"instruction": f"_ ran.\n\n{options}Answer format: option1/option2"})


def test_prompt():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert prompt(" Add 1 and 2. ") == expected


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


def test_a_training_file_is_read_once_for_all_tasks(data, monkeypatch):
    tasks._questions.cache_clear()
    read, files = read_rows, []
    monkeypatch.setattr(
        tasks, "read_rows", lambda path, *more, **named: files.append(path) or read(path, *more, **named)
    )
    for task in choose("AddSub,SingleEq,MultiArith"):
        load_test_rows(task, data, ["math_data_train", "mawps_train"])
    assert len(files) == 3 + 2


def test_a_sample_says_that_it_is_one(data):
    assert load_test_rows(TASKS["hellaswag"], data)[1] == ["a sample of 1,000 rows, not the official test set"]


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file with the test rows of boolq"):
        load_test_rows(TASKS["boolq"], tmp_path)
    (tmp_path / "boolq").mkdir()
    row = {"instruction": "x", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row]))
    assert load_test_rows(TASKS["boolq"], tmp_path) == ([row], [])
    with pytest.raises(ValueError, match=r"no file with the training rows 'nothing'.*; name .* with --trained_on"):
        load_test_rows(TASKS["boolq"], tmp_path, ["nothing"])
    (tmp_path / "learnt.json").write_text('[{"instruction": "X!", "output": "true"}]')  # what finetune.py needs
    with pytest.raises(ValueError, match=r"none of its test rows is left \(1 of 1 rows left out, they are in"):
        load_test_rows(TASKS["boolq"], tmp_path, [str(tmp_path / "learnt.json")])
    (tmp_path / "text.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match=r"row 1 has no instruction.*or say none"):
        load_test_rows(TASKS["boolq"], tmp_path, [str(tmp_path / "text.jsonl")])
    del row["answer"]
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="row 1 has no answer"):
        load_test_rows(TASKS["boolq"], tmp_path)


def test_training_data_beside_weights(tmp_path):
    assert training_data(str(tmp_path)) is None and training_data("user/name") is None
    (tmp_path / "training_data.json").write_text('{"train": ["boolq_train"]}')
    assert training_data(str(tmp_path)) == ["boolq_train"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("test.json", '{"instruction": "a"}', "are no rows"),
        ("test.jsonl", '"a"\n', "are no rows"),
        ("test.json", '[{"instruction": "a', "Unterminated"),
    ],
)
def test_a_file_without_rows_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_rows(tmp_path / name)
