# SPDX-License-Identifier: Apache-2.0
"""EMS beside other methods, prompt by prompt: results of `python -m ems_vllm.eval.lab`, and answers
of other engines as `python -m ems_vllm.eval.lab.answers` counts them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from ems_vllm.eval.report.stats import Interval, bootstrap, difference
from tables.markdown import FOCUS, GROUPS, percent, read, signed, table, titles

_PRESSES = {
    "adakv_expected_attention": "Expected Attention with AdaKV",
    "adakv_snapkv": "AdaKV over SnapKV",
    "chunkkv_snapkv": "ChunkKV over SnapKV",
    "compactor": "Compactor",
    "criticaladakv_snapkv": "CriticalAdaKV over SnapKV",
    "keydiff": "KeyDiff",
    "kvzip": "KVzip (reads twice)",
    "kvzip_equal": "KVzip, equal heads",
    "merging_snapkv": "MergingPress over SnapKV",
    "cam_snapkv": "CAMPress over SnapKV",
    "pyramidkv": "PyramidKV",
    "snapkv": "SnapKV",
    "tova": "TOVA",
}
# Those that read a prompt once, as a server does.
ONE_READING = _PRESSES.keys() - {"kvzip", "kvzip_equal"}


def peers(
    result: str,
    answers: str,
    groups: Sequence[str] = GROUPS,
    variants: Sequence[str] = (FOCUS,),
) -> str:
    """EMS beside another engine's methods on the same prompts, in the order of the first group."""
    lab, losses = read(result), read(answers)["losses"]
    rows = []
    for budget in lab["budgets"]:
        of_budget = [
            [f"**{variant}**", *_means(_ours(lab, budget, variant), groups)] for variant in variants
        ]
        for press, label in _PRESSES.items():
            of_press = losses.get(f"{press}-{budget}", {})
            if of_press.keys() & set(groups):
                of_budget.append([label, *_means(of_press, groups)])
        if len(of_budget) == len(variants):
            continue
        rows += [
            [percent(budget), label, *map(signed, cells, groups)]
            for label, *cells in sorted(of_budget, key=lambda row: row[1])
        ]
    return table(["", "", *titles(groups)], rows)


def behind(
    result: str | Sequence[str],
    answers: str | Sequence[str],
    presses: Collection[str] = ONE_READING,
    groups: Sequence[str] = GROUPS,
    variant: str = FOCUS,
) -> str:
    """By budget and group: the best of some presses, and what a variant loses more than it.

    Of several results, each with its answers, the prompts are taken together; budgets are the last
    one's.
    """
    lab, losses = _together(result), _losses_together(answers)
    rows = []
    for budget in lab["budgets"]:
        ours = _ours(lab, budget, variant)
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
            gap = _interval(ours[group], of_group[best])
            name = f"{best}: " if len(presses) > 1 else ""
            cells.append(f"{name}{signed(gap.value, group)} {_bounds(gap, group)}")
        if any(cells):
            rows.append([percent(budget), *cells])
    return table(["", *titles(groups)], rows)


def change(
    before: str,
    after: str,
    groups: Sequence[str] = GROUPS,
    variant: str = FOCUS,
    old_variant: str = FOCUS,
) -> str:
    """What a variant loses in one result and another in a second, and the difference, in pairs.

    At budgets at which both were measured.
    """
    old, new = read(before), read(after)
    rows = []
    for budget in new["budgets"]:
        ours, others = _ours(old, budget, old_variant), _ours(new, budget, variant)
        if not ours or not others:
            continue
        cells = []
        for group in groups:
            if group not in others:
                cells.append("")
                continue
            both = ours[group].keys() & others[group].keys()
            gap = _interval(others[group], ours[group])
            first, second = (
                signed(mean(losses[group][name] for name in both), group)
                for losses in (ours, others)
            )
            cells.append(f"{first}, {second} {_bounds(gap, group)}")
        rows.append([percent(budget), *cells])
    return table(["", *titles(groups)], rows)


def _each(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _together(result: str | Sequence[str]) -> dict[str, Any]:
    """Budgets of the last result, and the prompts of all."""
    labs = [read(name) for name in _each(result)]
    return {
        "budgets": labs[-1]["budgets"],
        "prompts": [prompt for lab in labs for prompt in lab["prompts"]],
    }


def _losses_together(answers: str | Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By press and budget, group and prompt."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in _each(answers):
        for press, of_press in read(name)["losses"].items():
            for group, of_group in of_press.items():
                found.setdefault(press, {}).setdefault(group, {}).update(of_group)
    return found


def _ours(lab: dict[str, Any], budget: str, variant: str = FOCUS) -> dict[str, dict[str, float]]:
    """What a variant loses above the full cache, by group and prompt, as AnswerLosses has them."""
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


def _bounds(gap: Interval, group: str) -> str:
    return f"({signed(gap.low, group)} to {signed(gap.high, group)})"
