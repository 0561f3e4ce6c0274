# SPDX-License-Identifier: Apache-2.0
"""Intervals against published values and against shifts that were put in."""

import math

import numpy as np
import pytest

from ems_vllm.eval.report import stats
from ems_vllm.eval.report.stats import (
    bootstrap,
    difference,
    macro_mean,
    mean_interval,
    ratio,
    ratio_difference,
    wilson,
)


# Newcombe (1998), Statistics in Medicine 17, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_bounds(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_wilson_holds_its_estimate_and_stays_in_range(n):
    for successes in {0, 1, n // 2, n}:
        interval = wilson(successes, n)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.low < interval.high


def test_zero_one_scores_get_wilson_and_others_a_bootstrap():
    assert mean_interval(np.array([1.0, 0.0, 1.0, 1.0])) == wilson(3, 4)
    scores = np.array([0.2, 0.4, 0.6, 0.8] * 25)
    interval = mean_interval(scores)
    # The standard error of the mean, from the formula.
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    assert interval.low == pytest.approx(0.5 - half, abs=0.004)
    assert interval.high == pytest.approx(0.5 + half, abs=0.004)


def test_pairs_recover_a_shift_that_is_small_beside_the_spread():
    generator = np.random.default_rng(5)
    difficulty = generator.random(200)
    ours = difficulty + 0.02 + 0.01 * generator.normal(size=200)
    rows = np.stack([ours, difficulty], axis=1)
    paired = bootstrap([rows], difference)
    assert paired.low < 0.02 < paired.high
    assert paired.excludes(0)
    assert paired.high - paired.low < 0.004
    # With the pairs broken up, the difficulty of the prompts hides the shift.
    broken = np.stack([ours, generator.permutation(difficulty)], axis=1)
    assert not bootstrap([broken], difference).excludes(0)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(6)
    held = 0
    for _ in range(200):
        interval = bootstrap([generator.random((60, 1))], macro_mean)
        held += not interval.excludes(0.5)
    assert 180 <= held <= 199


def test_the_same_data_give_the_same_interval():
    rows = np.random.default_rng(7).random((50, 2))
    before = bootstrap([rows, rows[:20]], ratio)
    stats._weights.cache_clear()
    assert bootstrap([rows, rows[:20]], ratio) == before


def test_equal_columns_differ_by_exactly_nothing():
    rows = np.repeat(np.random.default_rng(8).random((50, 1)), 2, axis=1)
    interval = bootstrap([rows], difference)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)


def test_each_stratum_counts_the_same_whatever_its_size():
    small, large = np.array([[1.0, 1.0]] * 4), np.array([[0.0, 1.0]] * 400)
    assert bootstrap([small, large], macro_mean).value == 0.5
    assert bootstrap([small, large], ratio).value == 0.5


def test_a_method_is_compared_relative_to_its_own_full_cache():
    # 0.4 of 0.5 and 0.8 of 1.0 keep the same share.
    rows = np.tile([0.4, 0.5, 0.8, 1.0], (10, 1))
    assert bootstrap([rows], ratio_difference).value == pytest.approx(0)


def test_one_sample_says_nothing_about_the_spread():
    interval = bootstrap([np.array([[0.3, 0.9]])], difference)
    assert interval.value == pytest.approx(-0.6)
    assert math.isnan(interval.low)
    assert not interval.excludes(0)


def test_a_share_of_nothing_is_not_a_number():
    interval = bootstrap([np.zeros((5, 2))], ratio)
    assert math.isnan(interval.value)
    assert not interval.excludes(0)
