"""Run a minute of tests with other versions of Python, PyTorch, Transformers and PEFT, in environments made for it.

    pip install uv
    python scripts/compatibility.py                               # all rows, one after the other
    python scripts/compatibility.py --rows oldest newest-3.13     # some, for example in one job of CI each

The oldest versions are those that pyproject.toml allows, the pinned ones those of scripts/constraints.txt, the newest
what the package index has for that Python. A row's log, result and, if it failed, environment stay in --folder. What
passed with the same constraints is not run again, so an interrupted command goes on; to begin anew, delete the folder.
The exit status is 1 if a row failed.

uv takes a Python from the PATH or from pyenv, and else downloads it. For Linux PyPI's PyTorch brings gigabytes of CUDA
libraries: with UV_TORCH_BACKEND=cpu in the environment uv takes PyTorch's own CPU builds. About two minutes a row.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
COUNTED = ("tests", "failures", "errors", "skipped")
FILES = ("keystone", "lifecycle", "warmup", "files", "sorted", "selection", "trainer")
COMPILED = "tests/test_compile.py::test_a_compiled_decoder_layer_is_one_graph_and_trains_as_eager"
TESTS = [*(f"tests/test_{name}.py" for name in FILES), COMPILED]
REPORT = """
import importlib.metadata, json, platform, sys
print(json.dumps({"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in sys.argv[1:]}))
"""


class Row(NamedTuple):
    python: str
    versions: str  # "oldest", "newest" or "pinned"
    others: dict[str, str] = {}  # packages with versions of another kind


ROWS = {
    "oldest": Row("3.10", "oldest"),
    "newest-3.13": Row("3.13", "newest"),
    "newest-3.12": Row("3.12", "newest"),
    "newest-3.11": Row("3.11", "newest"),
    "newest-3.10": Row("3.10", "newest"),
    "pinned-3.13": Row("3.13", "pinned"),
    "pinned-3.12": Row("3.12", "pinned"),
    "pinned-3.11": Row("3.11", "pinned"),
    "pinned-3.10": Row("3.10", "pinned"),
    "oldest-peft": Row("3.11", "newest", {"torch": "pinned", "peft": "oldest"}),
    "oldest-transformers": Row("3.11", "newest", {"torch": "pinned", "transformers": "oldest"}),
    "oldest-torch": Row("3.10", "newest", {"torch": "oldest"}),
}


def constraints(row: Row) -> list[str]:
    """Return the lines of a constraints file with which a row's packages have its versions."""
    lines = {"newest": [], "pinned": [], "oldest": []}
    lines["pinned"] = re.findall(r"^[\w-]+==.*$", (ROOT / "scripts/constraints.txt").read_text(), re.MULTILINE)
    bounds = re.findall(r'^    "([\w-]+)>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    lines["oldest"] = [f"{name}=={version}" for name, version in bounds]
    chosen = [line for line in lines[row.versions] if line.split("==")[0] not in row.others]
    return chosen + [line for name, kind in row.others.items() for line in lines[kind] if line.split("==")[0] == name]


def search_path() -> str:
    """Return a PATH with this Python's programs and pyenv's Pythons."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin")
    return os.pathsep.join([str(Path(sys.executable).parent), *map(str, pyenv), os.environ["PATH"]])


def run_row(name: str, folder: Path) -> dict:
    """Make a row's environment, run the tests in it and return the result, with an "error" if they could not run."""
    row, environment, log = ROWS[name], folder / name, folder / f"{name}.log"
    pins, report, python = folder / f"{name}.txt", folder / f"{name}.xml", environment / "bin/python"
    settings = os.environ | {"PATH": search_path(), "OMP_NUM_THREADS": "1"}
    uv, begun = shutil.which("uv", path=settings["PATH"]), time.time()
    if uv is None:
        sys.exit("There is no uv on the PATH: pip install uv")
    pins.write_text("\n".join(constraints(row)) + "\n")
    report.unlink(missing_ok=True)
    commands = [
        [uv, "venv", "--clear", "--python", row.python, environment],
        [uv, "pip", "install", "--python", environment, "--constraint", pins, "--editable", ROOT, "pytest"],
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS],
    ]
    with log.open("w") as output:
        codes = []
        while len(codes) < len(commands) and not any(codes):
            command = commands[len(codes)]
            codes.append(subprocess.run(command, cwd=ROOT, env=settings, stdout=output, stderr=output).returncode)
    result = {"constraints": constraints(row), "date": date.today().isoformat(), "seconds": round(time.time() - begun)}
    if len(codes) < len(commands) or not report.exists():
        return result | {"error": log.read_text().strip()[-800:] or f"exit status {codes[-1]}"}
    versions = subprocess.run([python, "-c", REPORT, *PACKAGES], capture_output=True, text=True, check=True).stdout
    counts = {key: int(n) for key, n in ElementTree.parse(report).find("testsuite").items() if key in COUNTED}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    if codes[-1] == 0:
        shutil.rmtree(environment)
    return result | json.loads(versions) | {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def succeeded(result: dict) -> bool:
    return "error" not in result and result["failed"] == 0 and result["passed"] > 0


def read_result(name: str, folder: Path) -> dict | None:
    """Return a row's result if there is one of the constraints that it has now."""
    file = folder / f"{name}.json"
    result = json.loads(file.read_text()) if file.exists() else None
    return result if result and result["constraints"] == constraints(ROWS[name]) else None


def table(results: dict[str, dict]) -> str:
    """Return a Markdown table of rows' results."""
    columns = ("python", *PACKAGES, "passed", "failed", "skipped", "date")
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, result in results.items():
        cells = [str(result.get(column, "")) for column in columns]
        if "error" in result:
            cells[0], cells[columns.index("failed")] = ROWS[name].python, "did not run"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs/compatibility", help="for environments and results"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        result = read_result(name, folder)
        if not (result and succeeded(result)):
            print(f"{name} ...", flush=True)
            result = run_row(name, folder)
            (folder / f"{name}.json").write_text(json.dumps(result, indent=1))
        outcome = result.get("error") or f"{result['passed']} passed, {result['failed']} failed, {result['seconds']} s"
        print(f"{name}: {outcome}" + ("" if succeeded(result) else f"\n{name}: see {folder / name}.log"), flush=True)
    results = {name: result for name in ROWS if (result := read_result(name, folder))}
    print(table(results))
    sys.exit(not all(succeeded(results[name]) for name in options.rows))


if __name__ == "__main__":
    main()
