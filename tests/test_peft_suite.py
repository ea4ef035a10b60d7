"""PEFT's own parametrised tests pass on SMT. The tests come from PEFT's source archive, the SMT rows from peft_suite/.

The archive of the installed PEFT version is fetched with pip; set SMT_PEFT_SDIST to a folder to keep it there. Alone:

    python -m pytest tests/test_peft_suite.py
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import smt_peft

# File -> passed tests at least. Fewer would mean that the rows do not reach PEFT's tests any more.
FILES = {
    "test_config": 25,
    "test_custom_models": 650,
    "test_decoder_models": 165,
    "test_encoder_decoder_models": 45,
    "test_feature_extraction_models": 110,
    "test_seq_classifier": 25,
}


@pytest.fixture
def peft_tests(tmp_path: Path) -> Path:
    """Give a folder with PEFT's tests as the package `tests`."""
    name = f"peft-{importlib.metadata.version('peft')}"
    folder = Path(os.environ.get("SMT_PEFT_SDIST", tmp_path)).absolute()
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-binary", "peft", "--no-deps", "--retries", "1"]
        fetch = subprocess.run([*pip, "-d", folder, name.replace("-", "==")], capture_output=True, text=True)
        if not archive.exists():
            pytest.skip(f"pip found no {archive.name}: {fetch.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(archive) as file:
        members = [member for member in file if member.name.startswith(f"{name}/tests/")]
        file.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 and older have none
        file.extractall(tmp_path, members)
    if not members:
        pytest.skip(f"{archive.name} carries no tests")
    (tmp_path / name / "tests/__init__.py").touch()
    (tmp_path / name / "pytest.ini").write_text("[pytest]\n")  # instead of PEFT's options, which want coverage
    return tmp_path / name


def run(folder: Path) -> ElementTree.Element:
    """Run the suite on the CPU without the hub, and return the report in JUnit's format."""
    import_from = [Path(__file__).parent / "peft_suite", Path(smt_peft.__file__).parents[1]]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, import_from)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    pytest_options = ["-p", "smt_rows", "-p", "no:cacheprovider", "--junitxml", "report.xml", "-q", "-W", "ignore"]
    files = [f"tests/{file}.py" for file in FILES]
    command = [sys.executable, "-m", "pytest", *pytest_options, *files]
    suite = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (folder / "report.xml").exists(), suite.stdout[-3000:] + suite.stderr[-3000:]
    return ElementTree.parse(folder / "report.xml").getroot()


def test_peft_tests_every_method_has_to_pass_hold_for_smt(peft_tests: Path):
    passed, failed = Counter(), []
    for case in run(peft_tests).iter("testcase"):
        outcome = {child.tag: child for child in case}
        if "failure" in outcome or "error" in outcome:
            reason = outcome.get("failure", outcome.get("error")).get("message", "").splitlines()[:1]
            failed.append(f"{case.get('name')}: {reason}")
        elif "skipped" not in outcome:
            passed[case.get("classname").split(".")[1]] += 1
    assert not failed, f"{len(failed)} failed:\n" + "\n".join(failed[:30])
    assert {file: passed[file] for file, least in FILES.items() if passed[file] < least} == {}
