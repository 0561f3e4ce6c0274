# SPDX-License-Identifier: Apache-2.0
"""bench_sampling.py: its measures, and that all queries agree with themselves."""

import bench_sampling
import pytest
import torch
from bench_sampling import Layer


def test_rank_correlation_of_worked_examples():
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    second = torch.tensor([[10.0, 20.0, 30.0, 40.0], [4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 4.0, 3.0]])
    # 1 - 6 * sum(d^2) / (n * (n^2 - 1)), d the difference of ranks
    assert bench_sampling.rank_correlation(first, second).tolist() == pytest.approx([1, -1, 0.6])


def test_overlap_counts_the_best_that_both_choose():
    first = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[9.0, 0.0, 7.0, 0.0, 6.0, 5.0, 0.0, 0.0]])
    assert bench_sampling.overlap(first, second, 0.5).item() == 0.5
    assert bench_sampling.overlap(first, second, 0.125).item() == 1


def test_more_queries_agree_better():
    torch.manual_seed(0)
    layers = [Layer(torch.randn(1500, 4, 64), torch.randn(2, 1500, 64)) for _ in range(2)]
    every, some, few = bench_sampling.compare(iter(layers), 0.125, [1, 2, 8], [0.1])
    assert every.rank_correlation == pytest.approx(1)
    assert every.kept[0.1] == 1
    assert 1 > some.rank_correlation > few.rank_correlation > 0
    assert 1 > some.kept[0.1] > few.kept[0.1]
