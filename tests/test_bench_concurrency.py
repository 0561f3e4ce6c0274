# SPDX-License-Identifier: Apache-2.0
"""bench_concurrency.py: what it counts is what the pool lets run."""

import os
from unittest import mock

import pytest
import typer
from bench_concurrency import parsed, run
from engine.harness import LLAMA, ROOT

pytestmark = pytest.mark.slow

# A prompt of about 150 tokens takes 10 blocks and its answer 2 more: two would fit dense.
NUM_BLOCKS, NUM_PROMPTS = 30, 8
EMS = {"recipe": "ems", "budget": 32, "recent_window": 16, "obs_window": 16, "min_blocks_saved": 1}


def test_compressed_requests_leave_room_for_others():
    text = next((ROOT / "models" / "text").glob("*.txt")).read_text()
    prompts = [text[start : start + 450] for start in range(0, 450 * NUM_PROMPTS, 450)]
    # What it sets for its engine must not reach the tests that start servers.
    with mock.patch.dict(os.environ):
        found = run(LLAMA, "float32", prompts, 24, NUM_BLOCKS, 256, EMS)
    assert 2 < found["running"] <= found["most"] < NUM_PROMPTS
    assert len(found["held_each"]) == NUM_PROMPTS
    assert all(share < 0.6 for share in found["held_each"])


def test_a_setting_needs_a_name():
    assert parsed(['a={"recipe": "ems"}']) == {"dense": None, "a": {"recipe": "ems"}}
    with pytest.raises(typer.BadParameter, match="has no name"):
        parsed(["ems"])
