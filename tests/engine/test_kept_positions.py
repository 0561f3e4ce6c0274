# SPDX-License-Identifier: Apache-2.0
"""What is told of a request's kept positions is what lies in its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.arrivals import Arrival, serve
from engine.harness import BLOCK_SIZE, LLAMA, EngineProbe, engine, tokens

pytestmark = pytest.mark.slow

SETTINGS = {
    "recipe": "snapkv",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 32,
    "min_blocks_saved": 1,
    "inspect_requests": 2,
}
SHARED: dict[str, dict[str, Any]] = {
    "one level": SETTINGS,
    "two levels": {**SETTINGS, "allocator": {"name": "pyramid", "beta": 4, "num_levels": 2}},
    "by head": {**SETTINGS, "allocator": {"name": "ada"}},
    "coverage": {**SETTINGS, "coverage": 0.3, "min_budget": 16},
    "as it comes": {**SETTINGS, "prefill_interval": 48},
}
PROMPT_LEN, NUM_NEW = 300, 90


@pytest.fixture(autouse=True)
def with_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are remembered only for it."""
    monkeypatch.setenv("VLLM_PLUGINS", "ems_cpu,ems_vllm,ems_status")


class Watch:
    """Writes down keys as they are computed, and compares those of kept entries with them.

    Attributes:
        num_compared: Compactions that were looked at.
    """

    def __init__(self, probe: EngineProbe) -> None:
        self._probe = probe
        self._managers = {m.kv_cache_group_id: m for m in probe.managers}
        # By group and stack, [num_layers, num_kv_heads, num_tokens, head_size].
        self._computed: dict[tuple[int, int], torch.Tensor] = {}
        self._num_computed = 0
        self._num_seen = 0
        self.num_compared = 0

    def __call__(self, _step: int) -> None:
        if not self._probe.scheduler.running:
            return
        (request,) = self._probe.scheduler.running
        req_id, inspection = request.request_id, self._probe.worker.inspection
        known = {one["request_id"]: one for one in inspection.requests()}
        if req_id in known and known[req_id]["num_compactions"] > self._num_seen:
            self._num_seen = known[req_id]["num_compactions"]
            self._compare(req_id)
        self._write_down(req_id, request.num_computed_tokens)

    def _live(self, group: Any, stack: Any, req_id: str, first: int) -> torch.Tensor:
        """[num_layers, num_kv_heads, num_entries, head_size]: keys from a column on."""
        columns = self._managers[group.tensors.group_id].req_to_blocks[req_id][first:]
        keys = stack.key_cache[:, [block.block_id for block in columns]]
        return keys.transpose(1, 2).flatten(2, 3).clone()

    def _write_down(self, req_id: str, num_computed: int) -> None:
        first = self._num_computed // BLOCK_SIZE
        for group in self._probe.worker.compression.groups:
            for index, stack in enumerate(group.tensors.stacks):
                at = (group.tensors.group_id, index)
                live = self._live(group, stack, req_id, first)
                start = self._num_computed - first * BLOCK_SIZE
                new = live[:, :, start : num_computed - first * BLOCK_SIZE]
                old = self._computed.get(at, new[:, :, :0])
                self._computed[at] = torch.cat((old, new), 2)
        self._num_computed = num_computed

    def _compare(self, req_id: str) -> None:
        for group in self._probe.worker.compression.groups:
            entries, by_head = group.positions[req_id], group.heads is not None
            kept = torch.from_numpy(entries.on_host())
            for index, stack in enumerate(group.tensors.stacks):
                computed = self._computed[group.tensors.group_id, index]
                first = 0 if by_head else (entries.tail - kept.shape[-1]) // BLOCK_SIZE
                live = self._live(group, stack, req_id, first)
                for layer, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])):
                    positions = kept[stack.layers][layer, head]
                    positions = positions[positions >= 0].long()
                    expected = computed[layer, head, positions]
                    if by_head:
                        # A page that a head owns may lie in any slot of a block.
                        every = live[layer].flatten(0, 1)
                        assert (expected[:, None] == every[None]).all(-1).any(1).all()
                    else:
                        assert torch.equal(live[layer, head, : len(expected)], expected)
        self.num_compared += 1


@pytest.mark.parametrize("compression", SHARED.values(), ids=SHARED)
def test_positions_are_those_of_the_kept_keys(compression: dict[str, Any]) -> None:
    with engine(compression, LLAMA, max_num_batched_tokens=64) as probe:
        watch = Watch(probe)
        serve(probe, [Arrival(0, tokens(PROMPT_LEN, seed=1), NUM_NEW)], watch)
    # Of the prompt, and of what was generated.
    assert watch.num_compared >= 3


def test_counts_by_part_add_up_to_what_is_held() -> None:
    with engine(SETTINGS, LLAMA) as probe:
        serve(probe, [Arrival(0, tokens(PROMPT_LEN, seed=1), NUM_NEW)], lambda step: None)
        inspection = probe.worker.inspection
        (one,) = inspection.requests()
        found = inspection.request(one["request_id"], 37)
        kept = inspection.positions(one["request_id"], 2, 1)
        assert inspection.request("another", 37) is None
        assert inspection.positions(one["request_id"], 99, 0) is None
    assert found["bins"][0] == 0
    assert found["bins"][-1] == one["num_tokens"]
    assert found["prompt_tokens"] == PROMPT_LEN
    assert found["token_ids"] is None
    held = [sum(counts) for _, _, counts in found["heads"]]
    assert held == [one["num_entries"]] * len(held)
    (of_head,) = (counts for layer, head, counts in found["heads"] if (layer, head) == (2, 1))
    tail = one["num_tokens"] - (int(one["num_entries"]) - len(kept))
    every = [*kept, *range(tail, one["num_tokens"])]
    spans = zip(found["bins"], found["bins"][1:], strict=False)
    assert of_head == [sum(first <= at < end for at in every) for first, end in spans]
    # No part has more than all of its tokens.
    assert max(of_head) <= -(-one["num_tokens"] // 37)


def test_as_many_requests_are_remembered_as_asked_and_no_prompt_of_others() -> None:
    with engine({**SETTINGS, "inspect_text": True}, LLAMA) as probe:
        prompts = [tokens(PROMPT_LEN, seed=seed) for seed in range(4)]
        for prompt in prompts:
            probe.generate([prompt], 4)
        # Too short to be compressed.
        probe.generate([prompts[0][:20]], 4)
        inspection = probe.worker.inspection
        found = [inspection.request(one["request_id"], 8) for one in inspection.requests()]
        # Forgotten when the next one has ended.
        assert len(inspection._prompts) <= 3
    assert [one["token_ids"] for one in found] == [prompts[3], prompts[2]]
