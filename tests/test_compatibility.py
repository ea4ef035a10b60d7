"""Tests of scripts/compatibility.py, and of what makes a deprecated call of this package an error in all tests."""

import json
import sys
from pathlib import Path
from types import ModuleType

import compatibility
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins(row: str) -> dict[str, str]:
    """The version of each package that a row holds at one."""
    found = {}
    for requirement in map(Requirement, compatibility.constraints(compatibility.ROWS[row])):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def test_the_oldest_versions_have_every_bound_and_the_pinned_ones_fulfil_them():
    oldest, pinned = pins("oldest"), pins("pinned-3.11")
    assert oldest.keys() == set(compatibility.PACKAGES) and oldest.keys() <= pinned.keys()
    assert all(Version(oldest[name]) <= Version(pinned[name]) for name in oldest)


def test_a_row_may_take_a_package_of_another_age():
    assert pins("newest-3.12") == {}
    assert pins("oldest-peft") == {"torch": pins("pinned-3.11")["torch"], "peft": pins("oldest")["peft"]}


def test_a_row_that_passed_is_not_run_again_and_one_that_did_not_is(tmp_path, monkeypatch, capsys):
    ran = []
    ends = {"oldest": {"error": "no such wheel"}, "newest-3.12": {"passed": 3, "failed": 0, "skipped": 1}}

    def run_row(name, folder):
        ran.append(name)
        constraints = compatibility.constraints(compatibility.ROWS[name])
        return {"constraints": constraints, "seconds": 5, "python": "3.12.1"} | ends[name]

    monkeypatch.setattr(compatibility, "run_row", run_row)
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--rows", *ends, "--folder", str(tmp_path)])
    for code in (1, 1):
        with pytest.raises(SystemExit) as end:
            compatibility.main()
        assert end.value.code == code
    assert ran == ["oldest", "newest-3.12", "oldest"]
    printed = capsys.readouterr().out
    assert "oldest: no such wheel" in printed and "| oldest | 3.10 |  |  |  |  |  |  | did not run |  |  |" in printed
    assert "| newest-3.12 | 3.12.1 |  |  |  |  |  | 3 | 0 | 1 |  |" in printed
    ends["oldest"] = ends["newest-3.12"]
    with pytest.raises(SystemExit) as end:
        compatibility.main()
    assert end.value.code == 0 and json.loads((tmp_path / "oldest.json").read_text())["passed"] == 3


# --- deprecated calls ------------------------------------------------------------------------------------------------


def module(name: str, code: str, **names) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    exec(code, vars(made))
    return made


@pytest.mark.parametrize("blamed", [1, 2], ids=["blames itself", "blames its caller"])
@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecated_call_raises_in_this_package_and_nowhere_else(category, blamed):
    code = f"import warnings\ndef old():\n    warnings.warn('old is deprecated', category, {blamed})"
    old = module("library.inside", code, category=category).old
    with pytest.raises(category, match="old is deprecated"):
        module("smt_peft.made_up", "def call():\n    old()", old=old).call()
    with pytest.warns(category, match="old is deprecated"):
        module("peft.made_up", "def call():\n    old()", old=old).call()


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_the_interpreter_says_of_this_package_raises(category):
    code = "import warnings\ndef call():\n    warnings.warn_explicit('old', category, 'f.py', 1, __name__)"
    with pytest.raises(category, match="old"):
        module("smt_peft.made_up", code, category=category).call()
    with pytest.warns(category, match="old"):
        module("peft.made_up", code, category=category).call()


def test_other_warnings_of_this_package_are_no_errors():
    with pytest.warns(UserWarning, match="look out"):
        module("smt_peft.made_up", "import warnings\ndef call():\n    warnings.warn('look out')").call()
