"""BlockMuon: against the singular value decomposition, torch.optim.Muon and AdamW; and inside a Trainer."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dense_truth import bank_of
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from smt_peft import SMTConfig, SMTWarmupCallback, select_blocks
from smt_peft.optimizers import ADAMW_RMS, BlockMuon, orthogonalize

STEPS, SIZE = 6, 16
RATE = 1e-2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, parameters, steps=STEPS, first=0, schedule=None) -> None:
    """Steps along random gradients, the same for every optimizer."""
    for step in range(first, first + steps):
        for position, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=1000 * position + step)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def bank(n: int = 3, size: int = SIZE) -> nn.Parameter:
    return nn.Parameter(random(n, size, size, seed=7))


def others() -> list[nn.Parameter]:
    """A classifier, a bias, and a convolution that is no bank."""
    return [nn.Parameter(random(*shape, seed=8)) for shape in ((5, 4), (4,), (2, 3, 4))]


# --- one matrix ------------------------------------------------------------------------------------------------------


def with_singular_values(values: torch.Tensor, blocks: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices of these singular values, and U V^T of them."""
    u, _, v = torch.linalg.svd(random(blocks, len(values), len(values)))
    return u * values @ v, u @ v


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_singular_values_become_about_one_and_singular_vectors_stay(size):
    matrices, exact = with_singular_values(torch.logspace(0, -1, size))  # largest is ten times the smallest
    found = torch.linalg.svdvals(orthogonalize(matrices))
    assert found.min() > 0.6 and found.max() < 1.3
    cosine = torch.cosine_similarity(orthogonalize(matrices).flatten(1), exact.flatten(1))
    assert (cosine > 0.97).all()


def test_twice_the_iterations_are_orthogonal_where_singular_values_are_far_apart():
    matrices, _ = with_singular_values(torch.logspace(0, -4, 16))
    few, many = (torch.linalg.svdvals(orthogonalize(matrices, steps)) for steps in (5, 10))
    assert few.min() < 0.3 and many.min() > 0.6


