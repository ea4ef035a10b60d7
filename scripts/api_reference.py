"""Write docs/api.md, the signatures and docstrings of what users call.

    python scripts/api_reference.py

tests/test_api.py fails where the page is not what this writes.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
from operator import attrgetter
from pathlib import Path
from textwrap import dedent

PAGE = Path(__file__).parents[1] / "docs/api.md"
NAMES = {  # module: its names, in the order of the page
    "smt_peft": """
        SMTConfig select_blocks SMTWarmupCallback SMTMonitorCallback Selection Selection.load Selection.save
        Selection.rebudget Selection.overlap Selection.summary Selection.blocks Selection.counts_by_type
        Selection.counts_by_layer SMTModel SMTModel.add_weighted_adapter BlockMuon""",
    "smt_peft.files": "read_adapter write_adapter StoredAdapter Blocks",
    "smt_peft.inspection": "describe compare",
    "smt_peft.merging": "merge_files merge_loaded",
    "smt_peft.combining": "combine_adapters",
    "smt_peft.conversion": """
        convert_to_lora_files lora_errors Loss Loss.summary adapter_of_difference Difference Difference.summary""",
    "smt_peft.patches": "sparse_patch apply_patch fused_rows",
    "smt_peft.selection": "select sort_lines Lines",
    "smt_peft.plotting": "plot_selection plot_shares plot_overlap plot_losses plot_adapter",
}
TOP = """# API reference

Written by `python scripts/api_reference.py` from the docstrings. [usage.md](usage.md) shows how these are used, and
has the options of `SMTConfig` in a table. Tensors are described by dtype and shape; b is the side of a block. What is
not on this page may change from one version to the next.
"""
NAMES_OF_ENTRY = re.compile(r"^(\w+(?:, \w+)*): ")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)


def typed(annotation: object) -> str:
    """An annotation as it stands in the source."""
    text = getattr(annotation, "__forward_arg__", annotation)
    return text if isinstance(text, str) else inspect.formatannotation(text)


def signature(name: str, value: object) -> str:
    """A call, on one line or with a parameter on each; of a class that nobody makes by hand, its name alone."""
    if isinstance(value, property) or (inspect.isclass(value) and not {"__init__", "__new__"} & vars(value).keys()):
        return name
    found = inspect.signature(value)
    own = inspect.get_annotations(value) if dataclasses.is_dataclass(value) else found.parameters  # without PEFT's
    parts = []
    for parameter in found.parameters.values():
        if parameter.name in own and parameter.name != "self":
            text = parameter.name
            if parameter.annotation is not inspect.Parameter.empty:
                text += f": {typed(parameter.annotation)}"
            if parameter.default is not inspect.Parameter.empty:
                default = repr(parameter.default).replace("<factory>", "{}")
                text += f" = {default}"
            parts.append(text)
    result = "" if inspect.isclass(value) else f" -> {typed(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""

    def section(match: re.Match) -> str:
        title, body = match.groups()
        text = dedent(body).strip()
        if title == "Returns":
            return f"**{title}**\n\n{text}\n\n"
        entries = re.sub(r"\n +", " ", text).split("\n")
        return f"**{title}**\n\n" + "".join(f"* {re.sub(NAMES_OF_ENTRY, named, entry)}\n" for entry in entries) + "\n"

    def named(match: re.Match) -> str:
        return ", ".join(f"`{name}`" for name in match[1].split(", ")) + ": "

    return re.sub(r"\n{3,}", "\n\n", SECTION.sub(section, docstring + "\n")).strip()


def page() -> str:
    parts = [TOP]
    for module_name, names in NAMES.items():
        module = importlib.import_module(module_name)
        first = inspect.getdoc(module).split("\n\n")[0]
        parts.append(f"## {module_name}\n\n{first}\n")
        for name in names.split():
            value = attrgetter(name)(module)
            code = signature(name, value)
            parts.append(f"### {name}\n\n```python\n{code}\n```\n\n{markdown(inspect.getdoc(value))}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
