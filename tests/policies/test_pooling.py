# SPDX-License-Identifier: Apache-2.0
"""Pooling of scores, by hand-worked examples."""

import pytest
import torch

from ems_vllm.policies.pooling import pool

SCORES = torch.tensor([0.0, 0.0, 6.0, 0.0, 3.0, 0.0, 0.0])


def pooled(pooling: str, kernel_size: int = 3, num_entries: int = 6) -> list[float]:
    is_entry = (torch.arange(7) < num_entries)[None, None, None]
    return pool(SCORES[None, None, None], is_entry, kernel_size, pooling)[0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        # The last entry has one neighbour less; what lies beyond the entries stays 0.
        ("avg", [0.0, 2.0, 2.0, 3.0, 1.0, 1.5, 0.0]),
        ("max", [0.0, 6.0, 6.0, 6.0, 3.0, 3.0, 0.0]),
        ("forward", [0.0, 0.0, 6.0, 6.0, 6.0, 3.0, 0.0]),
    ],
)
def test_worked_example(pooling, expected):
    assert pooled(pooling) == expected


@pytest.mark.parametrize("pooling", ["avg", "max", "forward"])
def test_kernel_of_one_changes_nothing(pooling):
    assert pooled(pooling, kernel_size=1) == SCORES.tolist()


@pytest.mark.parametrize("pooling", ["avg", "max", "forward"])
def test_a_longer_row_of_the_batch_changes_nothing(pooling):
    scores = torch.rand(2, 1, 3, 40)
    scores[..., 25:] = 0
    short = pool(scores[..., :25], torch.ones(1, 1, 1, 25, dtype=torch.bool), 7, pooling)
    long = pool(scores, (torch.arange(40) < 25)[None, None, None], 7, pooling)
    torch.testing.assert_close(long[..., :25], short)
    assert torch.all(long[..., 25:] == 0)