@pytest.mark.parametrize("scale", [1e-12, 1e10])
def test_only_the_direction_of_a_matrix_counts(scale):
    matrices = random(4, SIZE, SIZE)
    torch.testing.assert_close(orthogonalize(scale * matrices), orthogonalize(matrices), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_zero_matrix_stays_zero(dtype):
    """As of a block that gets no gradient in a step."""
    found = orthogonalize(torch.stack([torch.zeros(4, 4), 1e-4 * torch.eye(4)]).to(dtype))
    assert found.dtype == dtype and not found[0].any() and found[1].diagonal().min() > 0.5


def test_zero_matrices_stay_zero_beside_others():
    matrices = random(3, SIZE, SIZE)
    matrices[1] = 0
    found = orthogonalize(matrices)
    assert not found[1].any() and torch.equal(found[[0, 2]], orthogonalize(matrices[[0, 2]]))


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_muon(monkeypatch):
    """torch.optim.Muon without its rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    return partial(torch.optim.Muon, momentum=0.9, adjust_lr_fn="match_rms_adamw")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_block_moves_as_a_matrix_under_torchs_muon(exact_muon, weight_decay):
    blocks = bank()
    matrices = [nn.Parameter(block.detach().clone()) for block in blocks]
    ours = BlockMuon([blocks], lr=RATE, momentum=0.9, weight_decay=weight_decay)
    theirs = exact_muon(matrices, lr=RATE, weight_decay=weight_decay)
    for step in range(STEPS):
        blocks.grad = random(*blocks.shape, seed=step)
        for matrix, gradient in zip(matrices, blocks.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step(), theirs.step()
    moved = blocks - random(*blocks.shape, seed=7)
    torch.testing.assert_close(blocks, torch.stack(matrices), rtol=0, atol=1e-4 * moved.std().item())


def test_a_step_is_about_as_large_as_adamws():
    blocks = bank(50)
    before = blocks.detach().clone()
    train(BlockMuon([blocks], lr=RATE), [blocks], steps=1)
    rms = (blocks.detach() - before).square().mean().sqrt().item()
    assert rms == pytest.approx(RATE * ADAMW_RMS, rel=0.2)  # singular values are not quite 1


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-5}], ids=str)
def test_what_is_no_bank_moves_as_under_adamw(options):
    ours, theirs = others(), others()
    train(BlockMuon([bank(), *ours], lr=RATE, **options), ours)
    train(torch.optim.AdamW(theirs, lr=RATE, **{"weight_decay": 0.0, **options}), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_large_bank_moves_as_its_parts(monkeypatch):
    whole, parts = bank(7), bank(7)
    train(BlockMuon([whole]), [whole])
    monkeypatch.setattr("smt_peft.optimizers.CHUNK", 2 * SIZE**2)
    train(BlockMuon([parts]), [parts])
    torch.testing.assert_close(parts, whole)


def test_a_zero_gradient_leaves_zero_deltas_and_no_gradient_leaves_all():
    zero, without = nn.Parameter(torch.zeros(2, SIZE, SIZE)), bank()
    before = without.detach().clone()
    optimizer = BlockMuon([zero, without], weight_decay=0.1)
    zero.grad = torch.zeros_like(zero)
    optimizer.step()
    assert not zero.any() and torch.equal(without, before) and without not in optimizer.state


def test_a_step_leaves_the_gradients_as_they_are():
    parameters = [bank(), *others()]
    train(BlockMuon(parameters), parameters, steps=1)
    for position, parameter in enumerate(parameters):
        assert torch.equal(parameter.grad, random(*parameter.shape, seed=1000 * position))


def test_groups_have_options_of_their_own():
    slow, fast = bank(), bank()
    before = slow.detach().clone()
    train(BlockMuon([{"params": [slow], "lr": RATE}, {"params": [fast], "lr": 2 * RATE}]), [slow, fast], steps=1)
    slow.grad = fast.grad
    alike = bank()
    alike.grad = slow.grad
    BlockMuon([alike], lr=2 * RATE).step()
    assert torch.equal(alike, fast) and not torch.equal(slow - before, fast - before)


def test_the_state_is_one_float32_per_value_of_the_bank():
    blocks = bank()
    optimizer = BlockMuon([blocks])
    train(optimizer, [blocks])
    [state] = optimizer.state[blocks].values()
    assert state.shape == blocks.shape and state.dtype == torch.float32


def test_a_run_resumes_bit_for_bit_from_its_state_dict(tmp_path):
    whole, halves = [bank(), *others()], [bank(), *others()]
    train(BlockMuon(whole, lr=RATE), whole, steps=6)
    first = BlockMuon(halves, lr=RATE)
    train(first, halves, steps=3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = BlockMuon(halves, lr=1.0)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(second, halves, steps=3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_a_scheduler_sets_the_learning_rate():
    constant, falling = bank(), bank()
    train(BlockMuon([constant], lr=RATE), [constant], steps=1)
    optimizer = BlockMuon([falling], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 1))
    train(optimizer, [falling], steps=3, schedule=schedule)
    assert torch.equal(falling, constant), "with a rate of zero after the first step nothing moves"


def test_the_hooks_of_a_step_run_once_even_where_an_adamw_was_made_before():
    torch.optim.AdamW(others())
    parameters, calls = [bank(), *others()], []
    optimizer = BlockMuon(parameters)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(optimizer, parameters, steps=1)
    assert len(calls) == 1


def test_a_closure_is_called_once_with_gradients_enabled():
    blocks = bank()
    optimizer, calls = BlockMuon([blocks]), []

    def closure():
        optimizer.zero_grad()
        loss = blocks.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    before = blocks.detach().clone()
    assert optimizer.step(closure) is calls[0] and len(calls) == 1 and not torch.equal(blocks, before)


@pytest.mark.parametrize("broken", [False, True])
def test_a_gradient_scaler_unscales_and_leaves_a_step_with_infinities_out(broken):
    scaled, plain = bank(), bank()
    before = scaled.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = BlockMuon([scaled])
    scaler.scale((scaled * random(*scaled.shape)).sum()).backward()
    if broken:
        scaled.grad[0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    plain.grad = random(*plain.shape)
    BlockMuon([plain]).step()
    assert torch.equal(scaled, before if broken else plain)


def test_without_a_bank_it_refuses():
    with pytest.raises(ValueError, match=r"no parameter of shape.*ZeRO"):
        BlockMuon(others())


def test_a_bank_that_was_flattened_later_is_refused():
    blocks = bank()
    optimizer = BlockMuon([blocks])
    optimizer.param_groups[0]["params"] = [nn.Parameter(blocks.detach().flatten())]  # as DeepSpeed ZeRO-2 does
    with pytest.raises(ValueError, match="ZeRO"):
        optimizer.step()


# --- with a model ----------------------------------------------------------------------------------------------------


class Sentences(Dataset):
    tokens = torch.randint(2, 64, (16, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


@pytest.fixture
def make_trainer(llama, tmp_path):
    def make(lr: float = 3e-2, **options) -> Trainer:
        defaults = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1.0}  # of no effect
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "save_steps": 3}
        args = TrainingArguments(str(tmp_path / "run"), **{**defaults, **quiet, **options})
        smt = SMTConfig(block_size=SIZE, num_blocks=12, warmup_steps=2, modules_to_save=["lm_head"])
        model, muon = get_peft_model(copy.deepcopy(llama), smt), (BlockMuon, {"lr": lr})
        return Trainer(model, args, None, Sentences(), callbacks=[SMTWarmupCallback()], optimizer_cls_and_kwargs=muon)

    return make


def optimizer_of(trainer: Trainer) -> BlockMuon:
    optimizer = trainer.optimizer.optimizer  # accelerate's is around it
    assert isinstance(optimizer, BlockMuon)
    return optimizer


def test_a_trainer_trains_the_bank_and_the_head_with_it(make_trainer):
    trainer = make_trainer(lr_scheduler_type="constant", logging_steps=1)
    trainer.train()
    bank, states = bank_of(trainer.model), optimizer_of(trainer).state
    assert set(states[bank.weight]) == {"momentum_buffer"}
    assert [set(state) for parameter, state in states.items() if parameter is not bank.weight] == [
        {"step", "exp_avg", "exp_avg_sq"}
    ]
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry} == {3e-2}
    assert bank.weight.abs().amax((1, 2)).gt(0).all(), "every selected block has moved"


def test_a_resumed_trainer_ends_exactly_as_the_uninterrupted_one(make_trainer, tmp_path):
    whole, first, second = (make_trainer(save_strategy=when) for when in ("no", "steps", "no"))
    whole.train()
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for one, other in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_in_a_trainer_the_weight_decay_of_its_arguments_counts_for_the_bank(make_trainer):
    trainer = make_trainer(weight_decay=0.1)
    trainer.create_optimizer()
    [decay] = {
        group["weight_decay"]
        for group in trainer.optimizer.param_groups
        if any(parameter is bank_of(trainer.model).weight for parameter in group["params"])
    }
    assert decay == 0.1


def test_the_next_forward_sees_its_step(llama, batches):
    model = get_peft_model(llama, SMTConfig(block_size=SIZE, num_blocks=12, warmup_steps=2))
    select_blocks(model, batches, progress_bar=False)
    weight = bank_of(model).weight
    optimizer, version = BlockMuon([weight]), weight._version
    model.train()(**batches[0]).loss.backward()
    optimizer.step()
    assert weight._version > version
    after = model(**batches[0]).loss
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(after, merged(**batches[0]).loss)
    with model.disable_adapter():
        assert abs(after - model(**batches[0]).loss) > 1e-3


# --- sharded ---------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A bank and a head beside it."""

    def __init__(self, blocks: int):
        super().__init__()
        self.bank, self.head = bank(blocks), nn.Parameter(random(5, 4))


def run_sharded(rank: int, folder, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for blocks in sizes:
        model = fully_shard(Holder(blocks), mesh=mesh)
        parameters = list(model.parameters())
        optimizer = BlockMuon(parameters, lr=RATE, weight_decay=0.1)
        for step in range(STEPS):
            for position, parameter in enumerate(parameters):
                full = random(*parameter.shape, seed=1000 * position + step)
                parameter.grad = distribute_tensor(full, mesh, [Shard(0)])
            optimizer.step()
        momentum = optimizer.state[parameters[0]]["momentum_buffer"]
        assert isinstance(momentum, DTensor) and momentum.to_local().shape == parameters[0].to_local().shape
        found[blocks] = [parameter.full_tensor().detach() for parameter in parameters]
    inside = nn.Parameter(distribute_tensor(random(2, SIZE, SIZE), mesh, [Shard(1)]))
    inside.grad = torch.zeros_like(inside)
    try:
        BlockMuon([inside]).step()
    except ValueError as error:
        found["inside"] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_a_bank_that_fsdp_shards_between_blocks_moves_as_a_whole_one(tmp_path):
    sizes = [4, 3, 1]  # the last leaves a process without blocks
    mp.spawn(run_sharded, (tmp_path, sizes), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for blocks in sizes:
            whole = Holder(blocks)
            train(BlockMuon(whole.parameters(), lr=RATE, weight_decay=0.1), list(whole.parameters()))
            for parameter, expected in zip(found[blocks], whole.parameters(), strict=True):
                torch.testing.assert_close(parameter, expected.detach())
        assert "shard dimension 0" in found["inside"]
