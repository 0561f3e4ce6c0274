# SPDX-License-Identifier: Apache-2.0
"""What a generation much longer than its prompt and its budget remembers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from engine.harness import BLOCK_SIZE, ROOT, engine, tokens

from ems_vllm.policies import selection

pytestmark = pytest.mark.slow

# A model that has learnt to attend; in a random one everything is attended to alike.
MODEL = str(ROOT / "models" / "ems-tiny")
PROMPT = tokens(160, seed=5)
BUDGET, INTERVAL = 64, 64
NUM_GENERATED = 8 * INTERVAL
# As many recorded queries to an interval as by default, 1 to 16; a quarter of the tokens.
COMPRESSION = {
    "budget": BUDGET,
    "recent_window": BLOCK_SIZE,
    "obs_window": INTERVAL // 16,
    "recompress_interval": INTERVAL,
    "min_blocks_saved": 1,
    "merger": {"name": "none"},
}


class Origins:
    """Positions of the tokens that the only request keeps, followed through its compactions."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []  # [num_layers, num_kv_heads, BUDGET] each
        self._tail = 0

    def follow(self, kept_idx: torch.Tensor, num_entries: int) -> None:
        carried = self.kept[-1] if self.kept else kept_idx[..., :0].long()
        num_new = num_entries - carried.shape[-1]
        new = torch.arange(self._tail, self._tail + num_new).expand(*carried.shape[:-1], -1)
        self._tail += num_new
        self.kept.append(torch.cat([carried, new], -1).gather(-1, kept_idx.long()))


@pytest.fixture
def origins():
    origins = Origins()
    select = selection.select

    def following(context, ranked, merger):
        selected = select(context, ranked, merger)
        origins.follow(selected.kept_idx[:, 0], context.max_entries)
        return selected

    with mock.patch.object(selection, "select", following):
        yield origins


def test_a_long_generation_remembers_its_own_middle(origins):
    with engine({"recipe": "h2o", **COMPRESSION}, MODEL, max_model_len=1024) as probe:
        # Sampled: greedy answers of a small model end in a loop.
        probe.generate([PROMPT], NUM_GENERATED, temperature=1.0, seed=3)
    assert len(origins.kept) == NUM_GENERATED // INTERVAL
    kept = origins.kept[-1]
    start, stop = (len(PROMPT) + NUM_GENERATED * part // 4 for part in (1, 3))
    # About 0.06. Not more, for of accumulated attention early tokens get more than late ones.
    assert ((kept >= start) & (kept < stop)).float().mean() > 0.02
