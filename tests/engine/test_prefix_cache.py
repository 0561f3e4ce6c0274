# SPDX-License-Identifier: Apache-2.0
"""Prefix caching stays on: hits happen, nothing shared is written, answers do not change."""

from contextlib import contextmanager

import pytest
from engine.harness import BLOCK_SIZE, engine, tokens

from ems_vllm.engine.compactor import Compactor

SHARED = tokens(640, seed=99)
BATCHES = [
    [SHARED + tokens(300, 1)],
    [SHARED + tokens(250, 2), SHARED + tokens(411, 3), tokens(500, 4)],
    [SHARED + tokens(100, 5), SHARED + tokens(900, 6), SHARED + tokens(300, 1)],
]


def settings(recipe: str, **more: object) -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": 64,
        "recent_window": 32,
        "recompress_interval": 64,
        "min_blocks_saved": 1,
        **more,
    }


@contextmanager
def guarded(probe):
    """Assert before every compaction that its target blocks belong to one request only."""
    build = Compactor._context
    checked = []

    def guard(self, wave, stack):
        for item in wave:
            ids = item.request.block_ids[self._tensors.group_id][item.first : item.tail]
            for block_id in ids:
                block = probe.pool.blocks[block_id]
                assert block.ref_cnt == 1, (item.request.info.req_id, block)
                assert block.block_hash is None, (item.request.info.req_id, block)
                checked.append(block_id)
        return build(self, wave, stack)

    Compactor._context = guard
    try:
        yield checked
    finally:
        Compactor._context = build


def run(probe, batches=BATCHES, max_tokens=80):
    """Answers and cached tokens of batches that run one after the other."""
    answers, cached = [], []
    with guarded(probe) as checked:
        for batch in batches:
            outputs = probe.generate_outputs(batch, max_tokens)
            answers += [list(output.outputs[0].token_ids) for output in outputs]
            cached += [output.num_cached_tokens for output in outputs]
    assert checked, "nothing was compressed"
    probe.assert_pool_is_empty()
    return answers, cached


def test_query_free_scorer_gives_the_same_answers_with_and_without_hits():
    with engine(settings("knorm"), enable_prefix_caching=False) as probe:
        expected, cached = run(probe)
        assert not any(cached)
    with engine(settings("knorm"), enable_prefix_caching=True) as probe:
        answers, cached = run(probe)
    assert answers == expected
    assert cached[0] == 0
    assert cached[1] == cached[2] == len(SHARED)
    assert cached[3] == 0
    # The last prompt was seen whole; its hit ends where its own compaction begins to write.
    assert cached[-1] == (940 - 32) // BLOCK_SIZE * BLOCK_SIZE - 64


@pytest.mark.parametrize("recipe", ["ems", "h2o", "snapkv"])
def test_scorers_that_need_queries_score_hits_in_private(recipe):
    """A request's result must not depend on who shares its prefix at the same time."""
    prompt, other = SHARED + tokens(300, 1), SHARED + tokens(420, 7)
    with engine(settings(recipe)) as probe:
        run(probe, [[SHARED + tokens(64, 8)], [prompt]])
        alone, cached = run(probe, [[prompt]])
        assert cached[0] > 0
    with engine(settings(recipe)) as probe:
        run(probe, [[SHARED + tokens(64, 8)], [prompt]])
        together, cached_together = run(probe, [[prompt, other, SHARED + tokens(333, 9)]])
        assert cached_together[0] == cached[0]
    assert together[0] == alone[0]


def test_hit_is_shortened_when_no_private_score_pages_are_left():
    """Never wrong, only slower: the hit ends where the private pages do."""
    first = [[SHARED + tokens(300, 1)]]
    second = [[SHARED + tokens(250, 2)]]
    with engine(settings("ems", prefix_score_tokens=160)) as probe:
        run(probe, first)
        _, cached = run(probe, second)
        assert cached == [160]
    with engine(settings("ems", prefix_score_tokens=0)) as probe:
        run(probe, first)
        _, cached = run(probe, second)
        assert cached == [0]


def test_uncompressed_chat_turn_is_hashed_for_the_next_one():
    """A prompt too short to compress, and its answer, are found by the next turn of the chat."""
    with engine({"recipe": "ems", "budget": 1024}) as probe:
        prompt = tokens(200, 1)
        (answer,) = probe.generate([prompt], 100)
        turn = prompt + answer + tokens(50, 2)
        output = probe.generate_outputs([turn], 8)[0]
        assert output.num_cached_tokens == (200 + 99) // BLOCK_SIZE * BLOCK_SIZE
        probe.assert_pool_is_empty()
