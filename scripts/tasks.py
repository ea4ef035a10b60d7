"""The paper's commonsense and arithmetic tasks in the format of LLM-Adapters: rows, prompt, answers, what is right.

A row is a dictionary with `instruction`, `output` (the text to learn) and `answer` (the gold answer). The prompt and
the rules for finding an answer in a text are those of LLM-Adapters, so that scores compare with published ones; where
those of SMT's official code are known to differ, they are here, too.

What a model was trained on stands beside its weights, in `training_data.json`: `{"train": [names or paths]}`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from smt_peft.files import read_json

RESPONSE = "### Response:"
TOLERANCE = 0.001  # between a predicted number and the right one
OFFERED = r"Answer format: (\S+)\s*$"  # at the end of most instructions
TRAINING_DATA = "training_data.json"


@dataclass(frozen=True)
class Task:
    """One task: where its rows are, how an answer is found in a text, and how long a text may be."""

    name: str
    folder: str
    words: tuple[str, ...]  # the possible answers; empty where they are numbers
    new_tokens: int
    # To compare options by likelihood: what stands before a label, and how a label is written, in the texts to learn;
    # and how the instruction announces an option's text, or "" where an option is just its label.
    lead: str = "the correct answer is"
    label: str = " {}"
    heading: str = "{}:"

    def extract(self, text: str, lower_case: bool = False) -> str:
        """Give the answer in a generated text, or "" where there is none.

        It is the first occurrence of any of the task's words, inside other words too; for a numeric task the last
        number. A text ends where the model starts another response. `lower_case`: turn it into lower case first, but
        for a task whose words are capitals: any "a" would be one of AQuA's answers.
        """
        text = text.split(RESPONSE)[0]
        if self.words:
            if lower_case and not self.words[0].isupper():
                text = text.lower()
            found = re.search("|".join(self.words), text)
            return found[0] if found else ""
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))  # without commas: 1,234 is one number
        return numbers[-1] if numbers else ""

    def is_right(self, prediction: str, answer: str) -> bool:
        """Tell whether a prediction, as `extract` gives it, is the gold answer; "" never is."""
        if not prediction:
            return False
        if self.words:
            return prediction == answer
        return abs(float(prediction) - float(answer)) <= TOLERANCE

    def labels(self, row: dict) -> dict[str, str]:
        """Map each answer that the row offers to its label, as the texts to learn write it after `lead`."""
        if not self.words:
            raise ValueError(f'{self.name}: its answers are numbers, there are no options to compare; use "generate"')
        offered = re.search(OFFERED, row["instruction"])
        words = offered[1].split("/") if offered else self.words
        return {word: self.label.format(word) for word in words}

    def texts(self, row: dict) -> dict[str, str]:
        """Map each answer that the row offers to its text, which the instruction lists."""
        words = list(self.labels(row))
        if not self.heading:
            return dict(zip(words, words, strict=True))
        headings = [self.heading.format(word.capitalize()) for word in words]
        listed = "".join(rf"{re.escape(heading)}\s*(\S.*?)\s*" for heading in headings)
        found = re.fullmatch(f".*{listed}", re.sub(OFFERED, "", row["instruction"]), re.DOTALL)
        if not found:
            raise ValueError(
                f"{self.name}: no text for each of {', '.join(headings)} in {row['instruction']!r}; "
                'compare labels instead, with "label_likelihood"'
            )
        return dict(zip(words, found.groups(), strict=True))


def _commonsense(name: str, *words: str, **more: str) -> Task:
    return Task(name, "commonsense", words, new_tokens=32, **more)


def _math(name: str, *words: str) -> Task:
    written = {"lead": "The answer is", "label": " ({})", "heading": "({})"}
    return Task(name, "math", words, new_tokens=256, **written)


_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))
TASKS = {
    task.name: task
    for task in (
        _commonsense("boolq", "true", "false", heading=""),
        _commonsense("piqa", "solution1", "solution2"),
        _commonsense("social_i_qa", *_ANSWERS),
        _commonsense("hellaswag", "ending1", "ending2", "ending3", "ending4"),
        _commonsense("winogrande", "option1", "option2"),
        _commonsense("ARC-Easy", *_ANSWERS),
        _commonsense("ARC-Challenge", *_ANSWERS),
        _commonsense("openbookqa", *_ANSWERS),
        _math("gsm8k"),
        _math("SingleEq"),
        _math("SVAMP"),
        _math("MultiArith"),
        _math("AddSub"),
        _math("AQuA", *"ABCDE"),
        _math("mawps"),
    )
}
GROUPS = {
    "commonsense": [name for name, task in TASKS.items() if task.folder == "commonsense"],
    "math": [name for name, task in TASKS.items() if task.folder == "math" and name != "mawps"],  # the paper's six
}


def choose(names: str) -> list[Task]:
    """Give the tasks named in a comma-separated list of tasks and of groups, each task once."""
    chosen = {}
    for name in filter(None, map(str.strip, names.split(","))):
        for member in GROUPS.get(name, [name]):
            if member not in TASKS:
                raise ValueError(f"no task is called {member!r}; there are {', '.join([*GROUPS, *TASKS])}")
            chosen[member] = TASKS[member]
    if not chosen:
        raise ValueError(f"no task is named in {names!r}; there are {', '.join([*GROUPS, *TASKS])}")
    return list(chosen.values())


def prompt(instruction: str) -> str:
    """Give the Alpaca prompt for an instruction without input; what follows it is the response.

    LLM-Adapters indents all but its first line by 16 blanks, by accident; here there are none.
    """
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction.strip()}\n\n{RESPONSE}\n"
    )


def read_rows(path: Path, needed: Iterable[str] = ("instruction", "output", "answer")) -> list[dict]:
    """Read the rows of a .jsonl file, or of a .json file that holds a list of them."""
    text = path.read_text(encoding="utf-8")
    is_list = path.suffix == ".json"
    try:
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: what it holds are no rows, each of them a JSON object with names and values")
    for number, row in enumerate(rows, start=1):
        if missing := set(needed) - row.keys():
            raise ValueError(f"{path}: row {number} has no {' and no '.join(sorted(missing))}; a row needs them all")
    return rows


def load_test_rows(task: Task, data: Path, trained_on: Iterable[str] = ()) -> tuple[list[dict], list[str]]:
    """Give the rows to test on, without those the model was trained on, and notes that belong beside the score.

    `trained_on` holds the training files, each as a path or by its name in the data folder. A test row goes if its
    question is also in one of them, whatever the spacing and punctuation: all rows of math_data_train are test rows
    too, and without them just those of the `*_test_not_in_math_data` files are left.
    """
    path = _first_file(
        f"test rows of {task.name}",
        data / task.folder / f"{task.name}_test.jsonl",
        data / task.folder / f"{task.name}_test_1k.jsonl",
        data / task.name / "test.json",  # as in LLM-Adapters' own `dataset` folder
    )
    rows, notes = read_rows(path), []
    if path.stem.endswith("_1k"):
        notes.append(f"a sample of {len(rows):,} rows, not the official test set")
    for name in trained_on:
        seen = _questions(name, data)
        kept = [row for row in rows if _question(row) not in seen]
        if len(kept) < len(rows):
            notes.append(f"{len(rows) - len(kept):,} of {len(rows):,} rows left out, they are in {name}")
        rows = kept
    if not rows:
        raise ValueError(f"{task.name}: none of its test rows is left ({'; '.join(notes)}); leave out the task")
    return rows, notes


@cache  # a training file can be large, and is asked for by every task
def _questions(name: str, data: Path) -> frozenset[str]:
    """Give the questions of a training file, named by its path or by its name in the data folder."""
    names = [data / folder / f"{name}.jsonl" for folder in ("commonsense", "math")]
    try:
        rows = read_rows(_first_file(f"training rows {name!r}", *names, Path(name)), needed=["instruction"])
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; name the model's training files with --trained_on, or say none") from error
    return frozenset(map(_question, rows))


def _question(row: dict) -> str:
    """Give an instruction's letters and digits: tests and training files differ in spacing and punctuation."""
    return re.sub(r"[\W_]+", "", row["instruction"].lower())


def _first_file(what: str, *paths: Path) -> Path:
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no file with the {what}: there is no {', no '.join(map(str, paths))}")


def training_data(folder: str | Path) -> list[str] | None:
    """Give the training files that a folder with weights names, or None where it names none."""
    path = Path(folder, TRAINING_DATA)
    return read_json(path).get("train") if path.is_file() else None


def training_data_of(model: str, revision: str | None = None) -> list[str] | None:
    """As `training_data`, of a folder or of a repository on the hub; None, too, where there is no network."""
    if Path(model).is_dir():
        return training_data(model)
    try:
        folder = Path(hf_hub_download(model, TRAINING_DATA, revision=revision)).parent
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    return training_data(folder)
