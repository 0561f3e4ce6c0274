# SPDX-License-Identifier: Apache-2.0
"""Following the full cache: where answers part, and how far distributions are apart."""

import math

import pytest

from ems_vllm.eval.records.following import FullAnswer, divergence, follow


def logs(**probabilities):
    return {ord(name): math.log(value) for name, value in probabilities.items()}


def test_divergence_is_that_of_what_both_report_and_the_rest():
    p, q = logs(a=0.5, b=0.25), logs(a=0.25, c=0.5)
    # In common is a alone.
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(p, p) == pytest.approx(0, abs=1e-9)
    assert divergence(logs(a=0.9), logs(b=0.9)) >= 0
    assert divergence(logs(a=1.0), logs(a=1e-6)) == pytest.approx(-math.log(1e-6))


def test_divergence_is_never_more_than_the_whole_distribution_s():
    p, q = logs(a=0.6, b=0.3, c=0.1), logs(a=0.2, b=0.3, c=0.5)
    exact = sum(math.exp(p[t]) * (p[t] - q[t]) for t in p)
    assert divergence(p, q) == pytest.approx(exact)
    fewer = {t: v for t, v in q.items() if t != ord("b")}
    assert 0 < divergence(p, fewer) <= exact


def test_only_the_tokens_before_the_first_other_choice_count():
    answer = FullAnswer(token_ids=(1, 2, 3), tops=({1: -0.1}, {2: -0.1}, {3: -0.1}))
    followed = follow(answer, [{1: -0.1}, {2: -1.0, 9: -0.5}, {3: -0.1}])
    assert (followed.num_same, followed.agreement) == (1, 1 / 3)
    assert follow(answer, answer.tops).agreement == 1
    assert follow(answer, answer.tops).kl == 0
