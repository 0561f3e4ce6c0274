# SPDX-License-Identifier: Apache-2.0
"""Bounded scratch memory: requests and layers are taken in turns, with the same result."""

import pytest
from engine.harness import engine, tokens

from ems_vllm.policies.policy import Policy

pytestmark = pytest.mark.slow

PROMPTS = [tokens(length, seed=length) for length in (2000, 400, 900, 1900)]


@pytest.fixture
def parts(monkeypatch):
    """(layers, requests, score elements) of every call of a policy."""
    seen = []
    compact = Policy.compact

    def recording(self, context):
        elements = context.num_layers * context.num_rows * context.max_entries
        seen.append((context.num_layers, context.num_rows, elements))
        compact(self, context)

    monkeypatch.setattr(Policy, "compact", recording)
    return seen


def test_small_workspace_gives_the_same_answers(parts):
    compression = {"recipe": "ems", "budget": 64, "recent_window": 32}
    # One chunk holds all prompts, so that all of them are due in the same step.
    options = {"max_num_batched_tokens": 8192}
    with engine({**compression, "workspace_mib": 64}, **options) as probe:
        expected = probe.generate(PROMPTS, 24)
        assert [(layers, rows) for layers, rows, _ in parts] == [(4, 4)]
    parts.clear()
    with engine({**compression, "workspace_mib": 1}, **options) as probe:
        answers = probe.generate(PROMPTS, 24)
    assert answers == expected
    # At 144 bytes per entry: 8 tensors of 4 bytes for each of 4 kv_heads, and 16 bytes.
    assert max(elements for *_, elements in parts) <= (1 << 20) // 144
    assert min(layers for layers, *_ in parts) < 4
    assert max(rows for _, rows, _ in parts) < 3
