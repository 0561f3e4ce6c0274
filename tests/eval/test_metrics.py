# SPDX-License-Identifier: Apache-2.0
"""Metrics, by examples worked out by hand."""

import pytest

from ems_vllm.eval.metrics import METRICS


@pytest.mark.parametrize(
    ("name", "output", "references", "score"),
    [
        ("string_match_all", "They are 12 and 34.", ("12", "34", "56"), 2 / 3),
        ("string_match_all", "ABC", ("abc",), 1),
        ("string_match_all", "", ("12",), 0),
        ("string_match_part", "They are 12 and 34.", ("99", "34"), 1),
        ("string_match_part", "nothing", ("99", "34"), 0),
    ],
)
def test_by_hand(name, output, references, score):
    assert METRICS[name](output, references, ()) == pytest.approx(score)
