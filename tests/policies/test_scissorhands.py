# SPDX-License-Identifier: Apache-2.0
"""Scissorhands' score against its formula."""

import torch
from policies.contexts import GROUP
from policies.test_scorers import each_head, score
from policies.test_window_scorers import logits


def test_scissorhands_counts_queries_that_pay_more_than_the_mean():
    context, scores = score("scissorhands")
    for row, layer, head in each_head():
        attention = logits(context, row, layer, head).softmax(-1)
        num_queries, _, num_live = attention.shape
        num_entries = int(context.num_entries[row])
        counted = num_queries * GROUP
        expected = torch.zeros(num_entries, dtype=torch.double)
        for age in range(num_queries):
            for of_head in attention[age]:
                for entry in range(num_entries):
                    expected[entry] += float(of_head[entry] >= 1 / (num_live - age)) / counted
        expected += attention.sum((0, 1))[:num_entries] / counted / (2 * counted)
        got = scores.weights[layer, row, head].double()
        torch.testing.assert_close(got[:num_entries], expected, rtol=2e-4, atol=1e-6)
        assert (got[num_entries:] == 0).all()
