# SPDX-License-Identifier: Apache-2.0
"""Exact bounds of a share: known values, and what a bound means."""

import math

import pytest

from ems_vllm.confidence import lower_bound, needed, upper_bound


@pytest.mark.parametrize("num", [1, 20, 59, 200, 5000])
def test_nothing_seen_has_a_closed_form(num):
    assert upper_bound(0, num, 0.95) == pytest.approx(1 - 0.05 ** (1 / num), rel=1e-9)
    assert lower_bound(num, num, 0.95) == pytest.approx(0.05 ** (1 / num), rel=1e-9)
    assert lower_bound(0, num, 0.95) == 0.0
    assert upper_bound(num, num, 0.95) == 1.0


def test_nothing_is_known_of_no_sample():
    assert (lower_bound(0, 0, 0.95), upper_bound(0, 0, 0.95)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("count", "num", "confidence", "lower", "upper"),
    [
        # Both sides at 97.5 %: the well-known two-sided intervals at 95 %.
        (1, 10, 0.975, 0.0025, 0.4450),
        (5, 10, 0.975, 0.1871, 0.8129),
        (10, 100, 0.975, 0.0490, 0.1762),
    ],
)
def test_intervals_of_the_tables(count, num, confidence, lower, upper):
    assert lower_bound(count, num, confidence) == pytest.approx(lower, abs=5e-5)
    assert upper_bound(count, num, confidence) == pytest.approx(upper, abs=5e-5)


@pytest.mark.parametrize(("count", "num"), [(1, 7), (3, 50), (40, 200), (199, 200)])
def test_at_the_bound_what_was_seen_is_just_so_likely(count, num):
    def probability(share, counts):
        return sum(math.comb(num, k) * share**k * (1 - share) ** (num - k) for k in counts)

    upper, lower = upper_bound(count, num, 0.95), lower_bound(count, num, 0.95)
    assert probability(upper, range(count + 1)) == pytest.approx(0.05, rel=1e-6)
    assert probability(lower, range(count, num + 1)) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_as_many_as_needed_and_none_seen_is_enough(share):
    num = needed(share, 0.95)
    assert upper_bound(0, num, 0.95) <= share < upper_bound(0, num - 1, 0.95)
