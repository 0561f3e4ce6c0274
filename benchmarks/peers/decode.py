# SPDX-License-Identifier: Apache-2.0
"""Going on with compressed caches, one or several tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from peers.layers import sliding_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peers.branch import Branch, Entries


class Decoder:
    """The state of answers to one prompt, side by side.

    Args:
        model: Loaded with attention.IMPLEMENTATION.
        branches: The compressed prompt, once for each answer. They are copied.
    """

    def __init__(self, model: PreTrainedModel, branches: Sequence[Branch]) -> None:
        self._model = model
        self._windows = sliding_windows(model)
        self._cache = DynamicCache()
        self._visible: list[torch.Tensor | None] = []
        self._lengths: list[int] = []
        device = model.device
        self._starts = torch.tensor([b.next_position for b in branches], device=device)[:, None]
        self._num_new = 0
        for index, parts in enumerate(zip(*(branch.layers for branch in branches), strict=True)):
            longest = max(part.length for part in parts)
            keys, values = (
                torch.cat([pad(tensor, (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors])
                for tensors in zip(*((part.keys, part.values) for part in parts), strict=True)
            )
            self._cache.update(keys, values, index)
            self._visible.append(_visible(parts, longest))
            self._lengths.append(longest)

    @property
    def num_answers(self) -> int:
        return self._starts.shape[0]

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[Sequence[int]], logits_to_keep: int = 0) -> torch.Tensor:
        """Logits after further tokens of every answer.

        Args:
            token_ids: As many of each answer.
            logits_to_keep: Of the last tokens only; 0 for all.

        Returns:
            [num_answers, num_tokens, vocabulary].
        """
        device = self._model.device
        tokens = torch.tensor(token_ids, device=device)
        num_queries = tokens.shape[1]
        offsets = torch.arange(self._num_new, self._num_new + num_queries, device=device)
        logits: torch.Tensor = self._model(
            tokens,
            past_key_values=self._cache,
            # The true positions: keys were rotated before they were compressed.
            position_ids=self._starts + offsets,
            logits_to_keep=logits_to_keep,
            decode_masks=[self._mask(layer, num_queries) for layer in range(len(self._lengths))],
        ).logits
        self._num_new += num_queries
        return logits

    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after one more token of every answer, [num_answers, vocabulary]."""
        return self.extend([[token_id] for token_id in token_ids])[:, -1]

    @property
    def num_new(self) -> int:
        """Tokens since the prompt."""
        return self._num_new

    def rewind(self, num_new: int) -> None:
        """Forget all but the first `num_new` tokens since the prompt."""
        self._num_new = num_new
        for layer, length in zip(self._cache.layers, self._lengths, strict=True):
            layer.keys = layer.keys[:, :, : length + num_new]
            layer.values = layer.values[:, :, : length + num_new]

    def _mask(self, layer: int, num_queries: int) -> torch.Tensor | None:
        """What the next queries see of a layer, [num_answers, num_kv_heads, num_queries, all]."""
        visible, window, length = self._visible[layer], self._windows[layer], self._lengths[layer]
        if num_queries == 1 and visible is None and window is None:
            return None
        device = self._starts.device
        # Relative to the first new token: those of the prompt come before it.
        entries = torch.arange(-length, self._num_new + num_queries, device=device)
        queries = torch.arange(self._num_new, self._num_new + num_queries, device=device)[:, None]
        mask = entries <= queries
        if window is not None:
            mask = mask & (entries > queries - window)
        mask = mask[None, None]
        if visible is None:
            return mask.expand(self.num_answers, -1, -1, -1)
        return mask & pad(visible, (0, self._num_new + num_queries), value=True)[:, :, None]


def _visible(parts: Sequence[Entries], longest: int) -> torch.Tensor | None:
    """Which entries of padded answers are there, [num_answers, num_kv_heads, longest], or all."""
    if all(part.visible is None and part.length == longest for part in parts):
        return None
    rows = []
    for part in parts:
        there = part.visible
        if there is None:
            there = torch.ones(part.keys.shape[:3], dtype=torch.bool, device=part.keys.device)
        rows.append(pad(there, (0, longest - part.length), value=False))
    return torch.cat(rows)
