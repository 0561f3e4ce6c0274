# SPDX-License-Identifier: Apache-2.0
"""kv_heads that share what their layer keeps by the scores of each compaction: answers are those
of the engine on transformers, and neither hits nor chunks nor preemptions change them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from engine.harness import BLOCK_SIZE, LLAMA, engine
from engine.test_head_budgets import found_by
from engine.unequal_budgets import (
    COMPRESSION,
    LONG,
    OPTIONS,
    SHORT,
    answers,
    answers_of_transformers,
    disturbed,
    group_stats,
    increase,
    start_log,
)
from unlike_heads import unlike_heads

from ems_vllm.config import load_config
from ems_vllm.engine.group.head_tables import HeadTables

pytestmark = pytest.mark.slow

NUM_LAYERS, NUM_HEADS = 4, 4
BUDGET_BLOCKS = COMPRESSION["budget"] // BLOCK_SIZE
# Without a safeguard heads differ most.
ADA = {"name": "ada", "safeguard": 0.0}


@pytest.fixture(scope="class", params=["snapkv", "ems"])
def compression(request):
    return {**COMPRESSION, "recipe": request.param, "allocator": ADA}


@pytest.fixture(scope="class")
def probe(compression):
    with engine(compression, LLAMA, **OPTIONS) as probe:
        yield probe


@pytest.fixture
def fresh(probe):
    """The engine with nothing in its prefix cache; nobody owns pages afterwards."""
    assert probe.llm.reset_prefix_cache()
    with unlike_heads():
        yield probe
    probe.generate([[1]], 1)
    probe.assert_pool_is_empty()
    assert [group.heads.num_owners for group in probe.worker.compression.groups] == [0]


class TestAda:
    """One engine for all of it."""

    def test_heads_are_dealt_to_at_every_compaction(self, fresh, monkeypatch):
        seen: list[np.ndarray] = []
        own = HeadTables.own

        def recording(tables, req_ids, pages):
            own(tables, req_ids, pages)
            seen.append(tables.owned(req_ids)[:, 0])

        monkeypatch.setattr(HeadTables, "own", recording)
        before = group_stats(fresh)
        fresh.generate([LONG], 80)
        assert len(seen) == increase(fresh, before, "num_compactions")[0] > 2
        for owned in seen:
            assert owned.shape == (NUM_LAYERS, NUM_HEADS)
            assert (owned.sum(1) == NUM_HEADS * BUDGET_BLOCKS).all()
            assert owned.min() >= 1
            assert (owned.max(1) > BUDGET_BLOCKS).all()
        assert any((first != later).any() for first, later in pairwise(seen))

    def test_answers_are_those_on_transformers(self, fresh, compression):
        expected = answers_of_transformers(compression, [LONG, SHORT], 80)
        assert [fresh.generate([prompt], 80)[0] for prompt in (LONG, SHORT)] == expected

    def test_hits_chunks_and_preemptions_change_no_answer(self, fresh, compression):
        assert load_config(compression).is_neutral_to_hits
        cold = answers(fresh)
        found = disturbed(fresh)
        assert {name: found[name] == cold for name in found} == dict.fromkeys(found, True)

    def test_the_start_log_says_when_heads_are_dealt_to(self, probe, compression):
        lines = start_log(probe, compression, 420)
        assert any(
            "kv_heads share what their layer keeps, by the scores of each compaction." in line
            for line in lines
        ), lines


@pytest.mark.parametrize("recipe", ["ems", "snapkv"])
def test_a_safeguard_of_1_answers_as_uniform(recipe):
    shared = {**COMPRESSION, "recipe": recipe}
    uniform, stats = found_by({**shared, "allocator": "uniform"})
    found, of_heads = found_by({**shared, "allocator": {"name": "ada", "safeguard": 1.0}})
    assert of_heads == stats
    assert [token_ids for token_ids, _ in found] == [token_ids for token_ids, _ in uniform]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in uniform], rtol=0, atol=1e-3)
