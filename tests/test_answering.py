"""Tests of scripts/answering.py."""

import math

import pytest
import torch
from answering import PROTOCOLS, generate, mean_log_probs, most_likely
from tasks import TASKS, prompt
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
    for (context, text), value in zip(pairs, mean_log_probs(model, tokenizer, pairs), strict=True):
        alone = log_probs_one_by_one(model, tokenizer(context + text)["input_ids"])[-len(text) :]
        assert value == pytest.approx(sum(alone) / len(text), rel=1e-5)


@torch.no_grad()
def test_a_token_across_the_end_of_the_context_is_scored(tiny):
    model, tokenizer = tiny
    ids = tokenizer("abc")["input_ids"]
    assert len(ids) == 2
    assert mean_log_probs(model, tokenizer, [("ab", "c")]) == pytest.approx(log_probs_one_by_one(model, ids))


def test_overflow_is_an_error(tiny):
    model, tokenizer = tiny
    broken = LlamaForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, math.inf)
    with pytest.raises(ValueError, match="try --dtype float32"):
        mean_log_probs(broken, tokenizer, [("a", "b")])


ASKED = "{} ran.\n\nOption1: {} Option2: it rained all day. Answer format: option1/option2"


@pytest.mark.parametrize("by_label, lead, texts", [(True, "the correct answer is", " {word}"), (False, "", "{text}")])
@torch.no_grad()
def test_the_most_likely_option_is_that_with_the_highest_mean_log_probability(tiny, by_label, lead, texts):
    model, tokenizer = tiny
    rows = [{"instruction": ASKED.format(name, name)} for name in ("Ann", "Bartholomew", "Zoe B.")]
    given = most_likely(model, tokenizer, TASKS["winogrande"], rows, by_label)
    for row, one in zip(rows, given, strict=True):
        name = row["instruction"].split(" ran")[0]
        start = tokenizer(prompt(row["instruction"]) + lead)["input_ids"]
        expected = {}
        for word, text in (("option1", name), ("option2", "it rained all day.")):
            tokens = start + tokenizer(texts.format(word=word, text=text))["input_ids"]
            alone = log_probs_one_by_one(model, tokens)[len(start) - 1 :]
            expected[word] = sum(alone) / len(alone)
        assert one == {"prediction": max(expected, key=expected.get), "scores": pytest.approx(expected, rel=1e-5)}


def test_texts_are_compared_without_favour_to_short_ones(tiny):
    """The sum over tokens, unlike their mean, would always take the shorter text of two that are as likely."""
    model, tokenizer = tiny
    even = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(even.lm_head.weight)
    row = {"instruction": ASKED.format("Ann", "Ann")}
    [one] = most_likely(even, tokenizer, TASKS["winogrande"], [row], by_label=False)
    assert list(one["scores"].values()) == pytest.approx([-math.log(model.config.vocab_size)] * 2)


@torch.no_grad()
def test_generation_does_not_depend_on_the_batch(tiny):
    rows = [{"instruction": "x" * length} for length in (3, 30, 1, 12, 7)]
    how = {"protocol": PROTOCOLS["llm-adapters"], "num_beams": 4, "do_sample": False}
    together = generate(*tiny, TASKS["boolq"], rows, **how)
    assert together == [generate(*tiny, TASKS["boolq"], [row], **how)[0] for row in rows]
    assert all(answer["text"] for answer in together)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, start, length, penalty", [("llm-adapters", "", 32, 1.0), ("official", "<s> ", 256, 1.1)]
)
def test_a_protocol_sets_the_prompt_the_length_and_the_penalty_of_repetition(tiny, name, start, length, penalty):
    model, tokenizer = tiny
    tokens = [0, *tokenizer(" " + prompt("Say."))["input_ids"]] if start else tokenizer(prompt("Say."))["input_ids"]
    first = len(tokens)
    while len(tokens) < first + length and (len(tokens) == first or tokens[-1] != tokenizer.eos_token_id):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        seen = torch.tensor(sorted(set(tokens)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        tokens.append(int(logits.argmax()))
    how = {"protocol": PROTOCOLS[name], "num_beams": 1, "do_sample": False}
    [given] = generate(*tiny, TASKS["boolq"], [{"instruction": "Say."}], **how)
    assert given["text"] == tokenizer.decode(tokens[first:], skip_special_tokens=True)
