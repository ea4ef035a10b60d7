"""Options of the scripts: dataclasses, filled from a YAML file and the command line."""

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

BUDGETS = {"num_blocks", "trainable_ratio"}  # SMT takes one of them


class Loader(yaml.SafeLoader):
    """Safe; and 1e-3 is a number, as in YAML 1.2 and everywhere else."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


@contextlib.contextmanager
def in_a_line() -> Iterator[None]:
    """End the program with what an error says, and no more, where it is the user who can mend it."""
    try:
        yield
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise SystemExit(" ".join(str(error).split())) from error


def parse(text: str) -> Any:
    """What a text of YAML says. Raises ValueError where it is none."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text.strip()[:60]!r} is no YAML: {error}") from None


def read_options(argv: list[str], *kinds: type) -> tuple:
    """Fill dataclasses with the options of a YAML file, if --config names one, and with those beside it, which win.

    An option that is null in the file keeps its default. `--mapping.key value` sets one entry of a mapping; of SMT's
    two budgets, one given so takes the place of either in the file.
    """
    if argv and not argv[0].startswith("-"):
        raise SystemExit(f"{argv[0]!r} is not an option; a file of options goes after --config: --config {argv[0]}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    file, argv = parser.parse_known_args(argv)
    with in_a_line():
        values = (parse(file.config.read_text(encoding="utf-8")) or {}) if file.config else {}
    if not isinstance(values, dict):
        raise SystemExit(f"{file.config} holds no options: a line of it is `name: value`")
    given, entries = [], {}
    words = iter(argv)
    for word in words:
        mapping, dot, entry = word.removeprefix("--").partition(".")
        if word.startswith("--") and dot and mapping.isidentifier():
            key, equals, value = entry.partition("=")
            if not (value := value if equals else next(words, "")):
                raise SystemExit(f"{word} has no value")
            with in_a_line():
                entries.setdefault(mapping, {})[key] = parse(value)
        else:
            given.append(word)
    for mapping, own in entries.items():
        if any(word.partition("=")[0] == f"--{mapping}" for word in given):
            raise SystemExit(
                f"--{mapping} and --{mapping}.{next(iter(own))} are both given; one mapping has all entries"
            )
        if not isinstance(values.get(mapping) or {}, dict):
            raise SystemExit(f"{mapping} is {values[mapping]!r} in {file.config}, no mapping: --{mapping} sets it")
        replaced = BUDGETS if BUDGETS & own.keys() else set()
        values[mapping] = {k: v for k, v in (values.get(mapping) or {}).items() if k not in replaced} | own
    from_file = [
        (f"--{key}", *(map(str, value) if isinstance(value, list) else [_word(value)]))
        for key, value in values.items()
        if value is not None
    ]
    parser = HfArgumentParser(kinds, allow_abbrev=False, epilog="--config FILE reads options from a YAML file.")
    words = [word for pair in from_file for word in pair] + given
    with in_a_line():
        *found, left = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if left:
        raise SystemExit(f"{left[0]!r} is no option, or one value too many; --help lists the options")
    return tuple(found)


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
