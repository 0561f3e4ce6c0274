# SPDX-License-Identifier: Apache-2.0
"""What limits a server; the thresholds are ours."""

from __future__ import annotations

from enum import StrEnum

from ems_vllm.doctor.live.traffic import Traffic

# Requests, running and waiting, below which a server that generates nothing is idle.
IDLE_REQUESTS = 0.05
# Requests in the queue, in the mean, from which on requests wait.
QUEUE = 0.5
# Preemptions for each request that runs or has ended from which on they are what matters.
PREEMPTED = 0.2
# The same, from which on they show that the pool was full.
SOME_PREEMPTED = 0.01
# Share of the pool in use, while requests wait, from which on it is full.
FULL_POOL = 0.9
# It is full as well where what is left does not hold so many mean prompts: few long ones never fill
# it, and the next in the queue may be longer than the mean.
ROOM_FOR_PROMPTS = 2
# Share of the requests' time that goes into their prompts from which on these are what is waited
# for.
PREFILL_SHARE = 0.5
# The same, in prompt tokens per generated one, where no request has ended.
PREFILL_TOKENS = 50

THRESHOLDS = {
    "idle_requests": IDLE_REQUESTS,
    "queue": QUEUE,
    "preempted": PREEMPTED,
    "some_preempted": SOME_PREEMPTED,
    "full_pool": FULL_POOL,
    "room_for_prompts": ROOM_FOR_PROMPTS,
    "prefill_share": PREFILL_SHARE,
    "prefill_tokens": PREFILL_TOKENS,
}


class Regime(StrEnum):
    """What requests wait for.

    Attributes:
        ASLEEP: Nothing: sleep mode.
        IDLE: Nothing: there are none.
        PREEMPTING: The pool is so full that running requests lose their blocks.
        KV_BOUND: The pool is full, and requests wait for blocks.
        PREFILL_BOUND: Prompts take the time.
        COMPUTE_BOUND: There are blocks, but no place among the requests of a step.
        ROOM: Nothing: all of them run, and blocks are left.
    """

    ASLEEP = "asleep"
    IDLE = "idle"
    PREEMPTING = "preempting"
    KV_BOUND = "kv_bound"
    PREFILL_BOUND = "prefill_bound"
    COMPUTE_BOUND = "compute_bound"
    ROOM = "room"


FULL = (Regime.PREEMPTING, Regime.KV_BOUND)
QUIET = (Regime.ASLEEP, Regime.IDLE)


def regime(traffic: Traffic) -> Regime:
    """The first of these that holds, from what stops everything to what stops nothing."""
    if traffic.is_asleep:
        return Regime.ASLEEP
    if traffic.running + traffic.waiting < IDLE_REQUESTS and not traffic.generation_rate:
        return Regime.IDLE
    preempted = _preempted(traffic)
    if preempted >= PREEMPTED:
        return Regime.PREEMPTING
    queues = traffic.waiting >= QUEUE
    if preempted >= SOME_PREEMPTED or (queues and _is_full(traffic)):
        return Regime.KV_BOUND
    if _is_mostly_prompts(traffic):
        return Regime.PREFILL_BOUND
    return Regime.COMPUTE_BOUND if queues else Regime.ROOM


def _preempted(traffic: Traffic) -> float:
    """Preemptions for each request that runs or has ended while the server was watched."""
    lengths = traffic.lengths
    ended = 0 if lengths is None or lengths.since_start else lengths.num_requests
    requests = traffic.running + ended
    return traffic.preemptions / requests if requests else float(traffic.preemptions)


def _is_full(traffic: Traffic) -> bool:
    usage = traffic.usage_in_queue
    if usage is None:
        return False
    if usage >= FULL_POOL:
        return True
    if traffic.pool is None or traffic.lengths is None:
        return False
    left = (1 - usage) * traffic.pool.num_blocks * traffic.pool.block_size
    return left < ROOM_FOR_PROMPTS * traffic.lengths.prompt_mean


def _is_mostly_prompts(traffic: Traffic) -> bool:
    if traffic.prefill_share is not None:
        return traffic.prefill_share >= PREFILL_SHARE
    return traffic.prompt_rate > PREFILL_TOKENS * traffic.generation_rate
