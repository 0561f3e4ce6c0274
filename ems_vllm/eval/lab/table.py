# SPDX-License-Identifier: Apache-2.0
"""An ablation as a table: variants by protocol, a section for each size."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ems_vllm.eval.lab.result import LabResult, Summary
from ems_vllm.eval.records.method import FULL


def table(result: LabResult) -> Table:
    """Rows are variants; each group has columns for loss, right answers, KL, errors and bytes."""
    names = [full.group for full in result.full]
    has_errors = any(row.attention_error is not None for row in result.summaries)
    shown = Table(title=f"Loss above the full cache, nats per token: {escape(result.model)}")
    shown.add_column("")
    for name in names:
        shown.add_column(f"{name}\nloss (95 %)", justify="right", no_wrap=True)
        for metric in ("right", "KL", *(["error"] if has_errors else []), "bytes"):
            shown.add_column(f"\n{metric}", justify="right", no_wrap=True)
    row = ["full cache"]
    for full in result.full:
        row += [f"{full.loss:.3f}", f"{full.right}/{full.n}", *_blank(has_errors), "1x"]
    shown.add_row(*row)
    by_place = {(one.budget, one.variant, one.group): one for one in result.summaries}
    for budget in result.budgets:
        shown.add_section()
        shown.add_row(f"budget {budget}", style="bold")
        for variant, settings in result.settings.items():
            if (budget == FULL) != (settings["recipe"] == FULL):
                continue
            row = [escape(variant)]
            for name in names:
                row += _columns(by_place.get((budget, variant, name)), has_errors)
            shown.add_row(*row)
    return shown


def _columns(one: Summary | None, has_errors: bool) -> list[str]:
    if one is None:
        return ["no room", "", *_blank(has_errors), ""]
    loss = f"{one.loss_above_full:+.3f}"
    if one.low is not None and one.high is not None:
        loss += f" ({one.low:+.3f} to {one.high:+.3f})"
    columns = [loss, f"{one.right}/{one.of}" if one.of else "-", f"{one.kl:.3f}"]
    if has_errors:
        columns.append("" if one.attention_error is None else f"{one.attention_error:.3f}")
    return [*columns, f"{one.bytes_ratio:.3g}x"]


def _blank(has_errors: bool) -> list[str]:
    """Cells of KL and errors that say nothing."""
    return [""] * (1 + has_errors)
