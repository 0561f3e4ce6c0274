# SPDX-License-Identifier: Apache-2.0
"""A fixed load in which everything happens that a bug in the accounting of blocks needs."""

from __future__ import annotations

from typing import Any

from engine.build_scheduler import specs_of
from engine.levels import COVERED, LEVELS, WITHIN_PROMPTS
from engine.simulator import Simulator

SETTINGS = {
    "recipe": "ems",
    "budget": 8,
    "recent_window": 4,
    "obs_window": 2,
    "recompress_interval": 8,
    "min_blocks_saved": 1,
    # Few of both, so that requests have to wait for them.
    "prefix_score_tokens": 96,
    "query_ring_rows": 2,
}
# Prompts share prefixes of different lengths of this, so that hits are frequent.
BASE = list(range(60))
ALL_LEVELS = LEVELS | WITHIN_PROMPTS | COVERED
MODES: tuple[dict[str, Any], ...] = ({}, {"async_scheduling": True}, {"num_drafts": 3})


def modes_of(levels: str) -> tuple[dict[str, Any], ...]:
    return MODES[:2] if "prefill_interval" in ALL_LEVELS[levels] else MODES


def busy_run(levels: str, global_queries: int | str = "all", **options: Any) -> Simulator:
    """Hits, preemptions, recompressions, and late ones where levels differ."""
    settings = {**SETTINGS, "global_queries": global_queries, **ALL_LEVELS[levels]}
    groups = len(specs_of(settings))
    simulator = Simulator(settings, num_blocks=40 * groups, **options)
    for round_ in range(6):
        for index in range(5):
            prompt = [*BASE[: 10 * index + 5], 200 + index, 300 + round_ % 2]
            # A level that keeps the whole prompt compresses when there is as much again.
            simulator.add(prompt, 12 + 6 * index + (20 if groups > 1 else 0))
        for _ in range(25 // (1 + options.get("num_drafts", 0))):
            if simulator.unfinished:
                simulator.step()
        simulator.preempt(round_)
    simulator.drain()
    return simulator


def busy_runs(levels: str) -> None:
    for mode in modes_of(levels):
        for global_queries in ("all", 12):
            busy_run(levels, global_queries, **mode)
