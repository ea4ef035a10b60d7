"""Text that comes with every Python: the documentation and the source code of the standard library.

Two corpora, and questions, for small experiments that must run without a download. They differ a little from one build
of Python to the next, and are always the same for one build. No module written in Python is imported, its file is only
parsed, so reading them has no side effects.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

# Parts of a dotted name that rule a module out: tests, whole programs, what is installed besides the standard library,
# character tables, and build settings that describe this machine.
SKIPPED = re.compile(
    r"(^|\.)(tests?|idlelib|lib2to3|turtledemo|(site|dist)-packages|encodings|config-.*|_sysconfigdata.*)(\.|$)"
)
TOPICS = "pydoc_data.topics"  # a dictionary of strings: the language reference, as `help("for")` shows it
PACKAGES = ("asyncio", "decimal", "email", "importlib", "logging", "tarfile", "tkinter", "turtle", "unittest", "xml")
TEST_PERCENT = 12  # of the modules; less of the text, because the topics alone are a fifth of it


def documentation(split: str = "train") -> Iterator[str]:
    """Give the standard library's docstrings, one text each, and the language reference that `help()` shows.

    Modules written in Python count, and those compiled into the interpreter. `split` is "train" or "test": all texts
    of one module are in the same split, and a text that several modules share is given once, for the first of them.
    """
    return _select(split, chain(_docstrings(), _builtin_docstrings()))


def source_code(split: str = "train") -> Iterator[str]:
    """Give the standard library's Python code without docstrings and comments, one text per module.

    `split` is "train" or "test"; a module is in the same split here as in `documentation`.
    """
    return _select(split, _code())


def questions(split: str = "train") -> Iterator[dict[str, str]]:
    """Give labelled rows: in which package is this docstring? Each has `instruction` and `output`.

    The packages are some whose docstrings one can tell apart; of these the first paragraph is asked for, if it is
    short. `split` is "train" or "test", by the text alone.
    """
    packages = {}
    for module, text in _docstrings():
        package = module.split(".")[0].removeprefix("_py")  # _pydecimal is decimal
        text = " ".join(text.split("\n\n")[0].split())
        if package in PACKAGES and 20 <= len(text) <= 80:
            packages.setdefault(text, package)
    for text in _select(split, ((text, text) for text in packages)):
        yield {"instruction": f'Which Python module has the docstring "{text}"?', "output": packages[text]}


def _select(split: str, texts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Give the texts whose module belongs to the split, without empty and repeated ones."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    seen = {""}
    for module, text in texts:
        text = text.strip()
        if text not in seen and _split_of(module) == split:
            yield text
        seen.add(text)  # the other split's texts too: that keeps a shared text out of the second split


def _split_of(module: str) -> str:
    """Assign a module to a split by its name alone, so that nothing else on this machine matters."""
    # The topics quote one another, so dividing them would put the same paragraphs into both splits.
    held_out = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < TEST_PERCENT
    return "test" if held_out and module != TOPICS else "train"


def _docstrings() -> Iterator[tuple[str, str]]:
    for module, tree in _syntax_trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield module, ast.get_docstring(node) or ""
            elif module == TOPICS and isinstance(node, ast.Dict):
                yield from ((module, topic) for topic in ast.literal_eval(node).values())


def _builtin_docstrings() -> Iterator[tuple[str, str]]:
    for module in sorted(sys.builtin_module_names):
        names = vars(importlib.import_module(module))
        classes = [thing for thing in names.values() if inspect.isclass(thing)]
        for thing in chain(names.values(), *(vars(cls).values() for cls in classes)):
            if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.isdatadescriptor(thing):
                yield module, inspect.getdoc(thing) or ""


def _code() -> Iterator[tuple[str, str]]:
    for module, tree in _syntax_trees():
        if module == TOPICS:
            continue
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):  # not a lambda's body, which is one expression
                kept = [statement for statement in node.body if not _is_docstring(statement)]
                node.body = kept or [ast.Pass()] * (node is not tree)  # a block must not be empty, a file may
        yield module, ast.unparse(tree)  # a syntax tree holds no comments


def _is_docstring(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def _syntax_trees() -> Iterator[tuple[str, ast.Module]]:
    """Give the dotted name and the syntax tree of each file of the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    for module, path in sorted(files.items()):
        if not SKIPPED.search(module):
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escape sequences, which are not ours to correct
                tree = ast.parse(file.read())
            yield module, tree
