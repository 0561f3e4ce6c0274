# SPDX-License-Identifier: Apache-2.0
"""The result of an evaluation as one table on the terminal; the report says more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from rich.console import Console
from rich.table import Table

from ems_vllm.eval.questions.protocol import TITLES
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.results import EvalResult, SampleResult
from ems_vllm.eval.report.aggregate import protocols
from ems_vllm.eval.report.facts import MIN_FULL_SCORE


def print_summary(console: Console, result: EvalResult) -> None:
    """What the full cache scores, task by task, and then a row a method; each protocol apart."""
    parts = protocols([result])
    for protocol in parts:
        title = f"{TITLES[protocol]}: " if len(parts) > 1 else ""
        _print_part(console, result, protocol, title)


def _print_part(console: Console, result: EvalResult, protocol: str, title: str) -> None:
    scores = {
        id(method): _by_task(sample for sample in method.samples if sample.protocol == protocol)
        for method in result.methods
    }
    tasks = sorted({task for by_task in scores.values() for task in by_task})
    full = next((scores[id(method)] for method in result.methods if method.is_full), None)
    failed = {
        task
        for task in tasks
        if full is not None
        and result.higher_is_better.get(task, True)
        and (score := _mean(full, [task])) is not None
        and score < MIN_FULL_SCORE
    }
    quality = [t for t in tasks if t not in failed and result.higher_is_better.get(t, True)]
    if full is not None:
        table = Table("task", title=f"{title}Full cache")
        table.add_column("score", justify="right")
        table.add_column("")
        for task in tasks:
            remark = f"below {MIN_FULL_SCORE:g}: not compared" if task in failed else ""
            table.add_row(task, _number(_mean(full, [task]), 3), remark)
        console.print(table)
    table = Table("method", title=f"{title}Means over {len(quality)} tasks")
    bits = [task for task in tasks if not result.higher_is_better.get(task, True)]
    names = ["budget", "score", *bits, "KV MiB", "TTFT, s", "TPOT, ms", "tokens/s"]
    for name in names:
        table.add_column(name, justify="right")
    for method in result.methods:
        serving = method.serving
        kv_bytes, tpot_s = serving.kv_bytes_per_request, serving.tpot_s
        own = scores[id(method)]
        table.add_row(
            method.method,
            str(Budget(method.budget, method.budget_fraction)),
            _number(_mean(own, quality), 3),
            *(_number(_mean(own, [task]), 3) for task in bits),
            _number(None if kv_bytes is None else kv_bytes / 2**20, 2),
            _number(serving.ttft_s, 2),
            _number(None if tpot_s is None else 1000 * tpot_s, 1),
            _number(serving.output_tokens_per_s, 1),
        )
    console.print(table)


def _by_task(samples: Iterable[SampleResult]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for sample in samples:
        scores.setdefault(sample.task, []).append(sample.score)
    return scores


def _mean(scores: dict[str, list[float]], tasks: Sequence[str]) -> float | None:
    """Mean of the tasks' means: each counts the same."""
    means = [mean(scores[task]) for task in tasks if task in scores]
    return mean(means) if means else None


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
