# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on lengths, against plans that were worked out by hand."""

import pytest

from ems_vllm.advise.by_length import by_length
from ems_vllm.advise.candidates import candidates
from ems_vllm.advise.course import Course, course
from ems_vllm.advise.pool import Pool, read_pool
from ems_vllm.advise.quantiles import quantile
from ems_vllm.advise.replay import Speed, replay
from ems_vllm.advise.traffic import OutputFrom, Request
from ems_vllm.capacity import request_columns
from ems_vllm.config import ConfigError, load_config
from ems_vllm.config.cache_shape import CacheShape

BUDGET = load_config({"recipe": "ems", "budget": 256}).plan_settings
SPEED = Speed(token_seconds=0.1, prompt_rate=100)


def request(prompt_len, output_len, arrival=None):
    return Request(prompt_len, output_len, OutputFrom.RECORDED, arrival)


def test_course_of_a_compressed_request():
    found = course(BUDGET, 1000, 100, 16)
    # 58 columns lie before the window of 64 tokens, of which 16 are kept: 42 are freed, a step
    # after the prompt; then a column more at every sixteenth token.
    assert found.coming_in == 63
    assert found.steps[:3] == ((0, 63), (1, 21), (8, 22))
    assert found.steps[-1] == (88, 27)
    assert found.most == 27
    assert found.kept == 1000 - 42 * 16
    # 99 steps with 1001 to 1099 tokens, each without the 42 columns.
    assert found.read == sum(range(1001, 1100)) - 99 * 42 * 16
    assert found.compressed
    held = 63 + 7 * 21 + 16 * (22 + 23 + 24 + 25 + 26) + 12 * 27
    assert found.mean == pytest.approx(held / 100)


def test_course_of_a_dense_request():
    found = course(None, 1000, 100, 16)
    assert (found.coming_in, found.most, found.compressed) == (63, 69, False)
    assert found.read == sum(range(1001, 1100))
    assert found.kept == 1000


def test_a_request_is_compressed_when_it_has_grown_enough():
    # 64 + 12 * 16 + 256 tokens: the first recompression after a prompt that is too short.
    short, grown = course(BUDGET, 200, 200, 16), course(BUDGET, 200, 600, 16)
    assert not short.compressed
    assert short.most == 25
    assert grown.compressed
    assert grown.read < course(None, 200, 600, 16).read


@pytest.mark.parametrize("output_len", [0, 1, 2, 17, 900])
@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 256},
        {"ratio": 0.1, "recompress_interval": 64},
        {"budget": 128, "prefill_interval": 128},
        {"budget": 256, "allocator": {"name": "pyramid", "num_levels": 2}},
    ],
)
def test_courses_are_those_of_ems_vllm_plan(settings, output_len):
    plan = load_config({"recipe": "ems", **settings}).plan_settings_of(4)
    for prompt_len in (15, 100, 700, 1003):
        found = course(plan, prompt_len, output_len, 16)
        planned = request_columns(plan, prompt_len, output_len, 16)
        assert found.coming_in == pytest.approx(planned.coming_in)
        if output_len > 2:
            # The plan counts a step after the last token, too.
            assert planned.decoding - 1 <= found.most <= planned.decoding + 1e-9


