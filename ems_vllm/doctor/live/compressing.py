# SPDX-License-Identifier: Apache-2.0
"""What a server that compresses says of it: the metrics of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ems_vllm.doctor.live.page import Page
from ems_vllm.doctor.live.traffic import Traffic

_PREFIX = "ems_vllm:"


@dataclass(frozen=True)
class Compressing:
    """Of all engines together, since the server started unless it says otherwise.

    Attributes:
        compactions: Steps that compressed a request, counted by request.
        compactions_watched: Of these, while the server was watched.
        requests: That have ended, by outcome: compressed, fitted, off, ample, spared.
        refused: Requests that were refused, by reason.
        kept_share: Of the entries that compactions found; None without any.
        live_share: Of the blocks that running requests would hold dense, those that they hold, in
            the mean of the readings; None where none ran.
        saved_bytes: That running requests would hold besides, now; None where the server does not
            say.
        compaction_s: Seconds of a compaction, in the mean; None likewise.
        preemptions_avoided: None where the server does not count them.
    """

    compactions: int
    compactions_watched: int
    requests: dict[str, int]
    refused: dict[str, int]
    kept_share: float | None
    live_share: float | None
    saved_bytes: float | None
    compaction_s: float | None
    preemptions_avoided: int | None

    @property
    def compressed_share(self) -> float | None:
        """Of the requests that have ended; None where none has."""
        total = sum(self.requests.values())
        return self.requests.get("compressed", 0) / total if total else None

    def why_nothing(self) -> str | None:
        """Why nothing was compressed so far; None where something was."""
        if self.compactions:
            return None
        reasons = {
            "fitted": "were never longer than what may be held",
            "off": "asked for their whole cache",
            "ample": "were left alone, because the pool had room",
            "spared": "were left alone by the guard, because too many diverged",
        }
        found = {name: count for name in reasons if (count := self.requests.get(name, 0))}
        if not found:
            return "no request has ended and none is longer than what may be held"
        told = " and ".join(f"{count:,} {reasons[name]}" for name, count in found.items())
        return f"of {sum(found.values()):,} requests that have ended, {told}"


def compressing(pages: Sequence[Page], traffic: Traffic) -> Compressing | None:
    """What the pages say; None where the server has no metrics of this package."""
    first, last = pages[0], pages[-1]
    if not last.has(_PREFIX):
        return None
    found, kept = (_total(last, f"entries_{name}_total") for name in ("in", "kept"))
    avoided = last.total(f"{_PREFIX}preemptions_avoided_total")
    timed, times = (_total(last, f"compaction_time_seconds_{name}") for name in ("sum", "count"))
    compactions = _total(last, "compactions_total")
    return Compressing(
        compactions=round(compactions),
        compactions_watched=round(compactions - _total(first, "compactions_total")),
        requests=_counts(last, "requests_total", "outcome"),
        refused=_counts(last, "requests_refused_total", "reason"),
        kept_share=kept / found if found else None,
        live_share=_live_share(pages, traffic),
        saved_bytes=last.total(f"{_PREFIX}kv_bytes_saved"),
        compaction_s=timed / times if times else None,
        preemptions_avoided=None if avoided is None else round(avoided),
    )


def _live_share(pages: Sequence[Page], traffic: Traffic) -> float | None:
    saved = sum(_total(page, "blocks_saved") for page in pages)
    held = sum(_held(page, traffic) for page in pages)
    return held / (held + saved) if held + saved else None


def _held(page: Page, traffic: Traffic) -> float:
    """Blocks that requests hold; of servers that do not count them, by how full the pool is."""
    held = page.total(f"{_PREFIX}blocks_held")
    if held is not None or traffic.pool is None:
        return held or 0.0
    usages = page.by_engine("vllm:kv_cache_usage_perc").values()
    return sum(usages) * traffic.pool.num_blocks


def _counts(page: Page, name: str, label: str) -> dict[str, int]:
    found = page.by_label(f"{_PREFIX}{name}", label)
    return {value: round(count) for value, count in found.items() if count}


def _total(page: Page, name: str) -> float:
    return page.total(f"{_PREFIX}{name}") or 0.0
