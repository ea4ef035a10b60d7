"""For two processes: the bank is an FSDP unit of its own, as accelerate's wrapping by size makes it. Raises where its
gradient is not that of one process with both batches."""

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from smt_peft import SMTConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4))
    config = SMTConfig(block_size=8, num_blocks=6, selection="random", init_weights=False)
    model = get_peft_model(base, config).train()
    bank = model.base_model.model.smt_bank["default"]
    batches = [torch.randint(0, 64, (2, 6)) for _ in range(2)]
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    (expected,) = torch.autograd.grad((losses[0] + losses[1]) / 2, bank.weight)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(bank, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = batches[dist.get_rank()]
    model(input_ids=own, labels=own).loss.backward()
    torch.testing.assert_close(bank.weight.grad.full_tensor(), expected)
    dist.barrier()  # or one of them could be talking to who has left
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
