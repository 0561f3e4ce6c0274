# SPDX-License-Identifier: Apache-2.0
"""When requests wait, and for what."""

import pytest
from engine.build_scheduler import specs_of
from engine.levels import LEVELS
from engine.simulator import Simulator

from ems_vllm.config import RequestOptions
from ems_vllm.vllm_versions import bounds_cache_hits

SETTINGS = {
    "recipe": "ems",
    "budget": 16,
    "recent_window": 8,
    "obs_window": 4,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
    "prefix_score_tokens": 1024,
}


some_levels = pytest.mark.parametrize("levels", ["alike", "pyramid of 2", "one whole"])


def run(settings=SETTINGS, *, num_blocks, prompts, max_tokens, **options):
    simulator = Simulator(settings, num_blocks=num_blocks, **options)
    for prompt in prompts:
        simulator.add(prompt, max_tokens)
    simulator.drain()
    return simulator


@some_levels
def test_a_preempted_request_asks_for_what_it_will_hold(levels):
    """Its replay is compressed as it goes; waiting for room for all of it would block the queue."""
    settings = {**SETTINGS, **LEVELS[levels]}
    num_blocks = 130 * len(specs_of(settings))
    simulator = Simulator(
        settings, num_blocks=num_blocks, max_num_seqs=16, max_num_batched_tokens=64
    )
    for index in range(14):
        simulator.add([7 * index + token for token in range(15)], 350)
    scheduler, schedule = simulator.scheduler, simulator.scheduler.schedule
    room = []

    def scheduling(*args, **kwargs):
        output = schedule(*args, **kwargs)
        # While requests begin, and in a step that preempts, others wait for other reasons.
        if simulator.num_steps > 20 and scheduler.waiting and not output.preempted_req_ids:
            request = scheduler.waiting.peek_request()
            needed = sum(
                ledger.plan.max_replay_columns(request.num_tokens)
                for ledger in scheduler.planner.requests[request.request_id].ledgers
            )
            room.append(simulator.pool.get_num_free_blocks() - needed)
        return output

    scheduler.schedule = scheduling
    simulator.drain()
    assert simulator.num_preemptions > 10
    assert room
    assert max(room) < 0, "a request waits although what it will hold at most is free"


@some_levels
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_single_row_serves_everybody_in_turn(async_scheduling, levels):
    """Short of rows or score pages, requests wait; they neither stop each other nor starve."""
    settings = {**SETTINGS, **LEVELS[levels]}
    load = {
        "num_blocks": 200 * len(specs_of(settings)),
        "prompts": [[*range(60), *range(100 * index, 100 * index + 20)] for index in range(1, 9)],
        "max_tokens": 60,
        "max_num_batched_tokens": 64,
        "async_scheduling": async_scheduling,
    }
    # A hit can be 56 tokens long, with levels less: t = (80 - 8) // 4 = 18, a = t - 4 = 14.
    scarce = run({**settings, "query_ring_rows": 1, "prefix_score_tokens": 56}, **load)
    plenty = run({**settings, "query_ring_rows": 8}, **load)
    assert scarce.answers == plenty.answers
    assert scarce.num_steps > plenty.num_steps


@some_levels
def test_the_longest_prompt_can_still_be_admitted(levels):
    """Nobody else runs, so what a replay may hold at most has to fit into the whole pool."""
    settings = {**SETTINGS, **LEVELS[levels]}
    plans = [spec.settings.plan(60, 4, RequestOptions()) for spec in specs_of(settings)]
    needed = sum(plan.max_replay_columns(400) for plan in plans)
    assert needed < len(plans) * 400 // 4
    simulator = run(
        settings,
        num_blocks=needed + 2,
        prompts=[list(range(60))],
        max_tokens=20,
        max_num_seqs=1,
        max_model_len=400,
    )
    (answer,) = simulator.answers.values()
    assert len(answer) == 20


def test_nobody_passes_a_request_that_waits_for_score_pages():
    """Those that need few would always come first, and one that needs many never."""
    simulator = Simulator(
        {**SETTINGS, "prefix_score_tokens": 56}, num_blocks=400, max_num_batched_tokens=64
    )
    simulator.add([*range(60), *range(500, 520)], 4)
    simulator.drain()
    admitted, schedule = [], simulator.scheduler.schedule

    def scheduling(*args, **kwargs):
        output = schedule(*args, **kwargs)
        admitted.extend(request.req_id for request in output.scheduled_new_reqs)
        return output

    simulator.scheduler.schedule = scheduling
    # Tokens of the cached prompt that each begins with. The second wants all pages there are.
    queue = [
        simulator.add([*range(shared), *range(1000 * index, 1000 * index + 80 - shared)], 4)
        for index, shared in enumerate((28, 60, 28, 28), 1)
    ]
    simulator.drain()
    assert admitted == queue


@pytest.mark.skipif(not bounds_cache_hits(), reason="vLLM 0.32 passes no bound on")
def test_the_shorter_bound_of_a_hit_counts():
    """vLLM's own, or the one of the request's compaction."""
    simulator = Simulator(SETTINGS, num_blocks=400, max_num_batched_tokens=64)
    prompt = [*range(80)]
    simulator.add(prompt, 4)
    simulator.drain()
    simulator.add(prompt, 4)
    (request,) = simulator.scheduler.requests.values()
    hits = [
        simulator.scheduler._get_local_prefix_cache_hit(request, bound)[1]
        for bound in (None, 8, 70)
    ]
    # 56 as above: where the compaction begins to write.
    assert hits == [56, 8, 56]
