"""Sparse Matrix Tuning (arXiv 2405.15525) as a method of Hugging Face PEFT. Importing it registers "SMT"."""

from smt_peft.registration import add_peft_type, register

add_peft_type()  # before the config is defined: SMTConfig names PeftType.SMT

from smt_peft.callback import SMTWarmupCallback  # noqa: E402
from smt_peft.config import SMTConfig  # noqa: E402
from smt_peft.folders import wrap_methods  # noqa: E402
from smt_peft.model import SMTModel  # noqa: E402
from smt_peft.monitor import SMTMonitorCallback  # noqa: E402
from smt_peft.optimizers import BlockMuon  # noqa: E402
from smt_peft.selected import Selection  # noqa: E402
from smt_peft.warmup import select_blocks  # noqa: E402

register(SMTConfig, SMTModel)
wrap_methods()

__version__ = "0.1.0"
__all__ = [
    "BlockMuon",
    "SMTConfig",
    "SMTModel",
    "SMTMonitorCallback",
    "SMTWarmupCallback",
    "Selection",
    "select_blocks",
]
