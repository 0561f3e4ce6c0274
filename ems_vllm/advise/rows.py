# SPDX-License-Identifier: Apache-2.0
"""The advice as rows of tables and sentences, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ems_vllm.advise.report import AdviceReport, ByLength

DENSE = "dense"


@dataclass(frozen=True)
class Rows:
    """A table.

    Attributes:
        chosen: First cell of the row that is suggested; None for none.
    """

    title: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    chosen: str | None


def traffic(report: AdviceReport) -> str:
    """What was read, in a sentence."""
    seen = report.traffic
    outputs = ", ".join(f"{count:,} {origin}" for origin, count in seen.outputs.items())
    return (
        f"{seen.num_requests:,} requests; prompts of {seen.prompt_p50:,} tokens (p50), "
        f"{seen.prompt_p95:,} (p95) and {seen.prompt_max:,} at most; answers of "
        f"{seen.output_p50:,}, {seen.output_p95:,} and {seen.output_max:,} ({outputs})."
    )


def lengths(report: AdviceReport) -> Rows:
    """Arithmetic by budget."""
    head = ["budget", "com-\npressed", "blocks\nmean: p50 / p95", "prompt,\np95", "KV\nread"]
    if report.pool is not None:
        head += ["run at\na time", "never\nfit"]
    pool = ""
    if report.pool is not None:
        pool = f"; a pool of {report.pool.gib:,.4g} GiB, {report.pool.columns:,} blocks"
    title = f"By arithmetic: blocks of {report.block_size} tokens{pool}"
    body = [_lengths_row(report, label, found) for label, found in _budgets(report)]
    return Rows(title, tuple(head), tuple(body), report.suggestion.budget)


def arrivals(report: AdviceReport) -> Rows | None:
    """The replay, where there was one."""
    if report.dense.arrivals is None:
        return None
    head = ("budget", "running\nmean / most", "pool at\nits fullest", "waits for\nblocks",
            "in the queue\nmean / p95", "pre-\nempted")  # fmt: skip
    body = []
    for label, found in _budgets(report):
        one = found.arrivals
        if one is not None:
            body.append(
                (
                    label,
                    f"{one.running_mean:,.1f} / {one.running_most:,}",
                    f"{one.fullest:.0%}",
                    f"{one.blocked_share:.0%}",
                    f"{one.wait_mean:,.1f} / {one.wait_p95:,.1f} s",
                    f"{one.preemptions:,}",
                )
            )
    assert report.token_ms is not None
    assert report.prompt_rate is not None
    title = (
        f"Replay of the arrivals, assuming {report.token_ms:g} ms a token and "
        f"{report.prompt_rate:,.0f} prompt tokens a second"
    )
    return Rows(title, head, tuple(body), report.suggestion.budget)


def quality(report: AdviceReport) -> Rows | None:
    """What was measured, where anything was."""
    sample = report.sample
    if sample is None:
        return None
    head = ("budget", "KL\nmean", "KL\nworst", "same next\ntoken", f"KL above\n{sample.max_kl:g}",
            f"of such requests\n({sample.confidence:.0%} confidence)")  # fmt: skip
    body = [
        (
            budget.label,
            f"{budget.quality.kl_mean:.3f}",
            f"{budget.quality.kl_worst:.3f}",
            f"{budget.quality.same_top:.0%}",
            f"{budget.quality.num_above} of {sample.num_prompts}",
            f"at most {budget.quality.above_at_most:.0%}",
        )
        for budget in report.budgets
        if budget.quality is not None
    ]
    title = (
        f"Measured on {sample.num_prompts} of {sample.num_eligible:,} prompts, "
        f"{sample.num_tokens} tokens of an answer: KL from dense, nats"
    )
    return Rows(title, head, tuple(body), report.suggestion.budget)


def notes(report: AdviceReport) -> Iterator[str]:
    """What the figures take for granted."""
    yield (
        "'blocks' counts what a request holds at most once its prompt is over, 'prompt' while that "
        "is processed; 'KV read' is what decoding steps read of the cache, as a share of dense. "
        "Every layer with full attention is compressed; prefixes that requests share are not "
        "reckoned with, nor what requests ask for themselves."
    )
    if report.pool is not None:
        yield (
            "'run at a time' is the steady state of this mix, one prompt coming in; what the GPU "
            "can compute in time is another limit."
        )
    if report.traffic.outputs.get("max_tokens") or report.traffic.outputs.get("assumed"):
        yield "Answers of unknown length are as long as max_tokens or --output-len allows."
    if any(budget.settings.get("when") == "pressure" for budget in report.budgets):
        yield "All figures are of requests that are compressed, whenever that is."
    sample = report.sample
    if sample is None:
        yield f"Quality: not measured, because {report.why_no_quality}."
    else:
        yield (
            f"The sample is of requests with prompts of {sample.prompt_shortest:,} to "
            f"{sample.prompt_longest:,} tokens that a budget compresses; "
            f"{sample.num_too_long:,} longer ones were left out. It took {sample.seconds:,.0f} s."
        )


def _budgets(report: AdviceReport) -> Iterator[tuple[str, ByLength]]:
    yield DENSE, report.dense
    for budget in report.budgets:
        yield budget.label, budget.by_length


def _lengths_row(report: AdviceReport, label: str, found: ByLength) -> tuple[str, ...]:
    row = [
        label,
        f"{found.compressed_share:.0%}",
        f"{found.blocks_mean:,.0f}: {found.blocks_p50:,.0f} / {found.blocks_p95:,.0f}",
        f"{found.coming_in_p95:,.0f}",
        f"{found.read_share:.0%}",
    ]
    if report.pool is not None:
        row += [f"{found.fit or 0:,}", f"{found.never_fit or 0:,}"]
    return tuple(row)
