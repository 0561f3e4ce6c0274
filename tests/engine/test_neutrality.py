# SPDX-License-Identifier: Apache-2.0
"""Other people's traffic changes no answer: cold, warm, shared, next turn, preempted, in chunks.

A request is the same greedy request however much of its prompt comes from the prefix cache,
wherever its chunks are cut, and whether it was preempted, so it must keep the same entries and
answer alike (float32, where the order of sums changes no token here). Recipes say whether they
promise this.
"""

from __future__ import annotations

import pytest
from engine.arrivals import Arrival, serve
from engine.block_guard import guarded
from engine.harness import engine, tokens

from ems_vllm.config import load_config, recipes

pytestmark = pytest.mark.slow

PREFIX = tokens(640, seed=99)
PROMPT = PREFIX + tokens(260, seed=5)
# So long that even the level of layers that keeps most leaves the whole prefix to others.
PRIMER = PREFIX + tokens(200, seed=8)
# Long enough for two recompressions.
MAX_TOKENS = 76


def settings(recipe: str) -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": 64,
        "recent_window": 32,
        "obs_window": 16,
        "recompress_interval": 32,
        "min_blocks_saved": 1,
    }


def answer(probe, prompt, max_tokens=MAX_TOKENS):
    (output,) = probe.generate_outputs([prompt], max_tokens)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def preempted_answer(probe, at):
    """The answer to PROMPT from a cold cache, preempted in the given step."""
    scheduler = probe.scheduler

    def preempt(step):
        if step == at:
            scheduler._preempt_request(scheduler.running.pop(), 0.0)

    (output,) = serve(probe, [Arrival(0, PROMPT, MAX_TOKENS)], preempt)
    return list(output.outputs[0].token_ids)


def answer_in_chunks(probe, size):
    scheduler = probe.scheduler
    usual = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = size
    try:
        return answer(probe, PROMPT)[0]
    finally:
        scheduler.max_num_scheduled_tokens = usual


def fits_any_model(name):
    config = load_config(name)
    return not (config.scorer.reads_profile or config.allocator.reads_profile)


ALL = {name: settings(name) for name in recipes.names() if fits_any_model(name)}
# A query is sampled for its position, whoever computes it, and when.
SAMPLED = {**settings("ems"), "sample_stride": 4}


@pytest.mark.parametrize("chosen", [*ALL.values(), SAMPLED], ids=[*ALL, "ems, one query in 4"])
def test_the_same_request_answers_alike(chosen):
    assert load_config(chosen).is_neutral_to_hits
    options = {"max_model_len": 1280, "max_num_batched_tokens": 256}
    with engine(chosen, **options) as probe, guarded(probe):
        forget = probe.llm.reset_prefix_cache
        cold, cached = answer(probe, PROMPT)
        assert cached == 0
        answers = {}
        answers["warm"], cached = answer(probe, PROMPT)
        assert cached > len(PREFIX)
        turn = [*PROMPT, *cold[:30], *tokens(70, seed=11)]
        answers["next turn"], cached = answer(probe, turn, 24)
        assert cached > len(PREFIX)

        assert forget()
        cold_turn, cached = answer(probe, turn, 24)
        assert cached == 0
        assert answers.pop("next turn") == cold_turn

        assert forget()
        answer(probe, PRIMER, 4)
        answers["shared prefix"], cached = answer(probe, PROMPT)
        assert cached == len(PREFIX)

        for size in (100, 37):
            assert forget()
            answers[f"chunks of {size}"] = answer_in_chunks(probe, size)
        # In the middle of the prompt, and after one and two compactions.
        for step in (2, 20, 50):
            assert forget()
            answers[f"preempted in step {step}"] = preempted_answer(probe, step)
        assert {name: found == cold for name, found in answers.items()} == dict.fromkeys(
            answers, True
        )
        probe.assert_pool_is_empty()


def test_a_recipe_that_scores_with_all_queries_does_not_promise_it():
    assert not load_config({**settings("ems"), "global_queries": "all"}).is_neutral_to_hits
