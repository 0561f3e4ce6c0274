# SPDX-License-Identifier: Apache-2.0
"""CurDKV's score against its formula."""

import torch
from policies.contexts import entries
from policies.test_scorers import each_head, score


def test_cur_is_the_share_of_a_run_in_keys_times_that_in_values():
    context, scores = score({"recipe": "cur", "scorer": {"run_length": 12}})
    for row, layer, head in each_head():
        num_entries = int(context.num_entries[row])
        expected = torch.ones(num_entries)
        for cache in (context.key_cache, context.value_cache):
            squares = entries(cache, context, row)[layer, head, :num_entries].square().sum(-1)
            for start in range(0, num_entries, 12):
                run = slice(start, min(start + 12, num_entries))
                expected[run] *= squares[run] / squares[run].sum()
        got = scores.weights[layer, row, head]
        torch.testing.assert_close(got[:num_entries], expected)
        assert (got[num_entries:] == 0).all()
