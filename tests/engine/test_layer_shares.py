# SPDX-License-Identifier: Apache-2.0
"""Layers that share a budget unequally: each level keeps its own number, and all promises hold."""

from __future__ import annotations

import pytest
from engine.harness import BLOCK_SIZE, LLAMA, engine, tokens
from engine.one_engine import cold as cold
from engine.one_engine import compression as compression
from engine.one_engine import fresh as fresh
from engine.one_engine import plain_answers as plain_answers
from engine.one_engine import probe as probe
from engine.unequal_budgets import (
    BUDGET,
    COMPRESSION,
    LONG,
    OPTIONS,
    SHORT,
    SHORT_ANSWER,
    disturbed,
    few_blocks,
    found_by_runner_v2,
    group_stats,
    identity_prompts,
    increase,
    start_log,
)
from engine.workers import answers_of_workers

from ems_vllm.config import load_config
from ems_vllm.engine.worker.memory import KERNEL_SCRATCH_BYTES

pytestmark = pytest.mark.slow

# The model's four layers in two levels, each a KV-cache group.
PYRAMID = {**COMPRESSION, "allocator": {"name": "pyramid", "num_levels": 2}}


@pytest.fixture(scope="class")
def case():
    return PYRAMID, {}


class TestPyramid:
    """One engine for all of it."""

    def test_levels_keep_different_numbers_and_the_budget_on_the_mean(self, fresh):
        before = group_stats(fresh)
        fresh.generate([LONG], 2)
        assert increase(fresh, before, "num_compactions") == [1, 1]
        kept = increase(fresh, before, "num_entries_kept")
        layers = [stats["num_layers"] for stats in before]
        assert layers == [2, 2]
        assert kept[0] > 4 * kept[1] > 0
        mean = sum(k * n for k, n in zip(kept, layers, strict=True)) / sum(layers)
        assert mean == BUDGET

    @pytest.mark.parametrize("asked", [{"kv_budget": 4096}, {"kv_compression": "off"}], ids=str)
    def test_a_budget_that_holds_everything_is_identical_to_plain_vllm(
        self, fresh, plain_answers, asked
    ):
        before = group_stats(fresh)
        assert fresh.generate(identity_prompts(), 20, asked) == plain_answers
        assert increase(fresh, before, "num_compactions") == [0, 0]

    def test_a_level_that_holds_its_prompt_is_compressed_later(self, fresh):
        before = group_stats(fresh)
        fresh.generate([SHORT], 20)
        assert increase(fresh, before, "num_compactions") == [0, 1]
        before = group_stats(fresh)
        (answer,) = fresh.generate([SHORT], SHORT_ANSWER)
        assert len(answer) == SHORT_ANSWER
        first, second = increase(fresh, before, "num_compactions")
        assert second > first >= 1

    def test_hits_chunks_and_preemptions_change_no_answer(self, fresh, cold):
        assert load_config(PYRAMID).is_neutral_to_hits
        found = disturbed(fresh)
        assert {name: found[name] == cold for name in found} == dict.fromkeys(found, True)

    def test_hits_are_taken(self, fresh):
        """The test above would pass on an engine without a prefix cache; this one would not."""
        fresh.generate([LONG, SHORT], 2)
        again = fresh.generate_outputs([LONG, SHORT], 2)
        # What any level compresses is computed again, and so is the recent window.
        hits = [output.num_cached_tokens for output in again]
        assert hits == [(24 - 7) * BLOCK_SIZE, (6 - 3) * BLOCK_SIZE]

    def test_a_pool_that_is_too_small_changes_no_answer(self, fresh):
        prompts = [tokens(length, seed=length) for length in (420, 380, 130, 60)]
        expected = fresh.generate(prompts, 70)
        before = fresh.num_preemptions
        with few_blocks(fresh, 64):
            assert fresh.generate(prompts, 70) == expected
        assert fresh.num_preemptions > before

    def test_the_second_model_runner_answers_alike(self, fresh):
        lengths = (130, 206)
        found = found_by_runner_v2(PYRAMID, lengths)
        assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
        before = group_stats(fresh)
        prompts = [tokens(length, seed=length) for length in lengths]
        assert fresh.generate(prompts, 20) == found["answers"]
        # The longer one twice; the other one's first level not yet.
        assert increase(fresh, before, "num_compactions") == found["compactions"] == [2, 3]

    @pytest.mark.parametrize(
        ("parallel", "environment", "layers"),
        [
            ({"tensor_parallel_size": 2}, {}, [[2, 2], [2, 2]]),
            # The first stage has one layer of the first level, and none of the second.
            ({"pipeline_parallel_size": 2}, {"VLLM_PP_LAYER_PARTITION": "1,3"}, [[1], [1, 2]]),
        ],
        ids=["tensor", "pipeline"],
    )
    def test_two_workers_answer_as_one(self, fresh, parallel, environment, layers):
        prompts = [LONG, SHORT]
        found = answers_of_workers(LLAMA, PYRAMID, parallel, prompts, 30, environment)
        before = group_stats(fresh)
        assert found.answers == fresh.generate(prompts, 30)
        compactions = increase(fresh, before, "num_compactions")
        assert [[group["num_layers"] for group in rank] for rank in found.stats] == layers
        for rank in found.stats:
            for group in rank:
                assert group["num_compactions"] == compactions[group["group_id"]]

    def test_the_start_log_names_the_levels(self, probe):
        lines = start_log(probe, PYRAMID, 420)
        assert any(
            "by level, of a prompt of 420 tokens: 112 in 2 layers, 16 in 2 layers; 0.0% of" in line
            for line in lines
        ), lines

    def test_scores_and_cache_together_fit_the_memory(self, probe):
        groups = [group.tensors for group in probe.worker.compression.groups]
        held = [*probe.worker.model_runner.kv_caches, *(tensors.scores for tensors in groups)]
        held += [tensors.query_ring.queries for tensors in groups]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in held
        }
        taken = sum(storage.nbytes() for storage in storages.values())
        taken += (load_config(PYRAMID).workspace_mib << 20) + KERNEL_SCRATCH_BYTES
        memory = 512 << 20
        assert 0.95 * memory < taken <= memory


def answers_with_logprobs(compression):
    """Answers with the probabilities of their tokens, cold and warm; and what the groups did."""
    prompts = [LONG, SHORT, tokens(40, seed=7)]
    with engine(compression, LLAMA, **OPTIONS) as probe:
        found = []
        for _ in range(2):
            outputs = [out.outputs[0] for out in probe.generate_outputs(prompts, 40, logprobs=0)]
            found += [(output.token_ids, output.cumulative_logprob) for output in outputs]
        return found, group_stats(probe)


def test_levels_of_equal_shares_answer_exactly_as_uniform():
    """Groups, block tables and scores of their own change nothing of what is computed."""
    profile = {"ratios": [0.1, 0.5], "fractions": {layer: [0.1, 0.5] for layer in range(4)}}
    uniform, (stats,) = answers_with_logprobs({**COMPRESSION, "allocator": "uniform"})
    # The last of the three levels has two layers, so that it is two groups.
    found, of_groups = answers_with_logprobs(
        {**COMPRESSION, "allocator": {"name": "profile", "profile": profile, "num_levels": 3}}
    )
    assert len(of_groups) == 4
    for group in of_groups:
        assert group["num_compactions"] == stats["num_compactions"] > 0
        assert group["num_entries_kept"] == stats["num_entries_kept"]
    assert found == uniform
