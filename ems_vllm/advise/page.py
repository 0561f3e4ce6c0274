# SPDX-License-Identifier: Apache-2.0
"""The advice as files: a page in Markdown, its figure, and the JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ems_vllm.advise.report import AdviceReport
from ems_vllm.advise.rows import Rows, arrivals, lengths, notes, quality, traffic
from ems_vllm.config import ConfigError
from ems_vllm.eval.records.readable_json import readable
from ems_vllm.eval.report.markdown import escape


class Write(Protocol):
    def __call__(self, report: AdviceReport, out: Path) -> None: ...


def writer() -> Write:
    """What writes the files.

    Raises:
        ConfigError: a package that draws is missing.
    """
    try:
        from ems_vllm.advise.figure import draw
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"A figure needs {error.name}, which is not installed: pip install 'ems-vllm[report]', "
            "or leave --out out."
        ) from None

    def write(report: AdviceReport, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        draw(report, out / "advice.svg")
        (out / "advice.md").write_text(markdown(report), encoding="utf-8")
        data = readable(report.model_dump(mode="json"))
        (out / "advice.json").write_text(data, encoding="utf-8")

    return write


def markdown(report: AdviceReport) -> str:
    """The page."""
    return "\n\n".join(_blocks(report)) + "\n"


def _blocks(report: AdviceReport) -> Iterator[str]:
    suggestion = report.suggestion
    yield f"# A budget for {escape(report.model)}"
    size = f": {suggestion.budget}" if suggestion.budget else ""
    yield f"**{escape(suggestion.verdict + size)}**"
    yield "\n".join(escape(sentence) for sentence in suggestion.sentences)
    yield f"    {suggestion.command}"
    yield f"{escape(report.prompts)}: {escape(traffic(report))}"
    yield "![By budget: memory of a request, requests at a time, and KL from dense](advice.svg)"
    for rows in (lengths(report), arrivals(report), quality(report)):
        if rows is not None:
            yield f"## {escape(rows.title)}"
            yield _table(rows)
    yield "\n".join(escape(note) for note in notes(report))


def _table(rows: Rows) -> str:
    lines = [_line(rows.head), f"|{'---|' * len(rows.head)}"]
    for row in rows.body:
        cells = [f"**{escape(cell)}**" if row[0] == rows.chosen else escape(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(head: tuple[str, ...]) -> str:
    return f"| {' | '.join(escape(name.replace('-' + chr(10), '')) for name in head)} |"
