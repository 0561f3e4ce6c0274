# SPDX-License-Identifier: Apache-2.0
"""Every sequence says what it holds in the cache, whatever happens to its request."""

from __future__ import annotations

import pytest
from engine.harness import BLOCK_SIZE, LLAMA, engine, tokens
from engine.unequal_budgets import few_blocks

from ems_vllm.config import RequestOptions

pytestmark = pytest.mark.slow

EMS = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
LEVELS = {**EMS, "allocator": {"name": "pyramid", "beta": 4, "num_levels": 2}}
COVERAGE = {**EMS, "budget": 128, "coverage": 0.12, "min_budget": 16}
NUM_TOKENS = 100


@pytest.fixture(scope="module", params=[EMS, LEVELS], ids=["one level", "two levels"])
def probe(request):
    with engine(request.param, LLAMA, max_model_len=2048) as running:
        yield running


def expected_entries(probe, prompt_len, num_tokens):
    """By the plan, when the last of `num_tokens` has been sampled."""
    plans = [
        manager.kv_cache_spec.settings.plan(prompt_len, BLOCK_SIZE, RequestOptions())
        for manager in probe.managers
    ]
    # The last step begins when all but two of the tokens have been processed.
    start = prompt_len + num_tokens - 2
    gone = [plan.columns(start)[0] * BLOCK_SIZE for plan in plans]
    return prompt_len + num_tokens - sum(gone) / len(gone)


def holdings(probe, lengths, num_tokens=NUM_TOKENS, **sampling):
    prompts = [tokens(length, seed=length) for length in lengths]
    outputs = probe.generate_outputs(prompts, num_tokens, **sampling)
    return [[one.kv_compression for one in output.outputs] for output in outputs]


def test_entries_are_those_of_the_plan(probe):
    lengths = (700, 133, 333)
    for length, (held,) in zip(lengths, holdings(probe, lengths), strict=True):
        assert held.num_tokens == length + NUM_TOKENS
        assert held.num_entries == expected_entries(probe, length, NUM_TOKENS)
        assert held.num_entries < held.num_tokens
        in_cache = held.num_entries_in - held.num_entries_kept
        assert in_cache == held.num_tokens - held.num_entries


def test_a_request_that_is_not_compressed_holds_all(probe):
    ((short,), (off,)) = (
        holdings(probe, [50], 8)[0],
        holdings(probe, [700], 8, extra_args={"kv_compression": "off"})[0],
    )
    assert (short.num_tokens, short.num_entries, short.num_compactions) == (58, 58, 0)
    assert (off.num_tokens, off.num_entries, off.num_compactions) == (708, 708, 0)


def test_every_answer_to_a_prompt_says_its_own(probe):
    (answers,) = holdings(probe, [500], 70, n=3, temperature=1.0, seed=0)
    expected = expected_entries(probe, 500, 70)
    assert [held.num_entries for held in answers] == [expected] * 3
    assert len(set(map(id, answers))) == 3


def test_an_answer_that_ends_with_a_stop_string_says_it_too(probe):
    """The frontend ends it, and no last output of the engine core comes."""
    tokenizer = probe.llm.get_tokenizer()
    (answer,) = probe.generate([tokens(700, seed=700)], 40)
    stop = tokenizer.decode(answer)[20:26]
    ((held,),) = holdings(probe, [700], 40, stop=[stop])
    assert 701 < held.num_tokens < 740
    assert held.num_entries == expected_entries(probe, 700, held.num_tokens - 700)


def test_a_preempted_request_holds_as_much_in_the_end(probe):
    lengths = (420, 380, 130, 60)
    undisturbed = holdings(probe, lengths)
    probe.llm.reset_prefix_cache()
    before = probe.num_preemptions
    with few_blocks(probe, 34 * len(probe.managers)):
        found = holdings(probe, lengths)
    assert probe.num_preemptions > before
    assert [one.num_entries for (one,) in found] == [one.num_entries for (one,) in undisturbed]


def totals_of(probe, lengths):
    """What is counted while prompts are answered, all at a time."""
    accounts = probe.scheduler.planner.accounts
    accounts.take_totals()
    holdings(probe, lengths)
    return accounts.take_totals()


def test_what_is_not_kept_was_merged_or_evicted(probe):
    found = totals_of(probe, (700, 333))
    assert found.num_entries_in > found.num_entries_kept > 0
    gone = found.num_entries_in - found.num_entries_kept
    assert found.num_entries_merged + found.num_entries_evicted == pytest.approx(gone)
    # Two candidates for each kept entry, and few of them alike: the model's weights are random.
    assert 0 < found.num_entries_merged < 2 * found.num_entries_kept
    assert found.num_entries_evicted > 0


def test_every_step_that_compacts_is_timed(probe):
    found = totals_of(probe, (700,))
    assert len(found.compaction_seconds) == found.num_compactions > 1
    assert all(seconds > 0 for seconds in found.compaction_seconds)


@pytest.mark.parametrize(
    ("settings", "merges"),
    [
        ({**EMS, "merger": {"name": "none"}}, False),
        # Heads of a layer with unequal budgets, each a row of its own.
        ({**EMS, "allocator": {"name": "ada"}}, True),
        (COVERAGE, True),
    ],
    ids=["no merger", "by head", "coverage"],
)
def test_merged_entries_are_counted_however_it_is_compacted(settings, merges):
    with engine(settings, LLAMA, max_model_len=2048) as probe:
        found = totals_of(probe, (700, 333))
    gone = found.num_entries_in - found.num_entries_kept
    assert found.num_entries_merged + found.num_entries_evicted == pytest.approx(gone)
    assert (found.num_entries_merged > 0) == merges


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_what_a_coverage_keeps_is_said(async_scheduling):
    with engine(COVERAGE, LLAMA, max_model_len=2048, async_scheduling=async_scheduling) as probe:
        ((held,),) = holdings(probe, [700])
        stats = probe.stats()
    assert held.num_entries < expected_entries(probe, 700, NUM_TOKENS)
    assert held.num_entries_kept == stats["num_entries_kept"]
    assert held.num_entries_in == stats["num_entries_in"]
    assert held.num_compactions == stats["num_compactions"]
