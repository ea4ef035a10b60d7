"""Whoever asks a script for help gets it, and nothing else happens."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in sorted(ROOT.glob("scripts/**/*.py")) if "__main__" in path.read_text()]
SHELL = ["setup.sh", "quickstart.sh", "test.sh"]


WRITTEN = [ROOT / "docs" / name for name in ("api.md", "benchmarks.md", "results/selection.md")]


def files(folder) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_it_does_and_does_nothing(script, monkeypatch, tmp_path, capsys):
    before = [path.stat().st_mtime for path in WRITTEN]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code and "usage:" in capsys.readouterr().out
    assert [path.stat().st_mtime for path in WRITTEN] == before and not files(tmp_path)


@pytest.mark.parametrize("name", SHELL)
def test_no_environment_is_made_for_it(name, tmp_path):
    (tmp_path / "scripts").mkdir()
    for other in SHELL:
        (tmp_path / "scripts" / other).write_bytes((ROOT / "scripts" / other).read_bytes())
    before = files(tmp_path)
    helped = subprocess.run(
        ["bash", tmp_path / "scripts" / name, "--help"], capture_output=True, text=True, check=True
    )
    assert f"bash scripts/{name}" in helped.stdout and files(tmp_path) == before


def test_setup_refuses_an_extra_that_is_none(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_bytes((ROOT / "scripts/setup.sh").read_bytes())
    refused = subprocess.run(["bash", tmp_path / "scripts/setup.sh", "tests"], capture_output=True, text=True)
    assert refused.returncode == 2 and "[scripts|test]" in refused.stdout and not (tmp_path / ".venv").exists()
