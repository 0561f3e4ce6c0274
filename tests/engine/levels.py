# SPDX-License-Identifier: Apache-2.0
"""Settings by which the layers of a model share a budget, equally or not."""

from __future__ import annotations

from typing import Any

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
}
