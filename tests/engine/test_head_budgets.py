# SPDX-License-Identifier: Apache-2.0
"""kv_heads that share unequally what their layer keeps: each its own number, all promises hold."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from engine.harness import BLOCK_SIZE, LLAMA, engine, tokens
from engine.one_engine import cold as cold
from engine.one_engine import compression as compression
from engine.one_engine import plain_answers as plain_answers
from engine.one_engine import probe as probe
from engine.unequal_budgets import (
    COMPRESSION,
    LONG,
    OPTIONS,
    SHORT,
    answers_of_transformers,
    disturbed,
    few_blocks,
    found_by_runner_v2,
    group_stats,
    identity_prompts,
    increase,
    start_log,
)
from engine.workers import answers_of_workers

from ems_vllm.config import ConfigError, load_config
from ems_vllm.engine.group.head_tables import HeadTables

pytestmark = pytest.mark.slow

NUM_LAYERS, NUM_HEADS = 4, 4
BUDGET_BLOCKS = COMPRESSION["budget"] // BLOCK_SIZE
ALIKE = (0.5, 0.5, 0.5, 0.5)
UNLIKE = (0.9, 0.1, 0.6, 0.4)


def by_head(of_heads: Any, of_layers: Any = lambda layer: 0.5, num_levels: int = 1) -> dict:
    """A profile of what heads keep of a half of a prompt."""
    layers = range(NUM_LAYERS)
    return {
        "name": "profile",
        "profile": {
            "ratios": [0.5],
            "fractions": {layer: [of_layers(layer)] for layer in layers},
            "head_fractions": {layer: [[part] for part in of_heads(layer)] for layer in layers},
        },
        "uniform_share": 0,
        "num_levels": num_levels,
        "per_head": True,
    }


def turned(layer: int) -> tuple[float, ...]:
    """What one head keeps in one layer, the next one keeps in the next layer."""
    return UNLIKE[layer:] + UNLIKE[:layer]


HEADS = {**COMPRESSION, "allocator": by_head(turned)}
# Half of the layers keep a little more, so that they are a KV-cache group of their own.
LEVELS = {
    **COMPRESSION,
    "allocator": by_head(
        lambda layer: [part + (0.04 if layer < 2 else -0.04) for part in turned(layer)],
        lambda layer: 0.54 if layer < 2 else 0.46,
        num_levels=2,
    ),
}


@pytest.fixture(scope="class", params=[HEADS, LEVELS], ids=["one level", "two levels"])
def case(request):
    return request.param, {}


@pytest.fixture
def fresh(probe):
    """The engine with nothing in its prefix cache; nobody owns pages afterwards."""
    assert probe.llm.reset_prefix_cache()
    yield probe
    probe.generate([[1]], 1)
    probe.assert_pool_is_empty()
    assert [group.heads.num_owners for group in probe.worker.compression.groups] == [
        0 for _ in group_stats(probe)
    ]


class TestHeads:
    """One engine for all of it."""

    def test_heads_own_different_numbers_and_the_budget_on_the_mean(self, fresh, monkeypatch):
        seen: list[np.ndarray] = []
        own = HeadTables.own

        def recording(tables, req_ids, pages):
            own(tables, req_ids, pages)
            seen.append(tables.owned(req_ids)[:, 0])

        monkeypatch.setattr(HeadTables, "own", recording)
        before = group_stats(fresh)
        fresh.generate([LONG], 2)
        owned = np.concatenate(seen)
        assert owned.shape == (NUM_LAYERS, NUM_HEADS)
        assert owned.sum() == NUM_LAYERS * NUM_HEADS * BUDGET_BLOCKS
        for layer, of_heads in enumerate(owned.tolist()):
            wanted = turned(layer)
            most, least = wanted.index(max(wanted)), wanted.index(min(wanted))
            assert of_heads[most] == max(of_heads) >= 2 * of_heads[least] > 0
        kept = increase(fresh, before, "num_entries_kept")
        layers = [stats["num_layers"] for stats in before]
        mean = sum(k * n for k, n in zip(kept, layers, strict=True)) / sum(layers)
        assert mean == COMPRESSION["budget"]

    @pytest.mark.parametrize("asked", [{"kv_budget": 4096}, {"kv_compression": "off"}], ids=str)
    def test_a_budget_that_holds_everything_is_identical_to_plain_vllm(
        self, fresh, plain_answers, asked
    ):
        before = group_stats(fresh)
        assert fresh.generate(identity_prompts(), 20, asked) == plain_answers
        assert not any(increase(fresh, before, "num_compactions"))

    def test_answers_are_those_on_transformers(self, fresh, compression):
        expected = answers_of_transformers(compression, [LONG, SHORT], 80)
        assert [fresh.generate([prompt], 80)[0] for prompt in (LONG, SHORT)] == expected

    def test_hits_chunks_and_preemptions_change_no_answer(self, fresh, cold, compression):
        assert load_config(compression).is_neutral_to_hits
        found = disturbed(fresh)
        assert {name: found[name] == cold for name in found} == dict.fromkeys(found, True)

    def test_a_pool_that_is_too_small_changes_no_answer(self, fresh):
        prompts = [tokens(length, seed=length) for length in (420, 380, 130, 60)]
        expected = fresh.generate(prompts, 70)
        before = fresh.num_preemptions
        with few_blocks(fresh, 32 * len(group_stats(fresh))):
            assert fresh.generate(prompts, 70) == expected
        assert fresh.num_preemptions > before

    def test_the_start_log_says_what_heads_keep(self, probe, compression):
        lines = start_log(probe, compression, 420)
        # A page at least, and of 24 blocks the best head wants 0.3 on the mean of all layers.
        (line,) = (line for line in lines if "kv_heads share" in line)
        assert re.search(r"of a prompt of 420 tokens from 16 to 1[12]\d entries", line), line

    def test_scores_tables_and_cache_together_fit_the_memory(self, probe):
        held = [*probe.worker.model_runner.kv_caches]
        for rewriter in probe.worker.rewriters:
            tensors, heads = rewriter.group.tensors, rewriter.group.heads
            held += [tensors.scores, tensors.query_ring.queries, heads.page_starts]
            tables = vars(rewriter.head_batch).values()
            held += [tensor for tensor in tables if isinstance(tensor, torch.Tensor)]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in held
        }
        taken = sum(storage.nbytes() for storage in storages.values())
        taken += probe.worker._footprint().workspace_bytes
        memory = 512 << 20
        assert 0.9 * memory < taken <= memory


def test_the_second_model_runner_answers_alike():
    lengths = (130, 206)
    found = found_by_runner_v2(LEVELS, lengths)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    with engine(LEVELS, LLAMA, **OPTIONS) as probe:
        answers = probe.generate([tokens(length, seed=length) for length in lengths], 20)
        compactions = [group["num_compactions"] for group in group_stats(probe)]
    assert answers == found["answers"]
    assert compactions == found["compactions"]
    assert min(compactions) > 0


def found_by(compression: dict, **options: Any) -> tuple[list, list[dict[str, int]]]:
    """Answers with the probabilities of their tokens, cold and warm; and what the groups did."""
    prompts = [LONG, SHORT, tokens(40, seed=7)]
    with engine(compression, LLAMA, **OPTIONS, **options) as probe:
        found = []
        for _ in range(2):
            outputs = [out.outputs[0] for out in probe.generate_outputs(prompts, 40, logprobs=0)]
            found += [(list(out.token_ids), out.cumulative_logprob) for out in outputs]
        return found, group_stats(probe)


@pytest.mark.parametrize(("recipe", "cache"), [("ems", "auto"), ("h2o", "auto"), ("ems", "fp8")])
def test_heads_of_equal_shares_answer_as_uniform(recipe, cache):
    """Rows, pages and tables of their own change nothing of what is computed but its rounding."""
    shared = {**COMPRESSION, "recipe": recipe}
    uniform, stats = found_by({**shared, "allocator": "uniform"}, kv_cache_dtype=cache)
    alike = by_head(lambda layer: ALIKE)
    found, of_heads = found_by({**shared, "allocator": alike}, kv_cache_dtype=cache)
    assert of_heads == stats
    assert [token_ids for token_ids, _ in found] == [token_ids for token_ids, _ in uniform]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in uniform], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("parallel", "environment"),
    [
        ({"pipeline_parallel_size": 2}, {"VLLM_PP_LAYER_PARTITION": "1,3"}),
        ({"tensor_parallel_size": 2}, {}),
    ],
    ids=["pipeline", "tensor"],
)
def test_two_workers_answer_as_one(parallel, environment):
    # A rank deals among its own heads, so the heads of both have to want as much.
    # In two levels, of which the first stage of the pipeline has one layer of one.
    more = (0.04, 0.04, -0.04, -0.04)
    allocator = by_head(
        lambda layer: [part + more[layer] for part in (0.8, 0.2, 0.8, 0.2)],
        lambda layer: 0.5 + more[layer],
        num_levels=2,
    )
    pairs = {**COMPRESSION, "allocator": allocator}
    with engine(pairs, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([LONG, SHORT], 30)
    found = answers_of_workers(LLAMA, pairs, parallel, [LONG, SHORT], 30, environment)
    assert found.answers == expected
    for rank in found.stats:
        assert all(group["num_compactions"] > 0 for group in rank)


def test_a_profile_of_other_heads_is_refused():
    wrong = by_head(lambda layer: (0.6, 0.4))
    with (
        pytest.raises(ConfigError, match=r"deals shares to 2 kv_heads of .*, which has 4; "),
        engine({**COMPRESSION, "allocator": wrong}, LLAMA, **OPTIONS),
    ):
        pass
