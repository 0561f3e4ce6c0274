# SPDX-License-Identifier: Apache-2.0
"""Names and meanings of the metrics; docs/monitoring.md and the dashboard are checked with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As it is registered; on the page a counter has `_total` behind it.
        help: What it says, for the page.
    """

    name: str
    help: str


_OF_A_HEAD = "of a kv_head, in the mean of the compressed KV-cache groups"
_AS_MEASURED = f"{_OF_A_HEAD} and of the kv_heads of the first device"

COUNTERS = {
    "num_compactions": Metric(
        "ems_vllm:compactions",
        "Compactions: steps that compressed a request, counted by request.",
    ),
    "num_entries_in": Metric(
        "ems_vllm:entries_in", f"Entries that compactions have found, {_OF_A_HEAD}."
    ),
    "num_entries_kept": Metric(
        "ems_vllm:entries_kept", f"Entries that compactions have kept, {_OF_A_HEAD}."
    ),
    "num_entries_merged": Metric(
        "ems_vllm:entries_merged",
        f"Entries that compactions have merged into kept ones, {_AS_MEASURED}.",
    ),
    "num_entries_evicted": Metric(
        "ems_vllm:entries_evicted", f"Entries that compactions have dropped, {_AS_MEASURED}."
    ),
    "num_blocks_freed": Metric(
        "ems_vllm:blocks_freed",
        "Blocks that compactions have given back, counted by request where several share one.",
    ),
    "num_bytes_freed": Metric(
        "ems_vllm:kv_bytes_freed",
        "Bytes by which kv_bytes_saved has grown with compactions, on all devices of the engine.",
    ),
    "num_preemptions_avoided": Metric(
        "ems_vllm:preemptions_avoided",
        "Requests that went on although a pool of this size, dense, could not have held all that "
        "ran: those it would have preempted, or not let in, counted once an admission.",
    ),
    "num_guarded": Metric(
        "ems_vllm:guarded_requests",
        "Compressed requests of which it was measured what compactions changed, counted when they "
        "have ended.",
    ),
    "num_diverged": Metric(
        "ems_vllm:diverged_requests", "Those of them that changed by more than guard_limit."
    ),
}
"""By field of Totals."""

GAUGES = {
    "num_blocks_held": Metric(
        "ems_vllm:blocks_held", "Blocks of the pool in use, of all KV-cache groups."
    ),
    "num_blocks_saved": Metric(
        "ems_vllm:blocks_saved",
        "Blocks that running requests would hold besides, were they not compressed; one that "
        "several would share counts once.",
    ),
    "num_bytes_saved": Metric(
        "ems_vllm:kv_bytes_saved",
        "Bytes of the saved blocks on all devices of the engine, each taken to be as the first.",
    ),
    "diverged_lower_bound": Metric(
        "ems_vllm:diverged_lower_bound",
        "With 95 % confidence at least this share of requests diverges, by the latest 200 that "
        "were measured; there with a guard_limit, once one was.",
    ),
    "diverged_upper_bound": Metric(
        "ems_vllm:diverged_upper_bound", "Likewise: with 95 % confidence at most this share does."
    ),
    "guard_dense": Metric(
        "ems_vllm:guard_dense",
        "1 while new requests keep their whole cache, because too many diverge; there with "
        "guard_action dense.",
    ),
}
"""By field of Totals, but for blocks that are held."""

REQUESTS = Metric(
    "ems_vllm:requests",
    "Requests that have ended, by outcome: compressed; fitted, being never longer than what may be "
    "held; off, as they asked; ample, because the pool had room and compression is for pressure; "
    "spared, because guard_dense was 1.",
)

REFUSED = Metric(
    "ems_vllm:requests_refused",
    "Requests answered with an HTTP 400 because of compression, by reason: the key of vllm_xargs "
    "that was wrong (misspelt, where it is none), no_object, too_many_keys, or what cannot be "
    "combined.",
)

HISTOGRAM = Metric(
    "ems_vllm:compaction_time_seconds",
    "Seconds that a step spent on its compactions, on the first device.",
)

ERRORS = Metric(
    "ems_vllm:attention_error",
    "Relative error of attention's outputs after a compaction, of the recorded queries, by "
    "measured request and of its worst compaction, on the first device: in the mean of the "
    "layers, and of the layer that changed most.",
)

ALL = (*COUNTERS.values(), *GAUGES.values(), REQUESTS, REFUSED, HISTOGRAM, ERRORS)