def test_figures_of_a_mix():
    requests = [request(1000, 100), request(1000, 100), request(50, 10), request(100_000, 10)]
    found = by_length(BUDGET, requests, 16, 2**20, Pool(1000, 2**30), SPEED)
    assert found.compressed_share == 0.75
    assert (found.blocks_p50, found.blocks_p95) == (21, 27)
    assert found.mib_mean == found.blocks_mean
    assert found.coming_in_max == 6251
    # The longest prompt is dense until it is over.
    assert found.never_fit == 1
    held = (2 * 100 * course(BUDGET, 1000, 100, 16).mean + 10 * 4) / 210
    assert found.fit == 1 + int((1000 - (63 + 63 + 4) / 3) // held)
    dense = by_length(None, requests[:3], 16, 2**20, Pool(1000, 2**30, 4), SPEED)
    assert (dense.fit, dense.read_share, dense.kept_share) == (4, 1, None)
    assert dense.arrivals is None


def made_course(coming_in, *steps):
    return Course(coming_in, steps, max(held for _, held in steps), 0, 0, 0, False)


def test_a_request_waits_for_blocks_until_another_ends():
    fixed = made_course(6, (0, 6))
    found = replay([(0, 100, 10, fixed), (0, 100, 10, fixed)], 10, SPEED)
    # Each takes a second for its prompt and one for its answer, one after the other; in the first
    # second the other one waits for the prompt, in the next for blocks.
    assert found.running_most == 1
    assert found.running_mean == 1
    assert found.blocked_share == pytest.approx(0.25)
    assert (found.wait_mean, found.wait_p95) == (1, 2)
    assert found.fullest == 0.6
    assert found.preemptions == 0
    side_by_side = replay([(0, 100, 10, fixed), (0, 100, 10, fixed)], 12, SPEED)
    assert (side_by_side.running_most, side_by_side.blocked_share) == (2, 0)
    assert side_by_side.wait_p95 == 1
    limited = replay([(0, 100, 10, fixed), (0, 100, 10, fixed)], 12, SPEED, max_num_seqs=1)
    assert (limited.running_most, limited.blocked_share, limited.wait_p95) == (1, 0, 2)


def test_the_youngest_loses_its_blocks_where_none_are_left():
    growing = made_course(4, (0, 4), (5, 6))
    found = replay([(0, 1, 10, growing), (0.01, 1, 10, growing)], 10, SPEED)
    assert found.preemptions == 1
    assert found.fullest == 1
    assert replay([(0, 1, 10, growing), (0.01, 1, 10, growing)], 12, SPEED).preemptions == 0


def test_nothing_that_fits_is_nothing_to_replay():
    assert replay([], 10, SPEED) is None
    empty = Course(4, (), 4, 0, 0, 0, False)
    assert replay([(3, 10, 0, empty)], 10, SPEED).running_most == 1


def test_arrivals_are_replayed_where_pool_and_times_are_known():
    requests = [request(1000, 100, 0.0), request(1000, 100, 0.1)]
    dense = by_length(None, requests, 16, 1, Pool(130, 130), SPEED)
    compressed = by_length(BUDGET, requests, 16, 1, Pool(130, 130), SPEED)
    # 63 and 69 columns dense: the younger is thrown out once the older has grown.
    assert dense.arrivals.preemptions == 1
    assert compressed.arrivals.preemptions == 0
    assert by_length(BUDGET, requests, 16, 1, None, SPEED).arrivals is None


def test_pools_are_read_as_servers_are_told():
    shape = CacheShape.of(32, 8, 128, "bfloat16")
    # 16 tokens x 32 layers x 8 heads x 128 x (K, V) x 2 bytes = 2 MiB a column.
    assert read_pool(shape, 16, 1.0, None, 1, None).columns == 511
    assert read_pool(shape, 16, None, 2**30, 2, 7) == Pool(1023, 2**31, 7)
    assert read_pool(shape, 16, None, None, 1, None) is None
    with pytest.raises(ConfigError, match="two sizes of one pool"):
        read_pool(shape, 16, 1.0, 2**30, 1, None)
    with pytest.raises(ConfigError, match="above 0"):
        read_pool(shape, 16, 0.0, None, 1, None)
    sliding = CacheShape(2, 1, 64, 2, ("sliding_attention",))
    with pytest.raises(ConfigError, match=r"sliding_attention.*doctor MODEL"):
        read_pool(sliding, 16, 1.0, None, 1, None)


def test_budgets_suit_the_long_prompts_unless_others_are_asked_for():
    usual = candidates("ems", {}, [], [500] * 94 + [8000] * 6)
    assert [one.given for one in usual] == [
        {"budget": 512}, {"budget": 1024}, {"budget": 2048}, {"budget": 4096},
        {"ratio": 0.125}, {"ratio": 0.25},
    ]  # fmt: skip
    assert {"budget": 64} in [one.given for one in candidates("ems", {}, [], [30])]
    asked = candidates("snapkv", {"recent_window": 32}, ["100", "0.3", "100"], [30])
    assert [one.label for one in asked] == ["100", "30 %"]
    assert asked[1].given == {"recent_window": 32, "ratio": 0.3}
    assert (asked[0].config.recent_window, asked[0].config.budget) == (32, 100)
    for budgets, settings, said in (
        (["full"], {}, "dense cache is always shown"),
        (["1.5"], {}, "is not a budget"),
        ([], {"budget": 5}, "sizes come from --budget"),
    ):
        with pytest.raises(ConfigError, match=said):
            candidates("ems", settings, budgets, [30])
    with pytest.raises(ConfigError, match="compresses nothing"):
        candidates("off", {}, [], [30])


def test_quantiles_are_values_that_occur():
    values = [3, 1, 2, 10]
    assert [quantile(values, share) for share in (0.25, 0.5, 0.75, 0.76, 1)] == [1, 2, 3, 10, 10]
