# SPDX-License-Identifier: Apache-2.0
"""Why a budget is suggested, or none, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ems_vllm.advise.report import Budget, ByLength, PoolSize, Sample, Traffic
from ems_vllm.advise.thresholds import KNEE, LONG_WAIT, NEVER_FULL, TOLERATED, WORTH


def freed(dense: ByLength, budget: Budget) -> float:
    """Share of the blocks that running requests hold."""
    return 1 - budget.by_length.blocks_held / dense.blocks_held


def short(traffic: Traffic, least: Budget, share: float) -> str:
    """Why nothing is gained."""
    return (
        f"Your requests are short for these budgets (prompts: p50 = {traffic.prompt_p50:,}, p95 = "
        f"{traffic.prompt_p95:,} tokens): {least.label}, which frees most of these budgets, "
        f"would compress {least.by_length.compressed_share:.0%} of them and free "
        f"{max(0.0, share):.0%} of the blocks they hold."
    )


def room(pool: PoolSize | None, dense: ByLength) -> str:
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


def gain(pool: PoolSize | None, dense: ByLength, chosen: Budget) -> Iterator[str]:
    """What a budget frees."""
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


def measured(chosen: Budget, sample: Sample) -> Iterator[str]:
    """What a budget changed, and how sure that is."""
    quality = chosen.quality
    assert quality is not None
    yield (
        f"With {sample.confidence:.0%} confidence at most {quality.above_at_most:.0%} of such "
        f"requests have a mean KL above {sample.max_kl:g}: {quality.num_above} of "
        f"{sample.num_prompts} were, over the first {sample.num_tokens} tokens of an answer. That "
        "holds for traffic like the sample, and for this budget alone."
    )
    if quality.above_at_most > TOLERATED:
        needed = sample.prompts_needed
        if sample.num_prompts < needed:
            yield (
                f"For a bound of {TOLERATED:.0%}, measure {needed} prompts of which none is above: "
                f"--sample {needed}."
            )
        else:
            yield (
                f"For a bound of {TOLERATED:.0%}, measure more prompts, or take a larger budget: "
                f"{needed} are enough only where none is above."
            )
    yield (
        "A small KL says that a compressed cache continues your own answers alike; it does not say "
        "that later turns find what was dropped (docs/advise.md)."
    )


def knee_note(chosen: Budget, budgets: Sequence[Budget]) -> Iterator[str]:
    """Why it is not the smallest."""
    smallest = min(budgets, key=lambda budget: budget.by_length.blocks_held)
    if smallest is not chosen:
        yield (
            f"{smallest.label} is close enough too, and gains less than {KNEE:.0%} more: the "
            "larger budget is the safer one."
        )


def too_far(budgets: Sequence[Budget], dense: ByLength, sample: Sample) -> str:
    """Why none will do."""
    useful = [budget for budget in budgets if freed(dense, budget) >= WORTH]
    best = min(useful, key=lambda budget: budget.quality.kl_mean if budget.quality else 0.0)
    assert best.quality is not None
    return (
        f"Each of these budgets that frees anything changes too much: {best.label}, the nearest, "
        f"has a mean KL above {sample.max_kl:g} on {best.quality.num_above} of "
        f"{sample.num_prompts} prompts. Try larger budgets (--budget), a profile of your model "
        "(`ems-vllm calibrate`, --config), or --kv-cache-dtype fp8 without compression."
    )


def unmeasured(chosen: Budget, why: str | None) -> str:
    """That nothing is known of answers."""
    kept = chosen.by_length.kept_share or 1
    return (
        f"What it does to answers was not measured: {why}. It keeps {kept:.0%} of the prompts that "
        f"are compressed; a quarter is what small models wanted where questions are not last "
        "(docs/choosing-a-budget.md). Give prompts with their texts, or run `ems-vllm eval`."
    )


def beside_room(least: Budget) -> str:
    """What compression would do where the pool is never full."""
    return (
        f"Decoding steps would read less ({least.label}: {least.by_length.read_share:.0%} of the "
        "KV bytes, by arithmetic); no speed was measured. For the day it is full, the setting "
        '"when": "pressure" compresses only then.'
    )
