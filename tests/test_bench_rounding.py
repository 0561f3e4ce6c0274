# SPDX-License-Identifier: Apache-2.0
"""bench_rounding.py: its measures, and that this platform's engine rounds as little as others."""

import os
from unittest import mock

import pytest
import torch
from bench_rounding import VLLM, Predicted, Text, ask_transformers, compare, measure
from engine.harness import LLAMA, tokens

pytestmark = pytest.mark.slow

TEXTS = [Text(tokens(200, seed=1), 24), Text(tokens(90, seed=2), 24)]


def test_worked_example():
    texts = [Text([5, 0, 1, 1], 1)]
    truth = [Predicted(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0, 1, 2]))]
    found = [Predicted(torch.tensor([-1.5, -2.0, -2.0]), torch.tensor([0, 3, 2]))]
    prompt, decoding = compare("engine", texts, truth, found)
    assert (prompt.part, prompt.num_tokens) == ("prompt", 2)
    assert prompt.error == pytest.approx(0.25)
    assert prompt.rms_error == pytest.approx((0.25 / 2) ** 0.5)
    assert prompt.other_greedy == 0.5
    assert (decoding.part, decoding.num_tokens) == ("decoding", 1)
    assert (decoding.error, decoding.other_greedy) == (1, 0)


def test_tokens_one_by_one_are_predicted_as_together():
    (whole,) = ask_transformers(LLAMA, "float32", "sdpa", [Text(TEXTS[0].token_ids, 0)])
    (stepwise,) = ask_transformers(LLAMA, "float32", "sdpa", TEXTS[:1])
    torch.testing.assert_close(stepwise.logprobs, whole.logprobs, atol=1e-4, rtol=0)
    assert len(whole.greedy) == len(TEXTS[0].token_ids) - 1


@pytest.fixture(scope="module")
def rows():
    # What it sets for its engine must not reach the tests that start servers.
    with mock.patch.dict(os.environ):
        found = measure(LLAMA, "bfloat16", 64, TEXTS, ["transformers, sdpa"])
    return {(row.engine, row.part): row for row in found}


@pytest.mark.parametrize("part", ["prompt", "decoding"])
def test_the_engine_rounds_no_worse_than_transformers(rows, part):
    ours, theirs = (rows[name, part] for name in (VLLM, "transformers, sdpa"))
    assert 0 < ours.error < 1.3 * theirs.error
