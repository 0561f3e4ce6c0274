# SPDX-License-Identifier: Apache-2.0
"""Tables of losses above the full cache's, in Markdown, from files in benchmarks/results/.

A "result" is one of `python -m ems_vllm.eval.lab`, "answers" are those of `...lab.answers`. A group
is a protocol, or "continuation": running text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from ems_vllm.eval.report.stats import Interval, bootstrap, difference

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

_FOCUS = "ems"
_TITLES = {"continuation": "text"}
_ASKED = ("last", "first", "later")
_GROUPS = ("last", "first", "later", "continuation")
_PRESSES = {
    "adakv_expected_attention": "Expected Attention with AdaKV",
    "adakv_snapkv": "AdaKV over SnapKV",
    "chunkkv_snapkv": "ChunkKV over SnapKV",
    "compactor": "Compactor",
    "criticaladakv_snapkv": "CriticalAdaKV over SnapKV",
    "keydiff": "KeyDiff",
    "kvzip": "KVzip (reads twice)",
    "kvzip_equal": "KVzip, equal heads",
    "pyramidkv": "PyramidKV",
    "snapkv": "SnapKV",
    "tova": "TOVA",
}
# Those that read a prompt once, as a server does.
ONE_READING = _PRESSES.keys() - {"kvzip", "kvzip_equal"}


def recipes(
    result: str, variants: Sequence[str], groups: Sequence[str] = _GROUPS, focus: str = _FOCUS
) -> str:
    """Losses above the full cache's, and answers right, of variants at all budgets."""
    lab = _read(result)
    found = {(one["budget"], one["variant"], one["group"]): one for one in lab["summaries"]}
    rows = []
    for budget in lab["budgets"]:
        for variant in variants:
            cells = [_summary(found.get((budget, variant, group)), group) for group in groups]
            if any(cells):
                label = f"**{variant}**" if variant == focus else variant
                rows.append([_percent(budget), label, *cells])
    return _table(["", "", *_titles(groups)], rows)


def full_cache(results: Mapping[str, str]) -> str:
    """Answers of the full cache that are right, by task; a column for each result and protocol.

    Args:
        results: Files by what they are to be called.
    """
    counts: dict[str, dict[tuple[str, str], list[bool]]] = {}
    for label, result in results.items():
        for prompt in _read(result)["prompts"]:
            if prompt["group"] in _ASKED:
                by_column = counts.setdefault(prompt["task"], {})
                by_column.setdefault((label, prompt["group"]), []).append(prompt["full"]["right"])
    columns = [(label, group) for label in results for group in _ASKED]
    rows = [
        [f"`{task}`", *(_of(by_column.get(column, [])) for column in columns)]
        for task, by_column in sorted(counts.items())
    ]
    return _table(["", *(f"{label}: {group}" for label, group in columns)], rows)


def _of(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}" if right else ""


def peers(result: str, answers: str, groups: Sequence[str] = _GROUPS) -> str:
    """EMS beside another engine's methods on the same prompts, in the order of the first group."""
    lab, losses = _read(result), _read(answers)["losses"]
    rows = []
    for budget in lab["budgets"]:
        of_budget = [["**ems**", *_means(_ours(lab, _FOCUS, budget), groups)]]
        for press, label in _PRESSES.items():
            of_press = losses.get(f"{press}-{budget}")
            if of_press:
                of_budget.append([label, *_means(of_press, groups)])
        rows += [
            [_percent(budget), label, *map(_signed, cells, groups)]
            for label, *cells in sorted(of_budget, key=lambda row: row[1])
        ]
    return _table(["", "", *_titles(groups)], rows)


def behind(
    result: str,
    answers: str,
    presses: Collection[str] = ONE_READING,
    groups: Sequence[str] = _GROUPS,
) -> str:
    """By budget and group: the best of some presses, and what EMS loses more than it."""
    lab, losses = _read(result), _read(answers)["losses"]
    rows = []
    for budget in lab["budgets"]:
        ours = _ours(lab, _FOCUS, budget)
        cells = []
        for group in groups:
            of_group = {
                label: losses[f"{press}-{budget}"][group]
                for press, label in _PRESSES.items()
                if press in presses and group in losses.get(f"{press}-{budget}", {})
            }
            if not of_group or group not in ours:
                cells.append("")
                continue
            best = min(of_group, key=lambda label: mean(of_group[label].values()))
            digits = _digits(group)
            gap = _interval(ours[group], of_group[best])
            low, high = f"{gap.low:+.{digits}f}", f"{gap.high:+.{digits}f}"
            name = f"{best}: " if len(presses) > 1 else ""
            cells.append(f"{name}{gap.value:+.{digits}f} ({low} to {high})")
        if any(cells):
            rows.append([_percent(budget), *cells])
    return _table(["", *_titles(groups)], rows)


