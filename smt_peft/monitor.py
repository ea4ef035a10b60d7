"""SMTMonitorCallback: looks after a run under Trainer, and says where it goes wrong without an error."""

from __future__ import annotations

import math
import os
import statistics
from collections import deque

from transformers import TrainerCallback

from smt_peft.callback import calling_trainer
from smt_peft.diagnostics import warn
from smt_peft.warmup import find_adapter

SPIKE = 100  # times the running median
FEWEST_NORMS = 5
OVERFLOWS = 10  # in a row: more than float16's loss scaler needs to find its scale


class SMTMonitorCallback(TrainerCallback):
    """Warns, once, where a run diverges: of gradient norms in the Trainer's log that are not finite or leap, and of
    deltas that are not finite, at every save and in the end. Refuses to resume from a checkpoint that is half written.

    Args:
        adapter_name: whose deltas to look at.
    """

    def __init__(self, adapter_name: str = "default"):
        self.adapter_name = adapter_name
        self._norms: deque[float] = deque(maxlen=100)
        self._broken = 0  # norms in a row that are not finite
        self._warned = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._bank, _ = find_adapter(model, self.adapter_name)  # in the end another callback may have merged it
        _, resumed = calling_trainer()
        if resumed:
            _refuse_half_written(resumed, args)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or logs.get("grad_norm") is None:
            return
        norm, median = float(logs["grad_norm"]), None
        if len(self._norms) >= FEWEST_NORMS:
            median = statistics.median(self._norms)
        if math.isfinite(norm):
            self._norms.append(norm)
            self._broken = 0
            wrong = median is not None and norm > SPIKE * median > 0
        else:
            self._broken += 1
            wrong = self._broken > (OVERFLOWS if args.fp16 else 0)
        if wrong:
            before = "" if median is None else f", after a median of {median:.3g}"
            self._warn_once(
                f"The gradient norm is {norm:.3g} at step {state.global_step}{before}: training is about to diverge, "
                "or has. Lower the learning rate, train in bfloat16 instead of float16, or set max_grad_norm=1.0; go "
                "on from a checkpoint before this step."
            )

    def on_save(self, args, state, control, **kwargs):
        part = self._bank.local()
        broken = part.numel() - int(part.isfinite().sum())
        if broken:
            self._warn_once(
                f"{broken} of {part.numel()} trained values are not finite at step {state.global_step}: training has "
                "diverged, and no later step repairs it. Go on from a checkpoint before, with a lower learning rate, "
                "in bfloat16 instead of float16, or with max_grad_norm=1.0; logging_steps=10 shows in the log when it "
                "begins."
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warn(message)


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
