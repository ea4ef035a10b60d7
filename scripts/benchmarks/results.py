"""The JSON files of the benchmarks: what stands beside a number, and what of an earlier run is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import peft
import torch
import transformers

SAME = ("machine", "commit", "versions", "asked")  # figures that differ in these do not belong into one table
MEASURED = ("smt_peft", "scripts/benchmarks")


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
    """Of the code that is measured, with a hash of what was changed; COMMIT says it where a copy has no history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"] or None
    git = ["git", "-C", str(Path(__file__).parents[2])]
    asked = (["describe", "--always"], ["diff", "HEAD", "--", *MEASURED])
    try:
        name, changes = (subprocess.run([*git, *words], capture_output=True).stdout.strip() for words in asked)
    except OSError:  # no git here
        return None
    return "-".join([name.decode(), *([sha256(changes).hexdigest()[:8]] if changes else [])]) or None


def kept(path: Path | None, device: str, asked: dict | None = None, **empty: object) -> dict:
    """What is to be filled: the file's content, if this machine and this code made it, else a new one.

    Args:
        asked: options that all figures of the file depend on.
        empty: what a new one holds beside its header.
    """
    head = {**header(device), "asked": asked}
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


def clock(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
