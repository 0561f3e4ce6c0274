# SPDX-License-Identifier: Apache-2.0
"""Pages that are tables of the code or of results are up to date, and links lead somewhere."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", GENERATOR["PAGES"])
def test_generated_page_is_current(name):
    expected = GENERATOR["_NOTE"] + GENERATOR["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, (
        "run `python docs/generate.py`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_figures_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert text == GENERATOR["tables"].fill(text), "run `python docs/generate.py`"


def test_every_table_of_results_stands_in_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {f"<!-- table {name} -->" for name in GENERATOR["tables"].TABLES} == set(
        re.findall(r"<!-- table \S+ -->", text)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_find_them(page):
    for target, heading in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text("utf-8")):
        path = page.parent / target if target else page
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
        assert heading in slugs, f"{target}#{heading}"
