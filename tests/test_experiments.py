"""Tests of docs/experiments.md and docs/results: one page that one can read, and nothing measured that it lacks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/experiments.md"
RESULTS = ROOT / "docs/results"
PAGES = [PAGE, *sorted(RESULTS.glob("**/*.md"))]
STUDIES = sorted(path.stem for path in (ROOT / "configs/study").glob("*.yaml"))


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())


def test_the_page_can_be_read():
    assert len(PAGE.read_text().splitlines()) <= 300
    assert len(re.findall(r"^!\[", PAGE.read_text(), re.M)) <= 14


def test_the_page_links_every_study_and_no_other():
    linked = {
        Path(link).stem.removeprefix("quality_") for link in links(PAGE) if Path(link).name.startswith("quality_")
    }
    assert linked - {"overview"} == set(STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_has_its_page_with_what_was_read_in_it(study):
    page = (RESULTS / f"quality_{study}.md").read_text()
    notes = RESULTS / "notes" / f"{study}.md"
    assert page.startswith(f"# {study}\n") and (not notes.exists() or notes.read_text().strip() in page)


def test_no_text_stands_where_no_page_shows_it():
    assert {path.stem for path in (RESULTS / "notes").iterdir()} <= {*STUDIES, "selection"}
    assert (RESULTS / "notes/selection.md").read_text().strip() in (RESULTS / "selection.md").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path):
    for link in links(path):
        assert link.startswith("https://") or (path.parent / link).exists(), link
