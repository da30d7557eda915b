"""The documentation is true: its Python blocks run (a page is one session), its figures are those of kept runs."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import quote

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path) -> list[str]:
    return BLOCK.findall(page.read_text()) if page.exists() else []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_python_blocks_run(page, capsys):
    names: dict = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", quote.PAGES, ids=lambda page: page.stem)
def test_quoted_figures_are_those_of_the_kept_run(page):
    text = page.read_text()
    assert quote.quoted(text) == text, "python -m benchmarks.quote"


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch):
    row = {"impl": "jax_flash", "group": "grid", "dir": "fwd", "dtype": "bf16", "D": 64, "causal": 0, "S": 512}
    origin = {"device": "a GPU", "date": "2026-01-01", "commit": "abc", "jax": "0.11.2"}
    (tmp_path / "run.jsonl").write_text(json.dumps(row | origin | {"tflops": 400.0}))
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    page = quote.quoted("<!-- run: run.jsonl grid fwd bf16 -->\n<!-- end -->")
    assert "| 400 |" in page and quote.quoted(page) == page
    assert quote.quoted(page.replace("400", "500")) == page


def test_support_table_is_that_of_the_planner():
    command = [sys.executable, str(ROOT / "tools" / "support_table.py"), "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
