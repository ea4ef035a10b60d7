"""Every backend trains the adapter that one process trains: DDP, FSDP2, ZeRO-2 and ZeRO-3 on two CPU processes.

One process sees the same batches of two as two processes together (twice the accumulation, twice the warm-up), so that
scores, selection and delta must agree up to the order of summation.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import STEPS, Cell, launch, make_base, make_trainer, outcome, probe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

MATRIX = {
    f"{mode}-{n}": {"checkpointing": mode, "accumulation": n} for mode in ("none", "non-reentrant") for n in (1, 2)
}
REENTRANT = {f"reentrant-{n}": {"checkpointing": "reentrant", "accumulation": n} for n in (1, 2)}
SORTED = {"sorted": {"arrangement": "sorted", "scope": "input"}}
CELLS = {
    **MATRIX,
    **SORTED,
    "uneven": {"uneven_labels": True, "selection": "random", "accumulation": 2, "resume": False},
}
BF16 = {"bf16": {"bf16": True, "dropout": 0.1}}  # dropout: a random state that must come back, too
ACTIVATION = {"activation": {"selection": "activation", "checkpointing": "non-reentrant", "resume": False}}
BY_PART = {"by part": {"by_part": True, "resume": False}}
REFUSED = {"refused": {"checkpointing": "reentrant", "resume": False}}  # the last cell, for it fails
ONLY = {  # Trainer refuses bf16 with DeepSpeed where there is no GPU
    "single": BF16 | REENTRANT | ACTIVATION,
    "ddp": BF16 | REFUSED,
    "fsdp2": BF16
    | REENTRANT
    | ACTIVATION
    | {"sharded": {"sharded_checkpoints": True}, "ram-efficient": {"ram_efficient": True}},
    "zero2": BY_PART | REFUSED,
    "zero3": BY_PART | REFUSED,
}
BACKENDS = ["ddp", "fsdp2", "zero2", "zero3"]
EVERY = ["single", *BACKENDS]


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """Give what the cells of a backend ended with, one dict per rank; launched once."""
    done = {}

    def run(backend: str) -> list[dict]:
        if backend.startswith("zero"):
            pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed")
        if backend not in done:
            folder = tmp_path_factory.mktemp(backend)
            done[backend] = folder, launch(backend, CELLS | ONLY.get(backend, {}), folder)
        return done[backend]

    return run


def outcomes(ran, backend: str, cell: str) -> list[dict]:
    folder, ranks = ran(backend)
    for rank in ranks:
        failed = next((f"cell {name}: {found['error']}" for name, found in rank.items() if "error" in found), None)
        assert cell in rank, failed or f"a rank died; see {folder / 'log.txt'}"
        assert "error" not in rank[cell], failed
    return [rank[cell] for rank in ranks]


@pytest.mark.parametrize("cell", [*MATRIX, *SORTED])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_selection_is_that_of_one_process_on_every_rank(ran, backend, cell):
    (single,) = outcomes(ran, "single", cell)
    for rank in outcomes(ran, backend, cell):
        assert torch.equal(rank["index"], single["index"])
        for score, expected in zip(rank["scores"], single["scores"], strict=True):
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_score_of_a_batch_counts_what_every_rank_saw(ran, backend):
    (single,) = outcomes(ran, "single", "none-1")
    pairs = torch.tensor(single["batch_scores"]).view(-1, 2).sum(1).tolist()  # the ranks take turns
    for rank in outcomes(ran, backend, "none-1"):
        assert rank["batch_scores"] == pytest.approx(pairs, rel=1e-4)


@pytest.mark.parametrize("cell", [*MATRIX, *SORTED, "uneven"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_final_delta_is_that_of_one_process_on_every_rank(ran, backend, cell):
    (single,) = outcomes(ran, "single", cell)
    first, second = outcomes(ran, backend, cell)
    assert torch.equal(first["delta"], second["delta"])
    torch.testing.assert_close(first["delta"], single["delta"], rtol=1e-3, atol=2e-5)
    assert single["delta"].norm() > 1  # else the comparison would say nothing


@pytest.mark.parametrize("cell", [*MATRIX, *SORTED, "uneven"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reported_losses_are_those_of_one_process(ran, backend, cell):
    (single,) = outcomes(ran, "single", cell)
    assert len(single["losses"]) == STEPS
    assert outcomes(ran, backend, cell)[0]["losses"] == pytest.approx(single["losses"], rel=1e-4)


@pytest.mark.parametrize("cell", [*MATRIX, *SORTED])
@pytest.mark.parametrize("backend", EVERY)
def test_a_resumed_training_ends_exactly_as_the_uninterrupted_one(ran, backend, cell):
    for rank in outcomes(ran, backend, cell):
        assert torch.equal(rank["resumed"]["delta"], rank["delta"])
        assert torch.equal(rank["resumed"]["index"], rank["index"])
        assert rank["resumed"]["losses"] == rank["losses"]


def test_under_fsdp2_a_warm_up_without_a_backward_leaves_the_bank_trainable(ran):
    """Without a backward FSDP does not let go of the weights that it has gathered, frozen as they were then."""
    (single,) = outcomes(ran, "single", "activation")
    for rank in outcomes(ran, "fsdp2", "activation"):
        assert torch.equal(rank["index"], single["index"])
        torch.testing.assert_close(rank["delta"], single["delta"], rtol=1e-3, atol=2e-5)


def test_a_training_resumes_from_sharded_fsdp_checkpoints(ran):
    for rank in outcomes(ran, "fsdp2", "sharded"):
        assert torch.equal(rank["resumed"]["delta"], rank["delta"])


def test_a_training_with_sharded_fsdp_checkpoints_can_save_its_adapter(ran):
    rank = outcomes(ran, "fsdp2", "sharded")[0]
    saved = load_file(ran("fsdp2")[0] / "sharded" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.smt_bank.weight"], rank["delta"])


def test_under_fsdp2_weights_that_rank_0_hands_out_train_to_the_same_delta(ran):
    (single,) = outcomes(ran, "single", "none-1")
    for rank in outcomes(ran, "fsdp2", "ram-efficient"):
        assert torch.equal(rank["index"], single["index"])
        torch.testing.assert_close(rank["delta"], single["delta"], rtol=1e-3, atol=2e-5)
        assert torch.equal(rank["resumed"]["delta"], rank["delta"])


@pytest.mark.parametrize("cell", REENTRANT)
@pytest.mark.parametrize("backend", ["single", "fsdp2"])
def test_reentrant_checkpointing_changes_nothing_in_one_process_and_under_fsdp2(ran, backend, cell):
    for rank in outcomes(ran, backend, cell):
        plain = outcomes(ran, backend, f"none-{cell[-1]}")[0]
        torch.testing.assert_close(rank["delta"], plain["delta"], rtol=1e-4, atol=1e-6)
        assert torch.equal(rank["resumed"]["delta"], rank["delta"])


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_reentrant_checkpointing_is_refused_before_the_first_step_with_the_way_out(ran, backend):
    """One parameter that every segment uses: DDP and ZeRO would reduce it after the first."""
    folder, ranks = ran(backend)
    for rank in ranks:
        assert "use_reentrant" in rank["refused"]["error"] and "ValueError" in rank["refused"]["error"]
    assert not list(folder.glob("refused/checkpoint-*"))


@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_an_optimizer_without_the_deltas_is_refused_where_deepspeed_hides_it(ran, backend):
    for rank in outcomes(ran, backend, "by part"):
        assert "The optimizer does not have the deltas" in rank["refusal"]


@pytest.mark.parametrize("cell", ["non-reentrant-1", "non-reentrant-2"])
@pytest.mark.parametrize("backend", EVERY)
def test_gradient_checkpointing_changes_nothing(ran, backend, cell):
    plain = outcomes(ran, backend, f"none-{cell[-1]}")[0]
    torch.testing.assert_close(outcomes(ran, backend, cell)[0]["delta"], plain["delta"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cell", [*MATRIX, *SORTED])
@pytest.mark.parametrize("backend", EVERY)
def test_the_saved_adapter_loads_and_computes_what_was_trained(ran, backend, cell):
    rank = outcomes(ran, backend, cell)[0]
    folder = ran(backend)[0]
    saved = load_file(folder / cell / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.smt_bank.weight"], rank["delta"])
    base = LlamaForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, folder / cell / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=probe()).logits, rank["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_is_the_one_that_was_asked_for(ran, backend):
    types = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    for rank in outcomes(ran, backend, "none-1"):
        assert rank["distributed_type"] == types[backend]
        share = rank["local_base_elements"] / rank["base_elements"]
        assert share == pytest.approx(0.5 if backend in ("fsdp2", "zero3") else 1, abs=0.01)


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2"])
def test_under_bf16_autocast_delta_and_optimizer_state_stay_float32(ran, backend):
    for rank in outcomes(ran, backend, "bf16"):
        assert rank["delta_dtype"] == torch.float32
        assert rank["optimizer_dtypes"] == {torch.float32}


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2"])
def test_under_bf16_autocast_a_resumed_training_ends_exactly_as_the_uninterrupted_one(ran, backend):
    for rank in outcomes(ran, backend, "bf16"):
        assert torch.equal(rank["resumed"]["delta"], rank["delta"])


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_a_pure_bf16_model_trains_a_float32_delta(tmp_path, checkpointing):
    make_base(tmp_path / "base")
    trainer = make_trainer("single", tmp_path / "base", Cell(checkpointing), tmp_path, dtype=torch.bfloat16)
    trainer.train()
    found = outcome(trainer)
    assert found["delta_dtype"] == torch.float32
    assert found["optimizer_dtypes"] == {torch.float32}
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert found["delta"].norm() > 1


def test_a_bank_that_is_an_fsdp_unit_of_its_own_gets_the_gradient_of_all_ranks():
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*words, Path(__file__).with_name("own_fsdp_unit.py")], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
