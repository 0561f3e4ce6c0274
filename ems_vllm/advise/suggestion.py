# SPDX-License-Identifier: Apache-2.0
"""Which budget to serve with, if any, and why."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ems_vllm.advise.report import Budget, ByLength, PoolSize, Sample, Suggestion, Traffic, Verdict

MAX_KL = 0.1
"""Nats per token. Of the answers that SmolLM2's full cache has right, EMS kept 207 of 213 where the
mean KL of such prompts was at most that, and 131 of 161 up to 0.5 (docs/advise.md)."""
TOLERATED = 0.1
"""Share of requests that may be above it (ours)."""
WORTH = 0.1
"""Share of the blocks that must come free for compression to be worth its while (ours, and the
doctor's)."""
KNEE = 0.1
"""A larger budget is taken where it gains at most this share less than the smallest (ours)."""
QUARTER = 0.25
"""Of a prompt: what is suggested where nothing was measured (docs/choosing-a-budget.md)."""
NEVER_FULL = 0.01
"""Share of the time in which requests wait for blocks, below which a pool is never full (ours)."""
LONG_WAIT = 2.0
"""Seconds in the queue, of 95 % of the requests, from which on something else limits (ours)."""

THRESHOLDS = {
    "tolerated": TOLERATED,
    "worth": WORTH,
    "knee": KNEE,
    "quarter": QUARTER,
    "never_full": NEVER_FULL,
    "long_wait": LONG_WAIT,
}


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
        return _not(Verdict.SHORT, _short(traffic, least, freed), server)
    if room := _room(pool, dense):
        read = f"Decoding steps would read less ({least.label}: {least.by_length.read_share:.0%} "
        room += f" {read}of the KV bytes, by arithmetic); no speed was measured."
        return _not(Verdict.ROOM, room, server)
    if sample is None:
        return _unmeasured(pool, dense, budgets, why_no_quality, server)
    close = [budget for budget in budgets if _is_close(budget, sample)]
    gaining = [budget for budget in close if _freed(dense, budget) >= WORTH]
    if not gaining:
        return _not(Verdict.TOO_FAR, _too_far(budgets, dense, sample), server)
    chosen = _knee(dense, gaining)
    sentences = [
        *_gain(pool, dense, chosen),
        *_measured(chosen, sample),
        *_knee_note(chosen, gaining),
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


def _freed(dense: ByLength, budget: Budget) -> float:
    return 1 - budget.by_length.blocks_held / dense.blocks_held


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


def _knee_note(chosen: Budget, budgets: Sequence[Budget]) -> Iterator[str]:
    smallest = min(budgets, key=lambda budget: budget.by_length.blocks_held)
    if smallest is not chosen:
        yield (
            f"{smallest.label} is close enough too, and gains less than {KNEE:.0%} more: the "
            "larger budget is the safer one."
        )


def _short(traffic: Traffic, least: Budget, freed: float) -> str:
    return (
        f"Your requests are short (prompts: p50 = {traffic.prompt_p50:,}, p95 = "
        f"{traffic.prompt_p95:,} tokens): {least.label}, which frees most of these budgets, "
        f"would compress {least.by_length.compressed_share:.0%} of them and free "
        f"{max(0.0, freed):.0%} of the blocks they hold."
    )


def _room(pool: PoolSize | None, dense: ByLength) -> str:
    """Why the pool is never full without compression; empty where that is not known."""
    if pool is None or dense.never_fit:
        return ""
    arrivals = dense.arrivals
    if arrivals is not None:
        if arrivals.preemptions or arrivals.blocked_share >= NEVER_FULL:
            return ""
        queue = ""
        if arrivals.wait_p95 > LONG_WAIT:
            queue = (
                f" They wait all the same ({arrivals.wait_p95:,.0f} s, p95), for prompts to be "
                "processed at the assumed rate: give your server's with --prompt-rate."
            )
        return (
            "The pool is never full: in the replay of these arrivals, at the assumed speeds, at "
            f"most {arrivals.running_most:,} requests run at a time without compression, which "
            f"take {arrivals.fullest:.0%} of the blocks, so it would admit none earlier.{queue}"
        )
    if pool.max_num_seqs is not None and dense.fit is not None and dense.fit >= pool.max_num_seqs:
        return (
            f"The pool is never full: it holds the {pool.max_num_seqs:,} requests of "
            "--max-num-seqs without compression, so it would admit none earlier."
        )
    return ""


def _gain(pool: PoolSize | None, dense: ByLength, chosen: Budget) -> Iterator[str]:
    by_length = chosen.by_length
    if by_length.fit is not None and dense.fit is not None:
        yield (
            f"By arithmetic the pool holds {by_length.fit:,} of these requests at a time instead "
            f"of {dense.fit:,}, and their decoding steps read {by_length.read_share:.0%} of the KV "
            "bytes. No speed was measured."
        )
    else:
        yield (
            f"By arithmetic these requests hold {by_length.blocks_held / dense.blocks_held:.0%} of "
            f"their blocks, and their decoding steps read {by_length.read_share:.0%} of the KV "
            "bytes. No speed was measured."
        )
    now, then = dense.arrivals, by_length.arrivals
    if now is not None and then is not None:
        yield (
            f"In the replay requests wait for blocks {then.blocked_share:.0%} of the time instead "
            f"of {now.blocked_share:.0%}."
        )
    if pool is None:
        yield (
            "Whether your pool is ever full was not asked: give --pool-gib, or ask a running "
            "server with `ems-vllm doctor --url`."
        )


def _measured(chosen: Budget, sample: Sample) -> Iterator[str]:
    quality = chosen.quality
    assert quality is not None
    yield (
        f"With {sample.confidence:.0%} confidence at most {quality.above_at_most:.0%} of such "
        f"requests have a mean KL above {sample.max_kl:g}: {quality.num_above} of "
        f"{sample.num_prompts} were, over the first {sample.num_tokens} tokens of an answer. That "
        "holds for traffic like the sample, and for this budget alone."
    )
    if quality.above_at_most > TOLERATED:
        yield (
            f"For a bound of {TOLERATED:.0%}, measure {sample.prompts_needed} prompts of which "
            f"none is above: --sample {sample.prompts_needed}."
        )
    yield (
        "A small KL says that a compressed cache continues your own answers alike; it does not say "
        "that later turns find what was dropped (docs/advise.md)."
    )


def _too_far(budgets: Sequence[Budget], dense: ByLength, sample: Sample) -> str:
    useful = [budget for budget in budgets if _freed(dense, budget) >= WORTH]
    best = min(useful, key=lambda budget: budget.quality.kl_mean if budget.quality else 0.0)
    assert best.quality is not None
    return (
        f"Each of these budgets that frees anything changes too much: {best.label}, the nearest, "
        f"has a mean KL above {sample.max_kl:g} on {best.quality.num_above} of "
        f"{sample.num_prompts} prompts. Try larger budgets (--budget), a profile of your model "
        "(`ems-vllm calibrate`, --config), or --kv-cache-dtype fp8 without compression."
    )


def _unmeasured(
    pool: PoolSize | None,
    dense: ByLength,
    budgets: Sequence[Budget],
    why: str | None,
    server: Server,
) -> Suggestion:
    useful = [budget for budget in budgets if _freed(dense, budget) >= WORTH]
    enough = [budget for budget in useful if (budget.by_length.kept_share or 1) >= QUARTER]
    if enough:
        chosen = min(enough, key=lambda budget: budget.by_length.blocks_held)
    else:
        chosen = max(useful, key=lambda budget: budget.by_length.blocks_held)
    kept = chosen.by_length.kept_share or 1
    sentences = [
        *_gain(pool, dense, chosen),
        f"What it does to answers was not measured: {why}. It keeps {kept:.0%} of the prompts that "
        f"are compressed; a quarter is what small models wanted where questions are not last "
        "(docs/choosing-a-budget.md). Give prompts with their texts, or run `ems-vllm eval`.",
    ]
    return Suggestion(
        verdict=Verdict.UNMEASURED,
        budget=chosen.label,
        sentences=tuple(sentences),
        command=server.command(chosen),
    )
