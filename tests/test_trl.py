"""TRL's trainers with `peft_config=SMTConfig(...)` and the warm-up callback: real trainings of a tiny random model."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from dense_truth import bank_of
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks

trl = pytest.importorskip("trl")

WORDS = [f"w{i}" for i in range(40)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}user {{ message['content'] }} "
    "{% else %}assistant {% generation %}{{ message['content'] }} </s> {% endgeneration %}{% endif %}{% endfor %}"
)
NUM_BLOCKS, SIZE, BATCH = 6, 8, 4


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT_TEMPLATE, **special)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def config(warmup_steps: int = 1) -> SMTConfig:
    return SMTConfig(num_blocks=NUM_BLOCKS, block_size=SIZE, warmup_steps=warmup_steps, task_type="CAUSAL_LM")


def text(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(count))


def settings(folder, **changes) -> dict:
    """Three steps over the same batch of four, every loss logged."""
    fixed = {"max_steps": 3, "per_device_train_batch_size": BATCH, "learning_rate": 0.01, "logging_steps": 1}
    return fixed | {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": []} | changes


def logged(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


PLAIN = [{"text": text(i, 5 + i)} for i in range(BATCH)]
COMPLETIONS = [{"prompt": text(i, 4), "completion": " " + text(i + 9, 3)} for i in range(BATCH)]
CHATS = [
    {"messages": [{"role": "user", "content": text(i, 4)}, {"role": "assistant", "content": text(i + 9, 3)}]}
    for i in range(BATCH)
]
SFT_KINDS = {
    "every token": (PLAIN, {}),
    "packing": (PLAIN * 4, {"packing": True, "max_length": 24, "packing_strategy": "wrapped"}),
    "completion-only": (COMPLETIONS, {"completion_only_loss": True}),
    "assistant-only": (CHATS, {"assistant_only_loss": True}),
}


@pytest.fixture(scope="module", params=SFT_KINDS)
def sft(request, tokenizer, tmp_path_factory):
    """A finished SFT training; `first_batch` is what its dataloader gives."""
    rows, changes = SFT_KINDS[request.param]
    arguments = trl.SFTConfig(**settings(tmp_path_factory.mktemp("sft"), save_steps=3, **changes))
    callback = SMTWarmupCallback()
    trainer = trl.SFTTrainer(
        tiny_model(),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config(),
        callbacks=[callback],
    )
    trainer.first_batch = next(iter(trainer.get_train_dataloader()))
    trainer.warmup = callback
    trainer.train()
    return trainer


def test_sft_warms_up_on_the_tokens_it_trains_on(sft):
    model = tiny_model()
    model(**{key: value for key, value in sft.first_batch.items() if isinstance(value, torch.Tensor)}).loss.backward()
    for name, scores in zip(sft.warmup.selection.names, sft.warmup.selection.scores, strict=True):
        gradient = model.get_submodule(name).weight.grad
        expected = gradient.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).abs().mean((2, 3))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-8)


def test_sft_lowers_its_loss(sft):
    assert logged(sft)[-1] < logged(sft)[0]


def test_sft_trains_nothing_but_the_bank(sft):
    assert [name for name, p in sft.model.named_parameters() if p.requires_grad] == [
        "base_model.model.smt_bank.default.weight"
    ]


def test_sft_saves_a_checkpoint_that_loads_into_the_same_logits(sft):
    loaded = PeftModel.from_pretrained(tiny_model(), f"{sft.args.output_dir}/checkpoint-3").eval()
    tokens = sft.first_batch["input_ids"][:1]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, sft.model.eval()(tokens).logits, rtol=0, atol=0)


def test_the_warm_up_leaves_no_trace_in_the_logged_token_count(sft):
    labelled = sft.first_batch.get("attention_mask", torch.ones_like(sft.first_batch["input_ids"]))
    assert logged(sft, "num_tokens")[0] == labelled.sum()


# --- preference training ---------------------------------------------------------------------------------------------

PREFERENCES = [
    {"prompt": text(i, 4), "chosen": " " + text(i + 9, 3), "rejected": " " + text(i + 20, 5)} for i in range(4)
]
JUDGED = [{"prompt": text(i, 4), "completion": " " + text(i + 9, 3), "label": i % 2 == 0} for i in range(4)]


@pytest.fixture(scope="module")
def fine_tuned(tokenizer) -> PeftModel:
    """A model whose adapter was trained before: its deltas are not zero."""
    model = get_peft_model(tiny_model(), config())
    rows = tokenizer([row["text"] for row in PLAIN], padding=True, return_tensors="pt")
    select_blocks(model, [{"input_ids": rows["input_ids"], "labels": rows["input_ids"]}], progress_bar=False)
    torch.nn.init.normal_(bank_of(model).weight.data, std=0.1)
    return model


def dpo(model, tokenizer, folder, **changes):
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings(folder)),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
        callbacks=[SMTWarmupCallback()],
        **changes,
    )


def test_dpo_against_the_disabled_adapter_lowers_its_loss(tokenizer, tmp_path):
    trainer = dpo(tiny_model(), tokenizer, tmp_path, peft_config=config())
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_dpo_trains_the_trained_adapter_and_keeps_its_reference(fine_tuned, tokenizer, tmp_path):
    trainer = dpo(copy.deepcopy(fine_tuned), tokenizer, tmp_path)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    before = bank_of(fine_tuned).weight
    assert torch.equal(bank_of(trainer.model, "ref").weight, before)
    assert torch.equal(bank_of(trainer.model, "ref").index, bank_of(fine_tuned).index)
    assert not torch.equal(bank_of(trainer.model).weight, before)


def test_dpo_gives_the_gradient_of_a_dense_reference_pair(fine_tuned, tokenizer, tmp_path):
    """The first step's block gradients equal those of a dense policy against a dense reference model."""
    trainer = dpo(copy.deepcopy(fine_tuned), tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()

    dense = trl.DPOTrainer(
        copy.deepcopy(fine_tuned).merge_and_unload(),
        ref_model=copy.deepcopy(fine_tuned).merge_and_unload(),
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )
    dense.model.requires_grad_(True).train()
    dense.compute_loss(dense.model, batch).backward()
    bank = bank_of(trainer.model)
    for slot, (target, row, col) in enumerate(bank.index.tolist()):
        gradient = dense.model.get_submodule(bank.targets[target].name).weight.grad
        block = gradient.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE)[row, col]
        torch.testing.assert_close(bank.weight.grad[slot], block, rtol=1e-4, atol=1e-7)


