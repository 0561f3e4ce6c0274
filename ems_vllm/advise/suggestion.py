# SPDX-License-Identifier: Apache-2.0
"""Which budget to serve with, if any, and why."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.advise import reasons
from ems_vllm.advise.report import Budget, ByLength, PoolSize, Sample, Suggestion, Traffic, Verdict
from ems_vllm.advise.thresholds import KNEE, QUARTER, TOLERATED, WORTH


@dataclass(frozen=True)
class Server:
    """What the command to serve needs.

    Attributes:
        model, recipe: As they were given.
        flags: Further ones.
    """

    model: str
    recipe: str
    flags: tuple[str, ...] = ()

    def command(self, budget: Budget | None) -> str:
        """`vllm serve` with a budget, or without compression."""
        words = ["vllm", "serve", self.model]
        if budget is not None:
            settings = json.dumps(budget.settings)
            words += ["--kv-compression", self.recipe, "--kv-compression-config", settings]
        return shlex.join([*words, *self.flags])


def suggest(
    traffic: Traffic,
    pool: PoolSize | None,
    dense: ByLength,
    budgets: Sequence[Budget],
    sample: Sample | None,
    why_no_quality: str | None,
    server: Server,
) -> Suggestion:
    """The smallest budget that is close enough, or a larger one that gains as much.

    Args:
        traffic: What was read.
        pool: None where it is not known.
        dense: Figures without compression.
        budgets: At least one.
        sample: None where nothing was measured.
        why_no_quality: Then, why.
        server: For the command.
    """
    least = min(budgets, key=lambda budget: budget.by_length.blocks_held)
    freed = 1 - least.by_length.blocks_held / dense.blocks_held
    if freed < WORTH:
        return _not(Verdict.SHORT, reasons.short(traffic, least, freed), server)
    if room := reasons.room(pool, dense):
        return _not(Verdict.ROOM, f"{room} {reasons.beside_room(least)}", server)
    if sample is None:
        return _unmeasured(pool, dense, budgets, why_no_quality, server)
    close = [budget for budget in budgets if _is_close(budget, sample)]
    gaining = [budget for budget in close if reasons.freed(dense, budget) >= WORTH]
    if not gaining:
        return _not(Verdict.TOO_FAR, reasons.too_far(budgets, dense, sample), server)
    chosen = _knee(dense, gaining)
    sentences = [
        *reasons.gain(pool, dense, chosen),
        *reasons.measured(chosen, sample),
        *reasons.knee_note(chosen, gaining),
    ]
    return Suggestion(
        verdict=Verdict.COMPRESS,
        budget=chosen.label,
        sentences=tuple(sentences),
        command=server.command(chosen),
    )


def _not(verdict: Verdict, sentence: str, server: Server) -> Suggestion:
    return Suggestion(
        verdict=verdict, budget=None, sentences=(sentence,), command=server.command(None)
    )


def _gained(dense: ByLength, budget: Budget) -> float:
    """Times as many requests run at a time; without a pool, times fewer blocks are held."""
    fit, dense_fit = budget.by_length.fit, dense.fit
    if fit is None or dense_fit is None:
        return dense.blocks_held / budget.by_length.blocks_held
    return fit / max(1, dense_fit)


def _is_close(budget: Budget, sample: Sample) -> bool:
    return budget.quality is not None and budget.quality.num_above <= TOLERATED * sample.num_prompts


def _knee(dense: ByLength, budgets: Sequence[Budget]) -> Budget:
    """The one that holds most, of those that gain nearly as much as the best."""
    best = max(_gained(dense, budget) for budget in budgets)
    near = [budget for budget in budgets if _gained(dense, budget) >= (1 - KNEE) * best]
    return max(near, key=lambda budget: budget.by_length.blocks_held)


def _unmeasured(
    pool: PoolSize | None,
    dense: ByLength,
    budgets: Sequence[Budget],
    why: str | None,
    server: Server,
) -> Suggestion:
    useful = [budget for budget in budgets if reasons.freed(dense, budget) >= WORTH]
    enough = [budget for budget in useful if (budget.by_length.kept_share or 1) >= QUARTER]
    if enough:
        chosen = min(enough, key=lambda budget: budget.by_length.blocks_held)
    else:
        chosen = max(useful, key=lambda budget: budget.by_length.blocks_held)
    sentences = [*reasons.gain(pool, dense, chosen), reasons.unmeasured(chosen, why)]
    return Suggestion(
        verdict=Verdict.UNMEASURED,
        budget=chosen.label,
        sentences=tuple(sentences),
        command=server.command(chosen),
    )
