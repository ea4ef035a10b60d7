"""PEFT's registry has SMT once, and a PEFT that does not fit is refused in words."""

import pickle

import peft
import pytest
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from smt_peft import SMTConfig, SMTModel
from smt_peft.folders import wrap_methods
from smt_peft.registration import add_peft_type, register


def test_registering_again_changes_nothing():
    """As a module that is reloaded does."""
    members, save = list(PeftType), PeftModel.save_pretrained
    add_peft_type()
    register(SMTConfig, SMTModel)
    wrap_methods()
    assert list(PeftType) == members and members.count(PeftType.SMT) == 1 and PeftModel.save_pretrained is save
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SMT] is SMTModel
    assert pickle.loads(pickle.dumps(PeftType.SMT)) is PeftType.SMT is PeftType("SMT")


def test_a_peft_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.9")
    with pytest.raises(ImportError, match=r"needs peft >= 0\.21\.0.* but this is peft 0\.20\.9"):
        add_peft_type()


def test_a_method_of_pefts_own_with_this_name_is_left_alone(monkeypatch):
    monkeypatch.setattr(PeftType.SMT, "_from_smt_peft_", False)
    with pytest.raises(ImportError, match="has a method named SMT of its own"):
        add_peft_type()
