# SPDX-License-Identifier: Apache-2.0
"""Scores beside the prefix cache: hits are scored in private, and wait rather than shrink.

With `global_queries: all`, accumulated scores (ems, h2o) lack the attention of the queries that a
hit leaves out, and nothing else. Otherwise a hit changes nothing: test_neutrality.py.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from engine.block_guard import guarded
from engine.harness import engine, tokens

from ems_vllm import ops

pytestmark = pytest.mark.slow

PREFIX = tokens(640, seed=99)
PROMPTS = [PREFIX + tokens(length, seed=length) for length in (100, 260)]
# Long enough for every level to leave the whole prefix to others.
PRIMER = PREFIX + tokens(200, seed=8)
CHUNK = 320


def settings(recipe: str, **more: object) -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": 64,
        "recent_window": 32,
        "recompress_interval": 64,
        "min_blocks_saved": 1,
        **more,
    }


def answer(probe, prompt, num_cached, max_tokens=24):
    """Answer to a prompt of which `num_cached` tokens must be hit."""
    with guarded(probe):
        (output,) = probe.generate_outputs([prompt], max_tokens)
    assert output.num_cached_tokens == num_cached
    return list(output.outputs[0].token_ids)


def answers_without_hits(probe):
    answers = []
    for prompt in PROMPTS:
        assert probe.llm.reset_prefix_cache()
        answers.append(answer(probe, prompt, 0))
    return answers


def answers_with_hits(probe):
    assert probe.llm.reset_prefix_cache()
    answer(probe, PRIMER, 0, max_tokens=4)
    return [answer(probe, prompt, len(PREFIX)) for prompt in PROMPTS]


@contextmanager
def only_late_queries_accumulated(start):
    """Accumulate the queries from position `start` on, the beginning of a chunk."""
    score_queries = ops.score_queries

    def late(query, key_cache, table, query_starts, query_lens, seq_lens, accumulated, *others):
        (position,) = (seq_lens - query_lens).tolist()
        if position < start:
            return
        if position == start:
            # These are the first ones now; what earlier owners left in the pages does not count.
            accumulated = torch.zeros_like(accumulated)
        score_queries(
            query, key_cache, table, query_starts, query_lens, seq_lens, accumulated, *others
        )

    with mock.patch.object(ops, "score_queries", late):
        yield


@pytest.mark.parametrize("recipe", ["ems", "h2o"])
def test_accumulated_scores_lack_the_queries_of_the_hit_and_nothing_else(recipe):
    with engine(settings(recipe, global_queries="all"), max_num_batched_tokens=CHUNK) as probe:
        cold = answers_without_hits(probe)
        warm = answers_with_hits(probe)
        with only_late_queries_accumulated(len(PREFIX)):
            assert answers_without_hits(probe) == warm
        # The first token comes before the compaction; the scores decide about the other ones.
        assert [tokens[0] for tokens in warm] == [tokens[0] for tokens in cold]
        assert warm != cold
        probe.assert_pool_is_empty()


PYRAMID = {"allocator": {"name": "pyramid", "num_levels": 2}}


@pytest.mark.parametrize(
    ("recipe", "levels"), [("ems", {}), ("h2o", {}), ("ems", PYRAMID)], ids=["ems", "h2o", "levels"]
)
def test_hits_are_scored_in_private(recipe, levels):
    """A request's result must not depend on who shares its prefix at the same time."""
    prompt = PROMPTS[1]
    others = [PREFIX + tokens(length, seed=length) for length in (333, 150)]
    with engine(settings(recipe, **levels)) as probe:
        answer(probe, PRIMER, 0, max_tokens=4)
        alone = answer(probe, prompt, len(PREFIX))
        assert probe.llm.reset_prefix_cache()
        answer(probe, PRIMER, 0, max_tokens=4)
        with guarded(probe):
            outputs = probe.generate_outputs([others[0], prompt, others[1]], 24)
        assert [output.num_cached_tokens for output in outputs] == [len(PREFIX)] * 3
        assert list(outputs[1].outputs[0].token_ids) == alone
        probe.assert_pool_is_empty()


def computed_tokens(recipe, **more):
    """Prompt tokens that twelve requests compute together when their common prefix is cached."""
    shared = tokens(1600, seed=1)
    prompts = [shared + tokens(40, seed=10 + n) for n in range(12)]
    compression = {**settings(recipe), **more}
    options = {"max_model_len": 1792, "max_num_batched_tokens": 1792, "max_num_seqs": 16}
    with engine(compression, **options) as probe:
        probe.generate([shared + tokens(40, seed=9)], 4)
        scheduled = Counter()
        schedule = probe.scheduler.schedule

        def counting(*args, **kwargs):
            output = schedule(*args, **kwargs)
            scheduled.update(output.num_scheduled_tokens)
            return output

        with mock.patch.object(probe.scheduler, "schedule", counting), guarded(probe):
            outputs = probe.generate_outputs(prompts, 4)
        assert {output.num_cached_tokens for output in outputs} == {1536}
        probe.assert_pool_is_empty()
    return scheduled.total()


def test_hits_at_once_are_never_shortened():
    """There are private pages for one of the hits; the other requests wait for them."""
    pages_for_one = {"prefix_score_tokens": 1792, "query_ring_rows": 1}
    assert computed_tokens("ems", **pages_for_one) == computed_tokens("knorm")
