"""How a model answers the rows of a task: in its own words, or by which option it finds most likely."""

from itertools import takewhile
from typing import Any, NamedTuple

import torch
from tasks import Task, prompt

SAMPLING = {"do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 40}


class Protocol(NamedTuple):
    """How a model is asked for its own words, and how an answer is found in them."""

    start: str = ""  # of the prompt
    new_tokens: int | None = None  # at most; None: the task's
    repetition_penalty: float = 1.0
    lower_case: bool = False  # see `Task.extract`


# What is not known of SMT's official code is LLM-Adapters': the rest of the prompt, the beams, sampling.
PROTOCOLS = {"llm-adapters": Protocol(), "official": Protocol("<s> ", 256, 1.1, lower_case=True)}


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    task: Task,
    rows: list[dict],
    protocol: Protocol,
    num_beams: int,
    do_sample: bool,
) -> list[dict]:
    """Let the model answer the rows in its own words, and find the answers in them."""
    prompts = [protocol.start + prompt(row["instruction"]) for row in rows]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=protocol.new_tokens or task.new_tokens,
        repetition_penalty=protocol.repetition_penalty,
        num_beams=num_beams,
        pad_token_id=tokenizer.pad_token_id,
        **(SAMPLING if do_sample else {"do_sample": False}),
    )
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [{"prediction": task.extract(text, protocol.lower_case), "text": text} for text in texts]


def most_likely(model: torch.nn.Module, tokenizer: Any, task: Task, rows: list[dict], by_label: bool) -> list[dict]:
    """Take for each row the option whose text, or whose label, is the most likely response to the prompt."""
    lead = task.lead if by_label else ""
    options = [task.labels(row) if by_label else task.texts(row) for row in rows]
    contexts = [prompt(row["instruction"]) + lead for row in rows]
    pairs = [(context, text) for context, few in zip(contexts, options, strict=True) for text in few.values()]
    values = iter(mean_log_probs(model, tokenizer, pairs))
    scores = [{word: next(values) for word in few} for few in options]
    return [{"prediction": max(few, key=few.get), "scores": few} for few in scores]


def mean_log_probs(model: torch.nn.Module, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """Give the mean log-probability per token of each pair's second text, after its first; all in one batch."""
    whole = tokenizer([context + text for context, text in pairs])["input_ids"]
    contexts = tokenizer([context for context, _ in pairs])["input_ids"]
    # Where a token spans the end of the context, it belongs to the text.
    starts = torch.tensor([_shared(*both) for both in zip(whole, contexts, strict=True)], device=model.device)
    padded = tokenizer.pad({"input_ids": whole}, padding_side="right", return_tensors="pt").to(model.device)
    tokens, mask = padded["input_ids"], padded["attention_mask"]
    # The logits before the shortest context's end are not needed; over a large vocabulary they would fill the memory.
    first, length = int(starts.min()), tokens.shape[1]
    logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=length - first + 1).logits[:, :-1]
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[:, first:, None]).squeeze(-1)
    scored = mask[:, first:].bool() & (torch.arange(first, length, device=model.device) >= starts[:, None])
    means = log_probs.where(scored, 0).sum(1) / scored.sum(1)
    if not means.isfinite().all():
        raise ValueError(f"a log-probability is {means.min():g}: the model overflows; try --dtype float32")
    return means.tolist()


def _shared(first: list[int], second: list[int]) -> int:
    """Count the tokens that two texts start with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def too_long(model: torch.nn.Module, tokenizer: Any, rows: list[dict], protocol: Protocol) -> list[str]:
    """Give a note if some prompts are longer than the texts the model was made for."""
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    prompts = [protocol.start + prompt(row["instruction"]) for row in rows]
    lengths = [len(tokens) for tokens in tokenizer(prompts)["input_ids"]]
    count = sum(length > context for length in lengths)
    return [f"{count:,} of its prompts are longer than the model's context of {context:,} tokens"] if count else []
