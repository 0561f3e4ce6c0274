# SPDX-License-Identifier: Apache-2.0
"""Numbers of vLLM's metrics page and of ours, of all engines together."""

from __future__ import annotations

from collections import defaultdict

from vllm.v1.metrics.prometheus import get_prometheus_registry

from ems_vllm.engine.status.answers import Now


def numbers_now(num_blocks: int) -> Now | None:
    """What the metrics say; None before an engine has said anything.

    Args:
        num_blocks: Of the pools of all engines.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    by_label: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for family in get_prometheus_registry().collect():
        if not family.name.startswith(("ems_vllm:", "vllm:num_")):
            continue
        for sample in family.samples:
            sums[sample.name] += sample.value
            for label in ("outcome", "reason"):
                if label in sample.labels:
                    by_label[sample.name][sample.labels[label]] += int(sample.value)
    if "ems_vllm:compactions_total" not in sums:
        return None

    def count(name: str) -> int:
        return int(sums[name])

    return Now(
        requests_running=count("vllm:num_requests_running"),
        requests_waiting=count("vllm:num_requests_waiting"),
        preemptions=count("vllm:num_preemptions_total"),
        blocks=num_blocks,
        blocks_held=count("ems_vllm:blocks_held"),
        blocks_saved=count("ems_vllm:blocks_saved"),
        kv_bytes_saved=count("ems_vllm:kv_bytes_saved"),
        kv_bytes_freed=count("ems_vllm:kv_bytes_freed_total"),
        compactions=count("ems_vllm:compactions_total"),
        entries_in=sums["ems_vllm:entries_in_total"],
        entries_kept=sums["ems_vllm:entries_kept_total"],
        entries_merged=sums["ems_vllm:entries_merged_total"],
        entries_evicted=sums["ems_vllm:entries_evicted_total"],
        preemptions_avoided=count("ems_vllm:preemptions_avoided_total"),
        compaction_seconds=sums["ems_vllm:compaction_time_seconds_sum"],
        requests_by_outcome=dict(by_label["ems_vllm:requests_total"]),
        requests_refused=dict(by_label["ems_vllm:requests_refused_total"]),
    )
