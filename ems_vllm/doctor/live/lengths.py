# SPDX-License-Identifier: Apache-2.0
"""Lengths of the requests that have ended, from vLLM's histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ems_vllm.doctor.live.page import Page

_PROMPT = "vllm:request_prompt_tokens"
_GENERATED = "vllm:request_generation_tokens"


@dataclass(frozen=True)
class Lengths:
    """Of requests that have ended.

    Attributes:
        num_requests: How many.
        prompt_mean, generated_mean: Tokens.
        prompts: (tokens of a prompt, requests with about as many), shortest first.
        since_start: Whether they ended at any time, because none did while the server was watched.
    """

    num_requests: int
    prompt_mean: float
    generated_mean: float
    prompts: Sequence[tuple[int, float]]
    since_start: bool


def lengths(first: Page, last: Page) -> Lengths | None:
    """Of the requests that ended between two pages, else of all; None where none has ended."""
    return _between(first, last) or _between(None, last)


def _between(first: Page | None, last: Page) -> Lengths | None:
    def increase(name: str) -> float:
        before = 0.0 if first is None else first.total(name) or 0.0
        return (last.total(name) or 0.0) - before

    num_requests = increase(f"{_PROMPT}_count")
    if num_requests < 1:
        return None
    mean = increase(f"{_PROMPT}_sum") / num_requests
    before = {} if first is None else first.buckets(_PROMPT)
    cumulative = {
        bound: count - before.get(bound, 0.0) for bound, count in last.buckets(_PROMPT).items()
    }
    generated = max(1.0, increase(f"{_GENERATED}_count"))
    return Lengths(
        num_requests=round(num_requests),
        prompt_mean=mean,
        generated_mean=increase(f"{_GENERATED}_sum") / generated,
        prompts=spread(cumulative, mean),
        since_start=first is None,
    )


def spread(cumulative: Mapping[float, float], mean: float) -> list[tuple[int, float]]:
    """Lengths that stand for the buckets of a histogram, with the mean that was measured.

    The middle of each bucket, moved by one factor so that their mean is right, and then back into
    the bucket (ours).

    Args:
        cumulative: Observations up to each bound, in ascending order of bounds.
        mean: Of all observations.
    """
    counts: list[tuple[float, float, float]] = []
    low = below = 0.0
    for bound, count in cumulative.items():
        if count > below:
            counts.append((low, bound, count - below))
        low, below = bound, max(below, count)
    if not counts:
        return [(max(1, round(mean)), 1.0)]
    middles = [(low + high) / 2 if math.isfinite(high) else 1.5 * low for low, high, _ in counts]
    total = sum(count for *_, count in counts)
    weighted = zip(middles, counts, strict=True)
    factor = mean * total / sum(middle * count for middle, (*_, count) in weighted)
    return [
        (max(1, round(min(max(middle * factor, low + 1), high))), count)
        for middle, (low, high, count) in zip(middles, counts, strict=True)
    ]
