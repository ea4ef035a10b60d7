"""The callback that looks after a run, and says where it goes wrong without an error."""

from __future__ import annotations

import math
import os
import statistics
from collections import deque

import torch
from transformers import TrainerCallback

from smt_peft.banks import find_bank
from smt_peft.callback import calling_trainer
from smt_peft.diagnostics import warn
from smt_peft.scoring import reduce_over_ranks

# Gradient norms that are a sign of divergence:
SPIKE = 100  # times the running median
FEWEST_NORMS = 5
OVERFLOWS = 10  # in a row: more than float16's loss scaler needs to find its scale


class SMTMonitorCallback(TrainerCallback):
    """Warns once if a run diverges: if a gradient norm in the Trainer's log is not finite or leaps, or if, at a save
    or in the end, deltas are not finite. Resuming from a half-written checkpoint raises FileNotFoundError. In a
    distributed run give it to every rank: looking at the deltas is a collective operation.

    Args:
        adapter_name: whose deltas to look at.
    """

    def __init__(self, adapter_name: str = "default"):
        self.adapter_name = adapter_name

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._norms: deque[float] = deque(maxlen=100)  # of this run; a callback may see several
        self._broken = 0  # norms in a row that are not finite
        self._warned = False
        self._bank = find_bank(model, self.adapter_name)  # in the end another callback may have merged it
        _, resumed = calling_trainer()
        if resumed:
            _refuse_half_written(resumed, args)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or logs.get("grad_norm") is None:
            return
        norm = float(logs["grad_norm"])
        median = statistics.median(self._norms) if len(self._norms) >= FEWEST_NORMS else None
        if math.isfinite(norm):
            self._norms.append(norm)
            self._broken = 0
            wrong = median is not None and norm > SPIKE * median > 0
        else:
            self._broken += 1
            wrong = self._broken > (OVERFLOWS if args.fp16 else 0)
        if wrong:
            before = "" if median is None else f", after a median of {median:.3g}"
            self._warn_once(f"The gradient norm is {norm:.3g} at step {state.global_step}{before}")

    def on_save(self, args, state, control, **kwargs):
        part = self._bank.local()
        counts = torch.tensor([part.isfinite().sum(), part.numel()], device=self._bank.index.device)
        finite, count = reduce_over_ranks(counts).tolist()  # each may have another part
        if finite < count:
            share = f"{100 - 100 * finite / count:.3g} %"
            self._warn_once(f"{share} of the trained values are not finite at step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)

    def _warn_once(self, fact: str) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"{fact}: training is about to diverge, or has. Lower the learning rate, train in bfloat16 instead of "
                "float16, or set max_grad_norm=1.0; go on from a checkpoint before this step. logging_steps=10 shows "
                "in the log when it begins."
            )


def _refuse_half_written(checkpoint: str, args) -> None:
    """Raise where a rank died while the checkpoint was written: its random state is missing, so the run that goes on
    from there would be another one. Trainer itself only logs that."""
    name = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    files = os.listdir(checkpoint)
    if any(file.startswith("rng_state") for file in files) and name not in files:
        raise FileNotFoundError(
            f"{checkpoint} has no {name}: rank {args.process_index} died while it was written, or the number of "
            "processes was another. Resume from an earlier checkpoint, or with as many processes as wrote it."
        )
