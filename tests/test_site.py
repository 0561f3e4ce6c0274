# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: it builds without a warning, and says what the pages say.

`make docs` makes the environment that builds it, and so does `make test`.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
ELSEWHERE = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "deploy/README.md": "deploying",
}
PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))} | {
    name: ROOT / source for source, name in ELSEWHERE.items()
}
# What a page is made of, as far as one Markdown and another may disagree on it.
COUNTED = ("h1", "h2", "h3", "li", "pre", "table", "td", "th")

pytestmark = pytest.mark.skipif(not MKDOCS.exists(), reason="`make docs` makes .venv-docs/")


def build(folder: Path, config: Path = ROOT / "docs" / "site" / "mkdocs.yml") -> str:
    """What building says; strict, so that it fails where there is a warning."""
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--config-file", config, "--site-dir", folder],
        capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # Of links and headings that lead nowhere, and of pages that no reader is led to.
    assert "WARNING" not in build(folder)
    return folder


class Contents(HTMLParser):
    """Tags of the page's article; without Markdown around them, of all."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(found.get("href", ""))
        elif tag in ("script", "img", "iframe", "source"):
            self.loaded.append(found.get("src", ""))
        elif tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.loaded.append(found.get("href", ""))
        self.tags[tag] += 1


def article(site: Path, name: str) -> str:
    html = (site / f"{name}.html").read_text(encoding="utf-8")
    found = re.search(r"<article[^>]*>(.*)</article>", html, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_repository_shows(site: Path, name: str) -> None:
    """As CommonMark reads it: a list or a table that mkdocs takes for a paragraph is noticed."""
    markdown = PAGES[name].read_text(encoding="utf-8")
    shown = Contents(MarkdownIt("commonmark").enable("table").render(markdown)).tags
    built = Contents(article(site, name)).tags
    assert {tag: built[tag] for tag in COUNTED} == {tag: shown[tag] for tag in COUNTED}


def test_generated_pages_are_called_by_their_titles(site: Path) -> None:
    html = (site / "configuration.html").read_text(encoding="utf-8")
    assert "<title>Settings - ems-vllm</title>" in html
    assert "docs/generate.py" not in article(site, "configuration")


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    for page in site.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = Contents(html).loaded
        assert loaded
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page.name
        assert "@import" not in html
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\"'(\s]*(https?:)?//", sheet.read_text()), sheet.name


def test_links_lead_to_pages_where_there_is_one(site: Path) -> None:
    links = Contents(article(site, "index")).links
    assert {"verify.html", "contributing.html", "quality.html"} <= set(links)
    assert "architecture.html#memory-beside-the-cache" in links
    assert "index.html" not in Contents(article(site, "quality")).links
    # Files of the repository are named, as long as there is no address to link to.
    assert "all figures: <code>benchmarks/results/serving-cpu.json</code>" in article(site, "index")
    assert not [link for link in links if "benchmarks" in link]


def configured(folder: Path, docs: Path, repository: str = "") -> Path:
    """The configuration, of pages elsewhere; paths of a configuration are relative to it."""
    config = folder / "mkdocs.yml"
    text = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    text = text.replace('repository: ""', f'repository: "{repository}"')
    text = text.replace("docs_dir: ..", f"docs_dir: {docs}")
    text = text.replace("[hooks.py]", f"[{ROOT / 'docs' / 'site' / 'hooks.py'}]")
    config.write_text(text)
    return config


def test_links_lead_to_the_repository_where_it_has_an_address(tmp_path: Path) -> None:
    address = "https://example.org/ems/blob/main"
    build(tmp_path / "site", configured(tmp_path, ROOT / "docs", address))
    links = Contents(article(tmp_path / "site", "index")).links
    assert f"{address}/benchmarks/results/serving-cpu.json" in links
    assert f"{address}/Dockerfile.cpu" in links
    # A page is a page all the same.
    assert not [link for link in links if link.startswith(f"{address}/docs/")]


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for path in (ROOT / "docs").iterdir():
        if path.name != "verify.md":
            (pages / path.name).symlink_to(path)
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    wrong = "[x](../ems_vllm/missing.py) [x](budgets.md#no-such-heading)"
    (pages / "verify.md").write_text(f"{page}\n{wrong}\n")
    with pytest.raises(AssertionError) as failure:
        build(tmp_path / "site", configured(tmp_path, pages))
    said = str(failure.value)
    assert "docs/verify.md links to ../ems_vllm/missing.py, which does not exist" in said
    assert "'budgets.md#no-such-heading'" in said