def change(before: str, after: str, groups: Sequence[str] = _GROUPS) -> str:
    """What EMS loses in one result and in another, and the difference, on prompts of both."""
    old, new = _read(before), _read(after)
    rows = []
    for budget in new["budgets"]:
        ours, others = _ours(old, _FOCUS, budget), _ours(new, _FOCUS, budget)
        cells = []
        for group in groups:
            if group not in others:
                cells.append("")
                continue
            both = ours[group].keys() & others[group].keys()
            gap = _interval(others[group], ours[group])
            first, second = (
                _signed(mean(losses[group][name] for name in both), group)
                for losses in (ours, others)
            )
            digits = _digits(group)
            interval = f"{gap.low:+.{digits}f} to {gap.high:+.{digits}f}"
            cells.append(f"{first}, {second} ({interval})")
        rows.append([_percent(budget), *cells])
    return _table(["", *_titles(groups)], rows)


def equal_bytes(result: str, groups: Sequence[str] = _GROUPS) -> str:
    """What quantised caches and variants lose, by group; columns are ratios of bytes.

    A quantised cache has one ratio: it stands in the column that it fills, or nearly.
    """
    lab = _read(result)
    columns = [budget for budget in lab["budgets"] if budget.endswith("x")]
    rows = []
    for group in groups:
        title = f"**{_TITLES.get(group, group)}**"
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
    return _table(["question", "", *columns], rows)


# Ratios up to this much apart are the same.
_NEARLY = 1.1


def _column(one: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The largest ratio that a quantised cache reaches, or nearly."""
    reached = [name for name in columns if float(name[:-1]) <= _NEARLY * one["bytes_ratio"]]
    return reached[-1] if reached else columns[0]


def _with_ratio(variant: str, one: Mapping[str, Any]) -> str:
    ratio = round(one["bytes_ratio"], 2)
    return variant if ratio == int(ratio) else f"{variant} ({ratio:.2f}x)"


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
    titles = [
        column.title or f"{_percent(column.budget)}: {_TITLES.get(column.group, column.group)}"
        for column in columns
    ]
    rows = [
        [label, *(_cell(variant, column) for column in columns)]
        for variant, label in labels.items()
    ]
    return _table(["", *titles], rows)


def _cell(variant: str, column: Column) -> str:
    found = {
        one["group"]: one
        for one in _read(column.result)["summaries"]
        if (one["variant"], one["budget"]) == (variant, column.budget)
    }
    if column.group != "error":
        return _signed(found[column.group]["loss_above_full"], column.group)
    total = sum(one["n"] for one in found.values())
    return f"{sum(one['attention_error'] * one['n'] for one in found.values()) / total:.3f}"


def _ours(lab: dict[str, Any], variant: str, budget: str) -> dict[str, dict[str, float]]:
    """Losses above the full cache's by group and prompt, as AnswerLosses has them."""
    found: dict[str, dict[str, float]] = {}
    for prompt in lab["prompts"]:
        measured = prompt["measured"].get(budget, {}).get(variant)
        if measured:
            name = f"{prompt['task']}/{prompt['seed']}/{prompt['index']}"
            loss = measured["loss"] - prompt["full"]["loss"]
            found.setdefault(prompt["group"], {})[name] = loss
    return found


def _means(losses: dict[str, dict[str, float]], groups: Iterable[str]) -> list[float]:
    return [mean(losses[group].values()) if losses.get(group) else np.nan for group in groups]


def _interval(ours: dict[str, float], theirs: dict[str, float]) -> Interval:
    """Of ours - theirs, in pairs; prompts that both have."""
    both = sorted(ours.keys() & theirs.keys())
    return bootstrap([np.array([[ours[name], theirs[name]] for name in both])], difference)


def _summary(one: dict[str, Any] | None, group: str) -> str:
    if one is None:
        return ""
    loss = _signed(one["loss_above_full"], group)
    return f"{loss} ({one['right']} of {one['of']})" if one["of"] and group in _ASKED else loss


def _digits(group: str) -> int:
    """Text is many tokens, and differs less."""
    return 2 if group in _ASKED else 3


def _signed(loss: float, group: str) -> str:
    return "" if np.isnan(loss) else f"{loss:+.{_digits(group)}f}"


def _percent(budget: str) -> str:
    return f"{100 * float(budget):g} %"


def _titles(groups: Iterable[str]) -> list[str]:
    return [_TITLES.get(group, group) for group in groups]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([_row(head), f"|{'---|' * len(head)}", *map(_row, rows)])


def _row(cells: Iterable[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found
