"""Every ``python`` block of the README and of the pages of the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The python blocks of a page, each with the number of lines above it."""
    return [(text[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    if not page.exists():
        pytest.skip("the tests run outside a checkout")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        # Empty lines above the code make a traceback point into the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_blocks_are_found_in_order_and_other_languages_are_left_alone():
    text = "# Title\n\n```python\na = 1\n```\n\n```sh\nls\n```\n\n```python\nb = 2\n```\n"
    assert blocks(text) == [(3, "a = 1\n"), (11, "b = 2\n")]
