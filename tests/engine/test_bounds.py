# SPDX-License-Identifier: Apache-2.0
"""I4: the live columns of a request never exceed its plan, in prefill and in long generations."""

import pytest
from engine.busy_run import SETTINGS
from engine.harness import BLOCK_SIZE, engine, tokens
from engine.levels import LEVELS
from engine.simulator import Simulator

from ems_vllm.config import RequestOptions, load_config

pytestmark = pytest.mark.slow

COMPRESSION = {
    "recipe": "knorm",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
PROMPTS = [tokens(length, seed=length) for length in (700, 40, 333, 500, 5)]


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def probe(request):
    with engine(COMPRESSION, async_scheduling=request.param) as running:
        running.generate(PROMPTS, [300, 300, 300, 60, 40])
        yield running


def plans():
    settings = load_config(COMPRESSION).plan_settings
    return {len(p): settings.plan(len(p), BLOCK_SIZE, RequestOptions()) for p in PROMPTS}


def test_live_columns_never_exceed_the_plan(probe):
    by_prompt = plans()
    assert len(probe.live_columns) > 1000
    # Under async scheduling one more step is in flight when the next one is scheduled.
    lag = 1 if probe.scheduler.scheduler_config.async_scheduling else 0
    order = sorted(
        {req_id for req_id, _, _ in probe.live_columns}, key=lambda i: int(i.split("-")[0])
    )
    plan_of = {req_id: by_prompt[len(p)] for req_id, p in zip(order, PROMPTS, strict=True)}
    for req_id, live, start in probe.live_columns:
        plan = plan_of[req_id]
        if start < plan.prompt_len:
            continue
        bound = max(plan.max_live_columns(n) for n in range(max(0, start - lag), start + 1)) + lag
        assert live <= bound, (req_id, live, start, bound)


def test_long_generations_stay_bounded(probe):
    """Steady blocks per request below (budget + recent_window + recompress_interval)/bs + 1."""
    bound = (64 + 32 + 64) // BLOCK_SIZE + 1
    lag = 1 if probe.scheduler.scheduler_config.async_scheduling else 0
    late = [live for _, live, start in probe.live_columns if start >= 800]
    assert late
    assert max(late) <= bound + lag


def test_pool_is_empty_afterwards(probe):
    probe.assert_pool_is_empty()


def test_short_prompt_is_compressed_once_it_has_grown(probe):
    assert probe.stats()["num_compactions"] > 3 * (300 // 64)


@pytest.mark.parametrize("lag", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("levels", ["pyramid of 3", "one whole"])
def test_live_columns_of_each_level_never_exceed_its_plan(levels, lag):
    settings = {**SETTINGS, **LEVELS[levels], "query_ring_rows": 8}
    simulator = Simulator(settings, num_blocks=1000, async_scheduling=lag == 1)
    prompts = [[1000 * length + token for token in range(length)] for length in (5, 18, 30, 90)]
    by_request = {simulator.add(prompt, 100): len(prompt) for prompt in prompts}
    most = [0] * len(simulator.managers)
    while simulator.unfinished:
        simulator.step()
        for req_id, request in simulator.scheduler.requests.items():
            start = request.num_computed_tokens - 1
            if start < by_request[req_id]:
                continue
            for group_id, manager in enumerate(simulator.managers):
                plan = manager.kv_cache_spec.settings.plan(
                    by_request[req_id], manager.block_size, RequestOptions()
                )
                live = sum(not block.is_null for block in manager.req_to_blocks[req_id])
                bound = max(plan.max_live_columns(n) for n in range(start - lag, start + 1)) + lag
                assert live <= bound, (req_id, group_id, live, start, bound)
                if start > by_request[req_id] + BLOCK_SIZE:
                    most[group_id] = max(most[group_id], live)
    assert not simulator.num_preemptions
    # The first level keeps most.
    assert most[0] > most[-1] + 4
