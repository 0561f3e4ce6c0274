# SPDX-License-Identifier: Apache-2.0
"""The pages: well-formed, self-contained, safe with foreign text, and true to the data."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eval.report_results import BITS, BUDGETS, KVPRESS, VLLM, results

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.records.results import EvalResult, MethodResult, SampleResult
from ems_vllm.eval.report import write_report
from ems_vllm.eval.report.aggregate import aggregate
from ems_vllm.eval.report.compare import mean_table
from ems_vllm.eval.report.samples import MAX_PER_SERIES, worst_samples
from ems_vllm.eval.report.verdict import verdict

pytestmark = pytest.mark.slow

VOID = {"meta", "br", "input", "link", "img", "hr"}
HOSTILE = "</pre></td></table><script>alert('x')</script><img src=http://evil.example/a.png>&\"'"


class Page(HTMLParser):
    """What a page holds; every element must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.errors = [], [], [], []
        self.ids, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append((tag, self.getpos()))

    def handle_data(self, data):
        self.text.append(data)


def pages(found, tmp_path):
    """HTML, parsed and checked, and Markdown."""
    write_report(found, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.errors
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    for key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#"), (key, value)
        assert not key.startswith("on")
    # Nothing is loaded by the style sheets either.
    assert "@import" not in html
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", html))
    return page, html, (tmp_path / "results.md").read_text(encoding="utf-8")


def sentences(*found):
    report = aggregate(found)
    return " ".join(verdict(report, mean_table(report))).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    found = [results(), results(KVPRESS, "kvpress", serving=False)]
    return pages(found, tmp_path_factory.mktemp("report"))


def test_the_page_shows_every_part(compared):
    page, html, _ = compared
    text = " ".join(page.text)
    for heading in (
        "Quality against budget",
        "Where the needle is found",
        "All numbers",
        "Quality against memory and speed",
        "Answers that compression broke",
    ):
        assert heading in text
    # The mean, six tasks, memory and three of speed; all but the tasks in a second, wide form.
    assert html.count('<div class="narrow"><svg') == 11
    assert html.count('<div class="wide"><svg') == 5
    # Two tasks with a depth, six budgets, ten methods and two full caches.
    assert page.attributes.count(("class", "heat")) == 2 * 6 * 12
    assert all(name in text for name in [*VLLM, *KVPRESS])


def test_an_excluded_task_is_greyed_and_named(compared):
    _, html, markdown = compared
    assert re.search(r'<figure class=" ?excluded">\s*<figcaption><b>vt', html)
    assert "the full cache itself scores" in html
    assert "Left out of every mean, because the full cache itself scores below 0.5: vt" in markdown
    assert "## vt\n\n45 prompts. Not in the mean: the full cache itself scores" in markdown


def test_the_same_results_give_the_same_pages(tmp_path):
    found = [results({"ems": 2.0, "random": -1.0})]
    first = pages(found, tmp_path / "a")[1:]
    assert pages(found, tmp_path / "b")[1:] == first


def test_the_json_beside_it_stays_as_it_is(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    pages([results({"ems": 1.0})], tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"


def flat(name, share, fraction=None, n=100):
    """A method that is right on the first part of the prompts."""
    samples = [
        SampleResult(task="t", length=100, seed=0, index=i, score=float(i < share * n))
        for i in range(n)
    ]
    return MethodResult(method=name, budget_fraction=fraction, samples=samples)


def flat_run(*methods):
    return EvalResult(model="m", created="now", methods=list(methods))


def test_the_verdict_says_what_the_data_say():
    text = sentences(
        flat_run(
            flat("full", 1.0),
            flat("ems", 0.93, 0.06),
            flat("snapkv", 0.70, 0.06),
            flat("ems", 0.96, 0.25),
            flat("snapkv", 0.97, 0.25),
            flat("ems", 0.50, 0.5),
            flat("snapkv", 1.00, 0.5),
        )
    )
    assert "At a budget of 6 %, EMS keeps 93.0 % of the full cache's score" in text
    assert "best or within noise of the best at 2 of 3 budgets, and clearly the best at 6 %" in text
    assert "At 50 %, snapkv (vllm) is ahead by 50.0 points" in text
    assert text.count("ahead") == 1
    assert "The smallest budget at which it keeps 95 % is 25 %." in text


def test_the_verdict_is_about_the_best_where_there_is_no_ems():
    text = sentences(flat_run(flat("full", 1), flat("a", 0.5, 0.06), flat("b", 0.8, 0.06)))
    assert "At a budget of 6 %, b (vllm) keeps 80.0 %" in text
    assert "It keeps 95 % at no budget measured." in text


def test_the_verdict_compares_engines():
    peer = flat("ems", 0.40, 0.06).model_copy(update={"engine": "transformers"})
    found = [flat("full", 1), flat("ems", 0.90, 0.06), peer]
    text = sentences(flat_run(*found))
    assert "ems (transformers) agrees with ems (vllm) within noise at 0 of 1 budget; at 6 %" in text
    assert "it differs by \N{MINUS SIGN}50.0." in text
    same = flat("ems", 0.90, 0.06).model_copy(update={"engine": "transformers"})
    assert "within noise at 1 of 1 budget." in sentences(flat_run(*found[:2], same))
    # It is the same method, not a rival that ties.
    assert "clearly the best" not in sentences(flat_run(*found[:2], same))
    rival = flat("snapkv", 0.70, 0.06)
    assert "clearly the best at 6 %" in sentences(flat_run(*found[:2], same, rival))


def test_the_verdict_says_who_answered_less():
    full, ems = flat("full", 1), flat("ems", 0.9, 0.06)
    assert "fewer prompts" not in sentences(flat_run(full, ems))
    text = sentences(flat_run(full, ems, flat("a", 0.9, 0.06, n=50)))
    assert "1 method answered fewer prompts than others" in text


def test_markdown_has_the_right_cells(tmp_path):
    found = flat_run(
        flat("full", 0.9), flat("ems", 0.9, 0.06), flat("a|b", 0.45, 0.06), flat("ems", 0.9, 0.5)
    )
    _, _, markdown = pages([found], tmp_path)
    lines = markdown.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    table = lines[lines.index("| method | full cache | 6 % | 50 % |") :][:5]
    assert table[1] == "| --- | ---: | ---: | ---: |"
    # Wilson's interval of 90 of 100.
    assert table[2] == "| full (vllm) | 0.900 (0.826 to 0.945) |  |  |"
    assert table[3] == "| ems (vllm) |  | **100.0** (100.0 to 100.0) | 100.0 (100.0 to 100.0) |"
    assert table[4].startswith("| a\\|b (vllm) |  | 50.0 (")


def test_a_heat_map_shows_the_mean_of_its_cell(tmp_path):
    samples = [
        SampleResult(task="t", length=length, depth=depth, seed=0, index=i, score=score)
        for i, (length, depth, score) in enumerate(
            [(512, 0.0, 1), (512, 0.0, 0), (512, 1.0, 1), (1024, 0.0, 0.2)]
        )
    ]
    method = MethodResult(method="ems", budget_fraction=0.1, samples=samples)
    _, html, _ = pages([flat_run(method)], tmp_path)
    [table] = re.findall(r'<table class="heat">.*?</table>', html, flags=re.DOTALL)
    assert re.findall(r'<th scope="col">([^<]*)', table) == ["512", "1,024"]
    rows = re.findall(r'<th scope="row">([^<]*)</th>(.*)</tr>', table)
    assert rows == [
        ("0", '<td class="h10">50</td><td class="h4">20</td>'),
        ("1", '<td class="h20">100</td><td></td>'),
    ]


def test_worst_answers_are_the_largest_losses_of_tasks_compared():
    report = aggregate([results({"ems": 1.0, "random": -1.5})])
    worst = worst_samples(report, report.series)
    assert {item.series.method for item in worst} == {"ems", "random"}
    for series in report.compressed:
        own = [item for item in worst if item.series is series]
        prompts = {(i.sample.task, i.sample.length, i.sample.seed, i.sample.index) for i in own}
        assert len(prompts) == len(own) == MAX_PER_SERIES
        assert [item.column for item in own] == sorted((i.column for i in own), reverse=True)
    assert all(item.drop == 1 and item.full.score == 1 for item in worst)
    assert not {item.sample.task for item in worst} & {"vt", BITS}


def several_protocols():
    """EMS finds everything but what is asked later; the other method finds half, always."""
    found = []
    for protocol, share in (("last", 1.0), ("first", 1.0), ("later", 0.6)):
        for method in (flat("full", 1), flat("ems", share, 0.06), flat("snapkv", 0.5, 0.06)):
            samples = [s.model_copy(update={"protocol": protocol}) for s in method.samples]
            found.append(method.model_copy(update={"samples": samples}))
    return flat_run(*found)


def test_protocols_have_sections_of_their_own_and_stand_side_by_side(tmp_path):
    _, html, markdown = pages([several_protocols()], tmp_path)
    lines = markdown.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    head = "| method, 6 % | Question last | Question first | Question later |"
    table = lines[lines.index(head) :][:4]
    assert [cell.split(" (")[0] for cell in table[2].split(" | ")[1:]] == [
        "**100.0**", "**100.0**", "**60.0**"
    ]  # fmt: skip
    assert [cell.split(" (")[0] for cell in table[3].split(" | ")[1:]] == ["50.0", "50.0", "50.0"]
    for title in ("Question last", "Question first", "Question later"):
        assert f"## {title}" in lines
        assert f"<h2>{title}</h2>" in html
    assert html.count("Quality against budget</h3>") == 3
    text = " ".join(lines)
    assert "Question later instead of question last changes EMS at 6 % by \u221240.0 points" in text
    assert "first instead of question last changes EMS at 6 % by +0.0 points" in text


def test_a_method_is_missing_only_where_it_was_not_asked(tmp_path):
    later = [s.model_copy(update={"protocol": "later"}) for s in flat("ems", 1, 0.06).samples]
    found = flat_run(
        flat("full", 1),
        flat("snapkv", 0.5, 0.06),
        MethodResult(method="ems", budget_fraction=0.06, samples=later),
    )
    markdown = pages([found], tmp_path)[2]
    last, asked_later = markdown.split("## Question later")
    assert "| ems (vllm) |" not in last.split("## Question last")[1]
    assert "| ems (vllm) |" in asked_later
    assert "| snapkv (vllm) |" not in asked_later


def test_foreign_text_is_shown_and_never_obeyed(tmp_path):
    bad = [
        SampleResult(task="t", length=9, depth=0.5, seed=0, index=0, score=0, output=HOSTILE),
        SampleResult(
            task="t",
            length=9,
            depth=0.5,
            seed=0,
            index=1,
            score=0,
            output="\x00\ud800\u202e\x1b[0m",
        ),
        SampleResult(
            task="t", length=9, depth=0.5, seed=0, index=2, score=0, output="", error=HOSTILE
        ),
        SampleResult(task=f"$x_${HOSTILE}", length=9, seed=0, index=0, score=1),
    ]
    full = [s.model_copy(update={"score": 1.0, "error": None}) for s in bad]
    found = EvalResult(
        model=HOSTILE,
        preset=HOSTILE,
        created=HOSTILE,
        environment={HOSTILE: HOSTILE},
        methods=[
            MethodResult(method="full", samples=full),
            MethodResult(method=HOSTILE, engine=HOSTILE, budget_fraction=0.1, samples=bad),
        ],
    )
    page, html, markdown = pages([found], tmp_path)
    assert "<script" not in html
    assert "<script" not in markdown
    assert HOSTILE in "".join(page.text)
    assert "\\u0000\\ud800\\u202e\\u001b[0m" in "".join(page.text)


ONE = {"ems": 2.0}
INCOMPLETE = {
    "one method": [results(ONE)],
    "no full cache": [results({"ems": 2.0, "random": -1.0}, full=False)],
    "no serving figures": [results(ONE, serving=False)],
    "only the full cache": [results({})],
    "no method": [EvalResult(model="m", created="now")],
    "no samples": [
        flat_run(MethodResult(method="full"), MethodResult(method="ems", budget_fraction=0.1))
    ],
    "one sample": [flat_run(flat("full", 1, n=1), flat("ems", 1, 0.1, n=1))],
    "nothing right": [flat_run(flat("full", 1), flat("ems", 0, 0.1), flat("a", 0, 0.1))],
    "the full cache fails all": [flat_run(flat("full", 0.1), flat("ems", 0.1, 0.1))],
    "an empty cache": [flat_run(flat("full", 1), flat("ems", 0, 0.0), flat("ems", 1, 0.1))],
    "only bits per byte": [
        results(ONE).model_copy(
            update={
                "methods": [
                    m.model_copy(update={"samples": [s for s in m.samples if s.task == BITS]})
                    for m in results(ONE).methods
                ]
            }
        )
    ],
}


@pytest.mark.parametrize("found", INCOMPLETE.values(), ids=INCOMPLETE)
def test_missing_pieces_leave_a_page(found, tmp_path):
    page, _, markdown = pages(found, tmp_path)
    assert "svg" in page.tags or len(markdown) > 50
    assert "nan" not in " ".join(page.text).lower().split()
    assert "nan" not in markdown


def test_hundreds_of_methods_are_all_in_the_tables(tmp_path):
    names = [f"method{i}" for i in range(200)]
    found = flat_run(
        flat("full", 1, n=10),
        *(flat(name, i / 200, b, n=10) for i, name in enumerate(names) for b in BUDGETS[:2]),
    )
    page, _, markdown = pages([found], tmp_path)
    text = " ".join(page.text)
    assert "Figures show the 13 best of 201 methods" in text
    assert all(f"| {name} (vllm) |" in markdown for name in names)


def test_a_wheel_brings_the_templates():
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    package = root / "ems_vllm"
    patterns = settings["tool"]["setuptools"]["package-data"]["ems_vllm"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert set((package / "eval" / "report" / "templates").iterdir()) <= packed


def test_nothing_to_report_is_an_operators_mistake(tmp_path):
    with pytest.raises(ConfigError, match="nothing to report"):
        write_report([], tmp_path)
