"""One training script for every launcher: trains the cells of a backend and writes what each rank ended with.

    torchrun --nproc-per-node 2 tests/distributed_worker.py ddp results
    accelerate launch --config_file configs/accelerate/zero3.yaml ... tests/distributed_worker.py zero3 results

`results` holds the base model in `base` and {cell name: fields of Cell} in `cells.json`. Rank r writes `rank<r>.pt`:
{cell name: outcome}, with the text of the exception under "error" where a cell failed; none follows it. `launch` does
it all.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from smt_peft import SMTConfig, SMTMonitorCallback, SMTWarmupCallback

VOCABULARY, LENGTH, STEPS = 128, 12, 6


@dataclass
class Cell:
    """One training: `accumulation` counts batches of 2 per rank; both worlds see the same global batches."""

    checkpointing: str = "none"  # or "non-reentrant", "reentrant"
    accumulation: int = 1
    uneven_labels: bool = False  # a different number of labels in every sample
    selection: str = "gradient"
    arrangement: str = "tiles"
    scope: str = "model"
    dropout: float = 0.0
    resume: bool = True  # train a second time from the checkpoint in the middle
    die_at: int = 0  # SIGKILL `die_on` in this step ...
    die_on: int = 0
    die_where: str = "step"  # ... after its backward; "save": while the step's checkpoint is written
    save_steps: int = STEPS // 2
    continue_from: str = ""  # resume from the last checkpoint of this cell
    num_blocks: int = 17
    sharded_checkpoints: bool = False  # FSDP2: a file per rank
    ram_efficient: bool = False  # FSDP2: rank 0 hands the weights out
    bf16: bool = False
    by_part: bool = False  # the optimizer has the parameters of the layers, and not the bank


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[:2]:  # else the first layer's gradients win every block
        layer.self_attn.o_proj.weight.data *= 0.1
    model.save_pretrained(folder)


class Samples(Dataset):
    """Sixty-four random sentences."""

    def __init__(self, uneven_labels: bool = False):
        self.ids = torch.randint(0, VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(1))
        self.uneven_labels = uneven_labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        labels = self.ids[i].clone()
        if self.uneven_labels:
            labels[: i % 9] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def probe() -> torch.Tensor:
    """The input whose logits are compared."""
    return torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY


def launch(backend: str, cells: dict[str, dict], results: Path, timeout: int = 300) -> list[dict]:
    """Run the cells of a backend as a user would start them; returns each rank's outcomes, empty where it died."""
    results.mkdir(parents=True, exist_ok=True)
    if not (results / "base").exists():
        make_base(results / "base")
    (results / "cells.json").write_text(json.dumps(cells))
    for old in results.glob("rank*.pt"):
        old.unlink()
    python = [sys.executable, "-m"]
    if backend == "single":
        command = [sys.executable]
    elif backend == "ddp":
        command = [*python, "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port())]
    else:
        config = Path(__file__).parents[1] / "configs" / "accelerate" / f"{backend}.yaml"
        command = [*python, "accelerate.commands.launch", "--config_file", str(config), "--mixed_precision", "no"]
        command += ["--num_processes", "2", "--main_process_port", str(_free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with open(results / "log.txt", "w") as log:
        running = subprocess.Popen(
            [*command, __file__, backend, str(results)], env=environment, stdout=log, stderr=log
        )
        try:
            running.wait(timeout)
        finally:
            running.terminate()  # the launcher ends its workers, which a kill would leave behind
    files = [results / f"rank{rank}.pt" for rank in range(1 if backend == "single" else 2)]
    return [torch.load(file, weights_only=False) if file.exists() else {} for file in files]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class DieInStep(TrainerCallback):
    """SIGKILL this process as a power cut would: no exit handler runs."""

    def __init__(self, cell: Cell):
        self.cell = cell

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.cell.die_at and args.process_index == self.cell.die_on:
            os.kill(os.getpid(), signal.SIGKILL)


class CrashingTrainer(Trainer):
    """Dies where a checkpoint is half written: after the adapter, before the optimizer and the Trainer's state."""

    die_at, die_on = 0, 0

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == self.die_at and self.args.process_index == self.die_on:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


def keep_fsdp_on_cpu() -> None:
    """accelerate takes FSDP for GPUs only and silently gives DDP on CPU; make it believe."""
    original = accelerate_state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate_state.AcceleratorState.__init__ = init


def keep_deepspeed_from_compiling() -> None:
    """It would compile a communication of its own, for a minute; who is killed then leaves a lock that all later runs
    wait for. gloo does the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_trainer(backend: str, base: Path, cell: Cell, output: Path, dtype: torch.dtype = torch.float32) -> Trainer:
    world = int(os.environ.get("WORLD_SIZE", 1))
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT" if cell.sharded_checkpoints else "FULL_STATE_DICT"
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(cell.ram_efficient).lower()
    arguments = TrainingArguments(  # before the model: ZeRO-3 shards while loading
        output_dir=str(output),
        use_cpu=not backend.startswith("zero"),
        ddp_backend="gloo" if backend.startswith("zero") else None,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=cell.accumulation * (2 // world),
        max_steps=STEPS,
        save_steps=cell.save_steps,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=1,
        logging_first_step=True,
        bf16=cell.bf16,
        gradient_checkpointing=cell.checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": cell.checkpointing == "reentrant"},
        report_to="none",
        disable_tqdm=True,
        ddp_timeout=120,
        seed=7,
    )
    model = LlamaForCausalLM.from_pretrained(
        base, attention_dropout=cell.dropout, attn_implementation="eager", dtype=dtype
    )
    model.config.use_cache = False
    smt = SMTConfig(
        num_blocks=cell.num_blocks,
        block_size=16,
        warmup_steps=4 // world,
        selection=cell.selection,
        arrangement=cell.arrangement,
        scope=cell.scope,
    )
    trainer = CrashingTrainer(
        get_peft_model(model, smt),
        arguments,
        train_dataset=Samples(cell.uneven_labels),
        callbacks=[
            SMTMonitorCallback(),
            *([SMTWarmupCallback()] if cell.selection in ("gradient", "activation") else []),
        ],
    )
    if backend == "zero3":  # which otherwise leaves parameters as small as these gathered
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    if cell.die_at and cell.die_where == "step":
        trainer.add_callback(DieInStep(cell))
    elif cell.die_at:
        trainer.die_at, trainer.die_on = cell.die_at, cell.die_on
    return trainer


def local_elements(parameter: torch.Tensor) -> int:
    """How many elements of a parameter this rank holds."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel() + parameter.numel()  # the second is 0 unless it is gathered
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def full(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()


def bank_of(trainer: Trainer) -> torch.nn.Module:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.base_model.model.smt_bank["default"]


def outcome(trainer: Trainer) -> dict:
    bank = bank_of(trainer)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    trained = trainer.callback_handler.callbacks
    warmup = next((c.selection for c in trained if isinstance(c, SMTWarmupCallback)), None)
    optimizer = trainer.optimizer.state if hasattr(trainer.optimizer, "state") else {}
    return {
        "delta": full(bank.weight),
        "delta_dtype": bank.weight.dtype,
        "optimizer_dtypes": {v.dtype for s in optimizer.values() for v in s.values() if torch.is_tensor(v)},
        "index": bank.index.clone(),
        "scores": warmup.scores if warmup is not None else None,
        "batch_scores": warmup.batch_scores if warmup is not None else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "base_elements": sum(getattr(p, "ds_numel", p.numel()) for p in frozen),
        "local_base_elements": sum(local_elements(p) for p in frozen),
        "distributed_type": str(trainer.accelerator.distributed_type.value),
    }


def run_cell(backend: str, base: Path, cell: Cell, output: Path) -> dict:
    trainer = make_trainer(backend, base, cell, output)
    if cell.by_part:
        weight = trainer.model.get_base_model().model.layers[0].mlp.down_proj.weight.requires_grad_()
        trainer.create_optimizer = lambda *_: setattr(trainer, "optimizer", optimizer) or optimizer
        optimizer = torch.optim.AdamW([weight], lr=1e-2)
        try:
            trainer.train()
        except ValueError as error:
            return {"refusal": str(error)}
    last = get_last_checkpoint(output.parent / cell.continue_from) if cell.continue_from else None
    trainer.train(resume_from_checkpoint=last)
    result = outcome(trainer)
    trainer.model_wrapped.eval()
    with torch.no_grad():
        result["logits"] = trainer.model_wrapped(input_ids=probe()).logits.clone()
    if cell.sharded_checkpoints:  # of which Trainer writes no adapter file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output / "adapter"))
    if cell.resume:
        resumed = make_trainer(backend, base, cell, output / "resumed")
        resumed.train(resume_from_checkpoint=str(output / f"checkpoint-{STEPS // 2}"))
        result["resumed"] = outcome(resumed)
    return result


def main() -> None:
    backend, results = sys.argv[1], Path(sys.argv[2])
    base, cells = results / "base", results / "cells.json"
    torch.set_num_threads(1)
    gc.freeze()  # a Trainer collects garbage at its start; what was imported need not be looked at
    if backend == "fsdp2":
        keep_fsdp_on_cpu()
    if backend.startswith("zero"):
        keep_deepspeed_from_compiling()
    rank, outcomes = int(os.environ.get("RANK", 0)), {}
    for name, fields in json.loads(cells.read_text()).items():
        try:
            outcomes[name] = run_cell(backend, base, Cell(**fields), results / name)
        except Exception:  # stop here: the other rank may be waiting for this one, and the launcher will end it
            outcomes[name] = {"error": traceback.format_exc()}
            raise
        finally:
            torch.save(outcomes, results / f"rank{rank}.part")
            os.replace(results / f"rank{rank}.part", results / f"rank{rank}.pt")  # the launcher may end it any moment
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
