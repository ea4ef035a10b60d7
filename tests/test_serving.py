"""The page about serving runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/serve.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})
