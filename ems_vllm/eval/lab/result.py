# SPDX-License-Identifier: Apache-2.0
"""Means over prompts, with intervals, and the file that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ems_vllm.eval.lab.cells import Cell, prompt_digest
from ems_vllm.eval.lab.forcing import Measurement, group
from ems_vllm.eval.report.stats import bootstrap, difference

if TYPE_CHECKING:
    from ems_vllm.eval.lab.journal import Record
    from ems_vllm.eval.records.prompt_files import PromptLine


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FullSummary(_Part):
    """The full cache on the prompts of a group.

    Attributes:
        group: Protocol, or "continuation".
        loss: Nats per token, mean over prompts.
        right: Prompts of which every token of the answer is the greedy choice.
        n: Prompts.
    """

    group: str
    loss: float
    right: int
    n: int


class Summary(_Part):
    """A variant at a budget on the prompts of a group that the budget has room for.

    Attributes:
        loss_above_full: Nats per token above the full cache's, mean over prompts.
        low, high: Its 95 % interval, by a bootstrap over prompts, in pairs with the full cache.
        right, of: Prompts that it has right, of those that the full cache has right.
        kl: From the full cache's distribution, nats per token, mean over prompts.
        attention_error: Mean over prompts; None where it was not measured.
        bytes_ratio: How many times fewer bytes its prompts take than the full cache's.
        n: Prompts.
    """

    variant: str
    budget: str
    group: str
    loss_above_full: float
    low: float | None = None
    high: float | None = None
    right: int
    of: int
    kl: float
    attention_error: float | None = None
    bytes_ratio: float
    n: int


class PromptResult(_Part):
    """A prompt's key, and what was measured on it, by budget and variant."""

    task: str
    length: int
    seed: int
    index: int
    protocol: str
    group: str
    full: Measurement
    measured: dict[str, dict[str, Measurement]]


class LabResult(_Part):
    """An ablation.

    Attributes:
        model: Name of the model.
        created: When, in UTC.
        environment: With what.
        settings: All settings of every variant; those of a full one are how it is stored.
        budgets: In order; "full" where there are full variants.
        full, summaries: Means.
        prompts: What they are means of.
        left_out: Prompts without an answer that a compressed cache predicts.
    """

    model: str
    created: str
    environment: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    budgets: list[str]
    full: list[FullSummary]
    summaries: list[Summary]
    prompts: list[PromptResult]
    left_out: int = 0


def prompt_results(
    prompts: Sequence[PromptLine], cells: Sequence[Cell], records: Mapping[str, Record]
) -> list[PromptResult]:
    """What is known of some prompts; one that has no record is left out."""
    results = []
    for prompt in prompts:
        record = records.get(prompt_digest(prompt))
        if record is None:
            continue
        measured: dict[str, dict[str, Measurement]] = {}
        for cell in cells:
            if cell.digest in record.cells:
                by_variant = measured.setdefault(str(cell.size), {})
                by_variant[cell.variant] = record.cells[cell.digest]
        key = {name: getattr(prompt, name) for name in ("task", "length", "seed", "index")}
        results.append(
            PromptResult(
                **key,
                protocol=prompt.protocol,
                group=group(prompt),
                full=record.full,
                measured=measured,
            )
        )
    return results


def groups(results: Sequence[PromptResult]) -> list[str]:
    """In the order in which they come."""
    return list(dict.fromkeys(result.group for result in results))


def full_summaries(results: Sequence[PromptResult]) -> list[FullSummary]:
    """The full cache, group by group."""
    summaries = []
    for name in groups(results):
        measured = [result.full for result in results if result.group == name]
        summaries.append(
            FullSummary(
                group=name,
                loss=float(np.mean([one.loss for one in measured])),
                right=sum(one.right for one in measured),
                n=len(measured),
            )
        )
    return summaries


def summaries(results: Sequence[PromptResult], cells: Sequence[Cell]) -> list[Summary]:
    """Every cell in every group that has prompts with room for it."""
    found = []
    for cell in cells:
        budget = str(cell.size)
        for name in groups(results):
            pairs = [
                (result.measured[budget][cell.variant], result.full)
                for result in results
                if result.group == name and cell.variant in result.measured.get(budget, {})
            ]
            if pairs:
                found.append(_summary(cell.variant, budget, name, pairs))
    return found


def _summary(
    variant: str, budget: str, name: str, pairs: list[tuple[Measurement, Measurement]]
) -> Summary:
    # Every prompt counts the same.
    losses = np.array([[one.loss, full.loss] for one, full in pairs])
    interval = bootstrap([losses], difference)
    errors = [one.attention_error for one, _ in pairs if one.attention_error is not None]
    is_known = bool(np.isfinite(interval.low))
    return Summary(
        variant=variant,
        budget=budget,
        group=name,
        loss_above_full=interval.value,
        low=interval.low if is_known else None,
        high=interval.high if is_known else None,
        right=sum(one.right and full.right for one, full in pairs),
        of=sum(full.right for _, full in pairs),
        kl=float(np.mean([one.kl for one, _ in pairs])),
        attention_error=float(np.mean(errors)) if errors else None,
        bytes_ratio=sum(full.kv_bytes for _, full in pairs) / sum(one.kv_bytes for one, _ in pairs),
        n=len(pairs),
    )
