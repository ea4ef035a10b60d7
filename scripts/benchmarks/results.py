"""The JSON files of the benchmarks: what stands beside a number, and what of an earlier run is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import peft
import torch
import transformers

SAME = ("machine", "commit", "versions")  # figures that differ in these do not belong into one table


def header(device: str) -> dict:
    """What stands beside a number: command, commit, machine, versions, and how busy with other things it was."""
    on_gpu, threads = device == "cuda", torch.get_num_threads()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()}), threads: {threads}",
        "load_average": None if on_gpu else round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **versions},
    }


def commit() -> str | None:
    """Of the code that is measured; COMMIT says it where a copy has no history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"] or None
    git = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        return None


def kept(path: Path | None, device: str, **empty: object) -> dict:
    """What is to be filled: the file's content, if this machine and this code made it, else a new one.

    Args:
        empty: what a new one holds beside its header.
    """
    head = header(device)
    if path and path.exists():
        result = json.loads(path.read_text())
        if all(result.get(name) == head[name] for name in SAME):
            return result
    return {**head, **empty}


def write(result: dict, path: Path | None) -> None:
    """Whenever this is interrupted, one whole file stands."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1))
        part.replace(path)
