"""The warm-up and the training with every kind of data that Trainer takes."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from distributed_worker import VOCABULARY, make_base
from peft import get_peft_model
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base(folder)
    return folder


def rows(count: int = 24, length: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


class Stream(TorchIterableDataset):
    """Rows one after the other, shared out among dataloader workers."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        yield from rows()[info.id :: info.num_workers] if info else rows()


def generated():
    yield from rows()


def adapted(base, **changes):
    model = LlamaForCausalLM.from_pretrained(base)
    return get_peft_model(model, SMTConfig(**{"num_blocks": 9, "block_size": 16, "warmup_steps": 3} | changes))


def run(base, tmp_path, data, model=None, warmup=True, steps=4, collator=None, **settings):
    """Train; returns the Trainer, its warm-up callback and the batches of the training."""
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=2, max_steps=steps, seed=5,
        report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **settings,
    )  # fmt: skip
    model = model or adapted(base, **({} if warmup else {"selection": "random"}))
    callback, batches, drawn = SMTWarmupCallback(), [], []
    callbacks = [callback] if warmup else []
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks, data_collator=collator)
    original = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].clone())
        drawn.append(torch.get_rng_state())
        return original(model, inputs, *args, **kwargs)

    trainer.training_step, trainer.random_states = training_step, drawn
    trainer.train()
    return trainer, callback, batches


KINDS = {
    "list": (lambda: rows(), {}),
    "datasets": (lambda: Dataset.from_list(rows()), {}),
    "torch-iterable": (lambda: Stream(), {}),
    "torch-iterable-workers": (lambda: Stream(), {"dataloader_num_workers": 2}),
    "streaming": (lambda: IterableDataset.from_generator(generated), {}),
    "streaming-shuffled": (lambda: IterableDataset.from_generator(generated).shuffle(seed=1, buffer_size=8), {}),
    "workers": (lambda: rows(), {"dataloader_num_workers": 2}),
    "persistent-workers": (lambda: rows(), {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "length-grouped": (lambda: rows(), {"train_sampling_strategy": "group_by_length"}),
    "sequential": (lambda: rows(), {"train_sampling_strategy": "sequential"}),
    "drop-last": (lambda: rows(23), {"dataloader_drop_last": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_batches_and_random_numbers_that_it_would_see_without_a_warmup(base, tmp_path, kind):
    data, settings = KINDS[kind]
    trainer, callback, with_warmup = run(base, tmp_path, data(), **settings)
    other, _, without = run(base, tmp_path, data(), warmup=False, **settings)
    assert [b.tolist() for b in with_warmup] == [b.tolist() for b in without]
    assert all(map(torch.equal, trainer.random_states, other.random_states)), "dropout, among others"
    assert callback.selection.batches == 3
    assert len(with_warmup) == trainer.state.global_step == 4
    assert trainer.model.base_model.model.smt_bank["default"].weight.abs().max() > 0


@pytest.mark.parametrize("kind", ["list", "torch-iterable"])
def test_batches_after_the_first_epoch_are_the_same_too(base, tmp_path, kind):
    data, settings = KINDS[kind]
    *_, with_warmup = run(base, tmp_path, data(), steps=26, **settings)
    *_, without = run(base, tmp_path, data(), steps=26, warmup=False, **settings)
    assert [b.tolist() for b in with_warmup] == [b.tolist() for b in without]


@pytest.mark.parametrize("kind", ["list", "torch-iterable", "streaming", "workers"])
def test_data_smaller_than_the_warmup_is_gone_through_again_and_said(base, tmp_path, kind):
    data, settings = KINDS[kind]
    model = adapted(base, warmup_steps=15)  # 24 rows are 12 batches
    with pytest.warns(UserWarning, match="12 batches.*warmup_steps=15"):
        _, callback, batches = run(base, tmp_path, data(), model=model, **settings)
    assert callback.selection.batches == 15
    *_, without = run(base, tmp_path, data(), warmup=False, **settings)
    assert [b.tolist() for b in batches] == [b.tolist() for b in without]


def test_data_exactly_as_large_as_the_warmup_is_not_warned_about(base, tmp_path, recwarn):
    run(base, tmp_path, rows(), model=adapted(base, warmup_steps=12))
    assert not [w for w in recwarn if "warmup_steps" in str(w.message)]


def test_length_grouped_batches_of_different_lengths(base, tmp_path):
    data = [{"input_ids": row["input_ids"][: 3 + i % 6]} for i, row in enumerate(rows())]

    def pad(samples):
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        return {"input_ids": padded, "labels": labels, "attention_mask": (labels >= 0).long()}

    _, callback, batches = run(base, tmp_path, data, collator=pad, train_sampling_strategy="group_by_length")
    assert callback.selection.batches == 3
    assert len({b.shape[1] for b in batches}) > 1


def test_a_generator_that_can_be_read_only_once_is_refused_with_the_reason(base):
    batches = ({k: torch.tensor([v]) for k, v in row.items()} for row in rows(2))
    with pytest.raises(ValueError, match="iterated only once"):
        select_blocks(adapted(base), batches, progress_bar=False)


def test_the_selection_does_not_depend_on_dataloader_workers(base, tmp_path):
    selections = [run(base, tmp_path, rows(), dataloader_num_workers=n)[1].selection.index for n in (0, 2)]
    assert torch.equal(*selections)
