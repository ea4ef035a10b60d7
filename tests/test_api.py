"""Tests of docs/api.md: it is what the docstrings say, and has all that users are shown."""

import ast
import re
from pathlib import Path

import api_reference
import pytest

import smt_peft

ROOT = Path(__file__).parents[1]

LISTED = {module: names.split() for module, names in api_reference.NAMES.items()}
SHOWN = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_page_is_that_of_the_docstrings():
    written = api_reference.PAGE.read_text(encoding="utf-8")
    assert written == api_reference.page(), "run: python scripts/api_reference.py"


def test_the_page_has_every_public_name():
    assert {name for name in LISTED["smt_peft"] if "." not in name} == set(smt_peft.__all__)


@pytest.mark.parametrize("path", SHOWN)
def test_the_page_has_whatever_the_docs_import(path):
    for code in re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL):
        for line in re.findall(r"^(?:from smt_peft|import smt_peft).*", code, re.MULTILINE):
            [statement] = ast.parse(line).body
            for alias in statement.names if isinstance(statement, ast.ImportFrom) else ():
                everywhere = {name for module in (statement.module, "smt_peft") for name in LISTED.get(module, [])}
                assert alias.name in everywhere, f"{path}: {line}"


def test_sections_of_a_docstring_become_lists():
    arguments = "Args:\n    a, b: two numbers,\n        in order: 1, 2.\n    c: one."
    text = f"One line.\n\n{arguments}\n\nReturns:\n    A sum.\n\nRaises:\n    ValueError: of c,\n        at times."
    assert api_reference.markdown(text) == (
        "One line.\n\n**Args**\n\n* `a`, `b`: two numbers, in order: 1, 2.\n* `c`: one.\n\n"
        "**Returns**\n\nA sum.\n\n**Raises**\n\n* `ValueError`: of c, at times."
    )