def test_kto_against_the_disabled_adapter_starts_at_one_half(tokenizer, tmp_path):
    trainer = trl.KTOTrainer(
        tiny_model(),
        args=trl.KTOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(JUDGED),
        processing_class=tokenizer,
        peft_config=config(),
        callbacks=[SMTWarmupCallback()],
    )
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(0.5, abs=1e-4)
    assert bank_of(trainer.model).weight.count_nonzero()


def distinct_words(completions: list[str], **_) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def test_grpo_warms_up_on_its_own_generations_and_trains(tokenizer, tmp_path):
    callback = SMTWarmupCallback()
    trainer = trl.GRPOTrainer(
        tiny_model(),
        reward_funcs=distinct_words,
        args=trl.GRPOConfig(**settings(tmp_path), num_generations=4, max_completion_length=6, beta=0.1),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
        processing_class=tokenizer,
        peft_config=config(warmup_steps=2),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.selection.batches == 2
    assert bank_of(trainer.model).weight.count_nonzero()


def test_the_warm_up_generates_as_seldom_as_training_does(tokenizer, tmp_path):
    calls = []

    def counted(completions: list[str], **_) -> list[float]:
        calls.append(len(completions))
        return distinct_words(completions)

    options = {"max_steps": 1, "gradient_accumulation_steps": 4, "num_generations": 4, "max_completion_length": 6}
    trainer = trl.GRPOTrainer(
        tiny_model(),
        reward_funcs=counted,
        args=trl.GRPOConfig(**settings(tmp_path, **options)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
        processing_class=tokenizer,
        peft_config=config(warmup_steps=8),
        callbacks=[SMTWarmupCallback()],
    )
    trainer.train()
    assert len(calls) == 2 + 1, "8 batches of the warm-up are two rounds of 4, the step is one"


def test_activations_are_offloaded_in_the_warm_up_as_in_training(tokenizer, tmp_path):
    trainer = trl.SFTTrainer(
        tiny_model(),
        trl.SFTConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(PLAIN),
        processing_class=tokenizer,
        peft_config=config(warmup_steps=2),
        callbacks=[SMTWarmupCallback()],
    )
    entered = []

    class Counted(nullcontext):
        def __enter__(self):
            entered.append(1)

    trainer.maybe_activation_offload_context = Counted()
    trainer.train()
    assert len(entered) == 2 + 3, "batches of the warm-up, then steps"


def test_deltas_that_trl_casts_on_a_quantised_base_are_told_of_and_can_be_float32_again(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path / "base")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=int8, device_map="cpu")

    def trained(restored: bool) -> torch.dtype:
        trainer = trl.SFTTrainer(
            copy.deepcopy(base),
            trl.SFTConfig(**settings(tmp_path / "out", max_steps=1, save_strategy="no")),
            train_dataset=Dataset.from_list(PLAIN),
            processing_class=tokenizer,
            peft_config=config(),
            callbacks=[SMTWarmupCallback()],
        )
        if restored:
            trainer.model.get_base_model().smt_bank.float()
        trainer.train()
        bank = bank_of(trainer.model)
        assert bank.weight.any() and bank.index.dtype == torch.int32
        return bank.weight.dtype

    with pytest.warns(UserWarning, match="'default' are bfloat16, .*TRL casts them"):
        assert trained(restored=False) == torch.bfloat16
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*TRL casts them")
        assert trained(restored=True) == torch.float32
