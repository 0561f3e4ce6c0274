# SPDX-License-Identifier: Apache-2.0
"""When requests wait, and for what."""

import pytest
from engine.simulator import Simulator

from ems_vllm._C import CompressionPlan

SETTINGS = {
    "recipe": "ems",
    "budget": 16,
    "recent_window": 8,
    "obs_window": 4,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
    "prefix_score_tokens": 1024,
}


def run(settings=SETTINGS, *, num_blocks, prompts, max_tokens, **options):
    simulator = Simulator(settings, num_blocks=num_blocks, **options)
    for prompt in prompts:
        simulator.add(prompt, max_tokens)
    simulator.drain()
    return simulator


def test_a_preempted_request_asks_for_what_it_will_hold():
    """Its replay is compressed as it goes; waiting for room for all of it would block the queue."""
    simulator = Simulator(SETTINGS, num_blocks=130, max_num_seqs=16, max_num_batched_tokens=64)
    for index in range(14):
        simulator.add([7 * index + token for token in range(15)], 350)
    scheduler, schedule = simulator.scheduler, simulator.scheduler.schedule
    room = []

    def scheduling(*args, **kwargs):
        output = schedule(*args, **kwargs)
        # While requests begin, and in a step that preempts, others wait for other reasons.
        if simulator.num_steps > 20 and scheduler.waiting and not output.preempted_req_ids:
            request = scheduler.waiting.peek_request()
            (ledger,) = scheduler.planner.requests[request.request_id].ledgers
            needed = ledger.plan.max_replay_columns(request.num_tokens)
            room.append(simulator.pool.get_num_free_blocks() - needed)
        return output

    scheduler.schedule = scheduling
    simulator.drain()
    assert simulator.num_preemptions > 10
    assert room
    assert max(room) < 0, "a request waits although what it will hold at most is free"


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_single_row_serves_everybody_in_turn(async_scheduling):
    """Short of rows or score pages, requests wait; they neither stop each other nor starve."""
    load = {
        "num_blocks": 200,
        "prompts": [[*range(60), *range(100 * index, 100 * index + 20)] for index in range(1, 9)],
        "max_tokens": 60,
        "max_num_batched_tokens": 64,
        "async_scheduling": async_scheduling,
    }
    # A hit can be 48 tokens long: t = (80 - 8) // 4 = 18, a = t - 4 = 14.
    scarce = run({**SETTINGS, "query_ring_rows": 1, "prefix_score_tokens": 56}, **load)
    plenty = run({**SETTINGS, "query_ring_rows": 8}, **load)
    assert scarce.answers == plenty.answers
    assert scarce.num_steps > plenty.num_steps


def test_the_longest_prompt_can_still_be_admitted():
    """Nobody else runs, so what a replay may hold at most has to fit into the whole pool."""
    plan = CompressionPlan(
        prompt_len=60,
        block_size=4,
        budget_blocks=4,
        recent_window=8,
        recompress_interval=16,
        min_blocks_saved=1,
    )
    assert plan.max_replay_columns(400) < 400 // 4
    simulator = run(
        num_blocks=plan.max_replay_columns(400) + 2,
        prompts=[list(range(60))],
        max_tokens=20,
        max_num_seqs=1,
    )
    (answer,) = simulator.answers.values()
    assert len(answer) == 20
