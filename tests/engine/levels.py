# SPDX-License-Identifier: Apache-2.0
"""Settings by which the layers of a model, and their kv_heads, share a budget, equally or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def by_head(of_layers: Sequence[Sequence[float]], num_levels: int) -> dict[str, Any]:
    """An allocator that deals to kv_heads.

    Args:
        of_layers: By layer and kv_head, what is kept of a half of a prompt.
    """
    return {
        "name": "profile",
        "profile": {
            "ratios": [0.5],
            "fractions": {
                layer: [sum(of_heads) / len(of_heads)] for layer, of_heads in enumerate(of_layers)
            },
            "head_fractions": {
                layer: [[fraction] for fraction in of_heads]
                for layer, of_heads in enumerate(of_layers)
            },
        },
        "num_levels": num_levels,
        "uniform_share": 0,
        "per_head": True,
    }


LEVELS: dict[str, dict[str, Any]] = {
    "alike": {},
    "pyramid of 2": {"allocator": {"name": "pyramid", "num_levels": 2}},
    "pyramid of 3": {"allocator": {"name": "pyramid", "num_levels": 3}},
    # The first two layers keep the whole of a prompt that the other two compress, if it has 24 to
    # 39 tokens in blocks of 4.
    "one whole": {
        "allocator": {
            "name": "profile",
            "profile": {
                "ratios": [0.5],
                "fractions": {0: [0.98], 1: [0.98], 2: [0.02], 3: [0.02]},
            },
            "num_levels": 2,
            "uniform_share": 0,
        },
        "budget": 16,
        "min_blocks_saved": 2,
    },
    # No two layers deal alike.
    "heads": {
        "allocator": by_head(
            [(0.9, 0.1, 0.5), (0.2, 0.8, 0.5), (0.5, 0.02, 0.98), (0.3, 0.3, 0.9)], 1
        ),
        "budget": 16,
    },
    "heads in two levels": {
        "allocator": by_head(
            [(0.98, 0.2, 0.8), (0.7, 0.98, 0.3), (0.1, 0.62, 0.3), (0.02, 0.1, 0.9)], 2
        ),
        "budget": 12,
    },
}

# Prompts are compacted as they come. Drafts would fill the simulator's blocks, of 4 tokens.
WITHIN_PROMPTS: dict[str, dict[str, Any]] = {
    "within prompts": {"prefill_interval": 8},
    "pyramid within prompts": {**LEVELS["pyramid of 2"], "prefill_interval": 8},
}

# Less is kept than is planned; how much, only the worker knows.
COVERED: dict[str, dict[str, Any]] = {
    "covered": {"coverage": 0.5, "min_budget": 1, "budget": 16},
    "pyramid covered": {**LEVELS["pyramid of 2"], "coverage": 0.5, "min_budget": 1, "budget": 16},
    "covered within prompts": {
        "coverage": 0.5,
        "min_budget": 1,
        "budget": 16,
        "prefill_interval": 8,
    },
}
