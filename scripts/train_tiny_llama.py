"""Train the tiny LLaMA of this repository, and its tokenizer, on the documentation of Python's standard library.

    python scripts/train_tiny_llama.py --output scripts/tiny_llama

writes the folder with which the quickstart runs without a download. One CPU core needs about half an hour.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from platform import machine, python_version, system

import torch
import transformers
from command_line import read_options
from stdlib_text import documentation, source_code
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

README = """\
# Tiny LLaMA

A LLaMA of {parameters:,} parameters and its tokenizer, for demonstrations and tests only: it was trained on the
{corpora} of Python's standard library, writes what looks like that, and knows nothing. Made by

    python scripts/train_tiny_llama.py {options}

- training data: {bytes[train]:,} bytes, {tokens[train]:,} tokens
- held-out data, from other modules: {bytes[test]:,} bytes, {tokens[test]:,} tokens
- CPU time: {minutes:.0f} minutes, {speed:,.0f} tokens/s, on {machine}

| step | training loss | held-out loss |
|---:|---:|---:|
{losses}

Losses are means per token, in nats; the training loss is over the steps since the row above, with dropout. The texts
come from `scripts/stdlib_text.py`; they are the Python Software Foundation's, under the PSF License Agreement.
"""


@dataclass
class Settings:
    output: Path = HfArg(help="folder to write")
    steps: int = HfArg(default=2400, help="optimizer steps")
    warmup_steps: int = HfArg(default=100, help="steps until the learning rate is at its highest")
    batch_size: int = HfArg(default=16, help="sequences per step")
    length: int = HfArg(default=256, help="tokens per sequence")
    learning_rate: float = HfArg(default=3e-3, help="highest learning rate")
    weight_decay: float = HfArg(default=0.3, help="AdamW's weight decay")
    dropout: float = HfArg(default=0.15, help="of what the embedding and each layer add to the residual")
    source_code: bool = HfArg(default=False, help="learn Python's source code, too")
    hidden_size: int = HfArg(default=192, help="a multiple of 192; 768 and 12 layers: 79 million values")
    layers: int = HfArg(default=4, help="decoder layers")
    device: str = HfArg(default="cpu", help="cpu or cuda")
    threads: int = HfArg(default=1, help="CPU threads")
    bfloat16: bool = HfArg(default=False, help="autocast; faster where the processor has it")
    seed: int = HfArg(default=0, help="of the initial weights, the order of the data and the dropout")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that starts every text with `<s>`, as LLaMA's does."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that no text needs an "unknown" token
    trainer = trainers.BpeTrainer(vocab_size=1536, special_tokens=[*special.values()], initial_alphabet=alphabet)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **special)


def new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """Give an untrained model; with hidden size 192 and 4 layers its float32 weights take less than 8 MB."""
    shape = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 8 // 3, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden_size // 32, "num_key_value_heads": hidden_size // 64}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **shape, **heads, **special
    )
    return LlamaForCausalLM(config)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Join the texts into one row of tokens, each text between `<s>` and `</s>`."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for text in encoded for token in (*text, tokenizer.eos_token_id)])


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop parts of what is added to the residual stream, or the model would soon know so small a text by heart."""
    blocks = [block for layer in model.model.layers for block in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for block in (model.model.embed_tokens, *blocks):
        block.register_forward_hook(lambda block, _, out: torch.dropout(out, probability, block.training))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, sequences: torch.Tensor) -> float:
    """Give the mean loss per token."""
    rows = sequences.to(model.device)
    return sum(model.eval()(input_ids=x, labels=x).loss.item() * len(x) for x in rows.split(16)) / len(rows)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, test: torch.Tensor, options: Settings) -> list[tuple]:
    """Train on sequences that start anywhere in `tokens`; give ten rows of (step, training loss, held-out loss)."""
    test = test[: len(test) // options.length * options.length].view(-1, options.length)
    adamw = {"betas": (0.9, 0.95), "weight_decay": options.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, **adamw)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.bfloat16)
    rows, losses = [], []
    for step in (progress := tqdm(range(1, options.steps + 1), unit="step")):
        starts = torch.randint(len(tokens) - options.length + 1, (options.batch_size,))
        batch = torch.stack([tokens[start : start + options.length] for start in starts]).to(model.device)
        with autocast:
            loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step * 10 // options.steps > len(rows):
            with autocast:
                rows.append((step, sum(losses) / len(losses), evaluate(model, test)))
            losses.clear()
            progress.set_postfix_str("training loss {1:.3f}, held-out loss {2:.3f}".format(*rows[-1]))
    return rows


def main(options: Settings) -> None:
    options.output.mkdir(parents=True, exist_ok=True)  # fails now, if it must
    torch.set_num_threads(options.threads)
    transformers.set_seed(options.seed)
    corpora = (documentation, source_code) if options.source_code else (documentation,)
    texts = {split: [text for corpus in corpora for text in corpus(split)] for split in ("train", "test")}
    tokenizer = train_tokenizer(texts["train"])
    tokens = {split: pack(texts[split], tokenizer) for split in texts}
    model = new_model(tokenizer, options.hidden_size, options.layers).to(options.device)
    add_dropout(model, options.dropout)
    start = time.process_time()
    rows = train(model, tokens["train"], tokens["test"], options)
    seconds = time.process_time() - start
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    readme = README.format(
        parameters=model.num_parameters(),
        corpora=" and the ".join(corpus.__name__.replace("_", " ") for corpus in corpora),
        options=" ".join(f"--{name} {value}" for name, value in vars(options).items()),
        bytes={split: sum(len(text.encode()) for text in texts[split]) for split in texts},
        tokens={split: len(tokens[split]) for split in tokens},
        minutes=seconds / 60,
        speed=options.steps * options.batch_size * options.length / seconds,
        machine=f"a {options.device} ({system()} {machine()}), Python {python_version()}, PyTorch {torch.__version__}",
        losses="\n".join("| {:,} | {:.3f} | {:.3f} |".format(*row) for row in rows),
    )
    (options.output / "README.md").write_text(readme)


if __name__ == "__main__":
    main(*read_options(sys.argv[1:], Settings))
