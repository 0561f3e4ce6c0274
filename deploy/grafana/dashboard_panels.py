# SPDX-License-Identifier: Apache-2.0
"""What the dashboard shows: rows of panels, their queries, units and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The variables of the dashboard. Refusals happen before an engine is chosen, so they have no
# such label.
_MODEL = 'model_name=~"$model_name",instance=~"$instance"'
_ENGINE = f'{_MODEL},engine=~"$engine"'


@dataclass(frozen=True)
class Query:
    """A line of a panel; its legend may name labels as `{{reason}}`."""

    promql: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """Queries that are drawn together.

    Attributes:
        unit: As Grafana names it: bytes, s, percentunit, short, cps.
        description: One or two sentences; Grafana shows them beside the title.
        width: Columns of 24.
        top: Of the axis, where it has one.
    """

    title: str
    unit: str
    description: str
    queries: tuple[Query, ...]
    kind: Literal["lines", "stacked", "now", "heatmap"] = "lines"
    width: int = 8
    top: float | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _now(name: str) -> str:
    return f"sum({name}{{{_ENGINE}}})"


def _rate(name: str, labels: str = _ENGINE) -> str:
    return f"sum(rate({name}{{{labels}}}[$__rate_interval]))"


def _rate_by(label: str, name: str, labels: str = _ENGINE) -> Query:
    query = f"sum by ({label}) (rate({name}{{{labels}}}[$__rate_interval]))"
    return Query(query, f"{{{{{label}}}}}")


def _counted(name: str) -> str:
    return f"sum(increase({name}{{{_ENGINE}}}[$__range]))"


def _quantiles(name: str, *labels: str) -> tuple[Query, ...]:
    chosen = ",".join((_ENGINE, *labels))
    buckets = f"sum by (le) (rate({name}_bucket{{{chosen}}}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({quantile}, {buckets})", f"p{quantile * 100:.0f}")
        for quantile in (0.5, 0.95, 0.99)
    )


def _by_engine(name: str) -> Query:
    query = f"max by (instance, engine) ({name}{{{_ENGINE}}})"
    return Query(query, "{{instance}}, engine {{engine}}")


_HELD = _now("ems_vllm:blocks_held")
_SAVED = _now("ems_vllm:blocks_saved")
_RUNNING = Query(_now("vllm:num_requests_running"), "running")
_WAITING = Query(_now("vllm:num_requests_waiting"), "waiting")

_GAIN = Row(
    "Is it compressing, and what is gained?",
    (
        Panel(
            "Cache held",
            "percentunit",
            "Blocks in use, as a share of those that would be in use uncompressed. "
            "100 %: nothing of what runs is compressed. A dash: nothing runs, or the server does "
            "not compress.",
            (Query(f"{_HELD} / ({_HELD} + {_SAVED} > 0)"),),
            kind="now",
            width=4,
            top=1,
        ),
        Panel(
            "KV cache saved",
            "bytes",
            "Memory that running requests would hold besides, were they not compressed, on all "
            "devices. It is free for other requests and for the prefix cache.",
            (Query(_now("ems_vllm:kv_bytes_saved")),),
            kind="now",
            width=4,
        ),
        Panel(
            "Preemptions in this time",
            "short",
            "Requests that a dense pool of this size would have preempted or not let in, and "
            "preemptions that happened all the same, over the time that the dashboard shows.",
            (
                Query(_counted("ems_vllm:preemptions_avoided_total"), "avoided"),
                Query(_counted("vllm:num_preemptions_total"), "happened"),
            ),
            kind="now",
            width=4,
        ),
        Panel(
            "Requests",
            "short",
            "Requests that run, and that wait for blocks or for a place in the batch.",
            (_RUNNING, _WAITING),
            width=6,
        ),
        Panel(
            "Tokens per second",
            "short",
            "Prompt tokens that were computed or found in the prefix cache, and tokens generated.",
            (
                Query(_rate("vllm:prompt_tokens_total"), "prompt"),
                Query(_rate("vllm:generation_tokens_total"), "generated"),
            ),
            width=6,
        ),
    ),
)

_COMPACTIONS = Row(
    "Compactions",
    (
        Panel(
            "Compactions per second",
            "cps",
            "Steps that compressed a request, counted by request.",
            (Query(_rate("ems_vllm:compactions_total"), "compactions"),),
        ),
        Panel(
            "Entries per second",
            "short",
            "Entries of a kv_head, in the mean of the compressed groups: what compactions found, "
            "and what became of it; merged and evicted as the first device has measured.",
            tuple(
                Query(_rate(f"ems_vllm:entries_{fate}_total"), fate)
                for fate in ("in", "kept", "merged", "evicted")
            ),
        ),
        Panel(
            "Kept by a compaction",
            "percentunit",
            "Share of the entries found that is kept, in the mean of the compactions at that time.",
            (
                Query(
                    f"{_rate('ems_vllm:entries_kept_total')}"
                    f" / ({_rate('ems_vllm:entries_in_total')} > 0)",
                    "kept",
                ),
            ),
            top=1,
        ),
        Panel(
            "KV cache given back per second",
            "Bps",
            "By how much compactions let the memory saved grow, on all devices.",
            (Query(_rate("ems_vllm:kv_bytes_freed_total"), "given back"),),
        ),
        Panel(
            "Time of a step's compactions",
            "s",
            "How many steps spent how long on their compactions, on the first device.",
            (
                Query(
                    "sum by (le) (increase(ems_vllm:compaction_time_seconds_bucket"
                    f"{{{_ENGINE}}}[$__rate_interval]))",
                    "{{le}}",
                ),
            ),
            kind="heatmap",
        ),
        Panel(
            "Time of a step's compactions, quantiles",
            "s",
            "Half, 95 % and 99 % of the steps that compact spent no longer on it.",
            _quantiles("ems_vllm:compaction_time_seconds"),
        ),
    ),
)

_REQUESTS = Row(
    "Requests",
    (
        Panel(
            "Ended, by outcome",
            "reqps",
            "compressed: at least once; fitted: never longer than what may be held; off: asked "
            "for its whole cache; ample: left alone, because the pool had room.",
            (_rate_by("outcome", "ems_vllm:requests_total"),),
            kind="stacked",
        ),
        Panel(
            "Refused, by reason",
            "reqps",
            "Answered with an error before they ran: by compression, for the key of vllm_xargs "
            "that was wrong or what cannot be combined, and by vLLM, since its queue was full.",
            (
                _rate_by("reason", "ems_vllm:requests_refused_total", _MODEL),
                _rate_by("reason", "vllm:admission_rejections_total", _MODEL),
            ),
            kind="stacked",
        ),
        Panel(
            "Ended, by vLLM's reason",
            "reqps",
            "stop and length are answers; abort is a client that went away; error is the server's.",
            (_rate_by("finished_reason", "vllm:request_success_total"),),
            kind="stacked",
        ),
    ),
)

_POOL = Row(
    "Pool of blocks",
    (
        Panel(
            "Pool in use",
            "percentunit",
            "Blocks that requests hold, as a share of all; at 100 % the next token preempts.",
            (_by_engine("vllm:kv_cache_usage_perc"),),
            top=1,
        ),
        Panel(
            "Blocks held and saved",
            "short",
            "Blocks in use, and blocks that running requests would hold besides.",
            (Query(_HELD, "held"), Query(_SAVED, "saved")),
            kind="stacked",
        ),
        Panel(
            "Preemptions per second",
            "cps",
            "Each throws a request's cache away, to be computed again. Avoided: what a dense pool "
            "of this size would have preempted, or not let in.",
            (
                Query(_rate("vllm:num_preemptions_total"), "happened"),
                Query(_rate("ems_vllm:preemptions_avoided_total"), "avoided"),
            ),
        ),
        Panel(
            "Waiting, by reason",
            "short",
            "capacity: for blocks or a place in the batch; deferred: for something else, as a "
            "grammar.",
            (
                Query(
                    f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{_ENGINE}}})",
                    "{{reason}}",
                ),
            ),
            kind="stacked",
        ),
        Panel(
            "Prefix-cache hits",
            "percentunit",
            "Share of the prompt tokens looked up that were in the prefix cache.",
            (
                Query(
                    f"{_rate('vllm:prefix_cache_hits_total')}"
                    f" / ({_rate('vllm:prefix_cache_queries_total')} > 0)",
                    "hits",
                ),
            ),
            top=1,
        ),
        Panel(
            "Tokens of a step",
            "short",
            "Tokens that a step of the engine computes, in the mean: more of them use the GPU "
            "better.",
            (
                Query(
                    f"{_rate('vllm:iteration_tokens_total_sum')}"
                    f" / ({_rate('vllm:iteration_tokens_total_count')} > 0)",
                    "tokens",
                ),
            ),
        ),
    ),
)

_LATENCY = Row(
    "Latency",
    tuple(
        Panel(title, "s", description, _quantiles(f"vllm:{name}"), width=6)
        for title, name, description in (
            (
                "Time to first token",
                "time_to_first_token_seconds",
                "From a request's arrival, its time in the queue included.",
            ),
            (
                "Time per output token",
                "request_time_per_output_token_seconds",
                "In the mean of a request's tokens after the first.",
            ),
            (
                "Time between tokens",
                "inter_token_latency_seconds",
                "Of single tokens: a compaction in a step shows in its highest quantile.",
            ),
            (
                "Time in the queue",
                "request_queue_time_seconds",
                "Of requests that have ended: what more room in the pool shortens first.",
            ),
        )
    ),
)

_GUARD = Row(
    "Guard: measured requests",
    (
        Panel(
            "Attention error",
            "percentunit",
            "How much a request's worst compaction changed the outputs of attention, in the mean "
            "of the layers; half, 95 % and 99 % of the measured requests changed no more.",
            _quantiles("ems_vllm:attention_error", 'layers="mean"'),
        ),
        Panel(
            "Requests that diverge",
            "percentunit",
            "With 95 % confidence, at least and at most this share of requests changes by more "
            "than guard_limit, by the latest measured ones of an engine.",
            (
                Query(f"max(ems_vllm:diverged_lower_bound{{{_ENGINE}}})", "at least"),
                Query(f"max(ems_vllm:diverged_upper_bound{{{_ENGINE}}})", "at most"),
            ),
            top=1,
        ),
        Panel(
            "Measured, and in force",
            "short",
            "Requests measured and requests that diverged, per minute; and engines on which new "
            "requests keep their whole cache.",
            (
                Query(f"60 * {_rate('ems_vllm:guarded_requests_total')}", "measured"),
                Query(f"60 * {_rate('ems_vllm:diverged_requests_total')}", "diverged"),
                Query(_now("ems_vllm:guard_dense"), "engines that go dense"),
            ),
        ),
    ),
)

ROWS = (_GAIN, _COMPACTIONS, _REQUESTS, _POOL, _LATENCY, _GUARD)
