"""What the pages show is run: every Python block, page by page, beside the files that the page names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNABLE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "from prefect import" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("prefect_server")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__page__"}
    for number, block in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
        if block["title"]:
            (tmp_path / block["title"]).write_text(block["code"], encoding="utf-8")
        elif block["language"] == "python":
            source = tmp_path / f"block_{number}.py"  # Prefect reads the source of tasks
            source.write_text(block["code"], encoding="utf-8")
            exec(compile(block["code"], str(source), "exec"), scope)


def test_there_are_pages_to_run() -> None:
    assert len(RUNNABLE) >= 4
