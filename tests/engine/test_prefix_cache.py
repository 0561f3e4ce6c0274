# SPDX-License-Identifier: Apache-2.0
"""Prefix caching stays on: hits happen, nothing shared is written, answers do not change.

With a scorer that needs no queries an answer must not depend on hits at all; test_prefix_scores.py
is about the other ones.
"""

from __future__ import annotations

import pytest
from engine.arrivals import Arrival, serve
from engine.block_guard import guarded
from engine.harness import BLOCK_SIZE, engine, tokens

BUDGET, RECENT_WINDOW = 64, 32
COMPRESSION = {
    "recipe": "knorm",
    "budget": BUDGET,
    "recent_window": RECENT_WINDOW,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
PREFIX = tokens(2000, seed=99)
# The hit of the shortest ones ends before the prefix does: where their own compaction will write.
TAILS = (300, 5, 33, 64, 90, 95, 96, 112, 130, 160, 200, 240)
PROMPTS = [PREFIX + tokens(length, seed=length) for length in TAILS]
OTHER = tokens(1400, seed=7)
# Long enough for a recompression while decoding.
MAX_TOKENS, MAX_TOKENS_OF_FIRST = 66, 120


def longest_hit(prompt):
    """Where columns [0, first) of docs/architecture.md end, in tokens."""
    return (len(prompt) - RECENT_WINDOW) // BLOCK_SIZE * BLOCK_SIZE - BUDGET


@pytest.fixture(scope="module")
def expected():
    """Answers with prefix caching off; `expected(prompt, n)` are the first n tokens."""
    prompts = [*PROMPTS, OTHER]
    max_tokens = [MAX_TOKENS_OF_FIRST, *[MAX_TOKENS] * len(TAILS)]
    with engine(COMPRESSION, enable_prefix_caching=False, max_num_batched_tokens=2048) as probe:
        outputs = probe.generate_outputs(prompts, max_tokens)
    assert not any(output.num_cached_tokens for output in outputs)
    answers = {tuple(output.prompt_token_ids): output.outputs[0].token_ids for output in outputs}
    return lambda prompt, length: list(answers[tuple(prompt)][:length])


def assert_expected(outputs, expected):
    for output in outputs:
        answer = list(output.outputs[0].token_ids)
        assert answer == expected(output.prompt_token_ids, len(answer))


class TestSharedPrefix:
    """One engine; every test begins with an empty prefix cache."""

    @pytest.fixture(scope="class")
    def running(self, expected):
        # `expected` comes first, because there is one engine in a process at a time.
        with engine(COMPRESSION, max_num_batched_tokens=4096, disable_log_stats=False) as probe:
            yield probe

    @pytest.fixture
    def probe(self, running):
        assert running.llm.reset_prefix_cache()
        with guarded(running):
            yield running
        running.assert_pool_is_empty()

    @staticmethod
    def metric(probe, name):
        """A counter that vLLM's users see."""
        (value,) = [item.value for item in probe.llm.get_metrics() if item.name == f"vllm:{name}"]
        return value

    def test_requests_that_arrive_together_hit(self, probe, expected):
        """The chunk is so large that some hit blocks which are written in the same step."""
        hits = self.metric(probe, "prefix_cache_hits")
        queries = self.metric(probe, "prefix_cache_queries")
        outputs = probe.generate_outputs(PROMPTS, MAX_TOKENS)
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [0, *[min(len(PREFIX), longest_hit(p)) for p in PROMPTS[1:]]]
        assert min(cached[1:]) < len(PREFIX) == max(cached)
        assert self.metric(probe, "prefix_cache_hits") - hits == sum(cached)
        assert self.metric(probe, "prefix_cache_queries") - queries == sum(map(len, PROMPTS))
        assert_expected(outputs, expected)

    def test_requests_one_after_another_hit(self, probe, expected):
        outputs = [probe.generate_outputs([prompt], 16)[0] for prompt in PROMPTS]
        cached = [output.num_cached_tokens for output in outputs]
        assert cached == [0, *[min(len(PREFIX), longest_hit(p)) for p in PROMPTS[1:]]]
        assert_expected(outputs, expected)
        # A prompt that was seen whole; its hit ends where its own compaction begins to write.
        (again,) = probe.generate_outputs(PROMPTS[:1], 16)
        assert again.num_cached_tokens == longest_hit(PROMPTS[0]) > len(PREFIX)
        assert_expected([again], expected)

    def test_prefix_that_another_request_has_compressed_meanwhile(self, probe, expected):
        first, second = PROMPTS[0], PROMPTS[-1]
        arrival = MAX_TOKENS_OF_FIRST - MAX_TOKENS
        arrivals = [
            Arrival(0, first, MAX_TOKENS_OF_FIRST),
            Arrival(arrival, second, MAX_TOKENS // 2),
            # By then the first one has finished, and given back what it had compressed.
            Arrival(MAX_TOKENS_OF_FIRST + 1, first, MAX_TOKENS),
        ]
        compactions = probe.stats()["num_compactions"]
        seen = {}

        def look(step):
            if step == arrival:
                seen["compactions"] = probe.stats()["num_compactions"] - compactions
                seen["reset"] = probe.llm.reset_prefix_cache()
                (blocks,) = probe.managers[0].req_to_blocks.values()
                seen["columns"] = sum(not block.is_null for block in blocks)
            seen["running"] = len(probe.scheduler.running)
            if step == MAX_TOKENS_OF_FIRST + 1:
                seen["running at the end"] = seen["running"]

        outputs = serve(probe, arrivals, look)
        # The prompt and once while decoding; the prefix itself was given back to the cache.
        assert seen["compactions"] == 2
        assert seen["columns"] < 20
        # As in vLLM, the cache cannot be reset while a request holds blocks.
        assert seen["reset"] is False
        assert [output.num_cached_tokens for output in outputs] == [
            0,
            len(PREFIX),
            longest_hit(first),
        ]
        assert_expected(outputs, expected)

    def test_reset_forgets_the_cache_and_changes_no_answer(self, probe, expected):
        prompts = PROMPTS[1:2]
        cached = []
        for reset in (False, False, True, False):
            if reset:
                assert probe.llm.reset_prefix_cache() is True
            outputs = probe.generate_outputs(prompts, 16)
            cached.append(outputs[0].num_cached_tokens)
            assert_expected(outputs, expected)
        hit = longest_hit(prompts[0])
        assert cached == [0, hit, 0, hit]

    def test_reset_under_a_compressed_request_changes_no_answer(self, probe, expected):
        """vLLM preempts what runs, so that the request begins again, without a hit."""
        arrivals = [Arrival(0, PROMPTS[0], 70)]
        resets = []

        def reset(step):
            # After the compaction of the prompt, and after the next one.
            if step in (20, 64):
                resets.append(probe.llm.reset_prefix_cache(reset_running_requests=True))

        preemptions = probe.num_preemptions
        outputs = serve(probe, arrivals, reset)
        assert resets == [True, True]
        assert probe.num_preemptions == preemptions + 2
        assert_expected(outputs, expected)


def test_evictions_change_no_answer(expected):
    """The pool holds one prompt; what it evicts is computed again."""
    order = [PROMPTS[0], PROMPTS[4], OTHER, PROMPTS[5], OTHER]
    num_blocks = len(PROMPTS[0]) // BLOCK_SIZE + 10
    with engine(COMPRESSION, num_blocks=num_blocks, max_model_len=2368) as probe:
        with guarded(probe):
            outputs = [probe.generate_outputs([prompt], 20)[0] for prompt in order]
        cached = [output.num_cached_tokens for output in outputs]
        assert cached[1] == longest_hit(order[1])
        assert 0 < cached[3] < longest_hit(order[3])
        assert 0 < cached[4] < longest_hit(order[4])
        assert_expected(outputs, expected)
        probe.assert_pool_is_empty()
        with guarded(probe):
            outputs = probe.generate_outputs([PROMPTS[1], OTHER], 20)
        assert_expected(outputs, expected)
        probe.assert_pool_is_empty()
