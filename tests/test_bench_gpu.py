"""Tests of scripts/benchmarks/bench_gpu.sh: in which order and for how long it runs what. Nothing is measured."""

import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/benchmarks/bench_gpu.sh"
# In place of Python: notes what it is asked to run, and fails at what the file `failing` names.
STUB = """#!/usr/bin/env bash
here=$(dirname "$0")
if [[ $1 == -c ]]; then [[ $2 == *get_device_name* ]] && cat "$here/gpu"; exit 0; fi
echo "$*" >>"$here/asked"
! grep -qFf "$here/failing" <<<"$*"
"""


@pytest.fixture
def start(tmp_path):
    """Start the script; gives its exit status, what it printed, and what it asked Python to run."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "gpu").write_text("A GPU\n")

    def run(*options: str, failing: str = "nothing at all", commit: str = "abc") -> tuple[int, str, list[str]]:
        (tmp_path / "asked").write_text("")
        (tmp_path / "failing").write_text(failing)
        environment = {"PYTHON": str(stub), "RESULTS": str(tmp_path / "results"), "COMMIT": commit}
        environment |= {"PATH": "/usr/bin:/bin", "ARCHIVE": str(tmp_path / "all.tgz")}
        done = subprocess.run(["bash", str(SCRIPT), *options], env=environment, capture_output=True, text=True)
        asked = (tmp_path / "asked").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, [line for line in asked if "--summary" not in line]

    return run


def seconds(printed: str) -> list[int]:
    return [int(most) for most in re.findall(r"^--- .* (\d+) s at most", printed, re.M)]


def test_every_part_runs_once_within_its_hundred_seconds_and_twelve_minutes_together(start, tmp_path):
    status, printed, asked = start("100000")
    assert status == 0 and len(asked) == 9 and "pytest tests/test_gpu.py" in asked[0] and "--setting peft" in asked[1]
    assert max(seconds(printed)) <= 100 and sum(seconds(printed)) <= 720
    archived = subprocess.run(["tar", "tzf", tmp_path / "all.tgz"], capture_output=True, text=True).stdout
    assert "progress.txt" in archived and "gpu_tests.txt" in archived
    assert start("100000")[::2] == (0, []), "what has ended is not run again"


def test_another_commit_is_measured_anew(start):
    start("100000")
    assert len(start("100000", commit="def")[2]) == 9


def test_no_part_starts_that_may_not_end_in_time(start):
    status, printed, asked = start("61")
    assert status == 3 and max(seconds(printed)) <= 61 and len(asked) == len(seconds(printed)) == 3
    assert "Missing or failed: correctness peft linear" in printed
    assert start("10")[2] == []


def test_what_failed_is_named_and_has_its_turn_after_what_did_not_run_yet(start):
    assert "compile" in start("61", failing="compile")[1].rpartition("Missing or failed")[2]
    status, printed, asked = start("100000", failing="compile")
    assert status == 3 and "Missing or failed: compile." in printed
    assert "pytest" in asked[0] and "compile" in asked[-1] and len(set(asked)) == len(asked), "once in a start"
    status, printed, asked = start("100000")
    assert status == 0 and len(asked) == 1


def test_without_a_gpu_nothing_runs(start, tmp_path):
    (tmp_path / "python").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert start()[::2] == (1, [])
