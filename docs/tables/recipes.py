# SPDX-License-Identifier: Apache-2.0
"""Variants of recipes in results of `python -m ems_vllm.eval.lab`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tables.markdown import ASKED, FOCUS, GROUPS, TITLES, percent, read, signed, table, titles


def recipes(result: str, variants: Sequence[str], groups: Sequence[str] = GROUPS) -> str:
    """Losses above the full cache's, and answers right, of variants at all budgets."""
    lab = read(result)
    found = {(one["budget"], one["variant"], one["group"]): one for one in lab["summaries"]}
    rows = []
    for budget in lab["budgets"]:
        for variant in variants:
            cells = [_summary(found.get((budget, variant, group)), group) for group in groups]
            if any(cells):
                label = f"**{variant}**" if variant == FOCUS else variant
                rows.append([percent(budget), label, *cells])
    return table(["", "", *titles(groups)], rows)


def right(
    rows: Mapping[str, tuple[str, str]], results: Sequence[Sequence[str]], budgets: Sequence[str]
) -> str:
    """Answers right of those that the full cache has right, over several sets of prompts.

    Args:
        rows: Label: variant and group.
        results: Of each set of prompts; the first that has the variant counts.
        budgets: Columns.
    """

    def cell(variant: str, group: str, budget: str) -> str:
        found = [
            next(
                one
                for result in of_set
                for one in read(result)["summaries"]
                if (one["variant"], one["group"], one["budget"]) == (variant, group, budget)
            )
            for of_set in results
        ]
        return f"{sum(one['right'] for one in found)} of {sum(one['of'] for one in found)}"

    cells = [
        [label, *(cell(variant, group, budget) for budget in budgets)]
        for label, (variant, group) in rows.items()
    ]
    return table(["of the full cache's right answers", *map(percent, budgets)], cells)


class Column(NamedTuple):
    """What of a result stands in a column.

    Attributes:
        group: Or "error": the mean error of attention's outputs.
        title: Instead of budget and group.
    """

    result: str
    budget: str
    group: str
    title: str = ""


def ablation(labels: Mapping[str, str], columns: Sequence[Column]) -> str:
    """Variants in rows, under their labels."""
    head = [
        column.title or f"{percent(column.budget)}: {TITLES.get(column.group, column.group)}"
        for column in columns
    ]
    rows = [
        [label, *(_cell(variant, column) for column in columns)]
        for variant, label in labels.items()
    ]
    return table(["", *head], rows)


def equal_bytes(result: str, groups: Sequence[str] = GROUPS) -> str:
    """What quantised caches and variants lose, by group; columns are ratios of bytes.

    A quantised cache has one ratio: it stands in the column that it fills, or nearly.
    """
    lab = read(result)
    columns = [budget for budget in lab["budgets"] if budget.endswith("x")]
    rows = []
    for group in groups:
        title = f"**{TITLES.get(group, group)}**"
        for variant in lab["settings"]:
            found = [
                one
                for one in lab["summaries"]
                if (one["variant"], one["group"]) == (variant, group)
            ]
            cells = dict.fromkeys(columns, "")
            label = variant
            for one in found:
                column = one["budget"]
                if column not in cells:
                    column, label = _column(one, columns), _with_ratio(variant, one)
                elif one["bytes_ratio"] > _NEARLY * float(column[:-1]):
                    # A variant that is stored in fewer bits needs to drop nothing here.
                    continue
                cells[column] = _summary(one, group)
            rows.append([title, label, *cells.values()])
            title = ""
    return table(["question", "", *columns], rows)


# Ratios up to this much apart are the same.
_NEARLY = 1.1


def _column(one: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The largest ratio that a quantised cache reaches, or nearly."""
    reached = [name for name in columns if float(name[:-1]) <= _NEARLY * one["bytes_ratio"]]
    return reached[-1] if reached else columns[0]


def _with_ratio(variant: str, one: Mapping[str, Any]) -> str:
    ratio = round(one["bytes_ratio"], 2)
    return variant if ratio == int(ratio) else f"{variant} ({ratio:.2f}x)"


def _cell(variant: str, column: Column) -> str:
    found = {
        one["group"]: one
        for one in read(column.result)["summaries"]
        if (one["variant"], one["budget"]) == (variant, column.budget)
    }
    if not found:
        return ""
    if column.group != "error":
        return signed(found[column.group]["loss_above_full"], column.group)
    total = sum(one["n"] for one in found.values())
    return f"{sum(one['attention_error'] * one['n'] for one in found.values()) / total:.3f}"


def _summary(one: dict[str, Any] | None, group: str) -> str:
    if one is None:
        return ""
    loss = signed(one["loss_above_full"], group)
    return f"{loss} ({one['right']} of {one['of']})" if one["of"] and group in ASKED else loss
