"""The documentation is true: its Python blocks run (a page is one session), its figures are those of kept runs."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest

from benchmarks import quote

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = [
    ROOT / "CHANGELOG.md",
    *PAGES,
    *sorted(ROOT.glob("examples/*.md")),
    *sorted(ROOT.glob("benchmarks/**/*.md")),
]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
PATH = re.compile(r"`((?:benchmarks|bindings|cuda|docs|examples|jax_flash|tests|tools)/[\w./-]+)`")
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


def test_every_kept_run_is_listed():
    listed = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    for run in [*quote.RESULTS.glob("*.jsonl"), *quote.RESULTS.glob("logs/*")]:
        assert f"`{run.relative_to(quote.RESULTS)}`" in listed, run


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page):
    text = FENCE.sub("", page.read_text())
    for link in LINK.findall(text):
        url = urllib.parse.urlsplit(link)
        if url.scheme:
            assert url.scheme == "https" and "." in url.netloc, link
            continue
        target = page.parent / url.path if url.path else page
        assert target.exists(), link
        assert not url.fragment or url.fragment in anchors(target), link
    for path in PATH.findall(text):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


def raised() -> dict[str, str]:
    """The messages that the package raises, with `...` for what differs from call to call, and the line of each."""
    found = {}
    for path in [path for path in (ROOT / "jax_flash").rglob("*.py") if path.name != "__main__.py"]:
        constants = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                constants[ast.unparse(node.targets[0])] = node.value
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                message = node.exc.args[0]
                message = constants.get(ast.unparse(message), message)
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                text = "".join(part.value if isinstance(part, ast.Constant) else "..." for part in parts)
                found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_troubleshooting_has_the_messages_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \| ", page, re.MULTILINE)
    rows = [[part for part in re.split(r"\.\.\. ?", row) if part] for cell in cells for row in cell[1:-1].split("`, `")]
    for message, line in raised().items():
        assert any(all(part.strip() in message for part in row) for row in rows), f"{line}: {message}"
    sources = [*(ROOT / "jax_flash").rglob("*.py"), *(ROOT / "bindings").glob("*.cc")]
    everything = "".join([*raised(), *(source.read_text() for source in sources)])
    of_jax = ("handler's", "can't apply forward-mode autodiff")
    for row in rows:
        assert row[0].startswith(of_jax) or all(part.strip() in everything for part in row), row


def test_support_table_is_that_of_the_planner():
    command = [sys.executable, str(ROOT / "tools" / "support_table.py"), "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
