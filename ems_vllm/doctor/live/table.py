# SPDX-License-Identifier: Apache-2.0
"""The report on a running server for people: sentences, then the figures they rest on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ems_vllm.doctor.live.report import LiveReport


def print_report(out: Console, report: LiveReport) -> None:
    """Print it, readable at 80 columns and without colour."""
    out.print(Text(f"{report.regime}; compression helps: {report.helps}", style="bold"))
    for sentence in report.sentences:
        out.print(Text(sentence))
    table = Table("seen", "figure", box=SIMPLE_HEAD, pad_edge=False)
    for name, figure in _rows(report):
        table.add_row(Text(name), Text(figure))
    out.print(table)


def _rows(report: LiveReport) -> Iterator[tuple[str, str]]:
    seen = report.traffic
    yield "watched", f"{seen['seconds']:.0f} s, {seen['num_readings']} readings"
    if seen["num_engines"] > 1:
        yield "engines", f"{seen['num_engines']}; requests added up, the fullest pool"
    yield "pool in use", f"{seen['usage']:.0%}"
    if seen["usage_in_queue"] is not None:
        yield "the same, in a queue", f"{seen['usage_in_queue']:.0%}"
    pool = seen["pool"]
    if pool is not None:
        yield "pool of an engine", f"{pool['num_blocks']:,} blocks of {pool['block_size']} tokens"
    yield "requests running", f"{seen['running']:.1f}"
    if seen["blocks_of_running"] is not None:
        yield "blocks of one that runs", f"{seen['blocks_of_running']:,.0f}, in the mean"
    yield "requests waiting", f"{seen['waiting']:.1f}"
    yield "preemptions", f"{seen['preemptions']:,}"
    yield "prompt tokens computed", f"{seen['prompt_rate']:,.0f} a second"
    yield "tokens generated", f"{seen['generation_rate']:,.0f} a second"
    yield from _optional(seen)
    lengths = seen["lengths"]
    if lengths is not None:
        when = "since the start" if lengths["since_start"] else "watched"
        yield "requests ended", f"{lengths['num_requests']:,} ({when})"
        yield "their prompts", f"{lengths['prompt_mean']:,.0f} tokens, in the mean"
        yield "their answers", f"{lengths['generated_mean']:,.0f} tokens, in the mean"
    if report.gain is not None:
        yield from _of_gain(report.gain)
    if report.compressing is not None:
        yield from _of_compressing(report.compressing)


def _optional(seen: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is not known where nothing has come that far."""
    if seen["hit_rate"] is not None:
        yield "prompts from the prefix cache", f"{seen['hit_rate']:.0%}"
    if seen["queue_s"] is not None:
        yield "time in the queue", f"{seen['queue_s']:.2f} s, in the mean"
    if seen["ttft_s"] is not None:
        yield "time to first token", f"{seen['ttft_s']:.2f} s, in the mean"
    if seen["prefill_share"] is not None:
        yield "time spent on prompts", f"{seen['prefill_share']:.0%} of the requests' own"


def _of_gain(gain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "requests with compression", f"{gain['compressed_share']:.0%} compressed ({gain['size']})"
    blocks = f"{gain['dense_blocks']:,.0f} dense, {gain['compressed_blocks']:,.0f} compressed"
    yield "blocks of a request", blocks
    yield "requests that fit", f"{gain['dense_fit']:,} dense, {gain['compressed_fit']:,} compressed"


def _of_compressing(ours: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for outcome, count in ours["requests"].items():
        yield f"requests ended: {outcome}", f"{count:,}"
    for reason, count in ours["refused"].items():
        yield f"requests refused: {reason}", f"{count:,}"
    yield "compactions", f"{ours['compactions']:,}, {ours['compactions_watched']:,} watched"
    if ours["kept_share"] is not None:
        yield "kept of what was compacted", f"{ours['kept_share']:.0%}"
    if ours["live_share"] is not None:
        yield "held of the dense blocks", f"{ours['live_share']:.0%}"
    if ours["saved_bytes"] is not None:
        yield "memory saved now", f"{ours['saved_bytes'] / 2**30:,.2f} GiB"
    if ours["compaction_s"] is not None:
        yield "time of a compaction", f"{1000 * ours['compaction_s']:,.1f} ms, in the mean"
    if ours["preemptions_avoided"] is not None:
        yield "preemptions avoided", f"{ours['preemptions_avoided']:,}"
