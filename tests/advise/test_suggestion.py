# SPDX-License-Identifier: Apache-2.0
"""Which budget is suggested, and what a few prompts say of all."""

import shlex
from math import comb

import pytest

from ems_vllm.advise.report import (
    Arrivals,
    Budget,
    ByLength,
    PoolSize,
    Quality,
    Sample,
    Traffic,
    Verdict,
)
from ems_vllm.advise.sampling import draw
from ems_vllm.advise.suggestion import Server, suggest
from ems_vllm.advise.thresholds import WORTH
from ems_vllm.advise.traffic import OutputFrom, Request
from ems_vllm.confidence import needed, upper_bound
from ems_vllm.config import load_config

# One-sided, as tables of Clopper and Pearson have them.
KNOWN = [
    (0, 8, 0.95, 0.3123), (0, 29, 0.95, 0.0981), (0, 59, 0.95, 0.0495), (1, 10, 0.95, 0.3942),
    (2, 20, 0.95, 0.2826), (5, 10, 0.95, 0.7776), (0, 10, 0.99, 0.3690),
]  # fmt: skip


@pytest.mark.parametrize(("count", "num", "confidence", "bound"), KNOWN)
def test_upper_bound_is_the_exact_one(count, num, confidence, bound):
    found = upper_bound(count, num, confidence)
    assert found == pytest.approx(bound, abs=5e-5)
    so_few = sum(comb(num, k) * found**k * (1 - found) ** (num - k) for k in range(count + 1))
    assert so_few == pytest.approx(1 - confidence, abs=1e-9)


def test_upper_bound_at_its_ends():
    assert upper_bound(3, 3, 0.95) == 1
    assert upper_bound(0, 1, 0.95) == pytest.approx(0.95)
    assert upper_bound(30, 3000, 0.95) == pytest.approx(0.0136, abs=1e-4)


@pytest.mark.parametrize(("share", "num"), [(0.1, 29), (0.05, 59), (0.01, 299), (0.5, 5)])
def test_so_many_are_needed_and_one_fewer_is_not_enough(share, num):
    assert needed(share, 0.95) == num
    assert upper_bound(0, num, 0.95) <= share < upper_bound(0, num - 1, 0.95)


TRAFFIC = Traffic(
    num_requests=100, num_with_text=100, prompt_p50=2000, prompt_p95=4000, prompt_max=5000,
    output_p50=100, output_p95=300, output_max=400, outputs={"recorded": 100}, seconds=None,
)  # fmt: skip
POOL = PoolSize(columns=1000, gib=1, max_num_seqs=None)
SAMPLE = Sample(
    num_prompts=10, num_eligible=80, num_too_long=3, prompt_shortest=300, prompt_longest=4000,
    num_tokens=64, max_kl=0.1, confidence=0.95, prompts_needed=29, seconds=1,
)  # fmt: skip
SERVER = Server("folder/model", "ems", ("--max-num-seqs", "9"))


def lengths(held, fit=None, kept=0.5, arrivals=None, never_fit=None):
    return ByLength(
        compressed_share=0.9, blocks_mean=held, blocks_p50=held, blocks_p95=held, blocks_held=held,
        coming_in_p95=held, coming_in_max=held, mib_mean=held, kept_share=kept, read_share=0.4,
        fit=fit, never_fit=never_fit, arrivals=arrivals,
    )  # fmt: skip


def budget(count, held, above=None, fit=None, kept=0.5):
    quality = None
    if above is not None:
        quality = Quality(
            kl_mean=above / 20, kl_worst=1, kl=(0.0,) * 10, same_top=0.9, num_above=above,
            above_at_most=upper_bound(above, 10, 0.95),
        )  # fmt: skip
    return Budget(
        label=f"{count:,}", settings={"budget": count}, by_length=lengths(held, fit, kept),
        quality=quality,
    )  # fmt: skip


def of(dense, budgets, sample=SAMPLE, pool=POOL, why=None):
    return suggest(TRAFFIC, pool, dense, budgets, sample, why, SERVER)


def test_the_smallest_budget_that_is_close_enough():
    budgets = [
        budget(2048, 60, 0, fit=16), budget(1024, 40, 1, fit=25), budget(512, 20, 2, fit=50)
    ]  # fmt: skip
    found = of(lengths(100, 10), budgets)
    # One prompt of ten may be above the threshold, two may not.
    assert (found.verdict, found.budget) == (Verdict.COMPRESS, "1,024")
    text = " ".join(found.sentences)
    assert "holds 25 of these requests at a time instead of 10" in text
    assert "With 95% confidence at most 39% of such requests have a mean KL above 0.1" in text
    assert "--sample 29" in text
    assert shlex.split(found.command) == [
        "vllm", "serve", "folder/model", "--kv-compression", "ems", "--kv-compression-config",
        '{"budget": 1024}', "--max-num-seqs", "9",
    ]  # fmt: skip


def test_a_larger_budget_where_the_smallest_gains_no_more():
    budgets = [budget(1024, 40, 0, fit=25), budget(512, 39, 0, fit=26)]
    found = of(lengths(100, 10), budgets)
    assert found.budget == "1,024"
    assert "512 is close enough too" in " ".join(found.sentences)


