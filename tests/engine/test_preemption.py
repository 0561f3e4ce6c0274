# SPDX-License-Identifier: Apache-2.0
"""A preemption changes no answer, whatever the request had been through before it."""

import pytest
from engine.harness import engine, tokens

pytestmark = pytest.mark.slow

PROMPTS = [tokens(length, seed=1 + length) for length in (420, 380, 60, 100, 150, 300)]
MAX_TOKENS = 200


def settings(recipe: str, recompress_interval: int) -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": 64,
        "recent_window": 32,
        "recompress_interval": recompress_interval,
        "min_blocks_saved": 1,
    }


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("recipe", "recompress_interval"),
    # A preempted request finds its own prompt in the cache; queries that a hit spares do not score,
    # so EMS is the one that could answer differently.
    [("knorm", 64), ("knorm", 0), ("ems", 64)],
)
def test_preempted_requests_give_the_same_answers(recipe, recompress_interval, async_scheduling):
    compression = settings(recipe, recompress_interval)
    options = {
        "async_scheduling": async_scheduling,
        "max_model_len": 768,
    }
    with engine(compression, **options) as probe:
        expected = probe.generate(PROMPTS, MAX_TOKENS)
        assert probe.num_preemptions == 0
    with engine(compression, num_blocks=50, **options) as probe:
        answers = probe.generate(PROMPTS, MAX_TOKENS)
        assert probe.num_preemptions > 0
        assert max(probe.used_blocks) <= 49
        probe.assert_pool_is_empty()
    assert answers == expected
