# SPDX-License-Identifier: Apache-2.0
"""What requests kept where a coverage decides, in results of `python -m ems_vllm.eval.lab`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from tables.markdown import percent, read, table


def kept(result: str, variants: Sequence[str]) -> str:
    """By budget and variant: the mean of what prompts kept, and the least and most of one."""
    lab = read(result)
    rows = []
    for budget in lab["budgets"]:
        for variant in variants:
            shares = [
                prompt["measured"][budget][variant]["kv_bytes"] / prompt["full"]["kv_bytes"]
                for prompt in lab["prompts"]
                if variant in prompt["measured"].get(budget, {})
            ]
            if shares:
                coverage = lab["settings"][variant]["at"][budget]["coverage"]
                ends = f"{_percent(min(shares))} to {_percent(max(shares))}"
                rows.append(
                    [percent(budget), variant, f"{coverage:g}", _percent(mean(shares)), ends]
                )
    return table(["", "", "coverage", "kept in the mean", "of one prompt"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
