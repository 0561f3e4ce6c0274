# SPDX-License-Identifier: Apache-2.0
"""Results of one or more runs as a page that one looks at, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.records.results import EvalResult

__all__ = ["write_report"]


def write_report(results: Sequence[EvalResult], out: Path) -> None:
    """Write `report.html` and `results.md` into a folder, which is made if need be.

    Args:
        results: Of one or more runs: other engines, other commits, other budgets.
        out: Other files there stay as they are.

    Raises:
        ConfigError: There is no result, or a package that draws is missing.
    """
    if not results:
        raise ConfigError("results=[] leaves nothing to report: name at least one file.")
    try:
        from ems_vllm.eval.report.html import html
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"A report needs {error.name}, which is not installed: pip install 'ems-vllm[report]'."
        ) from None
    from ems_vllm.eval.report.markdown import markdown
    from ems_vllm.eval.report.section import sections

    parts = sections(results)
    out.mkdir(parents=True, exist_ok=True)
    pages = {
        "report.html": html(parts),
        "results.md": markdown(parts),
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
