"""The one place that touches PEFT's registry.

PEFT keeps its methods in a closed enum and has no entry points, so the member is made here, by hand, and then handed
to PEFT's own `register_peft_method`.
"""

from __future__ import annotations

import peft
from packaging.version import Version
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

MINIMUM_PEFT = "0.21.0"
NAME = "SMT"


def add_peft_type() -> None:
    """Make `PeftType.SMT` exist; do nothing where this package has made it already."""
    if Version(peft.__version__) < Version(f"{MINIMUM_PEFT}.dev0"):
        raise ImportError(
            f"smt_peft needs peft >= {MINIMUM_PEFT} (its adapter state hooks), but this is peft {peft.__version__}; "
            f"run: pip install 'peft>={MINIMUM_PEFT}'"
        )
    if NAME in PeftType.__members__:
        if not getattr(PeftType[NAME], "_from_smt_peft_", False):
            raise ImportError(
                f"peft {peft.__version__} has a method named {NAME} of its own, which smt_peft must not replace; use "
                "that one, or install an older peft beside smt_peft."
            )
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    member._from_smt_peft_ = True
    type.__setattr__(PeftType, NAME, member)  # EnumType refuses new attributes since Python 3.12
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    if PeftType(NAME) is not member or PeftType[NAME] is not member or member not in list(PeftType):
        raise ImportError("This Python's enum does not take a new member the known way; please report your version.")


def register(config_cls: type, model_cls: type) -> None:
    """Register SMT with PEFT's tuner registry. Idempotent."""
    if PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[NAME]) is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
