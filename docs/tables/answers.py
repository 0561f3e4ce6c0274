# SPDX-License-Identifier: Apache-2.0
"""What is answered: the full cache in ablations, and every method in reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from tables.markdown import ASKED, percent, read, table


def full_cache(results: Mapping[str, str]) -> str:
    """Answers of the full cache that are right, by task; a column for each result and protocol.

    Args:
        results: Files by what they are to be called.
    """
    counts: dict[str, dict[tuple[str, str], list[bool]]] = {}
    for label, result in results.items():
        for prompt in read(result)["prompts"]:
            if prompt["group"] in ASKED:
                by_column = counts.setdefault(prompt["task"], {})
                by_column.setdefault((label, prompt["group"]), []).append(prompt["full"]["right"])
    columns = [(label, group) for label in results for group in ASKED]
    rows = [
        [f"`{task}`", *(_of(by_column.get(column, [])) for column in columns)]
        for task, by_column in sorted(counts.items())
    ]
    return table(["", *(f"{label}: {group}" for label, group in columns)], rows)


def scores(report: str) -> str:
    """Mean scores of `ems-vllm eval`, by task; in a protocol's column those of every method."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for method in read(report)["methods"]:
        fraction = method.get("budget_fraction")
        budget = "" if fraction is None else f" {percent(fraction)}"
        label = method["method"] + budget
        for sample in method["samples"]:
            by_protocol = found.setdefault(sample["task"], {}).setdefault(sample["protocol"], {})
            by_protocol.setdefault(label, []).append(sample["score"])
    labels = list(dict.fromkeys(label for task in found.values() for label in task["last"]))
    rows = [
        [
            f"`{task}`",
            *(
                " / ".join(f"{mean(of_task[group][label]):.2f}" for label in labels)
                if group in of_task
                else ""
                for group in ASKED
            ),
        ]
        for task, of_task in found.items()
    ]
    return table([" / ".join(labels), *ASKED], rows)


def _of(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}" if right else ""
