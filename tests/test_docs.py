# SPDX-License-Identifier: Apache-2.0
"""Pages that are tables of the code or of results are up to date, and links lead somewhere."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ems_vllm import cli
from ems_vllm.config import load_config, recipes

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


def test_what_the_command_knows_of_methods_is_current():
    expected = GENERATOR["measured"].files()
    found = {
        path.name: path.read_text(encoding="utf-8") for path in GENERATOR["MEASURED"].iterdir()
    }
    assert found == expected, "run `python docs/generate.py`"


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


def cells_of(table: str) -> list[list[str]]:
    """Rows of a Markdown table without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]


def section(page: str, title: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_settings_show_what_each_recipe_sets():
    shown = {row[0]: row for row in cells_of(section("configuration.md", "Recipes"))}
    assert set(shown) == {f"`{name}`" for name in recipes.names()}
    for name in recipes.names():
        assert shown[f"`{name}`"][1] == f"budget {load_config(name).budget}"
        merger = shown[f"`{name}`"][5].strip("`").split(", ")[0]
        assert merger == load_config(name).merger.name()


def test_example_of_a_recipe_is_one(tmp_path):
    lines = section("configuration.md", "A recipe of your own").splitlines()
    example = "\n".join(
        line[4:] for line in lines if line.startswith("    ") and "vllm" not in line
    )
    (tmp_path / "own.yaml").write_text(example)
    config = load_config(str(tmp_path / "own.yaml"))
    shown = config.to_dict()
    for key, value in yaml.safe_load(example).items():
        if isinstance(value, dict):
            assert value.items() <= shown[key].items()
        else:
            assert shown[key] == value


def test_refusals_show_what_the_engine_fills_in():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert "splits it into blocks of `<block size>`" in page
    assert not re.search(r"{\w+}", page)


def commands_of_capacity(readme: str) -> list[str]:
    return re.findall(r"^    (ems-vllm plan .*--pool-gib.*)$", readme, re.MULTILINE)


def test_commands_of_the_readme_print_its_table_of_capacity():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = cells_of(readme.split("<!-- table capacity -->")[1].split("<!-- end -->")[0])
    commands = commands_of_capacity(readme)
    assert len(commands) == 1
    for name, gib, *cells in rows:
        layers = {"Llama 3.1 8B": "32", "Llama 3.3 70B": "80"}[name.split(",")[0]]
        for size, place in (("--ratio 0.25", 1), ("--budget 1024", 2)):
            args = shlex.split(commands[0])[1:]
            args[args.index("--pool-gib") + 1] = gib
            args[args.index("--num-layers") + 1] = layers
            at = args.index("--budget")
            args[at : at + 2] = shlex.split(size)
            result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, args)
            assert result.exit_code == 0, result.output
            pool = result.output.split("Requests that fit a pool")[1]
            printed = [line for line in pool.splitlines() if line.startswith("│")]
            for line, cell in zip(printed, cells, strict=True):
                _, dense, _, coming_in = (part.strip() for part in line.strip("│ ").split("│"))
                in_page = cell.split(" / ")
                assert (dense, coming_in) == (in_page[0], in_page[place])


def test_every_module_of_the_engine_stands_once_in_the_life_of_a_request():
    engine = ROOT / "ems_vllm" / "engine"
    modules = {
        str(path.relative_to(engine)) for path in engine.rglob("*.py") if path.name != "__init__.py"
    }
    page = (ROOT / "docs" / "life-of-a-request.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\* \[`([\w/.]+)`\]", page, re.MULTILINE)
    assert sorted(listed) == sorted(modules), "add it to a step in docs/pages/life.py"
    assert len(re.findall(r"^## \d\. ", page, re.MULTILINE)) == 9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    roots = (ROOT, ROOT / "ems_vllm", ROOT / "ems_vllm" / "engine")
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|h|cpp|cu|cuh|yaml))`", text):
        assert any((root / name).exists() for root in roots), name


def test_every_flag_of_the_command_line_says_what_it_means():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = [row for row in cells_of(page) if row[0].startswith("`")]
    assert len(rows) > 40
    assert not [row[0] for row in rows if not row[1]]