def test_a_sample_that_is_large_enough_is_not_asked_for_again():
    sample = SAMPLE.model_copy(update={"num_prompts": 29})
    text = " ".join(of(lengths(100, 10), [budget(512, 20, 1, fit=50)], sample).sentences)
    assert "measure more prompts, or take a larger budget" in text
    assert "--sample" not in text


def test_without_a_pool_the_blocks_count_and_the_pool_is_asked_for():
    found = of(lengths(100), [budget(1024, 40, 0), budget(512, 20, 0)], pool=None)
    assert found.budget == "512"
    text = " ".join(found.sentences)
    assert "hold 20% of their blocks" in text
    assert "doctor --url" in text


def test_short_prompts_are_not_compressed():
    found = of(lengths(100, 10), [budget(1024, 95, 0, fit=10), budget(512, 91, 0, fit=10)])
    assert (found.verdict, found.budget) == (Verdict.SHORT, None)
    assert "p95 = 4,000 tokens): 512" in found.sentences[0]
    assert found.command == "vllm serve folder/model --max-num-seqs 9"


def test_the_doctor_and_the_advice_call_the_same_worth_it():
    from ems_vllm.doctor.live import advice

    assert WORTH == advice.WORTH


def arrivals(blocked=0.0, preemptions=0, wait=0.0):
    return Arrivals(
        running_mean=3, running_most=6, fullest=0.4, blocked_share=blocked, wait_mean=wait,
        wait_p95=wait, preemptions=preemptions,
    )  # fmt: skip


@pytest.mark.parametrize("sample", [SAMPLE, None])
def test_a_pool_that_is_never_full_needs_no_compression(sample):
    budgets = [budget(512, 20, 0, fit=50)]
    dense = lengths(100, 10, arrivals=arrivals(), never_fit=0)
    found = of(dense, budgets, sample)
    assert (found.verdict, found.budget) == (Verdict.ROOM, None)
    assert "at most 6 requests run at a time" in found.sentences[0]
    assert "--prompt-rate" not in found.sentences[0]
    slow = of(lengths(100, 10, arrivals=arrivals(wait=30), never_fit=0), budgets)
    assert "They wait all the same (30 s, p95)" in slow.sentences[0]
    for full in (arrivals(blocked=0.2), arrivals(preemptions=1)):
        dense = lengths(100, 10, arrivals=full, never_fit=0)
        assert of(dense, budgets).verdict is Verdict.COMPRESS
    # One that does not fit dense is a reason of its own.
    dense = lengths(100, 10, arrivals=arrivals(), never_fit=2)
    assert of(dense, budgets).verdict is Verdict.COMPRESS


def test_a_pool_for_all_that_may_run_is_never_full():
    pool = PoolSize(columns=1000, gib=1, max_num_seqs=10)
    budgets = [budget(512, 20, 0, fit=10)]
    assert of(lengths(100, 10, never_fit=0), budgets, pool=pool).verdict is Verdict.ROOM
    assert of(lengths(100, 9, never_fit=0), budgets, pool=pool).verdict is Verdict.COMPRESS


def test_none_of_the_budgets_where_each_changes_too_much():
    # The one that is close enough frees nothing.
    budgets = [budget(4096, 99, 0, fit=10), budget(1024, 40, 5, fit=25), budget(512, 20, 9, fit=50)]
    found = of(lengths(100, 10), budgets)
    assert (found.verdict, found.budget) == (Verdict.TOO_FAR, None)
    assert "1,024, the nearest" in found.sentences[0]
    assert "5 of 10 prompts" in found.sentences[0]


def test_where_nothing_was_measured_a_quarter_is_kept_and_that_is_said():
    budgets = [budget(1024, 60, kept=0.6), budget(512, 40, kept=0.3), budget(256, 20, kept=0.15)]
    found = of(lengths(100), budgets, sample=None, pool=None, why="the file has lengths alone")
    assert (found.verdict, found.budget) == (Verdict.UNMEASURED, "512")
    assert "was not measured: the file has lengths alone. It keeps 30%" in found.sentences[-1]
    only = of(lengths(100), budgets[2:], sample=None, why="x")
    assert only.budget == "256"


def test_the_sample_is_of_prompts_that_are_compressed_and_not_too_long():
    requests = [
        Request(length, 10, OutputFrom.RECORDED, token_ids=(length,) * length)
        for length in (100, 400, 500, 600, 700, 5000)
    ] + [Request(600, 10, OutputFrom.RECORDED)]
    settings = [load_config({"recipe": "ems", "budget": size}).plan_settings for size in (128, 512)]
    drawn = draw(requests, settings, 16, 8, 16, 4096, seed=0)
    assert [len(prompt) for prompt in drawn.prompts] == [400, 500, 600, 700]
    assert drawn.eligible == [400, 500, 600, 700]
    assert drawn.num_too_long == 1
    two = draw(requests, settings, 16, 2, 16, 4096, seed=1)
    assert len(two.prompts) == 2
    assert two == draw(requests, settings, 16, 2, 16, 4096, seed=1)
    seen = {tuple(map(len, draw(requests, settings, 16, 2, 16, 4096, s).prompts)) for s in range(9)}
    assert len(seen) > 3
