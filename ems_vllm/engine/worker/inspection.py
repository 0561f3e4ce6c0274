# SPDX-License-Identifier: Apache-2.0
"""What this worker can tell of the requests that were compressed last: the status page's source.

Answers to collective_rpc, so of plain types; of the layers and kv_heads that this worker has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.model_executor.models.utils import extract_layer_index

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from ems_vllm.engine.group.compressed_group import CompressedGroup
    from ems_vllm.engine.group.kept_positions import KeptEntries


@dataclass
class _Prompt:
    """Of one request.

    Attributes:
        length: Tokens.
        token_ids: None where texts are not remembered, or the prompt is of embeddings.
        is_running: Whether the request has not ended.
    """

    length: int
    token_ids: list[int] | None
    is_running: bool = True


class Inspection:
    """Of the requests of one worker.

    Args:
        groups: Its compressed groups, which follow positions.
        keeps_text: Whether the tokens of prompts are remembered.
    """

    def __init__(self, groups: Sequence[CompressedGroup], keeps_text: bool) -> None:
        self._groups = groups
        self._keeps_text = keeps_text
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()

    def begin_step(self, output: SchedulerOutput) -> None:
        """Requests come and go."""
        for new in output.scheduled_new_reqs:
            tokens = new.prompt_token_ids
            if tokens is None:
                embeds = new.prompt_embeds
                prompt = _Prompt(0 if embeds is None else len(embeds), None)
            else:
                prompt = _Prompt(len(tokens), list(tokens) if self._keeps_text else None)
            self._prompts[new.req_id] = prompt
        for req_id in output.finished_req_ids:
            if (found := self._prompts.get(req_id)) is not None:
                found.is_running = False
        if output.finished_req_ids:
            known = set(self._latest())
            forgotten = [
                req_id
                for req_id, prompt in self._prompts.items()
                if not prompt.is_running and req_id not in known
            ]
            for req_id in forgotten:
                del self._prompts[req_id]

    def requests(self) -> list[dict[str, Any]]:
        """The remembered requests, the last one that was compressed first."""
        return [self._summary(req_id) for req_id in self._latest()]

    def request(self, req_id: str, num_bins: int) -> dict[str, Any] | None:
        """What is held of one request, by layer, kv_head and part of its length.

        Args:
            num_bins: Parts of equal length, at most; each of a token at least.

        Returns:
            None where it is not remembered.
        """
        if req_id not in self._latest():
            return None
        summary, heads = self._summary(req_id), []
        num_tokens = summary["num_tokens"]
        num_bins = min(num_bins, num_tokens)
        for layer, kv_head, positions, tail in self._heads(req_id):
            held = np.concatenate((positions, np.arange(tail, num_tokens)))
            counts = np.bincount(held * num_bins // num_tokens, minlength=num_bins)
            heads.append([layer, kv_head, counts.tolist()])
        starts = -(-np.arange(num_bins + 1) * num_tokens // num_bins)
        prompt = self._prompts.get(req_id)
        token_ids = None if prompt is None else prompt.token_ids
        return {**summary, "bins": starts.tolist(), "heads": heads, "token_ids": token_ids}

    def positions(self, req_id: str, layer: int, kv_head: int) -> list[int] | None:
        """Positions that one kv_head holds of a request, the tail's not among them.

        Returns:
            None where the request is not remembered, or another worker has the kv_head.
        """
        if req_id not in self._latest():
            return None
        for of_layer, of_head, positions, _ in self._heads(req_id):
            if (of_layer, of_head) == (layer, kv_head):
                found: list[int] = np.sort(positions).tolist()
                return found
        return None

    def _latest(self) -> list[str]:
        """Requests of which all groups remember what was kept."""
        first, *others = [group.positions for group in self._groups if group.positions is not None]
        known = [set(positions.latest()) for positions in others]
        return [req_id for req_id in first.latest() if all(req_id in one for one in known)]

    def _entries(self, req_id: str) -> Iterator[tuple[CompressedGroup, KeptEntries]]:
        for group in self._groups:
            if group.positions is not None:
                yield group, group.positions[req_id]

    def _heads(self, req_id: str) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """Layer, kv_head, positions of its entries, and position from which on all are held."""
        for group, entries in self._entries(req_id):
            first_head = group.tensors.first_kv_head
            for name, of_layer in zip(group.layer_names, entries.on_host(), strict=True):
                for head, of_head in enumerate(of_layer):
                    positions = of_head[of_head >= 0].astype(np.int64)
                    yield extract_layer_index(name), first_head + head, positions, entries.tail

    def _summary(self, req_id: str) -> dict[str, Any]:
        of_groups = [entries for _, entries in self._entries(req_id)]
        latest = max(of_groups, key=lambda entries: entries.num_computed)
        num_heads = [entries.positions.shape[:2].numel() for entries in of_groups]
        num_gone = sum(
            heads * entries.tail - entries.num_held
            for heads, entries in zip(num_heads, of_groups, strict=True)
        )
        prompt = self._prompts.get(req_id)
        return {
            "request_id": req_id,
            "prompt_tokens": 0 if prompt is None else prompt.length,
            "num_tokens": latest.num_computed,
            "num_entries": latest.num_computed - num_gone / sum(num_heads),
            "num_compactions": latest.num_compactions,
            "is_running": prompt is not None and prompt.is_running,
        }
