"""What a user loses on a bad day: nothing that was saved, and never silently."""

import random
import shutil

import pytest
import torch
from distributed_worker import LENGTH, STEPS, Cell, Samples, launch, make_base, make_trainer
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks

RANDOM = {"dropout": 0.1, "save_steps": 1, "resume": False}  # dropout: the random state must come back too
BACKENDS = ["ddp", "fsdp2", "zero3"]  # test_distributed.py resumes, by each backend, what ended well


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Give the outcomes of a training killed in a random step and resumed ("resumed"), of one that nothing interrupted
    ("whole"), and of an adapter with another budget that was to resume from the same checkpoint ("other")."""
    done = {}

    def kill(backend: str) -> list[dict]:
        if backend.startswith("zero"):
            pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed")
        if backend not in done:
            folder = tmp_path_factory.mktemp(backend)
            step = random.SystemRandom().randint(2, STEPS)
            died = launch(backend, {"killed": RANDOM | {"die_at": step}}, folder)
            assert died[0] == {}, "it survived"
            resumed = RANDOM | {"continue_from": "killed"}
            cells = {"whole": RANDOM, "resumed": resumed, "other": resumed | {"num_blocks": 18}}
            done[backend] = launch(backend, cells, folder)
        return done[backend]

    return kill


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(killed, backend):
    for rank in killed(backend):
        assert "error" not in rank["resumed"], rank["resumed"]["error"]
        assert torch.equal(rank["resumed"]["delta"], rank["whole"]["delta"])
        assert rank["resumed"]["losses"] == rank["whole"]["losses"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_refuses_a_checkpoint_with_another_budget(killed, backend):
    errors = [rank.get("other", {}).get("error", "") for rank in killed(backend)]
    if backend == "fsdp2":  # torch spreads the file over the ranks, and fails, before any hook of a module runs
        assert any("size of tensor" in error for error in errors), errors
    else:
        assert any("17 blocks" in error and "18" in error for error in errors), errors


def test_a_rank_that_dies_while_saving_leaves_nothing_that_resume_would_take(tmp_path):
    """The other rank; without the first, the checkpoint has no trainer_state.json, and Trainer refuses it."""
    launch("ddp", {"killed": RANDOM | {"die_at": 4, "die_on": 1, "die_where": "save"}}, tmp_path)
    assert (tmp_path / "killed" / "checkpoint-4").exists()
    ranks = launch("ddp", {"resumed": RANDOM | {"continue_from": "killed"}}, tmp_path)
    assert any("rng_state_1.pth" in rank.get("resumed", {}).get("error", "") for rank in ranks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Give a folder with `base` and a checkpoint of a finished training."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_base(folder / "base")
    make_trainer("single", folder / "base", Cell(), folder / "out").train()
    return folder


def resume(checkpoint, tmp_path, *, config=None):
    """Resume with another adapter."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=STEPS, report_to="none", disable_tqdm=True)
    base = LlamaForCausalLM.from_pretrained(checkpoint / "base")
    model = get_peft_model(base, config or smt())
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 64)
    trainer.add_callback(SMTWarmupCallback())
    taken = []
    trainer.training_step = lambda *args, **kwargs: taken.append(1)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint / "out" / f"checkpoint-{STEPS // 2}"))
    finally:
        assert not taken, "a step was taken"


def smt(**changes):
    return SMTConfig(**{"num_blocks": 17, "block_size": 16, "warmup_steps": 2} | changes)


def test_a_checkpoint_with_another_budget_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"17 blocks.*(\n.*)*18 blocks"):
        resume(checkpoint, tmp_path, config=smt(num_blocks=18))


def test_a_truncated_adapter_file_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "out" / f"checkpoint-{STEPS // 2}" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SafetensorError, match="incomplete metadata"):
        resume(tmp_path / "copy", tmp_path)


def test_resuming_the_right_checkpoint_takes_steps(checkpoint, tmp_path):
    with pytest.raises(AssertionError, match="a step was taken"):
        resume(checkpoint, tmp_path)


def batches(count=4):
    ids = Samples().ids.view(-1, 2, LENGTH)[:count]
    return [{"input_ids": i, "labels": i} for i in ids]


def adapted(folder, dtype=torch.float32):
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return get_peft_model(base, smt(warmup_steps=4))


def test_a_float16_warmup_lowers_a_loss_scale_that_overflows(checkpoint):
    data = batches(4)
    found = select_blocks(adapted(checkpoint, torch.float16), data, loss_scale=2.0**18, progress_bar=False)
    assert found.skipped == 0  # what overflowed was run again
    expected = select_blocks(adapted(checkpoint), data, progress_bar=False)
    for score, wanted in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(score, wanted, rtol=0.02, atol=1e-4)
